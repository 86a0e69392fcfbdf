"""The same solvers as diffusers schedulers, for unmodified pipelines of diffusers and of Optimum.

    pipe.scheduler = EPDScheduler.from_config(pipe.scheduler.config, table=epd.Table.load("table.json"))
    pipe.scheduler = SolverScheduler.from_config(pipe.scheduler.config, solver="dpmpp_2m")

A pipeline evaluates one point at a time: `timesteps` has one entry for every point the solver asks for, in the order it
asks, so the K directions of a step run one call after the other. The pictures are those of our runtime: the solver's
state is kept in float64 numpy, whatever the pipeline computes in (no gradient passes through `step`). StableDiffusion-
Pipeline works on x / alpha, sigma variables, as with EulerDiscreteScheduler; StableDiffusion3Pipeline on the state.

Text to image only: a run starts at the first timestep, and latents changed between two steps are refused.
Needs diffusers and torch, which nothing else in epd does; `import epd` does not import this module.
"""

import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from . import schedule, solvers
from .schedule import Floats
from .solve import Coroutine, Points, Solver, State, solve
from .table import Table

_OWN = ("table", "solver")  # arguments that one of our schedulers has and the other has not
_BEYOND = 1.01  # times the largest trained sigma: where a table may start at most, SD1.5


class _Scheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A coroutine turned inside out: the pipeline evaluates, `step` hands the slopes in.

    `timesteps` (one per point) float32; `init_noise_sigma`: start latents = init_noise_sigma * noise of unit variance.
    """

    order = 1
    _compatibles = [*(kind.name for kind in KarrasDiffusionSchedulers), "FlowMatchEulerDiscreteScheduler"]

    timesteps: torch.Tensor
    init_noise_sigma: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **changes: Any) -> Any:
        """A scheduler for the checkpoint whose scheduler had `config`; `changes` are arguments of the class.

        The family is sd3 if the configuration has a `shift`, else sd15. ValueError for settings that are not supported.
        """
        family = config.get("family", "sd3" if "shift" in config else "sd15")
        schedule.check_configuration(family, config)  # of the settings too that are no arguments here
        arguments = inspect.signature(cls.__init__).parameters
        known = {name: config[name] for name in arguments if name in config}  # diffusers leaves out what was a default
        config = {name: value for name, value in config.items() if name in arguments or name not in _OWN}
        return super().from_config(config, return_unused_kwargs, **{"family": family, **known, **changes})

    @abstractmethod
    def _plan(self, num_inference_steps: int | None) -> tuple[Floats, Solver, float]:
        """Grid, solver, and init_noise_sigma in sigma variables."""

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None) -> None:
        """Makes the grid of N = `num_inference_steps` intervals and a fresh run over it.

        Raises ValueError for an N that the table does not have, or that the checkpoint cannot be drawn in.
        """
        self._drawn_on: tuple[Any, torch.device] | None = None  # generator and device of noise; None in the dry run
        times, self._solver, start = self._plan(num_inference_steps)
        self._sigmas = _asked(self._solver, times)
        self.num_inference_steps = len(times) - 1
        self.init_noise_sigma = 1.0 if self._flow else start
        self._end_scale = 1.0 if self._flow else math.hypot(1, times[-1])
        self.timesteps = torch.tensor(self._network_times(), dtype=torch.float32, device=device)
        self._position = 0  # of the point to be evaluated next
        self._run: Coroutine | None = None

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """What the network takes: x / alpha brought back to unit variance (SD1.5), or the state itself (SD3)."""
        return sample if self._flow else sample / math.hypot(1, self._sigmas[self._position])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Takes the slope (epsilon or velocity) at `sample`; gives the point to evaluate next, at last the latents.

        Parameters
        ----------
        model_output, sample : (B, C, h, w) tensor
            `sample` as the last step gave it; at first the start latents.
        timestep : float or tensor of one
            Of `timesteps`, in order.
        generator : optional
            For solvers that add noise.

        Raises
        ------
        ValueError
            Another timestep or sample than was due.
        """
        self._check_due(timestep, sample)
        self._drawn_on = generator, sample.device
        if self._run is None:
            self._run = self._solver(_numpy(sample))
            self._points: Points = next(self._run)
            self._slopes: list[Floats] = []
        self._slopes.append(_numpy(model_output))
        self._position += 1
        if len(self._slopes) < len(self._points.x):
            x = self._points.x[len(self._slopes)]
        else:
            x = self._advance(self._run)
        self._given = torch.from_numpy(x).to(sample.device, sample.dtype)
        return SchedulerOutput(prev_sample=self._given) if return_dict else (self._given,)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The state of `original_samples` (B, ...) at network times (B,): x0 + sigma n, or (1 - t) x0 + t n."""
        t = self._sigma_of(timesteps.cpu().double().numpy())
        sigma = torch.from_numpy(t).to(original_samples).reshape(-1, *(1,) * (original_samples.ndim - 1))
        return original_samples * ((1 - sigma) if self._flow else 1) + sigma * noise

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def _flow(self) -> bool:
        return bool(self.config.family == "sd3")

    def _network_times(self) -> Floats:
        sigmas = np.array(self._sigmas)
        return sigmas * len(self) if self._flow else schedule.vp_of(self.config).time(sigmas)

    def _sigma_of(self, timesteps: Floats) -> Floats:
        return timesteps / len(self) if self._flow else schedule.vp_of(self.config).sigma(timesteps)

    def _check_due(self, timestep: Any, sample: torch.Tensor) -> None:
        if self._position == len(self._sigmas):
            raise ValueError("all timesteps are done; call set_timesteps for another run")
        due, came = float(self.timesteps[self._position]), float(timestep)
        if abs(came - due) > 1e-3 * max(due, 1):
            raise ValueError(
                f"timestep {came:g} came where {due:g} is due: this scheduler takes all its timesteps in order "
                "(text to image only)"
            )
        if self._run is not None and not torch.equal(sample, self._given):
            raise ValueError("the latents were changed between two steps, which a solver of several calls cannot take")

    def _advance(self, run: Coroutine) -> Floats:
        """Hands the slopes in; the next request's first point, or the latents at the end."""
        answer, self._slopes = np.stack(self._slopes), []
        try:
            event = run.send(answer)
            while not isinstance(event, Points):
                last: State = event
                event = next(run)
        except StopIteration:
            return np.asarray(last.x / self._end_scale)
        self._points = event
        return np.asarray(event.x[0])

    def _noise(self, x: Floats) -> Floats:
        """Unit normals like x, from the generator given to `step`."""
        if self._drawn_on is None:
            return np.zeros_like(x)
        generator, device = self._drawn_on
        return _numpy(randn_tensor(x.shape, generator=generator, device=device, dtype=torch.float32))


