"""The result of `benchmarks scaling` in words, as Markdown and as a plot. Knows nothing of how it was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runtime.profiles import OTHERS

from .common import megabytes, plain, save, table
from .machine import company

if TYPE_CHECKING:
    from .scaling import Drawn, Scaling

_FREE, _BUSY = 0.15, 0.85  # cost of one more direction, in calls: to the first it is free, from the second a call
_STEPS = 5  # of the table that the words compare


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
    equal = 1 + _STEPS * first.best
    said = [
        f"{first.k} directions cost {first.best:.2f} calls here{told}: {word}.",
        f"A table of K = {first.k} with {_STEPS + 1} sequential calls takes as long as {equal:.1f} calls of one "
        f"direction: it pays if its pictures are better than those of a K = 1 table of {int(equal + 0.05)} calls "
        "(`python -m benchmarks quality` tells).",
    ]
    judged = [one for one in result.tables if one.psnr_db is not None]
    front = [one for one in judged if not any(_beats(other, one) for other in judged)]
    if front:
        named = ", ".join(f"{one.name} ({one.seconds:.3g} s, {one.psnr_db:.1f} dB)" for one in front)
        said.append(f"Of its tables, none is both quicker here and closer than these: {named}.")
    if result.others is not None and result.others > OTHERS:
        said.append(f"Do not rely on it: {company(result.others)}.")
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
    details = [f"{nodes}{kept}", *result.machine.lines(), company(result.others)]
    lines += ["", *(f"- {line}" for line in details)]
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
        plain(axes)
    figure.suptitle(f"{result.model} on {result.provider}: {verdict(result)[0]}", fontsize=10)
    save(figure, file)
