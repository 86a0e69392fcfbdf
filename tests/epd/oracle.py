"""Closed-form networks: the Gaussian mixtures of the golden trajectories, and an ODE with a known solution.

Written with numpy; the torch versions are the same formulas through `torch` as the array module `xp`.
"""

import json
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
MEANS = np.array([[0.9, -0.4, 0.3, 1.2], [-0.7, 0.8, -1.1, 0.2]])
WEIGHTS = (0.35, 0.65)
S2 = 0.15


def golden():
    """{case name: (facts, {array name: array})}."""
    facts = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))
    with np.load(DATA / "golden.npz") as arrays:
        stored = {key: arrays[key] for key in arrays.files}
    return {
        case: (fact, {key.split("/")[1]: value for key, value in stored.items() if key.startswith(case + "/")})
        for case, fact in facts.items()
    }


def _expand(t, x):
    """(P,) or (P, B) times over (P, B, C, H, W)."""
    return t.reshape(tuple(t.shape) + (1,) * (x.ndim - t.ndim))


def _mean(x, shrink, var, xp):
    """Posterior mean of the mixture's component means, shape of x; shrink, var broadcast over x."""
    means = MEANS.reshape(2, 4, 1, 1) if xp is np else xp.tensor(MEANS.reshape(2, 4, 1, 1))
    logs = [
        np.log(WEIGHTS[k]) - (((x - shrink * means[k]) ** 2).sum((-3, -2, -1)) / (2 * var[..., 0, 0, 0]))
        for k in (0, 1)
    ]
    first = 1 / (1 + xp.exp((logs[1] - logs[0]).clip(-700, 700)))
    first = first[..., None, None, None]
    return first * means[0] + (1 - first) * means[1]


def edm_slope(points, xp=np):
    x, t = points.x, _expand(points.t, points.x)
    denoised = (S2 * x + t**2 * _mean(x, 0 * t + 1, S2 + t**2, xp)) / (S2 + t**2)
    return (x - denoised) / t


def flow_slope(points, xp=np):
    x, t = points.x, _expand(points.t, points.x)
    a = 1 - t
    var = a**2 * S2 + t**2
    mean = _mean(x, a, var, xp)
    return (x - (mean + a * S2 / var * (x - a * mean))) / t


def ode_slope(points):
    """One Gaussian of variance S2 at 0: slope x t / (S2 + t^2)."""
    t = _expand(points.t, points.x)
    return points.x * t / (S2 + t**2)


def ode_solution(x, t, t_next):
    """x(t_next) of `ode_slope` from x at t."""
    return x * np.sqrt((S2 + t_next**2) / (S2 + t**2))


class Counting:
    """A slope function that remembers the requests it answered."""

    def __init__(self, slope):
        self.slope, self.calls, self.evaluations, self.times = slope, 0, 0, []

    def __call__(self, points):
        self.calls += 1
        self.evaluations += points.x.shape[0]
        self.times.append(points.t)
        return self.slope(points)
