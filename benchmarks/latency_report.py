"""The result of `benchmarks latency` as text, Markdown, CSV and a plot. Knows nothing of how it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import megabytes, plain, save, table
from .machine import company

if TYPE_CHECKING:
    from .latency import Latency

_STEADY = 0.05  # drift below it is none
_MANY = 12  # steps, above which not every one has a line


def markdown(result: Latency) -> str:
    """What was drawn, the answer in words, where the time goes, then the details."""
    told = result.summary()
    picture, call = told["picture"], told["call"]
    pictures = "a picture" if result.images == 1 else f"{result.images} pictures"
    work = (
        f"{result.steps} steps of {result.solver}"
        + (f", K = {result.directions}" if result.directions > 1 else "")
        + f", guidance {result.guidance:g}, {result.size[0]}x{result.size[1]}"
    )
    start = sum(result.start.values())
    lines = [
        f"# {result.model}: latency on {result.provider['ran']}",
        "",
        f"**{pictures.capitalize()} in {picture['median']:.3g} s** (quartiles {_range(picture)}, p90 "
        f"{picture['p90']:.3g} s; {len(result.runs)} runs), each of {result.sequential_calls} sequential calls of "
        f"{call['median']:.3g} s: {work}. The first one took {start:.3g} s from the start of the program.",
        "",
        *table(("steady, per picture", "seconds", "quartiles", "p90", "share"), _steady(result, told)),
        "",
        *table(("first picture", "seconds"), [[name, f"{seconds:.3g}"] for name, seconds in result.start.items()]),
        "",
        *table(("step", "calls", "rows", "seconds", "quartiles", "p90"), _steps(result, told)),
        "",
        *(f"- {line}" for line in _details(result, told)),
    ]
    return "\n".join(lines) + "\n"


def _steady(result: Latency, told: Mapping[str, Any]) -> list[list[str]]:
    """Stages of a picture, below each the time inside the components it ran, then our overhead."""
    whole = told["picture"]["median"]
    components = {name: one for name, one in told["components"].items() if one["median"] > 0}
    lines = [(name, one) for name, one in told["stages"].items() if one["median"] > 0]
    lines += [(f"inside {name}", one) for name, one in components.items()]
    lines += [("overhead (ours)", told["overhead"])] if told["overhead"] is not None else []
    lines.append(("whole", told["picture"]))
    return [
        [name, f"{one['median']:.4g}", _range(one), f"{one['p90']:.4g}", f"{one['median'] / whole:.1%}"]
        for name, one in lines
    ]


def _steps(result: Latency, told: Mapping[str, Any]) -> list[list[str]]:
    """One line a step; of many, one for those of the same rows in a row, with the mean of their times."""
    rows = {step: [call.rows for call in result.runs[0].calls if call.step == step + 1] for step in range(result.steps)}
    alike = (lambda step: rows[step]) if result.steps > _MANY else (lambda step: step)
    found = []
    for _, group in groupby(range(result.steps), key=alike):
        steps = list(group)
        mean = {name: sum(told["step"][step][name] for step in steps) / len(steps) for name in told["step"][0]}
        name = str(steps[0] + 1) if len(steps) == 1 else f"{steps[0] + 1} to {steps[-1] + 1}, each"
        work = [str(len(rows[steps[0]])), " + ".join(map(str, rows[steps[0]]))]
        found.append([name, *work, f"{mean['median']:.4g}", _range(mean), f"{mean['p90']:.4g}"])
    return found


def _details(result: Latency, told: Mapping[str, Any]) -> list[str]:
    share = told["overhead_share"]
    drift = told["drift"] - 1
    moved = (
        "none" if abs(drift) < _STEADY else f"{drift:+.0%}: the device {'slowed down' if drift > 0 else 'got faster'}"
    )
    same = "the same in every run" if result.same else "NOT THE SAME IN EVERY RUN"
    finite = "finite" if result.finite else "NOT FINITE"
    rows = ", ".join(map(str, told["rows_per_call"]))
    return [
        f"{result.sequential_calls} sequential calls, {result.total_evaluations} total evaluations of an image, "
        f"{result.guided_forwards} guided forwards; rows per call: {rows}; directions run as {result.way}",
        "overhead (neither loading nor inside ONNX Runtime): "
        + ("not known where calls of one session run at once" if share is None else f"{share:.1%} of a picture"),
        _predicted(result.predicted_seconds, told["picture"]["median"]),
        f"drift of the calls, second half of the runs against the first: {moved}",
        f"peak memory {megabytes(result.peak_rss_bytes)}, predicted {megabytes(result.predicted_rss_bytes)}"
        + (" (--low-memory)" if result.low_memory else ""),
        f"provider asked {result.provider['asked']}, ran {result.provider['ran']}; threads as ONNX Runtime chooses",
        *result.placed,
        f"output {finite}, {same}: SHA-256 {result.first.sha256}",
        f"bundle.json SHA-256 {result.bundle or 'none: a foreign folder'}",
        *result.machine.lines(),
        company(result.others),
    ]


def _predicted(seconds: float | None, median: float) -> str:
    if seconds is None:
        return "what `plan` predicts: nothing, for `scaling` has not measured such calls here"
    return f"what `plan` predicts, by an earlier `scaling`: {seconds:.4g} s, {seconds / median:.2f} of the median"


def _range(one: Mapping[str, float]) -> str:
    return f"{one['low']:.4g} to {one['high']:.4g}"


def rows(result: Latency) -> list[dict[str, Any]]:
    """One for each call, run 0 the first picture's."""
    return [
        {"run": run, **asdict(call)} for run, drawn in enumerate((result.first, *result.runs)) for call in drawn.calls
    ]


def plot(result: Latency, file: Path) -> None:
    """Every call of every run in order of time; where a picture's time goes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    begun = 0
    for index, run in enumerate(result.runs):
        ordinals = range(begun + 1, begun + 1 + len(run.calls))
        left.plot(ordinals, [call.seconds for call in run.calls], "o-", color=("tab:blue", "crimson")[index % 2], ms=3)
        begun += len(run.calls)
    left.set_xlabel("calls in order of time; colours alternate with the runs")
    left.set_ylabel("seconds a call")
    left.set_ylim(bottom=0)
    lines = [line for line in _steady(result, result.summary()) if line[0] != "whole"][::-1]
    right.barh([line[0] for line in lines], [float(line[1]) for line in lines], color="tab:blue")
    right.set_xlabel("seconds a picture, medians")
    for axes in (left, right):
        plain(axes)
    figure.suptitle(f"{result.model} on {result.provider['ran']}, {result.steps} steps of {result.solver}", fontsize=10)
    save(figure, file)
