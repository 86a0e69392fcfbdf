"""Multistep methods: one call a step, the rest from memory. Adams-Bashforth in t (iPNDM), exponential ones in log-SNR.

With x_t = alpha x_0 + t n, lambda = log(alpha / t) and h = lambda_next - lambda, the ODE is solved exactly by

    x_next = t_next / t x + integral of alpha_next h e^(-h (1 - s)) D(s) ds,  s = (lambda' - lambda) / h from 0 to 1

for the denoised estimate D (DPM-Solver++, UniPC), and alike with the noise estimate (DEIS): a constant estimate is
Euler's step, and what is added to it is sum_j c_j (v_j - v_0) over earlier estimates v_j at positions s_j, where the
method gives the moments sum_j c_j s_j^k, k = 1, 2, .. (`_added`). In sigma variables (VP divided by alpha) alpha is
1, so flow matching (alpha = 1 - t) is the only other family. Knows nothing of models or devices.

Common to all: at flow's t = 1 lambda is -inf and no polynomial in lambda passes there, so the estimate at t = 1 is not
remembered and the order rises one step later. Near there steps in lambda hardly get shorter with more of them: from
t = 1 on order 2 is N^-2 log N. A step that ends at 0 is always Euler's.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from ..solve import Array, Coroutine, Solver, State
from .base import alpha, ask, grid, half_logsnr

# Adams-Bashforth weights on a uniform grid, newest slope first, by the number of slopes at hand.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
_FEW = 15  # steps below which diffusers' DPM-Solver and DEIS lower the order at the end

Moments = Callable[[float, float, bool, int], list[float]]  # (t, t_next, flow, number of nodes) -> moments
Nodes = list[tuple[float, Array]]  # (lambda, or position s on a step; estimate there), newest first


def ipndm(times: Any, order: int = 4) -> Solver:
    """Improved PNDM (Zhang and Chen 2022, arXiv 2204.13902, after Liu et al. 2022, arXiv 2202.09778), `order` 1 to 4.

    One call a step: Adams-Bashforth with the weights of a uniform grid, whatever the grid, started by orders 1, 2, ...
    So it shows order 2 for `order` 2 to 4 (1 for 1): its first step is Euler's, and on a grid that is not uniform the
    weights themselves are right to second order only. Equal to the EPD authors' sampler. ValueError on another order.
    """
    _choice("ipndm", order, (1, 2, 3, 4))
    steps = grid(times)

    def solver(x: Array) -> Coroutine:
        past: list[Array] = []  # slopes, newest first
        for t, t_next in pairwise(steps):
            past = [(yield from ask(x, t)), *past][:order]
            x = x + (t_next - t) * sum(c * d for c, d in zip(ADAMS_BASHFORTH[len(past) - 1], past, strict=True))
            yield State(x, t_next)

    return solver


def dpmpp_2m(times: Any, flow: bool = False, *, lower_order_final: bool = True) -> Solver:
    """DPM-Solver++(2M), multistep (Lu et al. 2022, arXiv 2211.01095, algorithm 2). Order 2, one call a step.

    As diffusers' DPMSolverMultistep (midpoint): the first step is Euler's, and so is the last one of a grid of fewer
    than 15 steps (`lower_order_final`) or that ends at 0.
    """
    return _multistep(times, 2, flow, lower_order_final, _denoised, _dpmpp)


def dpmpp_3m(times: Any, flow: bool = False, *, lower_order_final: bool = True) -> Solver:
    """DPM-Solver++(3M), multistep, as released (github.com/LuChengTHU/dpm-solver). One call a step.

    As diffusers' DPMSolverMultistep of solver_order 3: started by Euler and 2M, ended by 2M and Euler on a grid of
    fewer than 15 steps (`lower_order_final`), by Euler at 0. The released step takes half of the second derivative's
    share, so it shows order 2, and would with an exact start; `unipc` of order 3 predicts with the whole of it.
    """
    return _multistep(times, 3, flow, lower_order_final, _denoised, _dpmpp)


def deis(times: Any, order: int = 2, flow: bool = False, *, lower_order_final: bool = True) -> Solver:
    """DEIS (Zhang and Chen 2022, arXiv 2204.13902), tAB in log rho, `order` 2 or 3. One call a step.

    As diffusers' DEISMultistep (logrho): started by lower orders; on a grid of fewer than 15 steps ended by them, too
    (`lower_order_final`). Shows order 2 for both: its first step is Euler's. ValueError on another order.
    (diffusers' grid of flow sigmas repeats its last value, a step of no length, where ours has none.)
    """
    _choice("deis", order, (2, 3))
    return _multistep(times, order, flow, lower_order_final, _noise, _deis)


def unipc(times: Any, order: int = 2, flow: bool = False, *, lower_order_final: bool = True) -> Solver:
    """UniPC (Zhao et al. 2023, arXiv 2302.04867), B(h) = e^h - 1, data prediction, `order` 2 or 3. One call a step.

    Each new estimate first corrects the state it was made at, then predicts the next: predictor and corrector of
    `order`, started by lower ones. As in diffusers' UniPCMultistep (bh2) the order falls to 1 at the end whatever the
    number of steps (`lower_order_final`), and the last state is not corrected: so it shows order 2 for both. Without
    lower_order_final, on a grid that ends above 0, it shows 3 for 2, and 3 to 3.8 for 3 (a step of order 4, a start of
    order 3). ValueError on another order.
    (diffusers moves flow's t = 1 to 1 - 1e-6; a grid of ours may hold 1.)
    """
    _choice("unipc", order, (2, 3))
    steps = grid(times, flow)
    orders = _orders(steps, order, lower_order_final)

    def solver(x: Array) -> Coroutine:
        past: Nodes = []
        before: tuple[Array, Array, float, float, bool] | None = None  # the last step, to be corrected
        nodes: Nodes = []
        for (t, t_next), this_order in zip(pairwise(steps), orders, strict=True):
            denoised = x - t * (yield from ask(x, t))
            if before is not None:
                x = _unipc_step(*before, [(1.0, denoised), *nodes])
            before = (x, denoised, t, t_next, flow)
            nodes = _nodes(past[: this_order - 1], t, t_next, flow)
            x = _unipc_step(*before, nodes)
            past = _remember(past, denoised, t, flow)
            yield State(x, t_next)

    return solver


def _multistep(
    times: Any, order: int, flow: bool, lower_order_final: bool, estimate: Callable[..., Array], moments: Moments
) -> Solver:
    """Euler's step plus what the estimates of earlier steps add to it."""
    steps = grid(times, flow)
    orders = _orders(steps, order, lower_order_final and len(steps) - 1 < _FEW)

    def solver(x: Array) -> Coroutine:
        past: Nodes = []
        for (t, t_next), this_order in zip(pairwise(steps), orders, strict=True):
            d = yield from ask(x, t)
            now = estimate(x, t, d, flow)
            nodes = _nodes(past[: this_order - 1], t, t_next, flow)
            x = x + (t_next - t) * d + _added(now, nodes, moments(t, t_next, flow, len(nodes)))
            past = _remember(past, now, t, flow)
            yield State(x, t_next)

    return solver


def _unipc_step(x: Array, denoised: Array, t: float, t_next: float, flow: bool, nodes: Nodes) -> Array:
    """From (x, t), where the estimate is `denoised`, to t_next: predictor, or with a node at 1 corrector."""
    known = _unipc(t, t_next, flow, len(nodes))
    return x + (t_next - t) / t * (x - denoised) + _added(denoised, nodes, known)


def _added(now: Array, nodes: Nodes, moments: list[float]) -> Array:
    """sum_j c_j (v_j - now) over the nodes (s_j, v_j), with sum_j c_j s_j^k = moments[k - 1]; 0 without nodes."""
    if not nodes:
        return 0.0
    powers = np.array([[s ** (k + 1) for s, _ in nodes] for k in range(len(nodes))])
    weights = np.linalg.solve(powers, np.array(moments)).tolist()
    return sum(c * (v - now) for c, (_, v) in zip(weights, nodes, strict=True))


def _nodes(past: Nodes, t: float, t_next: float, flow: bool) -> Nodes:
    """What is remembered, (lambda, estimate), at positions s on the step: 0 at t, 1 at t_next, earlier ones < 0."""
    if not past:
        return []
    here = half_logsnr(t, flow)
    h = half_logsnr(t_next, flow) - here
    return [((there - here) / h, v) for there, v in past]


def _remember(past: Nodes, estimate: Array, t: float, flow: bool) -> Nodes:
    """The newest estimate in front of those before it; flow's t = 1, at lambda = -inf, is left out."""
    here = half_logsnr(t, flow)
    return past if here == -math.inf else [(here, estimate), *past][:2]


def _orders(steps: list[float], order: int, lowered: bool) -> list[int]:
    """The order of each step: rising from 1; if `lowered` falling to 1 at the end; 1 for a step to 0."""
    n = len(steps) - 1
    orders = [min(order, i + 1, n - i if lowered else order) for i in range(n)]
    return [*orders[:-1], 1] if steps[-1] == 0 else orders


def _denoised(x: Array, t: float, d: Array, flow: bool) -> Array:
    return x - t * d


def _noise(x: Array, t: float, d: Array, flow: bool) -> Array:
    return x + (1 - t) * d if flow else d


def _dpmpp(t: float, t_next: float, flow: bool, count: int) -> list[float]:
    """As released: half of the constant's share for one node; for two the second moment halved."""
    if count < 2:
        return [(1 - t_next / t) / 2] * count
    first, second = _unipc(t, t_next, flow, 2)
    return [first, second / 2]


def _unipc(t: float, t_next: float, flow: bool, count: int) -> list[float]:
    """Exact, but for one node half of the constant's share."""
    if count < 2:
        return [(1 - t_next / t) / 2] * count
    h = half_logsnr(t_next, flow) - half_logsnr(t, flow)
    return [alpha(t_next, flow) * integral for integral in _integrals(h, count)]


def _deis(t: float, t_next: float, flow: bool, count: int) -> list[float]:
    """Exact for the noise estimate: with n and x_0 changing places, lambda changes sign."""
    if count == 0:
        return []
    h = half_logsnr(t_next, flow) - half_logsnr(t, flow)
    return [t_next * integral for integral in _integrals(-h, count)]


def _integrals(h: float, count: int) -> list[float]:
    """Integral of h e^(-h (1 - s)) s^k ds from 0 to 1 for k = 1 .. count; h finite, not 0."""
    integrals = [-math.expm1(-h)]
    for k in range(1, count + 1):
        integrals.append(1 - k * integrals[-1] / h)
    return integrals[1:]


def _choice(name: str, order: int, choices: tuple[int, ...]) -> None:
    if order not in choices:
        raise ValueError(f"{name} has the orders {', '.join(map(str, choices))}, got {order}")
