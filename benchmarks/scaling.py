"""What rows cost on a device: t(rows), K directions against one, and what that says of a model's tables.

    python -m benchmarks scaling MODEL [--provider P] [-k 4 | --rows 1 2 4 8] [--runs 5] [--plot FILE.png]

All row counts, and the K calls at once of each number of directions, take turns. The result is kept as the device's
profile, in place of what it held: it is the one that `generate --directions auto` chooses by. Memory is the process's
peak after the first call of each row count, the counts ascending: what is needed for up to so many.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import scaling_report
from .common import add_device, add_outputs, check_outputs, comma_separated, device, publish
from .machine import Machine, machine

if TYPE_CHECKING:
    import epd
    from runtime.bundle import Bundle
    from runtime.pipeline import Pipeline
    from runtime.slopes import Slopes

DIRECTIONS = 4  # K, if nothing is said


@dataclass(frozen=True)
class Cost:
    """One call of so many rows."""

    rows: int
    seconds: float  # median
    low: float  # quartiles
    high: float
    calls: float  # in calls of one direction
    peak_rss_bytes: int | None  # of the process, once it has made such a call


@dataclass(frozen=True)
class Directions:
    """What K directions cost in each way, in calls of one direction; None: graph or provider do not allow it."""

    k: int
    batch: float | None
    in_turn: float
    at_once: float | None

    @property
    def best(self) -> float:
        return min(cost for cost in (self.batch, self.in_turn, self.at_once) if cost is not None)


@dataclass(frozen=True)
class Drawn:
    """One of the bundle's tables: what drawing one image with it takes here, the backbone's calls alone."""

    name: str
    k: int
    sequential_calls: int
    total_evaluations: int
    seconds: float
    psnr_db: float | None  # to converged pictures, held out, as it was fitted


@dataclass(frozen=True)
class Scaling:
    """The whole result; `to_json` of it is what --json prints."""

    model: str
    bundle: str | None  # SHA-256 of bundle.json
    provider: str
    nodes: dict[str, int] | None  # provider -> number
    point_rows: int  # of one direction: 2 with guidance
    runs: int
    costs: tuple[Cost, ...]
    directions: tuple[Directions, ...]
    tables: tuple[Drawn, ...]
    profile: str | None  # file; None: not kept
    others: float | None  # share of the processors that other programs took meanwhile
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": scaling_report.verdict(self)}


def measure(pipe: Pipeline, rows: Sequence[int] | None, k: int, runs: int) -> Scaling:
    """Times the backbone at so many rows, or at those of 1 to k directions and of two images of k.

    Raises
    ------
    RequestError
        Row counts that the bundle has no graphs of.
    """
    import epd
    from runtime.costs import ends
    from runtime.memory import peak_rss_bytes
    from runtime.noise import randn
    from runtime.providers import provider_of

    here = machine([provider_of(pipe.provider)])
    plan = pipe.plan("", solver="euler")
    slopes = pipe.slopes([plan.prompt], plan.guidance)
    x = plan.start_scale * randn(plan.latent_shape, 0)[None].astype(float)  # (1, C, h, w)
    one = epd.Points(x[None], plan.times[:1])
    rows = _rows(pipe.bundle, slopes.halves, rows, k)
    memory: dict[int, int | None] = {}
    named, wide = _tasks(slopes, one, rows)

    def first(rows: int, task: Callable[[], object]) -> None:
        task()
        if rows not in memory:
            memory[rows] = peak_rss_bytes()

    tasks: dict[str, Callable[[], object]] = {name: partial(first, n, task) for n, (name, task) in named.items()}
    profile = pipe.profile(plan)
    found = profile.sit(tasks | {work[0]: work[1] for work in wide.values()} | ends(pipe, plan), runs, alone=True)
    call = found[named[slopes.halves][0]].seconds
    costs = {n: Cost(n, *found[name], found[name].seconds / call, memory[n]) for n, (name, _) in named.items()}
    ways = tuple(
        Directions(
            count,
            costs[count * slopes.halves].calls if slopes.per_row else None,
            count,
            found[wide[count][0]].seconds / call if count in wide else None,
        )
        for count in _counts(rows, slopes.halves)
    )
    return Scaling(
        model=pipe.bundle.facts.name,
        bundle=pipe.bundle.fingerprint(),
        provider=slopes.backbone.provider,
        nodes=None if pipe.assignment is None else pipe.assignment.nodes,
        point_rows=slopes.halves,
        runs=runs,
        costs=tuple(costs.values()),
        directions=ways,
        tables=tuple(_tables(pipe.bundle, {1: 1.0} | {way.k: way.best for way in ways}, call)),
        profile=str(profile.file) if profile.kept else None,
        others=profile.others,
        machine=here,
    )


def _rows(bundle: Bundle, point: int, asked: Sequence[int] | None, k: int) -> list[int]:
    """Row counts to measure, ascending, those of one direction among them; of static graphs only their own."""
    from runtime.errors import RequestError

    have = bundle.facts.components[bundle.backbone].rows
    wanted = {point, *asked} if asked else {1, *(point * (i + 1) for i in range(k)), 2 * point * k}
    missing = sorted(wanted - {*have}) if have else []
    if missing and (asked or point in missing):
        raise RequestError(
            f"{bundle.facts.name} has graphs of {', '.join(map(str, have))} rows; {missing[0]} cannot be measured, "
            f"give --rows {' '.join(map(str, have))}"
        )
    return sorted(wanted & {*have} if have else wanted)


def _counts(rows: Sequence[int], point: int) -> list[int]:
    """Directions of one image that make up the row counts."""
    return [n // point for n in rows if n % point == 0 and n > point]


def _tasks(slopes: Slopes, one: epd.Points, rows: Sequence[int]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Rows -> one call of so many; directions -> their calls at once, where the provider allows that. Name and task."""
    import numpy as np

    import epd
    from runtime.directions import one_call, possible, work_of

    calls = {n: one_call(slopes, one, n) for n in rows}
    if "async" not in possible(slopes):
        return calls, {}
    counts = _counts(rows, slopes.halves)
    points = {k: epd.Points(np.repeat(one.x, k, 0), one.t[0] * np.linspace(1, 0.9, k)) for k in counts}
    return calls, {k: work_of(slopes, "async", points[k])[:2] for k in counts}


