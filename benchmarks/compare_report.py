"""The result of `benchmarks compare` in words, as Markdown, CSV and a plot. Knows nothing of how it was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import megabytes, plain, save, table
from .machine import company

if TYPE_CHECKING:
    from .compare import Comparison, Side

_WEIGHTS = {
    "same": "",
    "drawn alike": " (weights drawn alike)",
    "unknown": " (weights not known)",
}
_HEAD = (
    "contender", "precision", "load s", "first s", "median s", "quartiles", "ratio to ours", "quartiles", "peak memory",
    "to ours", "difference",
)  # fmt: skip

_READ = (
    "Ratios are of the same round; above 1 is slower, or more memory, than ours. Peak memory is the process's largest "
    "resident set. Difference: the largest from our answer, over our largest magnitude."
)

_PICTURES = (
    "no contender skips or caches steps: the rows that each backbone saw were counted",
    "ours loads its text encoders for every picture and releases them; peers keep all of theirs",
)


def verdict(result: Comparison) -> list[str]:
    """What the numbers say of every other contender, in sentences."""
    ours, *others = result.sides
    return [_sentence(side, ours) for side in others]


def _sentence(side: Side, ours: Side) -> str:
    ratio, memory, name = side.ratio(ours), side.memory(ours), f"{side.name} ({side.precision})"
    within = ratio.low <= 1 <= ratio.high
    spread = f"quartiles {ratio.low:.2f} to {ratio.high:.2f}"
    said = (
        f"{name} takes as long as ours, within the spread ({ratio.seconds:.2f} times, {spread})" if within
        else f"{name} takes {ratio.seconds:.2f} times as long as ours ({spread})"
    )  # fmt: skip
    return said + ("." if memory is None else f" and {memory:.2f} times the memory.")


def markdown(result: Comparison) -> str:
    """The verdict, the table, then the details."""
    ours = result.sides[0]
    first = "a first run" if result.work == "backbone" else "a first picture, of one step"
    each = "1 timed run" if result.runs == 1 else f"{result.runs} timed runs"
    random = ["RANDOM WEIGHTS: answers mean nothing, only speed and memory do.", ""] if result.random_weights else []
    lines = [
        f"# {result.model}: {result.work} compared",
        "",
        f"The work: {result.told}.",
        "",
        *random,
        *(f"- {line}" for line in verdict(result)),
        "",
        *table(_HEAD, [_line(side, ours) for side in result.sides]),
        "",
        f"{result.rounds} rounds in turns, each contender a process of its own with {result.threads} threads: load "
        f"(libraries and weights), {first}, {each}. {_READ}",
        "",
        *(f"- {line}" for line in _details(result)),
    ]
    return "\n".join(lines) + "\n"


def _line(side: Side, ours: Side) -> list[str]:
    seconds, ratio, memory = side.seconds, side.ratio(ours), side.memory(ours)
    peak = side.median("peak_rss_bytes")
    return [
        side.name,
        side.precision,
        _seconds(side.median("load")),
        _seconds(side.median("first")),
        f"{seconds.seconds:.4g}",
        f"{seconds.low:.4g} to {seconds.high:.4g}",
        f"{ratio.seconds:.2f}",
        f"{ratio.low:.2f} to {ratio.high:.2f}",
        "" if peak is None else megabytes(round(peak)),
        "" if memory is None else f"{memory:.2f}",
        _difference(side),
    ]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _difference(side: Side) -> str:
    if side.error is not None:
        return (f"{side.error:.1e}" if side.error else "0") + _WEIGHTS[side.weights]
    return "" if side.weights == "none" else "another method" if side.does else "other weights"


def _details(result: Comparison) -> list[str]:
    found = []
    for side in result.sides:
        parts = [*filter(None, [side.does]), *(f"{name} {version}" for name, version in side.versions.items())]
        parts += [f"threads {side.threads}", *side.notes]
        found.append(f"{side.name}: {'; '.join(parts)}")
    kinds = sorted({side.precision for side in result.sides if side.turns[0].load is not None})  # not computed
    if len(kinds) > 1:
        found.append(f"NOT ALL OF ONE PRECISION: {', '.join(kinds)}")
    return [
        *found,
        *(_PICTURES if result.work == "picture" else ()),
        f"bundle.json SHA-256 {result.bundle}",
        *result.machine.lines(),
        company(result.others),
    ]


def rows(result: Comparison) -> list[dict[str, Any]]:
    """One for each timed run."""
    return [
        {
            "contender": side.name,
            "precision": side.precision,
            "round": turn.round,
            "run": index,
            "seconds": seconds,
            "load": turn.load,
            "first": turn.first,
            "peak_rss_bytes": turn.peak_rss_bytes,
        }
        for side in result.sides
        for turn in side.turns
        for index, seconds in enumerate(turn.runs, 1)
    ]


def plot(result: Comparison, file: Path) -> None:
    """Every run of every contender, the round by colour, with the medians; on the right their memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sides = result.sides[::-1]
    figure = Figure(figsize=(11, 1.6 + 0.55 * len(sides)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    names = [f"{side.name} ({side.precision})" for side in sides]
    left.barh(names, [side.seconds.seconds for side in sides], color="0.85")
    for y, side in enumerate(sides):
        runs = [seconds for turn in side.turns for seconds in turn.runs]
        left.plot(runs, [y] * len(runs), "o", color="crimson", ms=3)
    left.set_xlabel("seconds: medians, and every run")
    right.barh(names, [(side.median("peak_rss_bytes") or 0) / 1e6 for side in sides], color="tab:blue")
    right.set_xlabel("peak memory, MB")
    for axes in (left, right):
        plain(axes)
    figure.suptitle(f"{result.model}: {result.told}", fontsize=9)
    save(figure, file)
