"""What `benchmarks quality` compares, and with what: attempts that fit a number of sequential calls, and references."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import epd
from epd import catalogue
from epd.solve import Solver
from runtime.costs import times_of
from runtime.figures import digest
from runtime.slopes import variance_preserving
from runtime.tables import load_table

from .bench import EVEN, Attempt, Bench

DIRECTIONS = (1, 2, 3)  # K of the start tables
PARALLEL = {"paradigms": epd.parallel.paradigms, "parataa": epd.parallel.parataa}
TOLERANCES = (1e-1, 1e-2, 1e-3)  # of those
PARALLEL_STEPS = 28
MOST_CALLS = 1000  # of a solver that is asked for at so many
HEADLINE = ("ipndm_3", "dpmpp_2m")


def entrants(
    bench: Bench,
    calls: Sequence[int],
    tables: Sequence[Path],
    only: Sequence[str] | None,
    intervals: Sequence[tuple[float, float]] = (),
    most_work: float = math.inf,
) -> list[Attempt]:
    """Everything that is compared: Euler first, then each deterministic solver of the family at each number of calls,
    the untrained start tables, the tables, and the solvers that are parallel in time; all of it but those once more
    with guidance in each of the intervals (sigma) only. And, to be compared with tables, the model's own solver in its
    own steps.

    The numbers of calls are those given and, so that tables meet their equals, the sequential calls of every table and
    its total evaluations, where these are no more than `most_work`.

    Parameters
    ----------
    only : sequence, optional
        These and Euler: NAME, at each number of calls, or NAME@M, at M calls alone.

    Raises
    ------
    RequestError
        A table that does not fit the model, a name or number in `only` that cannot be, or an interval above every grid.
    """
    from runtime.plan import checked_interval

    family = bench.pipe.bundle.facts.family
    plans = _plans(bench, tables)
    made = [plan.table for plan in plans.values()]
    work = {one.total_evaluations for one in made if one.total_evaluations <= most_work}
    calls = sorted({*calls, *(one.sequential_calls for one in made), *work})
    methods = [m.name for m in epd.solvers.METHODS.values() if not m.noisy and m.calls and family in m.families]
    if not bench.flow:
        methods += [name + EVEN for name in methods]
    names = [*methods, "epd", *PARALLEL]
    wanted = dict.fromkeys(names, calls) if only is None else _wanted(only, names, calls)
    found = [_method(bench, name, n) for name in methods for n in wanted.get(name, ())]
    found += [_start_table(bench, k, n) for k in DIRECTIONS for n in wanted.get("epd", ())]
    found += _tables(plans, [*names, *(attempt.name for attempt in found if attempt is not None)])
    one = [attempt for attempt in found if attempt is not None]
    for interval in intervals:
        checked_interval(interval, max(attempt.times[0] for attempt in one))
    told = [(interval, f"{interval[0]:g} to {interval[1]:g}") for interval in intervals]
    one += [replace(a, name=f"{a.name}, guided {text}", interval=i) for i, text in told for a in one]
    own = own_solver(bench) if tables else None
    if own is not None and (own.name, own.calls) not in {(attempt.name, attempt.calls) for attempt in one}:
        one.append(own)
    return one + [_parallel(bench, n, tolerance) for n in PARALLEL if n in wanted for tolerance in TOLERANCES]


def _wanted(only: Sequence[str], names: Sequence[str], calls: Sequence[int]) -> dict[str, list[int]]:
    """The numbers of calls of each solver that was asked for, as NAME or NAME@M; Euler at those of all others, unless
    it is asked for, too."""
    from runtime.errors import RequestError

    found: dict[str, set[int]] = {}
    for one in only:
        name, at, number = one.partition("@")
        if name not in names:
            raise RequestError(f"unknown solver {name!r}; choose from {', '.join(names)}")
        if at and name in PARALLEL:
            raise RequestError(f"--solvers {one}: it finds its calls by running; give {name}")
        least = 2 if name == "epd" else 1
        if at and not (number.isascii() and number.isdecimal() and least <= int(number[:5]) <= MOST_CALLS):
            raise RequestError(
                f"--solvers {one:.40}: M is a number of calls from {least} to {MOST_CALLS}; give {name}@6"
            )
        found.setdefault(name, set()).update([int(number)] if at else calls)
    found.setdefault("euler", set().union(*found.values()))
    return {name: sorted(some) for name, some in found.items()}


def own_solver(bench: Bench) -> Attempt | None:
    """The model's own in its own steps, which is what users get without any table.

    None for one that adds noise, or is parallel in time.
    """
    defaults = bench.pipe.bundle.facts.defaults
    method = epd.solvers.METHODS.get(defaults.solver)
    if method is None or method.noisy or not method.calls:
        return None
    plan = bench.pipe.plan("", solver=defaults.solver, num_inference_steps=defaults.steps)
    return _method(bench, defaults.solver, asked(method.build(plan.times, bench.flow)))


def headline(bench: Bench, tables: Sequence[Path]) -> list[Attempt]:
    """The model's own solver in its own steps and in 20 calls, iPNDM and DPM-Solver++ in 20, and the tables.

    Euler stands for one that is not compared.
    """
    own = own_solver(bench)
    name = "euler" if own is None else own.name
    found = [own, *(_method(bench, one, 20) for one in (name, *HEADLINE))]
    one = {(attempt.name, attempt.calls): attempt for attempt in found if attempt is not None}
    return [*one.values(), *_tables(_plans(bench, tables), [])]


def fetched(bench: Bench) -> list[Path]:
    """Published and shipped tables that were made for this model, by what they say."""
    facts, found = bench.pipe.bundle.facts, []
    for name in catalogue.names():
        file = catalogue.find(name)
        table = load_table(file)
        own = table.model is not None and table.model.rpartition("/")[2] == facts.source.id.rpartition("/")[2]
        if own and digest(table) not in {digest(load_table(bench.pipe.bundle.folder / path)) for path in facts.tables}:
            found.append(file)
    return found


def _plans(bench: Bench, tables: Sequence[Path]) -> dict[Path, Any]:
    return {file: bench.pipe.plan("", table=file, guidance_scale=bench.guidance) for file in tables}


def _tables(plans: dict[Path, Any], taken: Sequence[str]) -> list[Attempt]:
    """Each under a name that no other line of the result has."""
    every = [*taken, *(file.stem for file in plans)]
    names = {file: file.stem if every.count(file.stem) == 1 else str(file) for file in plans}
    return [_of_table(names[file], "table", plan, plan.table.sequential_calls) for file, plan in plans.items()]


def _method(bench: Bench, name: str, calls: int) -> Attempt | None:
    """A training-free solver with the most steps that fit; None where not even one does.

    NAME even (SD1.5): network times evenly from the last to the first, instead of the checkpoint's `leading` ones, from
    the references' start.
    """
    method = name.removesuffix(EVEN)
    for steps in range(calls, 0, -1):
        plan = bench.pipe.plan("", solver=method, num_inference_steps=steps)
        times, scale, end = plan.times, plan.start_scale, plan.end_scale
        if name.endswith(EVEN):
            times = tuple(epd.schedule.shifted(steps, 1.0, variance_preserving(bench.pipe.bundle.facts)).tolist())
            scale, end = times[0], math.hypot(1, times[-1])
        solver = epd.solvers.METHODS[method].build(times, bench.flow)
        if asked(solver) <= calls:
            return Attempt(name, solver, times, scale, end, calls)
    return None


def _start_table(bench: Bench, k: int, calls: int) -> Attempt | None:
    steps = calls // 2
    if steps == 0:
        return None
    plan = bench.pipe.plan("", solver="epd", k=k, num_inference_steps=steps)
    return _of_table(f"start table K={k}", "start", plan, calls)


def _of_table(name: str, kind: str, plan: Any, calls: int) -> Attempt:
    solver, numbers = epd.solvers.epd(plan.table), json.dumps(plan.table.to_json())
    return Attempt(name, solver, plan.times, plan.start_scale, plan.end_scale, calls, numbers, kind, table=plan.table)


def _parallel(bench: Bench, name: str, tolerance: float) -> Attempt:
    plan = bench.pipe.plan("", solver="euler", num_inference_steps=PARALLEL_STEPS)
    solver = PARALLEL[name](plan.times, bench.flow, tolerance=tolerance)
    told = f"{name} tol {tolerance:g}"
    return Attempt(told, solver, plan.times, plan.start_scale, plan.end_scale, numbers=str(tolerance), kind="parallel")


def asked(solver: Solver) -> int:
    """Sequential calls of a solver whose requests do not depend on the slopes, found by a dry run."""
    return len(times_of(solver))


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
