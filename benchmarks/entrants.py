"""What `benchmarks quality` compares, and with what: attempts that fit a number of sequential calls, and references."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import epd
from epd.solve import Solver
from runtime.slopes import variance_preserving

from .bench import EVEN, Attempt, Bench

DIRECTIONS = (1, 2, 3)  # K of the start tables
PARALLEL = {"paradigms": epd.parallel.paradigms, "parataa": epd.parallel.parataa}
TOLERANCES = (1e-1, 1e-2, 1e-3)  # of those
PARALLEL_STEPS = 28


def entrants(bench: Bench, calls: Sequence[int], tables: Sequence[Path], only: Sequence[str] | None) -> list[Attempt]:
    """Everything that is compared: Euler first, then each deterministic solver of the family at each number of calls,
    the untrained start tables, the tables, and the solvers that are parallel in time.

    Raises
    ------
    RequestError
        A table that does not fit the model, or an unknown name in `only`.
    """
    from runtime.errors import RequestError

    family = bench.pipe.bundle.facts.family
    plans: dict[Path, Any] = {f: bench.pipe.plan("", table=f, guidance_scale=bench.guidance) for f in tables}
    calls = sorted({*calls, *(plan.table.sequential_calls for plan in plans.values())})
    methods = [m.name for m in epd.solvers.METHODS.values() if not m.noisy and m.calls and family in m.families]
    names = [*methods, "epd", *PARALLEL]
    wanted = {*names} if only is None else {*only, "euler"}
    unknown = sorted(wanted - {*names})
    if unknown:
        raise RequestError(f"unknown solver {unknown[0]!r}; choose from {', '.join(names)}")
    found = [_method(bench, name, n) for name in methods if name in wanted for n in calls]
    if not bench.flow:
        found += [_method(bench, name, n, even=True) for name in methods if name in wanted for n in calls]
    found += [_start_table(bench, k, n) for k in DIRECTIONS if "epd" in wanted for n in calls]
    found += [_parallel(bench, name, tolerance) for name in PARALLEL if name in wanted for tolerance in TOLERANCES]
    made = [attempt for attempt in found if attempt is not None]
    taken = [*names, *(attempt.name for attempt in made), *(file.stem for file in plans)]
    for file, plan in plans.items():
        name = file.stem if taken.count(file.stem) == 1 else str(file)  # every line of the result has its own name
        made.append(_of_table(name, "table", plan, plan.table.sequential_calls))
    return made


def _method(bench: Bench, name: str, calls: int, even: bool = False) -> Attempt | None:
    """A training-free solver with the most steps that fit; None where not even one does.

    `even` (SD1.5): network times evenly from the last to the first, instead of the checkpoint's `leading` ones, from
    the references' start.
    """
    for steps in range(calls, 0, -1):
        plan = bench.pipe.plan("", solver=name, num_inference_steps=steps)
        times, scale, end = plan.times, plan.start_scale, plan.end_scale
        if even:
            times = tuple(epd.schedule.shifted(steps, 1.0, variance_preserving(bench.pipe.bundle.facts)).tolist())
            scale, end = times[0], math.hypot(1, times[-1])
        solver = epd.solvers.METHODS[name].build(times, bench.flow)
        if asked(solver) <= calls:
            return Attempt(name + EVEN if even else name, solver, times, scale, end, calls)
    return None


def _start_table(bench: Bench, k: int, calls: int) -> Attempt | None:
    steps = calls // 2
    if steps == 0:
        return None
    plan = bench.pipe.plan("", solver="epd", k=k, num_inference_steps=steps)
    return _of_table(f"start table K={k}", "start", plan, calls)


def _of_table(name: str, kind: str, plan: Any, calls: int) -> Attempt:
    solver, numbers = epd.solvers.epd(plan.table), json.dumps(plan.table.to_json())
    return Attempt(name, solver, plan.times, plan.start_scale, plan.end_scale, calls, numbers, kind)


def _parallel(bench: Bench, name: str, tolerance: float) -> Attempt:
    plan = bench.pipe.plan("", solver="euler", num_inference_steps=PARALLEL_STEPS)
    solver = PARALLEL[name](plan.times, bench.flow, tolerance=tolerance)
    told = f"{name} tol {tolerance:g}"
    return Attempt(told, solver, plan.times, plan.start_scale, plan.end_scale, numbers=str(tolerance), kind="parallel")


def asked(solver: Solver) -> int:
    """Sequential calls of a solver whose requests do not depend on the slopes, found by a dry run."""
    *_, last = epd.solve(solver, np.zeros((1, 1)), lambda points: np.zeros_like(points.x))
    return last.calls


def references(bench: Bench, steps: int) -> tuple[Attempt, Attempt]:
    """Two different solvers of about 2 * steps calls each, on even grids over the whole range of trained times.

    They start at times[0] * noise, as tables and their teachers do; DDIM's hypot(1, times[0]) is another picture.
    """
    return _reference(bench, "dpm2", steps), _reference(bench, "dpmpp_2m", 2 * steps)


def _reference(bench: Bench, name: str, steps: int) -> Attempt:
    """The flow grid is fine where the checkpoint's is; DDIM's `leading` steps never start at the first time."""
    plan = bench.pipe.plan("", solver="euler", num_inference_steps=steps)
    times, scale = plan.times, plan.start_scale
    if not bench.flow:
        ends_at_0 = plan.times[-1] == 0
        even = epd.schedule.discrete(steps - ends_at_0, variance_preserving(bench.pipe.bundle.facts)).tolist()
        times = (*even, 0.0) if ends_at_0 else tuple(even)
        scale = times[0]
    end = 1.0 if bench.flow else math.hypot(1, times[-1])
    solver = epd.solvers.METHODS[name].build(times, bench.flow)
    return Attempt(f"{name} of {steps} steps", solver, times, scale, end, kind="reference")
