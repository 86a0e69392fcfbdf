"""The solvers, as coroutines: each yields `Points` where it needs slopes and `State` when a step is finished.

A solver never calls a network, and its maths is operators only: the same coroutine runs on numpy arrays and on torch
tensors, gradients included. `x` is (B, ...); times are sigma, decreasing. Knows nothing of models or devices.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from .schedule import decreasing
from .solve import Array, Coroutine, Points, Solver, State
from .table import point_times

OneStep = Callable[[Array, float, float], Coroutine]

# Adams-Bashforth weights on a uniform grid, newest slope first, by the number of slopes at hand.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class Coefficients(Protocol):
    """What `epd` reads of a table; a training room may give the (N, K) numbers as torch tensors that want gradients.

    Shapes as in `Table`: times (N + 1,), r, w, scale_dir and scale_time (N, K), place (N, K, J), carry (N, Q).
    """

    @property
    def times(self) -> Any: ...
    @property
    def r(self) -> Any: ...
    @property
    def w(self) -> Any: ...
    @property
    def scale_dir(self) -> Any: ...
    @property
    def scale_time(self) -> Any: ...
    @property
    def start(self) -> str: ...
    @property
    def order(self) -> int: ...
    @property
    def midpoint(self) -> str: ...
    @property
    def place(self) -> Any: ...
    @property
    def carry(self) -> Any: ...


def euler(times: Any) -> Solver:
    """Euler in sigma: DDIM for epsilon models, the flow-matching scheduler's own step. Order 1, one call a step."""
    return _repeat(euler_step, times)


def heun(times: Any) -> Solver:
    """Heun (Karras et al. 2022, algorithm 1): order 2, two calls in turn a step; Euler where a step ends at 0."""
    return _repeat(heun_step, times)


def dpm2(times: Any, r: float = 0.5) -> Solver:
    """DPM-Solver-2 (Lu et al. 2022): order 2, midpoint t_next^r t^(1-r); Euler where a step ends at 0.

    Raises ValueError unless r is in (0, 1).
    """
    if not 0 < r < 1:
        raise ValueError(f"dpm2 needs r in (0, 1), got {r}")

    def step(x: Array, t: float, t_next: float) -> Coroutine:
        return dpm2_step(x, t, t_next, r)

    return _repeat(step, times)


def euler_step(x: Array, t: float, t_next: float) -> Coroutine:
    """One Euler step; returns the state (B, ...) at t_next."""
    d = yield from _slope(x, t)
    return x + (t_next - t) * d


def heun_step(x: Array, t: float, t_next: float) -> Coroutine:
    """One Heun step: the mean of the slopes at both ends; returns the state at t_next."""
    d = yield from _slope(x, t)
    x_next = x + (t_next - t) * d
    if t_next == 0:
        return x_next
    d_next = yield from _slope(x_next, t_next)
    return x + (t_next - t) * (d + d_next) / 2


def dpm2_step(x: Array, t: float, t_next: float, r: float = 0.5) -> Coroutine:
    """One DPM-Solver-2 step; returns the state at t_next."""
    d = yield from _slope(x, t)
    if t_next == 0:
        return x + (t_next - t) * d
    t_mid = t_next**r * t ** (1 - r)
    d_mid = yield from _slope(x + (t_mid - t) * d, t_mid)
    return x + (t_next - t) * (d + (d_mid - d) / (2 * r))


def epd(table: Coefficients) -> Solver:
    """The learned solver of `table`: EPD-Solver, EPD-Plugin (order 2 to 4), or a general linear method (history).

    With start "call" or "afs" (arXiv 2507.14797, algorithm 1): a start slope d at (x, t), under "afs" x / sqrt(1 + t^2)
    on the first step instead of a call; the K points are placed by the Adams-Bashforth combination of d and the start
    slopes before it (`order` of them at most), and asked for at once.

    With start "history" only the very first slope is a call of its own; see `Table` for `place`, `carry` and `past`.

    A point of weight zero is not asked for.
    """
    return _from_history(table) if table.start == "history" else _from_start(table)


