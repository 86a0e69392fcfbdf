"""The time grids that belong to a checkpoint: its own scheduler's, and the one the published tables take for it.

Knows nothing of sessions.
"""

from __future__ import annotations

import epd
from epd.solvers import METHODS

from .errors import RequestError
from .facts import Facts
from .slopes import variance_preserving


def own_grid(facts: Facts, steps: int, solver: str = "euler") -> tuple[float, ...]:
    """The grid that a solver has in diffusers with the checkpoint's scheduler, final value included: N + 1 sigmas.

    `solver`: a name of `METHODS`, or epd: an untrained table's grid is Euler's, the scheduler's own.

    Raises
    ------
    RequestError
        An unknown solver, a setting of the scheduler that is not supported, or a number of steps that it does not take.
    """
    train_steps = _train_steps(facts)
    if not 1 <= steps <= train_steps:
        raise RequestError(f"the number of steps must be from 1 to {train_steps}, got {steps}")
    method = {**METHODS, "epd": METHODS["euler"]}.get(solver)
    if method is None:
        raise RequestError(f"unknown solver {solver!r}; choose from {', '.join([*METHODS, 'epd'])}")
    try:
        return tuple(method.times(steps, facts.family, facts.schedule).tolist())
    except ValueError as error:
        raise RequestError(
            f"{facts.name} has no grid of {steps} steps: {error}; give --table with a grid of its own"
        ) from None


def published_grid(facts: Facts, steps: int) -> tuple[float, ...]:
    """The grid of the EPD authors' tables for this checkpoint's noise schedule: N + 1 sigmas, the last above 0."""
    if facts.family == "sd3":
        times = epd.schedule.flow(steps, facts.schedule.get("shift", 1.0), _train_steps(facts))
    else:
        times = epd.schedule.discrete(steps, variance_preserving(facts))
    return tuple(times.tolist())


def largest(facts: Facts) -> float:
    """The largest sigma the checkpoint was trained for."""
    if facts.family == "sd3":
        return 1.0
    return float(variance_preserving(facts).sigma(_train_steps(facts) - 1))


def _train_steps(facts: Facts) -> int:
    return int(facts.schedule.get("num_train_timesteps", 1000))
