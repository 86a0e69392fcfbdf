"""The result of `benchmarks quality` as text, Markdown, CSV and a plot. Knows nothing of how it was measured."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import EVEN
from .bootstrap import Figure
from .common import plain, save, table
from .metrics import metric

if TYPE_CHECKING:
    from .comparison import Quality, Row, Versus

WORK = {  # of one image
    "sequential_calls": "sequential calls",
    "total_evaluations": "total evaluations",
    "guided_forwards": "guided forwards",
    "seconds": "seconds",
}
PLAIN = (
    "solver",
    "kind",
    "calls",
    "steps",
    "k",
    "table",
    "guidance_interval",
    *WORK,
)  # columns of the CSV, then metrics
PLOTTED = 4  # metrics, at most


def markdown(quality: Quality) -> str:
    """What was done, a summary by calls, then each number of calls, best first, with paired differences."""
    rows = [row for row in quality.rows if row.kind != "reference"]
    names = _metrics(rows)
    lines = [f"# {quality.model}: how good each solver's pictures are", "", _told(quality), ""]
    lines += [line for note in quality.notes for line in (f"**{note}**", "")]
    lines += table(*_summary(rows, names[0]))
    for row in quality.rows:
        if row.kind == "reference":
            told = ", ".join(f"{metric(name).title} {_value(name, figure)}" for name, figure in row.figures.items())
            lines += ["", f"The converged pictures themselves: {told}."] if told else []
    for calls in _calls(rows):
        some = _ordered([row for row in rows if row.calls == calls], names[0])
        lines += ["", f"## {calls} sequential calls", "", *table(_head(names), [_cells(row, names) for row in some])]
        against = [row for row in some if row.baseline is not None]
        if against:
            head = [f"minus {_other(against[0])}", *(metric(name).title for name in names)]
            lines += ["", *table(head, [_differences(row, row.baseline, names) for row in against])]
        lines += _verdicts(some, names)
    lines += _against_own(rows, names)
    parallel = [row for row in rows if row.calls is None]
    if parallel:
        cells = [_cells(row, names) for row in _ordered(parallel, names[0])]
        lines += ["", "## Parallel in time: calls as they came out", "", *table(_head(names), cells)]
    return "\n".join(lines) + "\n"


def _told(quality: Quality) -> str:
    images = f"{quality.prompts} prompts, "
    if quality.different_prompts < quality.prompts:
        images += f"{quality.different_prompts} of them different, "
    images += f"{quality.seeds} start noise{'s' * (quality.seeds > 1)} each (from seed {quality.seed})"
    text = (
        f"{images}, guidance {quality.guidance:g}, {quality.precision} on {quality.provider}. Means with 95 % "
        "intervals by resampling prompts; differences are paired, bold where their interval does not hold 0. Work and "
        f"seconds are those of one image alone, from prompt to picture ({quality.seconds_from}). "
    )
    if quality.agreement_db is not None:
        agreement = quality.agreement_db
        text += (
            f"Distances are to converged pictures: the references, {' and '.join(quality.references)}, agree to "
            f"{agreement.mean:.1f} dB (95 %: above {agreement.low:.1f}). Left out, for they add noise and have no "
            f"reference: {', '.join(quality.left_out) or 'none'}. "
        )
    if any(metric(name).features for row in quality.rows for name in row.figures):
        text += (
            f"Frechet distances are to {quality.frechet_to}; their intervals, in brackets, are without the bias that "
            "few images give, and may lie below the figure. "
        )
    return text.strip()


def _verdicts(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Of tables: against the best training-free solver within as many calls, and within as many evaluations."""
    lines = []
    for row in rows:
        for versus, equal in ((row.closest, "sequential calls"), (row.closest_by_work, "total evaluations")):
            if versus is not None and names[0] in versus.over:
                lines.append(f"- {row.solver}, {versus.calls} {equal}: {_verdict(versus, names[0])}")
    head = ["", "Paired, against the best training-free solver within as many calls, and as many evaluations:", ""]
    return head + lines if lines else []


