"""A solver's requests, timed: what stands between a solver and the driver while `Pipeline.draw` runs it.

Knows nothing of what the times are for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import epd
from epd.solve import Coroutine, Solver
from runtime.plan import Noise, Plan

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Call:
    """One request answered: a sequential call of the backbone, or of several sessions at once."""

    step: int  # 1 for the first interval
    points: int
    rows: int
    seconds: float
    inside: float | None  # of them inside ONNX Runtime; None: not known of calls at once on one session


class Watch:
    """Stands between a solver and the driver and times its requests."""

    def __init__(self, pipe: Pipeline, rows: Callable[[epd.Points], int]) -> None:
        self._pipe, self._rows = pipe, rows
        self.calls: list[Call] = []

    def over(self, solver: Solver) -> Solver:
        """The same solver, watched."""

        def watched(x: Any) -> Coroutine:
            run, answer, step = solver(x), None, 1
            try:
                while True:
                    try:
                        event = run.send(answer)
                    except StopIteration:
                        return
                    if not isinstance(event, epd.Points):
                        step += 1
                        answer = yield event
                        continue
                    before, started = self._inside(), time.perf_counter()
                    answer = yield event
                    seconds = time.perf_counter() - started
                    after = self._inside()
                    # Sessions at once: the one that took longest.
                    inside = max(after[name] - before[name] for name in after)
                    self.calls.append(Call(step, len(event.x), self._rows(event), seconds, inside))
            finally:
                run.close()

        return watched

    def _inside(self) -> dict[str, float]:
        backbone = self._pipe.bundle.backbone
        return {name: one.run_seconds for name, one in self._pipe.sessions.items() if one.component == backbone}


@dataclass(frozen=True)
class Watched(Plan):
    """A plan whose solver is watched."""

    watch: Watch = field(kw_only=True)

    def coroutine(self, noise: Noise) -> Solver:
        return self.watch.over(super().coroutine(noise))
