"""The time grids that belong to a checkpoint: its own scheduler's, and the one the published tables take for it.

Knows nothing of sessions.
"""

from __future__ import annotations

import epd

from .bundle import Facts
from .errors import RequestError
from .slopes import variance_preserving

_UNSUPPORTED = {  # settings of a scheduler that would change the grid or the step -> value that does not
    "sd3": {"use_dynamic_shifting": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
            "use_beta_sigmas": False, "invert_sigmas": False, "stochastic_sampling": False, "shift_terminal": None},
    "sd15": {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
             "clip_sample": False, "thresholding": False, "rescale_betas_zero_snr": False, "trained_betas": None},
}  # fmt: skip


def own_grid(facts: Facts, steps: int) -> tuple[float, ...]:
    """The grid that the checkpoint's scheduler has in diffusers, final value included: N + 1 sigmas.

    Raises
    ------
    RequestError
        A setting of the scheduler that is not supported, or a number of steps that it does not take.
    """
    schedule = facts.schedule
    for key, neutral in _UNSUPPORTED[facts.family].items():
        if schedule.get(key, neutral) != neutral:
            raise RequestError(
                f"{facts.name}: its scheduler sets {key} = {schedule[key]!r}, which is not supported; "
                "give --table with a grid of its own"
            )
    train_steps = _train_steps(facts)
    if not 1 <= steps <= train_steps:
        raise RequestError(f"the number of steps must be from 1 to {train_steps}, got {steps}")
    vp = variance_preserving(facts) if facts.family == "sd15" else None
    try:
        if vp is None:
            times = epd.schedule.flow_euler(steps, schedule.get("shift", 1.0), train_steps)
        else:
            times = epd.schedule.ddim(
                steps,
                vp,
                spacing=schedule.get("timestep_spacing", "leading"),
                steps_offset=schedule.get("steps_offset", 0),
                set_alpha_to_one=schedule.get("set_alpha_to_one", True),
            )
    except ValueError as error:
        raise RequestError(f"{facts.name} cannot be drawn in {steps} steps: {error}") from None
    return tuple(times.tolist())


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