def _from_start(table: Coefficients) -> Solver:
    def solver(x: Array) -> Coroutine:
        past: list[Array] = []  # start slopes, newest first
        for i, (t, t_next) in enumerate(pairwise(_floats(table.times))):
            analytic = table.start == "afs" and i == 0
            d = x / (1 + t * t) ** 0.5 if analytic else (yield from _slope(x, t))
            past = [d, *past][: table.order]
            direction = sum(c * d for c, d in zip(ADAMS_BASHFORTH[len(past) - 1], past, strict=True))
            asked = _asked(table, i)
            t_k, t_ask, weight = _row(table, i, asked, t, t_next, x)
            slopes = yield Points(x + col(t_k - t, x) * direction, t_ask)
            x = x + (t_next - t) * (col(weight, x) * slopes).sum(0)
            yield State(x, t_next)

    return solver


def _from_history(table: Coefficients) -> Solver:
    carry = [[]] * len(table.w) if table.carry is None else table.carry
    depth = max(table.place.shape[2], len(carry[0]))

    def solver(x: Array) -> Coroutine:
        times = _floats(table.times)
        past: list[Array | None] = [(yield from _slope(x, times[0]))]  # None: a point that was not asked for
        for i, (t, t_next) in enumerate(pairwise(times)):
            asked = _asked(table, i)
            t_k, t_ask, weight = _row(table, i, asked, t, t_next, x)
            place = _like(table.place[i][asked], x)
            direction = sum(col(place[:, j], x) * d for j, d in enumerate(past[: place.shape[1]]) if d is not None)
            slopes = yield Points(x + col(t_k - t, x) * direction, t_ask)
            carried = sum(c * d for c, d in zip(_like(carry[i], x), past, strict=False) if d is not None)
            x = x + (t_next - t) * ((col(weight, x) * slopes).sum(0) + carried)
            new = dict(zip(asked, slopes, strict=True))
            past = [*(new.get(k) for k in range(table.w.shape[1])), *past][:depth]
            yield State(x, t_next)

    return solver


def col(a: Array, x: Array) -> Array:
    """(K,) -> (K, 1, ..., 1), in x's kind: one axis for each of x's (B, ...)."""
    a = _like(a, x)
    return a.reshape(tuple(a.shape) + (1,) * x.ndim)


def _like(a: Any, x: Array) -> Array:
    """Numbers as an array of x's kind: numpy float64, or a tensor beside x (one that is a tensor already is kept)."""
    if isinstance(x, np.ndarray):
        return np.asarray(a, dtype=np.float64)
    return a if hasattr(a, "new_tensor") else x.new_tensor(a)


def _floats(times: Any) -> list[float]:
    return [float(t) for t in times]


def _slope(x: Array, t: float) -> Coroutine:
    """Ask for one point; returns its slope (B, ...)."""
    slopes = yield Points(x[None], _like([t], x))
    return slopes[0]


def _asked(table: Coefficients, i: int) -> list[int]:
    """The points of interval i that have a weight."""
    return [k for k, w in enumerate(table.w[i]) if w != 0]


def _row(table: Coefficients, i: int, asked: list[int], t: float, t_next: float, x: Array) -> tuple[Array, ...]:
    """Of the asked points: their times, the times to ask at, and the weights of their slopes; (P,) each, x's kind.

    (x - D(x, s t_k)) / t_k = s slope(x, s t_k): a time scale s goes into the time asked at and into the weight.
    """
    r, w = _like(table.r[i][asked], x), _like(table.w[i][asked], x)
    scale_dir, scale_time = _like(table.scale_dir[i][asked], x), _like(table.scale_time[i][asked], x)
    t_k = point_times(table.midpoint, t, t_next, r)
    return t_k, scale_time * t_k, w * scale_dir * scale_time


def _repeat(step: OneStep, times: Any) -> Solver:
    """A one-step method over a grid."""
    grid = _floats(decreasing(times))

    def solver(x: Array) -> Coroutine:
        for t, t_next in pairwise(grid):
            x = yield from step(x, t, t_next)
            yield State(x, t_next)

    return solver
