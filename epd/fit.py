"""Fits a table to a model by least squares, from forward passes alone: no gradients, no torch, on any device.

The student is a table that starts from history (see `epd.Table`): one request of K points an interval. Its coefficients
are found interval by interval, on the student's own states x, against converged trajectories of the same start noise:

    place   least squares of (teacher(t_k) - x) / (t_k - t) on the slopes already known, for every point k
    ask     one request at the placed points
    update  least squares of (teacher(t_next) - x) / (t_next - t) on the new slopes and the known ones

Every latent entry of every trajectory is an equation, so a few trajectories are enough. Where the trajectories were
made at a higher precision than the student's slopes, what those lose is fitted along with the error of the grid. Knows
only a slope function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .schedule import Floats, decreasing
from .solve import Points, Slope, Solver, solve
from .solvers import dpm2
from .table import Table, point_times

Array = NDArray[np.float64]
MARGIN = 0.05  # dB by which a design must be better to be taken


@dataclass(frozen=True)
class Design:
    """The shape of a table, chosen before its coefficients are fitted."""

    times: tuple[float, ...]  # (N + 1,) sigma, decreasing; may end at 0
    r: tuple[tuple[float, ...], ...]  # (N, K) positions of the points, arithmetic, in (0, 1]
    place: int = 3  # J: newest known slopes that place a point
    carry: int = 2  # newest known slopes in the update, beside the K new ones
    ridge: float = 1e-4  # pull towards plain coefficients, relative to the mean square of a slope

    def __post_init__(self) -> None:
        if self.place < 1 or self.carry < 0 or not self.ridge >= 0:
            raise ValueError(f"a design needs place >= 1, carry >= 0 and ridge >= 0, got {self}")
        if len(self.r) != len(self.times) - 1:
            raise ValueError(f"r must have one row for each of {len(self.times) - 1} intervals, got {len(self.r)}")
        if (
            len({len(row) for row in self.r}) != 1
            or not self.r[0]
            or not all(0 < r <= 1 for row in self.r for r in row)
        ):
            raise ValueError(f"r must be rows of one length with numbers in (0, 1], got {self.r}")

    @property
    def directions(self) -> int:
        """K, points asked for at once."""
        return len(self.r[0])

    def begins_as(self, other: Design) -> int:
        """Intervals at the start whose requests are those of another design as well."""
        if (self.place, self.carry, self.ridge) != (other.place, other.carry, other.ridge):
            return 0
        ends = zip(zip(self.times[1:], self.r, strict=True), zip(other.times[1:], other.r, strict=True), strict=True)
        return next((i for i, (ours, theirs) in enumerate(ends) if ours != theirs), len(self.r))

    @property
    def sequential_calls(self) -> int:
        """N + 1: the very first slope, then one request an interval."""
        return len(self.times)


@dataclass(frozen=True)
class Trajectories:
    """Converged solutions from B start states, readable at every time between the first and the last."""

    times: Floats  # (M + 1,) decreasing
    x: Array  # (M + 1, B, ...) states
    d: Array  # (M + 1, B, ...) slopes there; the last is not used where times end at 0

    def at(self, t: float) -> Array:
        """States (B, ...) at time t: cubic Hermite between two times, quadratic where the slope at 0 is not known."""
        i = int(np.clip(np.searchsorted(-self.times, -t, side="right") - 1, 0, len(self.times) - 2))
        h = self.times[i + 1] - self.times[i]
        u = (t - self.times[i]) / h
        x, rise, d = self.x[i], self.x[i + 1] - self.x[i], h * self.d[i]
        if self.times[i + 1] == 0:
            return np.asarray(x + u * d + u * u * (rise - d))
        e = h * self.d[i + 1]
        return np.asarray(x + u * d + u * u * (3 * rise - 2 * d - e) + u**3 * (d + e - 2 * rise))


def teach(slope: Slope, x: Array, times: Any, method: Callable[[Any], Solver] = dpm2) -> Trajectories:
    """Solves from states x (B, ...) at times[0] on a fine grid. DPM-Solver-2: 2 requests a step, 1 more at the end.

    `times` has M intervals, many more than any student; it may end at 0. States and slopes are kept as float32.
    """
    grid = decreasing(times)
    known: dict[float, Array] = {}
    wanted = set(grid.tolist())

    def recording(points: Points) -> Array:
        answer, t = slope(points), float(points.t[0])
        if t in wanted:  # a step's own state, not a midpoint
            known[t] = answer[0].astype(np.float32)
        return np.asarray(answer)

    states = [np.asarray(x, np.float32)]
    for step in solve(method(grid), x, recording):
        states.append(step.x.astype(np.float32))
    if grid[-1] > 0:
        recording(Points(step.x[None], grid[-1:]))
    slopes = [known.get(float(t), np.zeros_like(states[0])) for t in grid]
    return Trajectories(grid, np.stack(states), np.stack(slopes))


def fit(design: Design, slope: Slope, teacher: Trajectories, learn: int | None = None) -> tuple[Table, Array]:
    """The table of a design, and the states it ends at.

    Parameters
    ----------
    design : Design
        Its grid begins and ends where the teacher's does.
    slope : callable
        As of `epd.solve`, over the teacher's B images; asked N + 1 times.
    teacher : Trajectories
    learn : int, optional
        Only the first `learn` images are learned from; the others are carried along, to be judged by. None: all.

    Returns
    -------
    Table, (B, ...) float64

    Raises
    ------
    ValueError
        The grids do not begin or end together.
    """
    times = decreasing(design.times)
    if not np.allclose(times[[0, -1]], teacher.times[[0, -1]], rtol=1e-9, atol=0):
        raise ValueError(
            f"the grid runs from {times[0]:g} to {times[-1]:g}, the teacher's from {teacher.times[0]:g} to "
            f"{teacher.times[-1]:g}; they must be the same"
        )
    n, k = len(design.r), design.directions
    place, w, carry = np.zeros((n, k, design.place)), np.zeros((n, k)), np.zeros((n, max(design.carry, 1)))
    x = teacher.x[0].astype(np.float64)
    past = [_ask(slope, x[None], times[:1])[0]]
    for i, (t, t_next) in enumerate(pairwise(times)):
        t_k = point_times("arithmetic", t, t_next, np.array(design.r[i]))
        placing = past[: design.place]
        x_k = np.empty((k, *x.shape))
        for j, time in enumerate(t_k):
            coefficients = _solve(placing, (teacher.at(time) - x) / (time - t), _first(len(placing)), design, learn)
            place[i, j, : len(placing)] = coefficients
            x_k[j] = x + (time - t) * _sum(coefficients, placing)
        new = list(_ask(slope, x_k, t_k))
        slopes = new + past[: design.carry]
        plain = np.concatenate([np.full(k, 1 / k), np.zeros(len(slopes) - k)])
        coefficients = _solve(slopes, (teacher.at(t_next) - x) / (t_next - t), plain, design, learn)
        w[i], carry[i, : len(slopes) - k] = coefficients[:k], coefficients[k:]
        x = x + (t_next - t) * _sum(coefficients, slopes)
        past = (new + past)[: max(design.place, design.carry)]
    table = Table(
        times=times,
        r=np.array(design.r),
        w=w,
        start="history",
        midpoint="arithmetic",
        weights="free",
        place=place,
        carry=carry if design.carry else None,
    )
    return table, x


def decibels(x: Array, reference: Array) -> Array:
    """How close states (B, ...) are to a reference, in dB, per image: 10 log10 of its power over the error's."""
    axes = tuple(range(1, x.ndim))
    power, error = np.square(reference, dtype=np.float64).mean(axes), np.square(x - reference).mean(axes)
    return np.asarray(10 * np.log10(power / np.maximum(error, 1e-30)))


