"""The result of `benchmarks quality` as text, Markdown, CSV and a plot. Knows nothing of how it was measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import EVEN
from .common import plain, save, table

if TYPE_CHECKING:
    from .quality import Quality, Row

HEAD = ("solver", "steps", "sequential calls", "total evaluations", "guided forwards", "PSNR dB", "over Euler dB",
        "latent RMSE", "right")  # fmt: skip
COLUMNS = ("solver", "kind", "calls", "steps", "sequential_calls", "total_evaluations", "guided_forwards", "psnr_db",
           "psnr_low_db", "psnr_high_db", "over_euler_db", "over_euler_low_db", "over_euler_high_db", "closest",
           "over_closest_db", "over_closest_low_db", "over_closest_high_db", "latent_rmse", "right")  # fmt: skip


def markdown(quality: Quality) -> str:
    """What was done, a summary (PSNR of each solver at each number of calls), then each number of calls, best first."""
    low, agreement = quality.agreement_db.low, quality.agreement_db.mean
    lines = [
        f"# {quality.model}: PSNR to a converged reference",
        "",
        f"{quality.prompts} prompts, one start noise each, guidance {quality.guidance:g}. PSNR in dB of the decoded "
        "pictures, means over the images with 95 % intervals; over Euler: paired differences. Work is that of one "
        f"image. The references, {quality.references[0]} and {quality.references[1]}, agree to {agreement:.1f} dB "
        f"(95 %: above {low:.1f}). Left out, for they add noise and have no reference: "
        f"{', '.join(quality.left_out) or 'none'}.",
        "",
        *table(*_summary(quality.rows)),
    ]
    for calls in _calls(quality.rows):
        rows = [row for row in quality.rows if row.calls == calls]
        lines += ["", f"## {calls} sequential calls", "", *table(HEAD, _cells(rows))]
        tables = [row for row in rows if row.over_closest_db is not None]
        if tables:
            lines += ["", "Paired, against the closest training-free solver within as many calls:", ""]
            lines += [f"- {row.solver}: {_verdict(row)}" for row in tables]
    parallel = [row for row in quality.rows if row.calls is None]
    if parallel:
        lines += ["", "## Parallel in time: calls as they came out", "", *table(HEAD, _cells(parallel))]
    return "\n".join(lines) + "\n"


def _verdict(row: Row) -> str:
    over = row.over_closest_db
    assert over is not None  # only tables are asked
    word = "closer" if over.low > 0 else "farther" if over.high < 0 else "no clear difference"
    return f"{word}, {over.mean:+.2f} ± {over.half:.2f} dB over {row.closest}"


def comma_separated(quality: Quality) -> str:
    """One line a row, all digits, empty where a number does not apply."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in quality.rows:
        over = row.over_euler_db
        psnr = (row.psnr_db.mean, row.psnr_db.low, row.psnr_db.high)
        euler = (None, None, None) if over is None else (over.mean, over.low, over.high)
        best = row.over_closest_db
        closest = (None, None, None) if best is None else (best.mean, best.low, best.high)
        work = (row.sequential_calls, row.total_evaluations, row.guided_forwards)
        writer.writerow(
            [
                row.solver,
                row.kind,
                row.calls,
                row.steps,
                *work,
                *psnr,
                *euler,
                row.closest,
                *closest,
                row.latent_rmse,
                row.right,
            ]
        )
    return text.getvalue()


def _calls(rows: Sequence[Row]) -> list[int]:
    return sorted({row.calls for row in rows if row.calls is not None})


def _summary(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    calls = _calls(rows)
    by_name: dict[str, dict[int, str]] = {}
    for row in rows:
        if row.calls is not None:
            by_name.setdefault(row.solver, {})[row.calls] = f"{row.psnr_db.mean:.1f}"
    lines = [[name, *(cells.get(number, "") for number in calls)] for name, cells in by_name.items()]
    return ["sequential calls", *map(str, calls)], lines


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """Best first."""
    return [
        [
            row.solver,
            str(row.steps),
            *(f"{work:.4g}" for work in (row.sequential_calls, row.total_evaluations, row.guided_forwards)),
            f"{row.psnr_db.mean:.2f} ± {row.psnr_db.half:.2f}",
            "" if row.over_euler_db is None else f"{row.over_euler_db.mean:+.2f} ± {row.over_euler_db.half:.2f}",
            f"{row.latent_rmse:.4f}",
            "" if row.right is None else f"{row.right:.1%}",
        ]
        for row in sorted(rows, key=lambda row: -row.psnr_db.mean)
    ]


def plot(quality: Quality, file: Path) -> None:
    """PSNR against sequential calls and against total evaluations, side by side, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    names = dict.fromkeys(_label(row) for row in quality.rows)
    for axes, work in ((left, "sequential_calls"), (right, "total_evaluations")):
        for name in names:
            rows = sorted((r for r in quality.rows if _label(r) == name), key=lambda row: getattr(row, work))
            x, y = [getattr(row, work) for row in rows], [row.psnr_db.mean for row in rows]
            spread = [[row.psnr_db.mean - row.psnr_db.low for row in rows], [row.psnr_db.high - row.psnr_db.mean
                                                                            for row in rows]]  # fmt: skip
            axes.errorbar(x, y, spread, label=name, elinewidth=0.6, **_look(rows[0]))
        axes.set_xscale("log")
        ticks = _calls(quality.rows) if axes is left else [4, 6, 10, 20, 40, 80]
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.minorticks_off()
        plain(axes)
        axes.set_xlabel("sequential calls" if axes is left else "total evaluations of one image")
    left.set_ylabel("PSNR to the converged picture (dB)")
    figure.suptitle(f"{quality.model}, guidance {quality.guidance:g}: {quality.prompts} prompts, 95 % intervals")
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside right center",
        frameon=False,
        fontsize=8 if len(names) < 36 else 7,
    )
    save(figure, file)


_COLOURS = {"euler": "black", "heun": "0.55", "dpm2": "0.7", "dpmpp": "tab:blue", "unipc": "tab:green",
            "deis": "tab:purple", "ipndm": "tab:orange", "paradigms": "tab:brown", "parataa": "tab:olive",
            "start table K": "lightcoral"}  # fmt: skip
_MARKERS = {"1": "o", "2": "s", "3": "^", "4": "D", "2s": "v", "2m": "s", "3m": "^"}


def _label(row: Row) -> str:
    """A line of the plot: the solver; one for all tolerances of a solver parallel in time."""
    return row.solver.partition(" tol ")[0] if row.kind == "parallel" else row.solver


def _look(row: Row) -> dict[str, Any]:
    """Colour by family, marker by order, hollow on even times; tables stand out, the untrained and parallel back."""
    if row.kind == "table":
        return {"color": "crimson", "marker": "*", "markersize": 13, "linewidth": 2.0, "zorder": 5}
    name = _label(row).removesuffix(EVEN)
    family, _, order = name.replace("=", "_").rpartition("_") if "_" in name or "=" in name else (name, "", "1")
    style = {"solver": "-", "start": ":", "parallel": "--"}[row.kind]
    colour, marker = _COLOURS.get(family, "tab:cyan"), _MARKERS.get(order, "o")
    look = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.2, "linestyle": style}
    return look | ({"markerfacecolor": "white", "linewidth": 0.8} if row.solver.endswith(EVEN) else {})