def _against_own(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Of tables, those of fewest calls first: against the model's own solver in its own steps."""
    told = sorted((row for row in rows if row.own_solver is not None), key=lambda row: (row.calls or 0, row.k or 0))
    against = [(row, row.own_solver) for row in told if row.own_solver is not None and names[0] in row.own_solver.over]
    if not against:
        return []
    lines = [f"- {row.solver}, {row.calls} sequential calls: {_verdict(versus, names[0])}" for row, versus in against]
    _, own = against[0]
    return ["", f"## Tables against {own.name} in {own.calls} calls, the model's own solver", "", *lines]


def _verdict(versus: Versus, name: str) -> str:
    """Better, worse or neither, and by how much."""
    over, rule = versus.over[name], metric(name)
    word = {True: "better", False: "worse", None: "no clear difference"}[over.clear(rule.higher)]
    among = f", the best of {versus.among}" if versus.among > 1 else ""
    return f"{word}, {_value(name, over, '+')} {rule.title} over {versus.name}{among}"


def comma_separated(quality: Quality) -> str:
    """One line a row, all digits, empty where a number does not apply."""
    names = _metrics(quality.rows)
    ends = ("", "_low", "_high")
    columns = [*PLAIN, *(f"{name}{end}" for name in names for end in ends)]
    columns += [f"over_baseline_{name}{end}" for name in names for end in ends]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in quality.rows:
        plain = [getattr(row, name) for name in PLAIN]
        plain[PLAIN.index("guidance_interval")] = " ".join(map(str, row.guidance_interval or ()))
        over = {} if row.baseline is None else row.baseline.over
        writer.writerow([*plain, *_numbers(row.figures, names), *_numbers(over, names)])
    return text.getvalue()


def _numbers(figures: Mapping[str, Figure], names: Sequence[str]) -> list[float | None]:
    none = Figure(math.nan, None, None)
    found = [figures.get(name, none) for name in names]
    return [value for one in found for value in ((None,) * 3 if one is none else (one.mean, one.low, one.high))]


def _metrics(rows: Sequence[Row]) -> list[str]:
    """Those of any row, the one that rows are ordered by first."""
    return list(dict.fromkeys(name for row in sorted(rows, key=lambda r: -len(r.figures)) for name in row.figures))


def _calls(rows: Sequence[Row]) -> list[int]:
    return sorted({row.calls for row in rows if row.calls is not None})


def _ordered(rows: Sequence[Row], name: str) -> list[Row]:
    """Best first."""
    return sorted(rows, key=lambda row: row.figures[name].mean, reverse=metric(name).higher)


def _summary(rows: Sequence[Row], name: str) -> tuple[list[str], list[list[str]]]:
    calls = _calls(rows)
    by_name: dict[str, dict[int, str]] = {}
    for row in rows:
        if row.calls is not None:
            by_name.setdefault(row.solver, {})[row.calls] = f"{row.figures[name].mean:{metric(name).form}}"
    lines = [[solver, *(cells.get(number, "") for number in calls)] for solver, cells in by_name.items()]
    return [f"{metric(name).title} at sequential calls", *map(str, calls)], lines


def _head(names: Sequence[str]) -> list[str]:
    return ["solver", "steps", *WORK.values(), *(metric(name).title for name in names)]


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    work = [getattr(row, name) for name in WORK]
    told = ["" if value is None else f"{value:.4g}" for value in work]
    return [row.solver, str(row.steps), *told, *(_value(name, row.figures.get(name)) for name in names)]


def _value(name: str, figure: Figure | None, sign: str = "") -> str:
    """With half its interval's width; of Frechet distances, whose interval is not about the figure, both ends."""
    if figure is None:
        return ""
    form = metric(name).form
    text = f"{figure.mean:{sign}{form}}"
    if figure.half is None:
        return text
    if metric(name).features:
        return f"{text} ({figure.low:{sign}{form}} to {figure.high:{sign}{form}})"
    return f"{text} ± {figure.half:{form}}"


def _differences(row: Row, versus: Versus | None, names: Sequence[str]) -> list[str]:
    cells = [row.solver]
    for name in names:
        figure = None if versus is None else versus.over.get(name)
        text = _value(name, figure, "+")
        cells.append(f"**{text}**" if figure is not None and figure.clear() is not None else text)
    return cells


def _other(row: Row) -> str:
    return "" if row.baseline is None else f"{row.baseline.name} at {row.baseline.calls}"


def plot(quality: Quality, file: Path) -> None:
    """Every metric, one row of panels each, against sequential calls, total evaluations and seconds, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    rows = [row for row in quality.rows if row.kind != "reference"]
    metrics = _metrics(rows)[:PLOTTED]
    figure = Drawing(figsize=(17, 1.4 + 4.8 * len(metrics)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    works = ("sequential_calls", "total_evaluations", "seconds")
    panels = figure.subplots(len(metrics), len(works), sharey="row", sharex="col", squeeze=False)
    for line, name in zip(panels, metrics, strict=True):
        for axes, work in zip(line, works, strict=True):
            _panel(axes, rows, name, work)
        line[0].set_ylabel(metric(name).title)
    for axes, work in zip(panels[-1], works, strict=True):
        axes.set_xlabel(f"{WORK[work]} of one image")
    images = f"{quality.prompts} prompts x {quality.seeds}"
    figure.suptitle(f"{quality.model}, guidance {quality.guidance:g}: {images}, 95 % intervals")
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        lines, labels, loc="outside right center", frameon=False, fontsize=8 if len(labels) < 36 else 7, handlelength=5
    )
    save(figure, file)


def _panel(axes: Any, rows: Sequence[Row], name: str, work: str) -> None:
    """One metric against one kind of work, a line for every solver."""
    dashes = _dashes(rows)
    for label in dict.fromkeys(_label(row) for row in rows):
        some = [row for row in rows if _label(row) == label and name in row.figures and getattr(row, work) is not None]
        some.sort(key=lambda row: getattr(row, work))
        if not some:
            continue
        x, figures = [getattr(row, work) for row in some], [row.figures[name] for row in some]
        (line,) = axes.plot(x, [f.mean for f in figures], label=label, **_look(some[0]) | dashes.get(label, {}))
        for at, figure in zip(x, figures, strict=True):  # not error bars: the figure may lie outside
            if figure.low is not None:
                axes.vlines(at, figure.low, figure.high, line.get_color(), linewidth=0.6)
    axes.set_xscale("log")
    if not metric(name).higher:
        axes.set_yscale("log", nonpositive="clip")
    first = sorted(rows, key=lambda row: (row.kind != "table", getattr(row, work) or 0))
    ticks = _apart(
        [float(f"{value:.2g}") for row in first if (value := getattr(row, work))], 7 if work == "seconds" else 16
    )
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    plain(axes)


def _apart(values: Sequence[float], most: int) -> list[float]:
    """Those that have room on a logarithmic axis for `most` numbers; the first ones have it before the others."""
    room = (max(values, default=1) / min(values, default=1)) ** (1 / most)
    found: list[float] = []
    for value in values:
        if all(max(value, other) > room * min(value, other) for other in found):
            found.append(value)
    return sorted(found)


def _dashes(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By label: tables of as many directions differ in their dashes."""
    labels = dict.fromkeys((row.k, _label(row)) for row in rows if row.kind == "table")
    alike = {k: [label for other, label in labels if other == k] for k, _ in labels}
    return {label: {"linestyle": _DASHES[i % len(_DASHES)]} for some in alike.values() for i, label in enumerate(some)}


_COLOURS = {"euler": "black", "heun": "0.55", "dpm2": "0.7", "dpmpp": "tab:blue", "unipc": "tab:green",
            "deis": "tab:purple", "ipndm": "tab:orange", "paradigms": "tab:brown", "parataa": "tab:olive",
            "start table K": "lightcoral"}  # fmt: skip
_TABLES = ("firebrick", "deeppink", "crimson", "orangered")  # by K
_DASHES = ("-", "--", ":", "-.")  # of tables of as many directions
_MARKERS = {"1": "o", "2": "s", "3": "^", "4": "D", "2s": "v", "2m": "s", "3m": "^"}


def _label(row: Row) -> str:
    """A line of the plot: the solver; one for tables that differ in calls, and one for tolerances in parallel."""
    if row.kind == "table":
        return re.sub(r"-calls\d+", "", row.solver)
    return row.solver.partition(" tol ")[0] if row.kind == "parallel" else row.solver


def _look(row: Row) -> dict[str, Any]:
    """Colour by family, marker by order, hollow on even times; tables stand out, the untrained and parallel back."""
    if row.kind == "table":
        colour = _TABLES[(row.k or 0) % len(_TABLES)]
        return {"color": colour, "marker": "*", "markersize": 12, "linewidth": 1.5, "zorder": 5}
    name = _label(row).partition(",")[0].removesuffix(EVEN)
    family, _, order = name.replace("=", "_").rpartition("_") if "_" in name or "=" in name else (name, "", "1")
    style = {"solver": "-", "start": ":", "parallel": "--"}[row.kind]
    colour, marker = _COLOURS.get(family, "tab:cyan"), _MARKERS.get(order, "o")
    look = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.2, "linestyle": style}
    return look | ({"markerfacecolor": "white", "linewidth": 0.8} if row.solver.endswith(EVEN) else {})
