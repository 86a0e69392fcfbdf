"""A contender's turn, told as JSON lines on standard output: one job comes in, on standard input.

Runs as a script of whatever environment the contender lives in: Python 3.10, numpy, and nothing of this program but the
one file that reads a process's memory, whose path is in the job. The process ends with the one that started it.
`python turn.py NAME...` prints the versions of these packages, null where one is not there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

_STARTED = time.perf_counter()  # before any library is imported


@dataclass
class Ready:
    """A contender that has been loaded.

    Attributes
    ----------
    run : callable
        Does the work once; its answer as a numpy array.
    first : callable, optional
        What is done before `run` is timed: the same, or less of it. None: `run`.
    told : dict
        Of this contender, for the report: precision, threads, versions, notes. Sent after the last run.
    """

    run: Callable[[], Any]
    first: Callable[[], Any] | None = None
    told: dict[str, Any] = field(default_factory=dict)


class Parent:
    """The process that started this one. Standard output is its own: what libraries print goes to standard error."""

    def __init__(self) -> None:
        self._lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.job: dict[str, Any] = json.loads(sys.stdin.readline())
        threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(self, **what: Any) -> None:
        print(json.dumps(what), file=self._lines, flush=True)

    def tell_loaded(self) -> None:
        """Seconds since this process began: libraries, then weights."""
        self.tell(load=time.perf_counter() - _STARTED)

    def tell_memory(self) -> None:
        """The peak so far, counted as the rest of this program counts it."""
        self.tell(peak_rss_bytes=runpy.run_path(self.job["memory"])["peak_rss_bytes"]())


def serve(load: Callable[[dict[str, Any]], Ready], parent: Parent) -> None:
    """The whole turn: load, a first run, the timed ones."""
    ready = load(parent.job)
    parent.tell_loaded()
    started = time.perf_counter()
    (ready.first or ready.run)()
    parent.tell(first=time.perf_counter() - started)
    output: Any = None
    for _ in range(parent.job["runs"]):
        started = time.perf_counter()
        output = ready.run()
        parent.tell(run=time.perf_counter() - started)
    parent.tell_memory()
    parent.tell(**_answer(parent.job["output"], output), **ready.told)


def _answer(file: str, output: Any) -> dict[str, Any]:
    """What the last run gave, kept for the comparison."""
    import numpy as np

    array = np.ascontiguousarray(output, np.float32)
    np.save(file, array)
    return {"sha256": hashlib.sha256(array.tobytes()).hexdigest(), "finite": bool(np.isfinite(array).all())}


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """Package -> version; None: not here."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _end_with_parent() -> None:
    """The parent holds the other end of standard input: when it is gone, however it went, so are we."""
    while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    os._exit(1)


if __name__ == "__main__":
    print(json.dumps(versions(sys.argv[1:])))