class EPDScheduler(_Scheduler):
    """A learned table (EPD-Solver, its plugin, or one fitted to the model) as a scheduler.

    Parameters
    ----------
    table : Table, or its JSON object
        Its grid, its number of steps. One that starts analytically (afs) is refused: a pipeline evaluates the start.
    family : "sd15" | "sd3"
    num_train_timesteps, beta_start, beta_end, beta_schedule, prediction_type
        Of the checkpoint; `from_config` takes them from its scheduler.

    Raises ValueError if table and checkpoint do not fit.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        table: Table | Mapping[str, Any],
        family: str,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        prediction_type: str | None = None,
    ) -> None:
        schedule.check_configuration(family, self.config)
        self.table = (
            table if isinstance(table, Table) else Table.from_json(dict(table) if isinstance(table, Mapping) else table)
        )
        self.register_to_config(table=self.table.to_json())
        first, given = self.table.times[0], self.table.family
        if given not in (None, family):
            raise ValueError(f"the table is for the family {given}, the checkpoint is {family}; give another table")
        if self._flow and abs(first - 1) > 1e-6:
            raise ValueError(f"the table starts at {first:g}, StableDiffusion3Pipeline at 1; give another table")
        largest = self._sigma_of(np.array(len(self) - 1.0))
        if not self._flow and first > _BEYOND * largest:
            raise ValueError(f"the table starts at sigma {first:g}, the checkpoint at most at {largest:.4g}")
        self.set_timesteps(self.table.steps)

    def _plan(self, num_inference_steps: int | None) -> tuple[Floats, Solver, float]:
        steps = self.table.steps
        if num_inference_steps not in (None, steps):
            raise ValueError(
                f"the table has {steps} steps, asked for were {num_inference_steps}; give num_inference_steps={steps}"
            )
        return self.table.times, solvers.epd(self.table), float(self.table.times[0])


class SolverScheduler(_Scheduler):
    """Any training-free solver of `epd.solvers.METHODS` on the checkpoint's own grid, as a scheduler.

    Parameters
    ----------
    solver : str
        Name of a method; one whose times depend on the latents (parallel in time) is refused.
    family : "sd15" | "sd3"
    num_train_timesteps, shift, beta_start, beta_end, beta_schedule, timestep_spacing, steps_offset, set_alpha_to_one,
    prediction_type, original_inference_steps
        Of the checkpoint; `from_config` takes them from its scheduler. They make the grid, `Method.times` says which:
        that of DDIMScheduler or, for lcm, LCMScheduler (sd15); of FlowMatchEulerDiscreteScheduler or, for multistep
        solvers and the like, of use_flow_sigmas (sd3); ending at 0 where the solver adds noise.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        solver: str,
        family: str,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        timestep_spacing: str = "leading",
        steps_offset: int = 1,
        set_alpha_to_one: bool = False,
        prediction_type: str | None = None,
        original_inference_steps: int = 50,
    ) -> None:
        schedule.check_configuration(family, self.config)
        possible = [name for name, method in solvers.METHODS.items() if method.calls and family in method.families]
        if solver not in possible:
            raise ValueError(f"no solver {solver!r} as a scheduler for {family}; choose from {', '.join(possible)}")
        self._method = solvers.METHODS[solver]

    def _plan(self, num_inference_steps: int | None) -> tuple[Floats, Solver, float]:
        if num_inference_steps is None:
            raise ValueError("give num_inference_steps")
        times = self._method.times(num_inference_steps, self.config.family, self.config)
        extra = {"noise": self._noise} if self._method.noisy else {}
        return times, self._method.build(times, self._flow, **extra), math.hypot(1, times[0])


def _asked(solver: Solver, times: Floats) -> list[float]:
    """The times of all points a solver asks for, by a dry run with a network that answers 0."""
    asked: list[float] = []

    def zero(points: Points) -> Floats:
        asked.extend(points.t.tolist())
        return np.zeros_like(points.x)

    for _ in solve(solver, np.zeros((1, 1)), zero):
        pass
    if asked[0] != times[0]:
        raise ValueError(f"a pipeline evaluates the start at {times[0]:g}, this solver asks for {asked[0]:g} first")
    return asked


def _numpy(x: torch.Tensor) -> Floats:
    return np.asarray(x.detach().cpu().double().numpy())
