"""What a table is, for a reader: its numbers, where they came from, the work it asks for, a plot of its points."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .schedule import Floats
from .table import Table, point_times, write_whole

WEAK = 0.05  # share of an interval's weight below which a direction hardly counts
WIDTH = 100  # columns of the text
STRIP = 21  # columns of one interval's picture in the text


def describe(table: Table) -> dict[str, Any]:
    """Counts of work per image, the weak directions, and the table itself, as a JSON object."""
    return {
        "steps": table.steps,
        "directions": table.directions,
        "sequential_calls": table.sequential_calls,
        "total_evaluations": table.total_evaluations,
        "guided_forwards": table.total_evaluations * (2 if guided(table) else 1),
        "weak_directions": weak_directions(table),
        "table": table.to_json(),
    }


def guided(table: Table) -> bool:
    """Whether an evaluation is two forwards: guidance above 1 (FLUX takes its guidance as an input: one)."""
    return table.guidance is not None and table.guidance > 1 and table.family != "flux"


def weak_directions(table: Table) -> list[dict[str, Any]]:
    """Directions with less than 5 % of the weight of their interval, |w| / (sum |w| + sum |carry|), that are asked."""
    shares = _shares(table)
    weak = np.argwhere((shares < WEAK) & (table.w != 0))
    return [{"interval": int(i), "direction": int(k), "share": float(shares[i, k])} for i, k in weak]


def text(table: Table, name: str) -> str:
    """The whole table in lines of at most 100 columns."""
    facts = describe(table)
    forwards = "with guidance" if guided(table) else "without guidance"
    points = f"{table.midpoint} points, {table.weights} weights, start by {table.start}"
    order = f", Adams-Bashforth order {table.order}" if table.order > 1 else ""
    head = [
        ("table", name),
        ("made for", ", ".join(_made_for(table)) or "nothing said"),
        ("grid", f"{table.grid or 'no name'}; {table.steps} intervals, {table.times[0]:.6g} to {table.times[-1]:.4g}"),
        ("method", f"K = {table.directions} directions, {points}{order}"),
        (
            "work",
            f"per image {facts['sequential_calls']} sequential calls, {facts['total_evaluations']} total evaluations, "
            f"{facts['guided_forwards']} forwards {forwards}",
        ),
        *_origin(table),
        ("weak", _weak_text(facts["weak_directions"])),
    ]
    lines = [line for title, value in head for line in _wrapped(title, value)]
    return "\n".join([*lines, "", *_rows(table), *_history(table)])


def plot(table: Table, path: str | os.PathLike[str], name: str) -> None:
    """A PNG of the points on the grid: one line an interval, a dot a point, as large as its share of the weight.

    ValueError if matplotlib, the extra `plot`, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'epd-toolkit[plot]'") from error

    figure = Figure(figsize=(8, 1.5 + 0.3 * table.steps), layout="constrained")
    axes = figure.add_subplot()
    rows = np.arange(table.steps)
    axes.hlines(rows, table.times[1:], table.times[:-1], color="0.7", zorder=1)
    for times in (table.times[:-1], table.times[1:]):
        axes.plot(times, rows, "|", color="0.4", markersize=10, zorder=2)
    points, shares = _points(table), _shares(table)
    for k in range(table.directions):
        asked = table.w[:, k] != 0
        axes.scatter(points[asked, k], rows[asked], s=10 + 140 * shares[asked, k], label=f"k = {k}", zorder=3)
    if table.times[0] > 1 and table.times[-1] > 0:  # sigma; flow matching's t is from 0 to 1
        axes.set_xscale("log")
    axes.set(xlabel="t (noise level)", ylabel="interval", yticks=rows, title=name)
    axes.invert_xaxis()
    axes.invert_yaxis()
    axes.legend(loc="lower left", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(Path(path), buffer.getvalue())


def _points(table: Table) -> Floats:
    """The times (N, K) of the points."""
    return np.asarray(point_times(table.midpoint, table.times[:-1, None], table.times[1:, None], table.r))


def _shares(table: Table) -> Floats:
    """The share (N, K) of each direction in the weights of its interval."""
    carried = 0 if table.carry is None else abs(table.carry).sum(1, keepdims=True)
    return np.asarray(abs(table.w) / (abs(table.w).sum(1, keepdims=True) + carried))


def _made_for(table: Table) -> list[str]:
    told = [table.family, table.model]
    told.append(None if table.guidance is None else f"guidance {table.guidance:g}")
    told.append(None if table.size is None else f"{table.size[0]} x {table.size[1]}")
    told.append({None: None, True: "with T5", False: "without T5"}[table.t5])
    return [part for part in told if part]


def _origin(table: Table) -> list[tuple[str, str]]:
    """The provenance, one line a key; what a file said of itself is left to --json."""
    told = {key: value for key, value in (table.provenance or {}).items() if key != "metadata"}
    if not told:
        return [("from", "not said")]
    lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in told.items()]
    return [("from" if i == 0 else "", line) for i, line in enumerate(lines)]


def _weak_text(weak: list[dict[str, Any]]) -> str:
    if not weak:
        return f"no direction carries less than {WEAK:.0%} of the weight of its interval"
    told = [f"interval {one['interval']} k = {one['direction']} ({one['share']:.1%})" for one in weak]
    return f"less than {WEAK:.0%} of the weight: {', '.join(told)}"


def _wrapped(title: str, value: str) -> list[str]:
    """Lines `title  value`, broken at WIDTH; what a file says cannot reach the terminal as control characters."""
    from textwrap import wrap

    shown = "".join(letter if letter.isprintable() else "?" for letter in value)
    lines = wrap(shown, WIDTH - 10) or [""]
    return [f"{title if i == 0 else '':<10}{line}" for i, line in enumerate(lines)]


def _rows(table: Table) -> list[str]:
    """One line a direction: the interval, the point's place in it (a picture and numbers), its weight and scales."""
    points, shares = _points(table), _shares(table)
    title = (
        f"{'':>3} {'t':>9} {'t_next':>9}  {'':{STRIP}}  {'k':>2} {'r':>8} {'t_k':>9} {'w':>8} {'dir':>7} {'time':>7}"
    )
    lines = [title]
    for i in range(table.steps):
        for k in range(table.directions):
            start = f"{i:>3} {table.times[i]:>9.5g} {table.times[i + 1]:>9.5g}" if k == 0 else " " * 23
            strip = ["-"] * STRIP
            strip[min(int(table.r[i, k] * STRIP), STRIP - 1)] = "o" if table.w[i, k] else "x"
            scales = f"{table.scale_dir[i, k]:>7.4f} {table.scale_time[i, k]:>7.4f}"
            numbers = f"{k:>2} {table.r[i, k]:>8.5f} {points[i, k]:>9.5g} {table.w[i, k]:>8.5f} {scales}"
            note = "" if shares[i, k] >= WEAK else " weak" if table.w[i, k] else " off"
            lines.append(f"{start}  {''.join(strip)}  {numbers}{note}")
    return lines


def _history(table: Table) -> list[str]:
    """The coefficients of a history table, newest slope first."""
    lines = []
    if table.place is not None:
        for i, k in np.ndindex(*table.place.shape[:2]):
            lines += _wrapped(f"place {i} {k}", _coefficients(table.place[i, k]))
    if table.carry is not None:
        for i, carry in enumerate(table.carry):
            lines += _wrapped(f"carry {i}", _coefficients(carry))
    return [""] * bool(lines) + lines


def _coefficients(row: Floats) -> str:
    return " ".join(f"{number:.6g}" for number in row)
