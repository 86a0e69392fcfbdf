"""Time grids: pure functions that return N + 1 strictly decreasing float64 times (sigma), for N intervals.

Knows nothing of solvers. Times are noise levels: sigma of x_t = x_0 + sigma n for EDM and variance preserving (VP)
models, the mixing fraction t of x_t = (1 - t) x_0 + t n for flow matching.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def decreasing(times: Any) -> Floats:
    """Check a grid and return it as float64 (N + 1,): finite, strictly decreasing, >= 0 (0 at the end only), N >= 1."""
    grid = np.array(times, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"times must be N + 1 >= 2 numbers, got shape {grid.shape}")
    if not np.isfinite(grid).all():
        raise ValueError("times must be finite")
    if not (np.diff(grid) < 0).all():
        raise ValueError("times must be strictly decreasing")
    if grid[-1] < 0:
        raise ValueError("times must not be negative")
    return grid


def polynomial(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Floats:
    """n + 1 decreasing times, evenly spaced in sigma^(1/rho) (Karras et al. 2022, equation 5, without the final 0)."""
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _grid(n, (top + _even(n) * (bottom - top)) ** rho)


def logsnr(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Floats:
    """n + 1 decreasing times, evenly spaced in log sigma."""
    return _grid(n, sigma_max * (sigma_min / sigma_max) ** _even(n))


def time_uniform(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 1.0, eps_s: float = 1e-3
) -> Floats:
    """n + 1 decreasing times on the continuous VP curve through sigma_max (u = 1) and sigma_min (u = eps_s).

    sigma(u) = sqrt(exp(beta_d u^2 / 2 + beta_min u) - 1), u evenly spaced in u^(1/rho) (Song et al. 2021, VP SDE).
    """
    top, bottom = np.log1p(sigma_max**2), np.log1p(sigma_min**2)
    beta_d = 2 * (bottom / eps_s - top) / (eps_s - 1)
    beta_min = top - beta_d / 2
    u = (1 + _even(n) * (eps_s ** (1 / rho) - 1)) ** rho
    return _grid(n, np.sqrt(np.expm1(beta_d * u**2 / 2 + beta_min * u)))


@dataclass(frozen=True)
class VP:
    """The discrete variance preserving noise schedule of Stable Diffusion 1.5 and its kin, and its time maps.

    sigma = sqrt((1 - abar) / abar); between network times log(alpha) = log(abar) / 2 is interpolated linearly.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    beta_schedule: str = "scaled_linear"  # "scaled_linear" (linear in sqrt(beta)) | "linear"

    def __post_init__(self) -> None:
        if self.beta_schedule not in ("scaled_linear", "linear"):
            raise ValueError(f"beta_schedule must be scaled_linear or linear, got {self.beta_schedule!r}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"betas must satisfy 0 < start <= end < 1, got {self.beta_start}, {self.beta_end}")

    @cached_property
    def alphas_cumprod(self) -> Floats:
        """abar at network times 0 .. num_train_timesteps - 1, float64, decreasing."""
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        betas = np.linspace(self.beta_start**power, self.beta_end**power, self.num_train_timesteps) ** (1 / power)
        return np.cumprod(1 - betas, dtype=np.float64)

    def sigma(self, time: Any) -> Floats:
        """Sigma at network times in [0, num_train_timesteps - 1] (fractional; clamped to that range)."""
        steps = np.arange(self.num_train_timesteps)
        return np.asarray(np.sqrt(np.expm1(-np.interp(time, steps, np.log(self.alphas_cumprod)))))

    def time(self, sigma: Any) -> Floats:
        """Network time, fractional, of any sigma >= 0: the inverse of `sigma`, clamped at both ends."""
        steps = np.arange(self.num_train_timesteps)
        rising = -np.log(self.alphas_cumprod)
        return np.asarray(np.interp(np.log1p(np.square(sigma, dtype=np.float64)), rising, steps))


SD15 = VP()


def discrete(n: int, vp: VP = SD15, rho: float = 1.0, eps_s: float = 1e-3) -> Floats:
    """n + 1 decreasing times: sigma at u from 1 to eps_s, evenly spaced in u^(1/rho); network time = steps * u - 1.

    The grid of the published SD1.5 tables (rho 1): 14.61 .. 0.0292.
    """
    u = (1 + _even(n) * (eps_s ** (1 / rho) - 1)) ** rho
    return _grid(n, vp.sigma(vp.num_train_timesteps * u - 1))


def flow(n: int, shift: float = 3.0, num_train_timesteps: int = 1000) -> Floats:
    """n + 1 decreasing times > 0: `flow_euler` of n + 1 steps without its final 0, the grid of published SD3 tables."""
    _even(n)
    return flow_euler(n + 1, shift, num_train_timesteps)[:-1]


def flow_euler(n: int, shift: float = 3.0, num_train_timesteps: int = 1000) -> Floats:
    """n + 1 decreasing times ending at 0: the sigmas of diffusers' FlowMatchEulerDiscreteScheduler.set_timesteps(n).

    Evenly spaced between 1 and the shifted smallest training sigma, then shifted: s -> shift s / (1 + (shift - 1) s).
    (diffusers shifts the smallest one twice; so do we.)
    Network time = num_train_timesteps * sigma. No dynamic shifting.
    """

    def shifted(s: Any) -> Any:
        return shift * s / (1 + (shift - 1) * s)

    _even(n)
    return _grid(n, np.append(shifted(np.linspace(1.0, shifted(1 / num_train_timesteps), n)), 0.0))


def flow_even(n: int, shift: float = 3.0, num_train_timesteps: int = 1000) -> Floats:
    """n + 1 decreasing times ending at 0: diffusers' DPMSolverMultistepScheduler with use_flow_sigmas.

    Evenly spaced from 1 - 1 / num_train_timesteps to 0, then shifted. Unlike `flow_euler` it has no last node close to
    0, before which multistep methods extrapolate far.
    """
    s = (1 - 1 / num_train_timesteps) * (1 - _even(n))
    return _grid(n, shift * s / (1 + (shift - 1) * s))


def shifted(n: int, shift: float = 1.0, vp: VP | None = None) -> Floats:
    """n + 1 decreasing times over the whole range of a model, most of them early (shift > 1) or late (shift < 1).

    u evenly spaced from 1 to 0, then u -> shift u / (1 + (shift - 1) u). Flow matching (`vp` None): the times are u,
    from 1 to 0. Otherwise sigma at network time (num_train_timesteps - 1) u: 14.61 .. 0.0292 for Stable Diffusion 1.5.
    """
    if not shift > 0:
        raise ValueError(f"shift must be > 0, got {shift}")
    u = 1 - _even(n)
    u = shift * u / (1 + (shift - 1) * u)
    return _grid(n, u if vp is None else vp.sigma((vp.num_train_timesteps - 1) * u))


def flow_dynamic(n: int, mu: float, num_train_timesteps: int = 1000) -> Floats:
    """n + 1 decreasing times > 0: the grid of published FLUX tables, shifted by e^mu (mu: 1.15 at 1024 x 1024).

    diffusers' FlowMatchEulerDiscreteScheduler with dynamic shifting, set_timesteps(n + 1, mu=mu), its final 0 dropped;
    unlike `flow`, the smallest training sigma is shifted once.
    """
    s = 1 + _even(n) * (1 / num_train_timesteps - 1)
    shift = np.exp(mu)
    return _grid(n, shift * s / (1 + (shift - 1) * s))


def ddim(
    n: int, vp: VP = SD15, spacing: str = "leading", steps_offset: int = 1, set_alpha_to_one: bool = False
) -> Floats:
    """n + 1 decreasing times: diffusers' DDIMScheduler of n steps as sigmas, its final value (often 0) included.

    Defaults are those of the SD1.5 checkpoint. Euler on this grid is DDIM with eta 0; the start state is
    randn * sqrt(1 + sigma_0^2) there, not randn * sigma_0, since DDIM starts from unit variance at abar < 1.
    Trap: DDIMScheduler steps down by num_train_timesteps // n whatever its next timestep is; where the two differ
    (`linspace`; `trailing` when n does not divide num_train_timesteps) it mislabels its own state, and we do not.

    Raises
    ------
    ValueError
        Unknown spacing; too many steps; or a last step of no length (final time = last timestep).
    """
    _even(n)
    steps = vp.num_train_timesteps
    if spacing == "leading":
        timesteps = np.arange(n)[::-1] * (steps // n) + steps_offset
    elif spacing == "trailing":
        timesteps = np.round(np.arange(steps, 0, -steps / n)).astype(np.int64) - 1
    elif spacing == "linspace":
        timesteps = np.linspace(0, steps - 1, n).round()[::-1].astype(np.int64)
    else:
        raise ValueError(f"spacing must be leading, trailing or linspace, got {spacing!r}")
    if n > steps or timesteps[0] >= steps:
        raise ValueError(f"{n} steps with offset {steps_offset} do not fit {steps} training timesteps")
    before = int(timesteps[-1]) - steps // n
    final = 0.0 if before < 0 and set_alpha_to_one else vp.sigma(max(before, 0))
    sigmas = vp.sigma(timesteps)
    if final >= sigmas[-1]:
        raise ValueError("DDIM's last step has no length: give steps_offset=1 or set_alpha_to_one=True")
    return _grid(n, np.append(sigmas, final))


def lcm(n: int, vp: VP = SD15, original_steps: int = 50) -> Floats:
    """n + 1 decreasing times ending at 0: diffusers' LCMScheduler of n steps as sigmas.

    n <= `original_steps` of the times that latent consistency models are distilled at (Luo et al. 2023, arXiv
    2310.04378): network times k - 1, 2 k - 1 .., k = num_train_timesteps // original_steps, picked evenly from the top.
    """
    _even(n)
    if not n <= original_steps <= vp.num_train_timesteps:
        raise ValueError(f"LCM takes at most its {original_steps} original steps, of {vp.num_train_timesteps} times")
    original = (vp.num_train_timesteps // original_steps) * np.arange(original_steps, 0, -1) - 1
    picked = np.floor(np.linspace(0, original_steps, n, endpoint=False)).astype(np.int64)
    return _grid(n, np.append(vp.sigma(original[picked]), 0.0))


# Settings of a checkpoint's diffusers scheduler that would change grid or step: the value that does not.
_NEUTRAL: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "sd3": {
        "use_dynamic_shifting": (False,),
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "invert_sigmas": (False,),
        "stochastic_sampling": (False,),
        "shift_terminal": (None,),
    },
    "sd15": {
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "use_flow_sigmas": (False, None),
        "clip_sample": (False,),
        "thresholding": (False,),
        "rescale_betas_zero_snr": (False,),
        "trained_betas": (None,),
        "prediction_type": ("epsilon", None),
    },
}


_NUMBERS: dict[str, tuple[tuple[type, ...], float]] = {  # of a configuration: kinds, least
    "num_train_timesteps": ((int,), 1),
    "steps_offset": ((int,), 0),
    "original_inference_steps": ((int,), 1),
    "shift": ((int, float), 1e-6),
    "beta_start": ((int, float), 0),  # VP says what betas must be to one another
    "beta_end": ((int, float), 0),
}


def check_configuration(family: str, config: Mapping[str, Any]) -> None:
    """ValueError unless `of_checkpoint` can take the diffusers scheduler configuration `config`."""
    if family not in _NEUTRAL:
        raise ValueError(f"family must be one of {', '.join(_NEUTRAL)}, got {family!r}")
    for key, neutral in _NEUTRAL[family].items():
        if config.get(key, neutral[0]) not in neutral:
            raise ValueError(f"the checkpoint's scheduler sets {key} = {config[key]!r}, which is not supported")
    for key, (kinds, least) in _NUMBERS.items():
        if key in config and not (type(config[key]) in kinds and least <= config[key] < 1e6):
            told = "a number" if float in kinds else "a whole number"
            raise ValueError(f"the checkpoint's scheduler sets {key} = {config[key]!r:.60}; give {told} from {least:g}")


def vp_of(config: Mapping[str, Any]) -> VP:
    """The noise schedule of a diffusers scheduler configuration, with diffusers' defaults where it is silent."""
    return VP(
        beta_start=config.get("beta_start", 0.0001),
        beta_end=config.get("beta_end", 0.02),
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        beta_schedule=config.get("beta_schedule", "linear"),
    )


def of_checkpoint(n: int, family: str, config: Mapping[str, Any], kind: str = "own") -> Floats:
    """n + 1 decreasing times: a grid of a checkpoint in diffusers, by its scheduler configuration.

    `family` "sd15": that of DDIMScheduler, or if `kind` is "lcm" of LCMScheduler; "sd3": of
    FlowMatchEulerDiscreteScheduler, or if `kind` is "even" that of the solvers which diffusers runs there with
    use_flow_sigmas (`flow_even`). Final value included. `Method.grid` says which kind a method has.

    Raises
    ------
    ValueError
        Another family, a setting that is not supported, or an n that gives no grid.
    """
    check_configuration(family, config)
    if family == "sd3":
        grid = flow_even if kind == "even" else flow_euler
        return grid(n, config.get("shift", 1.0), config.get("num_train_timesteps", 1000))
    if kind == "lcm":
        return lcm(n, vp_of(config), config.get("original_inference_steps", 50))
    return ddim(
        n,
        vp_of(config),
        spacing=config.get("timestep_spacing", "leading"),
        steps_offset=config.get("steps_offset", 0),
        set_alpha_to_one=config.get("set_alpha_to_one", True),
    )


def _even(n: int) -> Floats:
    if n < 1:
        raise ValueError(f"a grid needs at least one interval, got {n}")
    return np.linspace(0.0, 1.0, n + 1)


def _grid(n: int, times: Any) -> Floats:
    grid = decreasing(times)
    if len(grid) != n + 1:
        raise ValueError(f"{n} intervals asked for, this spacing gives {len(grid) - 1}")
    return grid
