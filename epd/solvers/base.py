"""What every solver is written with: asking for a slope, arrays of the state's kind, the sign of noise in time.

Knows nothing of particular methods.
"""

import math
from typing import Any

import numpy as np

from ..schedule import decreasing
from ..solve import Array, Coroutine, Points


def ask(x: Array, t: float) -> Coroutine:
    """Ask for the slope at one point per image, (B, ...) at time t; returns it, (B, ...)."""
    slopes = yield Points(x[None], like(t, x).reshape(1))
    return slopes[0]


def col(a: Array, x: Array) -> Array:
    """(K,) -> (K, 1, ..., 1), in x's kind: one axis for each of x's (B, ...)."""
    a = like(a, x)
    return a.reshape(tuple(a.shape) + (1,) * x.ndim)


def like(a: Any, x: Array) -> Array:
    """Numbers as an array of x's kind: numpy float64, or a tensor beside x (one that is a tensor already is kept)."""
    if isinstance(x, np.ndarray):
        return np.asarray(a, dtype=np.float64)
    return a if hasattr(a, "new_tensor") else x.new_tensor(a)


def floats(times: Any) -> list[Any]:
    """Times as Python floats, unchecked; a tensor's stay tensors, for its gradient."""
    return list(times) if hasattr(times, "new_tensor") else [float(t) for t in times]


def grid(times: Any, flow: bool = False) -> list[float]:
    """A checked grid as Python floats: N + 1 strictly decreasing times >= 0; for flow matching in [0, 1].

    Raises
    ------
    ValueError
        The times break a rule of `epd.schedule.decreasing`, or exceed 1 in a flow grid.
    """
    checked = floats(decreasing(times))
    if flow and checked[0] > 1:
        raise ValueError(f"flow matching needs times in [0, 1], got {checked[0]:g}: leave flow out for a sigma grid")
    return checked


def alpha(t: float, flow: bool) -> float:
    """The signal's factor in x_t = alpha x_0 + t n: 1 - t for flow matching, 1 otherwise."""
    return 1 - t if flow else 1.0


def half_logsnr(t: float, flow: bool) -> float:
    """lambda = log(alpha / t): -inf at flow's t = 1 (no signal), inf at t = 0 (no noise)."""
    signal = alpha(t, flow)
    if signal == 0 or t == 0:
        return math.inf if t == 0 else -math.inf
    return math.log(signal / t)
