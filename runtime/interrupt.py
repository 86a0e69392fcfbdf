"""Calls that Ctrl-C ends, though Python sees it only between two steps of the main thread.

Knows nothing of ONNX Runtime.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


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

    def __call__(self, call: Callable[[], Value], stop: Callable[[], None]) -> Value:
        """The result of `call`. Ctrl-C has `stop` end it, and is passed on when it has ended."""
        if not self.alone and threading.current_thread() is not threading.main_thread():
            return call()
        future: concurrent.futures.Future[Value] | None = None
        try:
            future = self._thread.submit(call)
            while not future.done():
                try:
                    return future.result(timeout=0.2)  # Windows sees Ctrl-C between two waits
                except TimeoutError:
                    pass  # or the call's own, told below
            return future.result()
        except KeyboardInterrupt:
            stop()
            if future is not None:
                future.exception()  # waits
            raise
