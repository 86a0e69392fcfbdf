"""One-step methods: each a sub-generator `step(x, t, t_next)` that returns the next state, and its solver.

`x` is (B, ...); times are floats, t > t_next >= 0. Knows nothing of models or devices.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ..solve import Array, Coroutine, Solver, State
from .base import alpha, ask, grid

OneStep = Callable[[Array, float, float], Coroutine]


def euler(times: Any) -> Solver:
    """Euler in sigma: DDIM (arXiv 2010.02502) for epsilon models, the flow-matching scheduler's own step.

    Order 1, one call a step. diffusers: EulerDiscrete, FlowMatchEulerDiscrete, DDIM with eta 0.
    """
    return repeat(euler_step, grid(times))


def heun(times: Any) -> Solver:
    """Heun's method (Karras et al. 2022, arXiv 2206.00364, algorithm 1 without churn).

    Order 2, two calls in turn a step; one, by Euler, where a step ends at 0.
    diffusers: HeunDiscrete, FlowMatchHeunDiscrete.
    """
    return repeat(heun_step, grid(times))


def dpm2(times: Any, r: float = 0.5) -> Solver:
    """DPM-Solver-2 (Lu et al. 2022, arXiv 2206.00927), midpoint t_next^r t^(1-r), in flow matching, too.

    Order 2, two calls in turn a step; one, by Euler, where a step ends at 0. Raises ValueError unless r is in (0, 1).
    """
    _inside("dpm2", r)

    def step(x: Array, t: float, t_next: float) -> Coroutine:
        return dpm2_step(x, t, t_next, r)

    return repeat(step, grid(times))


def dpmpp_2s(times: Any, flow: bool = False, r: float = 0.5) -> Solver:
    """DPM-Solver++(2S), singlestep (Lu et al. 2022, arXiv 2211.01095, algorithm 1): midpoint at lambda + r h.

    Order 2, two calls in turn a step; one, by Euler, where a step ends at 0. Where a flow step starts at t = 1, where
    lambda is -inf and has no middle, that step is DPM-Solver-2's. Raises ValueError unless r is in (0, 1).

    diffusers' DPMSolverSinglestep takes the midpoints out of its grid instead: a step of ours is two of its timesteps.
    Its end differs with an even number of timesteps (two Euler steps); with an odd one it is ours.
    """
    _inside("dpmpp_2s", r)

    def step(x: Array, t: float, t_next: float) -> Coroutine:
        return dpmpp_2s_step(x, t, t_next, flow, r)

    return repeat(step, grid(times, flow))


def euler_step(x: Array, t: float, t_next: float) -> Coroutine:
    """One Euler step; returns the state (B, ...) at t_next."""
    d = yield from ask(x, t)
    return x + (t_next - t) * d


def heun_step(x: Array, t: float, t_next: float) -> Coroutine:
    """One Heun step: the mean of the slopes at both ends; returns the state at t_next."""
    d = yield from ask(x, t)
    x_next = x + (t_next - t) * d
    if t_next == 0:
        return x_next
    d_next = yield from ask(x_next, t_next)
    return x + (t_next - t) * (d + d_next) / 2


def dpm2_step(x: Array, t: float, t_next: float, r: float = 0.5) -> Coroutine:
    """One DPM-Solver-2 step; returns the state at t_next."""
    d = yield from ask(x, t)
    if t_next == 0:
        return x + (t_next - t) * d
    t_mid = t_next**r * t ** (1 - r)
    d_mid = yield from ask(x + (t_mid - t) * d, t_mid)
    return x + (t_next - t) * (d + (d_mid - d) / (2 * r))


def dpmpp_2s_step(x: Array, t: float, t_next: float, flow: bool = False, r: float = 0.5) -> Coroutine:
    """One DPM-Solver++(2S) step; returns the state at t_next."""
    if t_next == 0:
        return (yield from euler_step(x, t, t_next))
    if alpha(t, flow) == 0:
        return (yield from dpm2_step(x, t, t_next, r))
    ratio = math.exp(r * math.log(t_next / alpha(t_next, flow)) + (1 - r) * math.log(t / alpha(t, flow)))
    t_mid = ratio / (1 + ratio) if flow else ratio
    d = yield from ask(x, t)
    x_mid = x + (t_mid - t) * d
    d_mid = yield from ask(x_mid, t_mid)
    change = (x_mid - t_mid * d_mid) - (x - t * d)  # of the denoised estimate
    return x + (t_next - t) * d + (1 - t_next / t) / (2 * r) * change


def repeat(step: OneStep, times: list[float]) -> Solver:
    """A one-step method over a checked grid."""

    def solver(x: Array) -> Coroutine:
        for t, t_next in pairwise(times):
            x = yield from step(x, t, t_next)
            yield State(x, t_next)

    return solver


def _inside(name: str, r: float) -> None:
    if not 0 < r < 1:
        raise ValueError(f"{name} needs r in (0, 1), got {r}")