def _tables(bundle: Bundle, cost: dict[int, float], call: float) -> list[Drawn]:
    """Those of the bundle whose directions were measured, the quickest first."""
    from runtime.tables import load_table

    found = []
    for path in bundle.facts.tables:
        made = load_table(bundle.folder / path)
        if made.directions in cost:
            single = made.sequential_calls - made.steps  # requests of one point
            seconds = call * (single + made.steps * cost[made.directions])
            work = (made.directions, made.sequential_calls, made.total_evaluations)
            found.append(Drawn(Path(path).stem, *work, seconds, made.held_out_psnr))
    return sorted(found, key=lambda one: one.seconds)


def add(commands: Any) -> None:
    """Registers the command with `argparse`'s subparsers."""
    command = commands.add_parser("scaling", help="what rows cost here: K directions against one")
    command.set_defaults(run=_run)
    command.add_argument("model", metavar="MODEL", help="a bundle folder, or the name of a shipped one")
    command.add_argument("--rows", type=int, nargs="+", metavar="R", help="row counts, in place of those for -k")
    command.add_argument(
        "-k",
        type=int,
        default=DIRECTIONS,
        metavar="K",
        help=f"1 to K directions, and two images of K (default {DIRECTIONS})",
    )
    command.add_argument("--runs", type=int, default=5, metavar="N", help="timed runs of each, 3 or more (default 5)")
    add_device(command)
    add_outputs(command)


def _run(options: argparse.Namespace) -> None:
    from runtime.errors import RequestError
    from runtime.pipeline import Pipeline
    from runtime.plan import MOST_DIRECTIONS

    check_outputs(options)
    if options.runs < 3 or not 1 <= options.k <= MOST_DIRECTIONS or min(options.rows or [1]) < 1:
        raise RequestError(f"--runs must be 3 or more, -k 1 to {MOST_DIRECTIONS}, --rows 1 or more")
    if "," in options.provider:
        raise RequestError(f"scaling measures one provider; give one of {options.provider}")
    result = measure(Pipeline.from_pretrained(options.model, **device(options)), options.rows, options.k, options.runs)
    publish(options, result, scaling_report, comma_separated([asdict(cost) for cost in result.costs]))
