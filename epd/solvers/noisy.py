"""Methods that add noise on the way: ancestral sampling and consistency sampling. The noise is a parameter.

`noise(x)` gives independent unit normals in the shape and kind of the state x (B, ...); it is called once in every step
that does not end at 0. Knows nothing of generators or seeds.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ..schedule import SD15, VP
from ..solve import Array, Coroutine, Solver, State
from .base import alpha, ask, grid

Noise = Callable[[Array], Array]


def euler_ancestral(times: Any, flow: bool = False, *, noise: Noise) -> Solver:
    """Ancestral sampling by Euler steps (Ho et al. 2020, arXiv 2006.11239; Song et al. 2021, arXiv 2011.13456).

    One call a step; order 1 in distribution. In rho = t / alpha: down to rho_next^2 / rho along the slope, and up again
    to rho_next with noise. Equal to diffusers' EulerAncestralDiscrete on a sigma grid; in flow matching it is the same
    step in rho, t = rho / (1 + rho) (diffusers has none), and from t = 1 it goes through the denoised estimate.
    """
    steps = grid(times, flow)

    def solver(x: Array) -> Coroutine:
        for t, t_next in pairwise(steps):
            d = yield from ask(x, t)
            left = (t_next * alpha(t, flow)) / (t * alpha(t_next, flow))  # rho_next / rho, in [0, 1)
            down = left * t_next / alpha(t_next, flow)
            t_down = down / (1 + down) if flow else down
            x = (x + (t_down - t) * d) * (alpha(t_next, flow) / alpha(t_down, flow))
            if t_next > 0:
                x = x + t_next * math.sqrt(1 - left**2) * noise(x)
            yield State(x, t_next)

    return solver


def lcm(times: Any, flow: bool = False, *, noise: Noise, vp: VP = SD15) -> Solver:
    """Consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1) of a latent consistency model.

    One call a step: to the estimate f of x_0, then back to t_next with new noise. For models distilled for it
    (Luo et al. 2023, arXiv 2310.04378); it integrates nothing, so it has no order.

    In flow matching f is the denoised estimate D, as in diffusers' FlowMatchLCM. Otherwise f = c_out D + c_skip x /
    sqrt(1 + t^2) with LCM's boundary scalings at the *network time* of t under `vp`, as in diffusers' LCM (sigma_data
    0.5, timestep_scaling 10; at network time 19 they differ from 1 and 0 by 7e-6 at most, at 0 f is x itself).
    """
    steps = grid(times, flow)

    def solver(x: Array) -> Coroutine:
        for t, t_next in pairwise(steps):
            denoised = x - t * (yield from ask(x, t))
            if not flow:
                scaled = 10.0 * float(vp.time(t)) / 0.5
                c_skip, c_out = 1 / (1 + scaled**2), scaled / math.sqrt(1 + scaled**2)
                denoised = c_out * denoised + c_skip / math.sqrt(1 + t * t) * x
            x = alpha(t_next, flow) * denoised
            if t_next > 0:
                x = x + t_next * noise(x)
            yield State(x, t_next)

    return solver
