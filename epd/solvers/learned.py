"""The learned solvers: EPD-Solver, EPD-Plugin and general linear methods, all read from the numbers of a table.

Knows nothing of how the numbers were found.
"""

from itertools import pairwise
from typing import Any, Protocol

from ..solve import Array, Coroutine, Points, Solver, State
from ..table import point_times
from .base import ask, col, floats, like
from .multistep import ADAMS_BASHFORTH


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
        for i, (t, t_next) in enumerate(pairwise(floats(table.times))):
            analytic = table.start == "afs" and i == 0
            d = x / (1 + t * t) ** 0.5 if analytic else (yield from ask(x, t))
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
        times = floats(table.times)
        past: list[Array | None] = [(yield from ask(x, times[0]))]  # None: a point that was not asked for
        for i, (t, t_next) in enumerate(pairwise(times)):
            asked = _asked(table, i)
            t_k, t_ask, weight = _row(table, i, asked, t, t_next, x)
            place = like(table.place[i][asked], x)
            direction = sum(col(place[:, j], x) * d for j, d in enumerate(past[: place.shape[1]]) if d is not None)
            slopes = yield Points(x + col(t_k - t, x) * direction, t_ask)
            carried = sum(c * d for c, d in zip(like(carry[i], x), past, strict=False) if d is not None)
            x = x + (t_next - t) * ((col(weight, x) * slopes).sum(0) + carried)
            new = dict(zip(asked, slopes, strict=True))
            past = [*(new.get(k) for k in range(table.w.shape[1])), *past][:depth]
            yield State(x, t_next)

    return solver


def _asked(table: Coefficients, i: int) -> list[int]:
    """The points of interval i that have a weight."""
    return [k for k, w in enumerate(table.w[i]) if w != 0]


def _row(table: Coefficients, i: int, asked: list[int], t: float, t_next: float, x: Array) -> tuple[Array, ...]:
    """Of the asked points: their times, the times to ask at, and the weights of their slopes; (P,) each, x's kind.

    (x - D(x, s t_k)) / t_k = s slope(x, s t_k): a time scale s goes into the time asked at and into the weight.
    """
    r, w = like(table.r[i][asked], x), like(table.w[i][asked], x)
    scale_dir, scale_time = like(table.scale_dir[i][asked], x), like(table.scale_time[i][asked], x)
    t_k = point_times(table.midpoint, t, t_next, r)
    return t_k, scale_time * t_k, w * scale_dir * scale_time