def search(
    score: Callable[[Design], float], starts: Sequence[Design], moves: Callable[[Design], Iterable[Design]], budget: int
) -> Iterator[tuple[Design, float]]:
    """Climbs from the best of `starts` through its neighbours; yields each better design with its score.

    `score` is asked at most `budget` times, never twice for one design. `moves` lists the neighbours of a design, those
    most likely to help first, always in one order: what helped is tried again, then what comes after it. A neighbour
    is better from `MARGIN` on, for a score is a mean over few images.
    """
    known: dict[Design, float] = {}

    def scored(design: Design) -> float:
        if design not in known:
            known[design] = score(design)
        return known[design]

    best = None
    for design in starts:
        if len(known) < budget and (best is None or scored(design) > scored(best)):
            best = design
            yield best, scored(best)
    place, tried = 0, 0  # in the list of neighbours; of the best design's neighbours
    while best is not None and tried < len(neighbours := list(moves(best))):
        design = neighbours[place % len(neighbours)]
        if design not in known and len(known) >= budget:
            return
        if design not in known and scored(design) >= scored(best) + MARGIN:
            best, tried = design, 0
            yield best, scored(best)
        else:
            place, tried = (place + 1) % len(neighbours), tried + 1


def _ask(slope: Slope, x: Array, t: Floats) -> Array:
    answer = np.asarray(slope(Points(x, t)), np.float64)
    if answer.shape != x.shape:
        raise ValueError(f"slope answered shape {answer.shape} to points of shape {x.shape}")
    if not np.isfinite(answer).all():
        raise FloatingPointError(f"a slope asked for at times {t.tolist()} is not finite")
    return answer


def _solve(slopes: list[Array], target: Array, plain: Array, design: Design, learn: int | None) -> Array:
    """Coefficients of the slopes nearest to the target, pulled towards `plain` ones."""
    a: Array = np.stack([slope[:learn].ravel() for slope in slopes])
    gram: Array = a @ a.T
    pull = design.ridge * np.trace(gram) / len(a)
    missing: Array = a @ (target[:learn].ravel() - plain @ a)
    change: Array = np.linalg.lstsq(gram + pull * np.eye(len(a)), missing, rcond=None)[0]  # slopes may be collinear
    return np.asarray(plain + change)


def _sum(coefficients: Array, slopes: list[Array]) -> Array:
    return np.asarray(sum(c * slope for c, slope in zip(coefficients, slopes, strict=True)), np.float64)


def _first(n: int) -> Array:
    return np.asarray(np.eye(n)[0])
