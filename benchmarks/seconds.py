"""What one picture takes here, from prompt to picture, by attempt: its requests times what calls cost on this device.

The costs are the device's profile, as `benchmarks scaling` or an earlier run has left it, else timed now in the same
way and kept. Everything is loaded; one image at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

import epd

from .bench import Attempt, Bench, Trajectories
from .entrants import PARALLEL_STEPS

if TYPE_CHECKING:
    from runtime.costs import Costs, Requests
    from runtime.directions import Directions


class Watch:
    """Seconds of attempts on the device of a bench.

    Attributes
    ----------
    told : str
        Where the costs are from.
    """

    def __init__(self, bench: Bench, attempts: Sequence[Attempt]) -> None:
        from runtime.costs import costs, ends
        from runtime.directions import possible

        pipe, plan = bench.pipe, bench.pipe.plan("", solver="euler", guidance_scale=bench.guidance)
        slopes = pipe.slopes([""], bench.guidance)
        self._halves, self._ways = slopes.halves, possible(slopes)
        self._bench = bench
        every = [points for attempt in attempts for points in self._requests(attempt)]
        if any(attempt.kind == "parallel" for attempt in attempts):
            every.append((self._halves,) * PARALLEL_STEPS)
        one = epd.Points(np.zeros((1, 1, *plan.latent_shape)), np.array(plan.times[:1]))
        tasks = self._tasks(slopes, one, every) | ends(pipe, plan)
        profile = pipe.profile(plan)
        found = profile.need(tasks)
        known = costs([found], self._halves)
        assert known is not None  # it was asked for
        self._costs: Costs = known
        self.told = "from this device's profile" if profile.kept else "timed now, on a busy machine: not kept"

    def seconds(self, attempt: Attempt, found: Trajectories) -> float | None:
        """Of one image in the quickest way; parallel in time as if its requests were of one size."""
        if attempt.kind == "parallel":
            call = self._costs.call(round(found.guided_forwards / found.sequential_calls))
            ends = self._costs.encode + self._costs.decode
            return None if call is None else ends + found.sequential_calls * call
        requests = self._requests(attempt)
        wide = any(len(points) > 1 for points in requests)
        ways: Sequence[Directions] = self._ways if wide else ("batch",)
        taken = [self._costs.drawing(requests, way) for way in ways]
        return min((seconds for seconds in taken if seconds is not None), default=None)

    def _requests(self, attempt: Attempt) -> Requests:
        from runtime.costs import requests

        return [] if attempt.kind == "parallel" else requests(attempt.solver, self._halves, attempt.interval)

    def _tasks(
        self, slopes: object, one: epd.Points, every: Sequence[tuple[int, ...]]
    ) -> dict[str, Callable[[], object]]:
        """A call of every row count that is asked for, and the points of a guided request at once."""
        from runtime.directions import one_call, work_of

        rows = {self._halves} | {sum(points) for points in every} | {rows for points in every for rows in points}
        tasks = dict(one_call(slopes, one, n) for n in sorted(rows))
        if "async" in self._ways:
            for k in sorted({len(points) for points in every} - {1, PARALLEL_STEPS}):
                times = one.t[0] * np.linspace(1, 0.9, k)
                name, task, _ = work_of(slopes, "async", epd.Points(np.repeat(one.x, k, 0), times))
                tasks[name] = task
        return tasks
