"""Calls that Ctrl-C ends, though Python sees it only between two steps of the main thread.

Knows nothing of ONNX Runtime.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")
Stop = Callable[[], None]


class Hand:
    """A thread, made when first needed and kept, that makes the main thread's calls while that waits for Ctrl-C.

    Calls of other threads are made where they are: Ctrl-C is the main thread's, and whoever waits there stops them.

    Attributes
    ----------
    alone : bool
        Calls of every thread are made here, one after the other: for what must always run in the same thread.
    """

    def __init__(self) -> None:
        self.alone = False
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._stops: list[Stop] = []  # of the calls under way
        self._lock = threading.Lock()

    def __call__(self, call: Callable[[], Value], stop: Stop) -> Value:
        """The result of `call`. Ctrl-C has `stop` end it, and is passed on when it has ended."""
        with self._lock:
            self._stops.append(stop)
        try:
            here = not self.alone and threading.current_thread() is not threading.main_thread()
            return call() if here else self._wait(self._thread.submit(call), stop)
        finally:
            with self._lock:
                self._stops.remove(stop)

    def stop(self) -> None:
        """Ends the calls under way, which other threads have made."""
        with self._lock:
            for stop in self._stops:
                stop()

    def _wait(self, future: concurrent.futures.Future[Value], stop: Stop) -> Value:
        try:
            while not future.done():
                try:
                    return future.result(timeout=0.2)  # Windows sees Ctrl-C between two waits
                except TimeoutError:
                    pass  # or the call's own, told below
            return future.result()
        except KeyboardInterrupt:
            stop()
            future.exception()  # waits
            raise
