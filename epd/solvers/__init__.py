"""The solvers, as coroutines: each yields `Points` where it needs slopes and `State` when a step is finished.

A solver never calls a network, and its maths is operators only: the same coroutine runs on numpy arrays and on torch
tensors, gradients included. `x` is (B, ...); times are sigma, decreasing, of x_0 + t n, or with `flow` in [0, 1], of
(1 - t) x_0 + t n; a grid may start at flow's 1 and end at 0. VP models are solved in sigma variables, x / alpha.
`METHODS` lists the solvers that need no training.
"""

from .base import col
from .learned import Coefficients, epd
from .methods import METHODS, Method
from .multistep import ADAMS_BASHFORTH, deis, dpmpp_2m, dpmpp_3m, ipndm, unipc
from .noisy import Noise, euler_ancestral, lcm
from .one_step import (
    OneStep,
    dpm2,
    dpm2_step,
    dpmpp_2s,
    dpmpp_2s_step,
    euler,
    euler_step,
    heun,
    heun_step,
)

__all__ = [
    "ADAMS_BASHFORTH",
    "METHODS",
    "Coefficients",
    "Method",
    "Noise",
    "OneStep",
    "col",
    "deis",
    "dpm2",
    "dpm2_step",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_2s_step",
    "dpmpp_3m",
    "epd",
    "euler",
    "euler_ancestral",
    "euler_step",
    "heun",
    "heun_step",
    "ipndm",
    "lcm",
    "unipc",
]
