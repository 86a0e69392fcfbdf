"""How close a solver table comes to converged pictures, beside every training-free solver at as many sequential calls.

Knows nothing of fitting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import epd
from epd.fit import Trajectories, decibels
from epd.solve import Slope, Solver
from epd.solvers import METHODS

from .errors import RequestError
from .facts import Facts
from .grid import own_grid
from .interval import independent, interval
from .pipeline import Pipeline
from .slopes import variance_preserving

Array = NDArray[np.float64]
CONVERGED_DB = 40.0  # to which two converged solutions must agree


@dataclass(frozen=True)
class Judgement:
    """PSNR in dB of held-out pictures to converged ones, mean over each prompt's and over those; None: not finite."""

    psnr_db: float
    half_width_db: float  # of its 95 % interval: over the prompts; over the images where there is one prompt only
    images: int
    prompts: int  # different ones
    latent_db: float
    reference_db: float  # two converged solutions by different solvers agree to this
    training_free: dict[str, float | None]  # solver -> psnr_db at as many sequential calls, on the better of two grids
    best_other: str  # the closest of them
    over_best_db: float  # paired difference to it
    over_best_half_db: float  # of its 95 % interval

    def told(self, calls: int) -> str:
        """In words, plainly also where the table does not win."""
        other = f"{self.best_other}, the best training-free solver"
        if self.over_best_db > self.over_best_half_db:
            verdict = f"closer than {other}"
        elif self.over_best_db < -self.over_best_half_db:
            verdict = f"NO closer than {other}"
        else:
            verdict = f"no clear difference to {other}"
        of = f"{self.images} pictures of {self.prompts} held-out prompt{'s' if self.prompts > 1 else ''}"
        line = (
            f"{self.psnr_db:.1f} ± {self.half_width_db:.1f} dB to converged pictures ({of}) "
            f"at {calls} sequential calls: {verdict} (by {self.over_best_db:+.1f} ± {self.over_best_half_db:.1f} dB)"
        )
        if self.prompts == 1:
            line += "; ± is over noises of ONE prompt and says nothing of others, give 5 prompts or more"
        if self.reference_db < CONVERGED_DB:
            line += f"; NOT CONVERGED: two solutions agree to {self.reference_db:.1f} dB only, raise --teacher-calls"
        return line


def curve(facts: Facts, n: int, shift: float) -> tuple[float, ...]:
    """`epd.schedule.shifted` over the whole range of a model: n + 1 sigmas."""
    vp = variance_preserving(facts) if facts.family == "sd15" else None
    return tuple(epd.schedule.shifted(n, shift, vp).tolist())


def competitors(facts: Facts) -> list[str]:
    """Training-free solvers to compare with: deterministic, and of known sequential calls."""
    known = METHODS.items()
    return [n for n, method in known if facts.family in method.families and not method.noisy and method.calls > 0]


def judge(
    pipe: Pipeline,
    table: epd.Table,
    slope: Slope,
    noise: Array,
    reference: Trajectories,
    check: Sequence[float],
    prompts: Sequence[str],
) -> Judgement:
    """Draws with a table and with every competitor, and compares with the reference's pictures.

    Parameters
    ----------
    slope : callable
        The network over the B >= 2 images.
    noise : (B, C, h, w)
        Of unit variance; states at the first time are first time * noise (its own scale on a solver's own grid).
    reference : Trajectories
    check : sequence
        Fine grid on which DPM-Solver++(2M) solves once more, to see whether the reference has converged.
    prompts : sequence
        Of the B images: those of one prompt are no independent ones.
    """
    facts, flow = pipe.bundle.facts, pipe.bundle.facts.family == "sd3"
    first = float(reference.times[0])

    def drawn(solver: Solver, grid: Sequence[float], scale: float = first) -> tuple[Array, NDArray[np.float32]]:
        *_, last = epd.solve(solver, scale * noise, slope)
        x = last.x / end_scale(facts, grid[-1])
        return x, pipe.decode(x)

    def compared(pictures: NDArray[np.float32]) -> Array:
        return independent(psnr(pictures, picture), prompts)

    def competing(name: str) -> Array:
        found = []
        for own in (True, False):
            try:
                grid = _grid(facts, name, table.sequential_calls, own)
                scale = first if flow or not own else math.hypot(1, grid[0])
                found.append(compared(drawn(METHODS[name].build(grid, flow), grid, scale)[1]))
            except (RequestError, FloatingPointError):  # no such grid for this checkpoint; a solver that diverges
                continue
        return max(found, key=np.mean, default=np.full(len(every), -np.inf))

    aim = reference.x[-1] / end_scale(facts, float(reference.times[-1]))
    picture = pipe.decode(aim)
    x, ours = drawn(epd.solvers.epd(table), table.times.tolist())
    every = compared(ours)
    others = {name: competing(name) for name in competitors(facts)}
    best = max(others, key=lambda name: float(others[name].mean()))
    again = drawn(epd.solvers.dpmpp_2m(check, flow), check)[1]
    mean, over = interval(every), interval(every - others[best])
    return Judgement(
        psnr_db=round(mean.mean, 2),
        half_width_db=round(mean.half, 2),
        images=len(noise),
        prompts=len(set(prompts)),
        latent_db=round(float(decibels(x, aim).mean()), 2),
        reference_db=round(float(psnr(again, picture).mean()), 2),
        training_free={n: round(float(d.mean()), 2) if np.isfinite(d).all() else None for n, d in others.items()},
        best_other=best,
        over_best_db=round(over.mean, 2),
        over_best_half_db=round(over.half, 2),
    )


def psnr(one: NDArray[Any], other: NDArray[Any]) -> Array:
    """PSNR in dB of pictures (B, H, W, 3) in [0, 1], per picture; at most 120."""
    error = np.square(one.astype(np.float64) - other).mean((1, 2, 3))
    return np.asarray(10 * np.log10(1 / np.maximum(error, 1e-12)))


def _grid(facts: Facts, name: str, calls: int, own: bool) -> tuple[float, ...]:
    """Of the most steps that fit the calls: the grid users get, or an even one over the model's whole range."""
    for steps in range(calls, 0, -1):
        grid = own_grid(facts, steps, name) if own else curve(facts, steps, 2.0 if facts.family == "sd3" else 1.0)
        *_, last = epd.solve(METHODS[name].build(grid, facts.family == "sd3"), np.zeros((1, 1)), _still)
        if last.calls <= calls:
            return grid
    raise RequestError(f"{name} takes more than {calls} sequential calls")


def _still(points: epd.Points) -> Array:
    return np.zeros_like(points.x)


def end_scale(facts: Facts, sigma: float) -> float:
    """What a state at the last time is divided by to be a latent."""
    return 1.0 if facts.family == "sd3" else math.hypot(1, sigma)
