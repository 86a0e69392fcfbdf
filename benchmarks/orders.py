"""Orders of convergence, measured: the error of every deterministic training-free solver against the number of steps.

python -m benchmarks orders [--plot FILE]

The ODE is that of independent Gaussian data of several variances, which has a closed-form solution; several, so that
no accident of signs hides an error. Solvers run with the start and the end they really use. Knows nothing of trained
models.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import epd
from epd.solve import Solver
from epd.solvers import METHODS, Method

VARIANCES = np.array([0.05, 0.15, 0.6, 2.0])  # of the data, one for each entry of the state
COUNTS = (16, 32, 64, 128, 256, 512, 1024)  # steps
FIT = 3  # the order is read off the last three counts
MARKS = "os^vD"


def grid(n: int, flow: bool) -> Any:
    """n + 1 decreasing times: sigma 1 .. 0.1, dense at the end; in flow 0.9 .. 0.1, evenly spaced."""
    return np.linspace(0.9, 0.1, n + 1) if flow else epd.schedule.polynomial(n, 0.1, 1.0, 2)


def slope(points: epd.Points, flow: bool) -> Any:
    """Slope (x - D) / t of the Gaussian data; points.x is (P, B, 4), points.t (P,)."""
    t = points.t[:, None, None]
    return points.x * ((t - (1 - t) * VARIANCES) / _variance(t, flow) if flow else t / _variance(t, flow))


def solution(x: Any, t: float, t_next: float, flow: bool) -> Any:
    """The exact state (B, 4) at t_next of the one that is x at t: the ratio of the standard deviations."""
    return x * np.sqrt(_variance(t_next, flow) / _variance(t, flow))


def _variance(t: Any, flow: bool) -> Any:
    return ((1 - t) ** 2 if flow else 1) * VARIANCES + t**2


def error(build: Callable[..., Solver], times: Any, flow: bool) -> float:
    """Root mean square error of the last state of `build(times, flow)`, from a state of ones."""
    x = np.ones((1, len(VARIANCES)))
    *_, last = epd.solve(build(times, flow), x, lambda points: slope(points, flow))
    return float(np.sqrt(np.mean((last.x - solution(x, times[0], times[-1], flow)) ** 2)))


def errors(method: Method, flow: bool, counts: Sequence[int] = COUNTS) -> list[float]:
    """The method's error for each number of steps."""
    return [error(method.build, grid(n, flow), flow) for n in counts]


def order(found: Sequence[float], counts: Sequence[int] = COUNTS) -> float:
    """The measured order: minus the slope of log error over log steps, by the last few counts."""
    return float(-np.polyfit(np.log(counts[-FIT:]), np.log(found[-FIT:]), 1)[0])


def deterministic() -> list[Method]:
    """The methods that have an order on their own: no noise, one call after another."""
    return [method for method in METHODS.values() if not method.noisy and method.calls > 0]


def add(commands: Any) -> None:
    """Register `orders` with the subcommands of `python -m benchmarks`."""
    parser = commands.add_parser("orders", help="measured order of convergence of every training-free solver")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw error against steps (PNG)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print one line for each method, and plot if asked."""
    measured = {flow: {m.name: errors(m, flow) for m in deterministic()} for flow in (False, True)}
    print(f"{'solver':12}{'declared':>9}{'sigma':>8}{'flow':>8}   error at {COUNTS[0]} and {COUNTS[-1]} steps (sigma)")
    for name, found in measured[False].items():
        orders = f"{METHODS[name].order:9d}{order(found):8.2f}{order(measured[True][name]):8.2f}"
        print(f"{name:12}{orders}   {found[0]:.1e} {found[-1]:.1e}")
    if options.plot is not None:
        plot(measured, options.plot)


def plot(measured: dict[bool, dict[str, list[float]]], path: Path) -> None:
    """Error against steps, both logarithmic: one panel for the sigma grid, one for the flow grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (flow, found) in zip(panels, measured.items(), strict=True):
        for i, (name, values) in enumerate(found.items()):
            label = f"{name}  {order(measured[False][name]):.2f} | {order(measured[True][name]):.2f}"
            style = {"color": f"C{i % 10}", "marker": MARKS[i % len(MARKS)], "linestyle": "-" if i < 10 else "--"}
            panel.loglog(COUNTS, values, markersize=4, linewidth=1.2, label=label, **style)
        for slope_shown, anchor in ((1, 0.4), (2, 4.0)):
            panel.loglog(COUNTS, [anchor / n**slope_shown for n in COUNTS], color="0.6", linestyle=":", linewidth=1)
            panel.annotate(f"order {slope_shown}", (COUNTS[-1], anchor / COUNTS[-1] ** slope_shown), color="0.4")
        panel.set_title("flow matching, t = 0.9 to 0.1" if flow else "sigma = 1 to 0.1")
        panel.set_xlabel("steps N")
        panel.set_xticks(COUNTS, [str(n) for n in COUNTS])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("root mean square error of the last state")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right center", title="measured order: sigma | flow", fontsize=9)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, dpi=90, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
