"""What rows cost on a device: t(rows), K directions against one, and what that says of a model's tables.

    python -m benchmarks scaling MODEL [--provider P] [-k 4 | --rows 1 2 4 8] [--runs 5] [--plot FILE.png]

All row counts, and the K calls at once of each number of directions, take turns. The result is kept as the device's
profile, in place of what it held: it is the one that `generate --directions auto` chooses by. Memory is the process's
peak after the first call of each row count, the counts ascending: what is needed for up to so many.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    add_device,
    add_outputs,
    check_outputs,
    comma_separated,
    device,
    megabytes,
    save,
    table,
    write,
)
from .machine import Machine, machine

if TYPE_CHECKING:
    import epd
    from runtime.bundle import Bundle
    from runtime.pipeline import Pipeline
    from runtime.slopes import Slopes

DIRECTIONS = 4  # K, if nothing is said
_FREE, _BUSY = 0.15, 0.85  # cost of one more direction, in calls: to the first it is free, from the second a call


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
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": verdict(self)}


def measure(pipe: Pipeline, rows: Sequence[int] | None, k: int, runs: int) -> Scaling:
    """Times the backbone at so many rows, or at those of 1 to k directions and of two images of k.

    Raises
    ------
    RequestError
        Row counts that the bundle has no graphs of.
    """
    import epd
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
    found = profile.sit(tasks | {work[0]: work[1] for work in wide.values()}, runs, alone=True)
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


def verdict(result: Scaling) -> list[str]:
    """What the numbers say, in sentences."""
    if not result.directions:
        return ["No two directions were measured: give more --rows."]
    first, *more = result.directions
    each = (first.best - 1) / (first.k - 1)
    word = (
        "further directions are nearly free here" if each <= _FREE
        else "this device is busy at one" if each >= _BUSY
        else "this device has some room beside one"
    )  # fmt: skip
    told = "".join(f"; {way.k} cost {way.best:.2f}" for way in more)
    steps = 5
    equal = 1 + steps * first.best
    said = [
        f"{first.k} directions cost {first.best:.2f} calls here{told}: {word}.",
        f"A table of K = {first.k} with {steps + 1} sequential calls takes as long as {equal:.1f} calls of one "
        f"direction: it pays if its pictures are better than those of a K = 1 table of {int(equal + 0.05)} calls "
        "(`python -m benchmarks quality` tells).",
    ]
    judged = [one for one in result.tables if one.psnr_db is not None]
    front = [one for one in judged if not any(_beats(other, one) for other in judged)]
    if front:
        named = ", ".join(f"{one.name} ({one.seconds:.3g} s, {one.psnr_db:.1f} dB)" for one in front)
        said.append(f"Of its tables, none is both quicker here and closer than these: {named}.")
    return said


def _beats(one: Drawn, other: Drawn) -> bool:
    assert one.psnr_db is not None  # only those with a figure are compared
    assert other.psnr_db is not None
    mine, yours = (one.seconds, one.psnr_db), (other.seconds, other.psnr_db)
    return mine != yours and mine[0] <= yours[0] and mine[1] >= yours[1]


def markdown(result: Scaling) -> str:
    """The verdict, then the tables."""
    rows = [
        [
            str(cost.rows),
            f"{cost.seconds:.4g}",
            f"{cost.low:.4g} to {cost.high:.4g}",
            f"{cost.seconds / cost.rows:.4g}",
            f"{cost.calls:.2f}",
            megabytes(cost.peak_rss_bytes),
        ]
        for cost in result.costs
    ]
    ways = [
        [str(way.k), *(_calls(cost) for cost in (way.batch, way.in_turn, way.at_once))] for way in result.directions
    ]
    drawn = [
        [
            one.name, str(one.k), str(one.sequential_calls), str(one.total_evaluations), f"{one.seconds:.3g}",
            "" if one.psnr_db is None else f"{one.psnr_db:.1f}",
        ]
        for one in result.tables
    ]  # fmt: skip
    lines = [f"# {result.model}: the cost of rows on {result.provider}", "", *verdict(result), ""]
    lines += table(("rows", "seconds", "quartiles", "s per row", "calls", "peak memory"), rows)
    lines += [
        "",
        f"Medians of {result.runs} runs in turns. A call is one of {result.point_rows} rows: one direction of one "
        "image. Memory: the process's peak so far.",
    ]
    if ways:
        lines += ["", *table(("directions", "one batch", "in turn", "at once"), ways), "", "In calls of one direction."]
    if drawn:
        head = ("table", "K", "sequential calls", "total evaluations", "seconds", "PSNR dB")
        lines += [
            "",
            *table(head, drawn),
            "",
            "Seconds of the backbone for one image, by the costs above; PSNR as fitted.",
        ]
    kept = "not kept" if result.profile is None else f"kept for --directions auto: {result.profile}"
    nodes = "" if result.nodes is None else "nodes on " + ", ".join(f"{p}: {n}" for p, n in result.nodes.items()) + "; "
    lines += ["", f"- {nodes}{kept}", *(f"- {line}" for line in result.machine.lines())]
    return "\n".join(lines) + "\n"


def _calls(cost: float | None) -> str:
    return "" if cost is None else f"{cost:.2f}"


def plot(result: Scaling, file: Path) -> None:
    """Seconds against rows with their quartiles beside a straight line through the first; memory on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = [cost.rows for cost in result.costs]
    seconds = [cost.seconds for cost in result.costs]
    spread = [[cost.seconds - cost.low for cost in result.costs], [cost.high - cost.seconds for cost in result.costs]]
    left.errorbar(rows, seconds, spread, marker="o", color="crimson", label="measured (quartiles)")
    call = next(cost for cost in result.costs if cost.rows == result.point_rows)
    left.plot(rows, [call.seconds * n / call.rows for n in rows], "--", color="0.6", label="as many calls in turn")
    left.axhline(call.seconds, linestyle=":", color="0.6", label="further rows free")
    left.set_ylabel("seconds a call")
    left.legend(frameon=False)
    peaks = [(cost.rows, cost.peak_rss_bytes / 1e6) for cost in result.costs if cost.peak_rss_bytes is not None]
    if peaks:
        right.plot(*zip(*peaks, strict=True), marker="o", color="tab:blue")
        right.set_ylim(0, 1.1 * peaks[-1][1])
    right.set_ylabel("peak memory of the process (MB)")
    for axes in (left, right):
        axes.set_xticks(rows)
        axes.set_xlabel("rows of a call")
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result.model} on {result.provider}: {verdict(result)[0]}", fontsize=10)
    save(figure, file)


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
    if options.csv is not None:
        write(options.csv, comma_separated([asdict(cost) for cost in result.costs]))
    if options.markdown is not None:
        write(options.markdown, markdown(result))
    if options.plot is not None:
        plot(result, options.plot)
    print(json.dumps(result.to_json(), allow_nan=False) if options.json else markdown(result))
