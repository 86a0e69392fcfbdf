"""Work of minutes that shows its seconds on a terminal and that Ctrl-C ends. Knows nothing of ONNX Runtime."""

from __future__ import annotations

import concurrent.futures
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

THREAD = "watched"  # name of the work's; a process that ends as usual while it is in a library of others' may crash
Value = TypeVar("Value")


def watched(work: Callable[[], Value], stop: Callable[[], None], line: str) -> Value:
    """The result of `work`, run in a thread, `line` with its seconds told on a terminal.

    Ctrl-C calls `stop` and waits for the end of the work; a second one does not wait.
    """
    future: concurrent.futures.Future[Value] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  raised by whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name=THREAD, daemon=True).start()
    with _Ticker() as ticker:
        try:
            _wait(future, ticker, line)
        except KeyboardInterrupt:
            stop()
            _wait(future, ticker, f"stopping, once more Ctrl-C does not wait: {line}")
            raise
    return future.result()


def _wait(future: concurrent.futures.Future[Any], ticker: _Ticker, line: str) -> None:
    while not concurrent.futures.wait([future], timeout=0.2).done:  # Windows sees Ctrl-C between two waits
        ticker.tell(line)


class _Ticker:
    """One line on a terminal, written over again and again, gone in the end."""

    def __enter__(self) -> _Ticker:
        self._shown = ""
        self._began = time.perf_counter()
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        return self

    def __exit__(self, *error: object) -> None:
        self._show("")

    def tell(self, line: str) -> None:
        self._show(f"{line}: {time.perf_counter() - self._began:.0f} s")

    def _show(self, text: str) -> None:
        if self._terminal and text != self._shown:
            sys.stderr.write(f"\r{text:{len(self._shown)}}" + ("" if text else "\r"))
            sys.stderr.flush()
            self._shown = text
