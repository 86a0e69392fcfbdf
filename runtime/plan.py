"""What to draw, decided and checked before anything is loaded: size, seeds, guidance, solver, grid.

Knows nothing of sessions or pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import epd
from epd.solve import Solver

from .bundle import Bundle, Facts
from .errors import RequestError
from .slopes import variance_preserving

SOLVERS = ("euler", "heun", "dpm2", "epd")
_BEYOND = 1.01  # times the largest trained sigma: where a table may start at most, SD1.5
DIRECTIONS = 2  # of a start table, if nothing is said
_UNSUPPORTED = {  # settings of a scheduler that would change the grid or the step -> value that does not
    "sd3": {"use_dynamic_shifting": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
            "use_beta_sigmas": False, "invert_sigmas": False, "stochastic_sampling": False, "shift_terminal": None},
    "sd15": {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
             "clip_sample": False, "thresholding": False, "rescale_betas_zero_snr": False, "trained_betas": None},
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One drawing, complete: the same plan draws the same pictures."""

    prompt: str
    negative_prompt: str
    height: int  # pixels
    width: int
    guidance: float
    seeds: tuple[int, ...]  # one per image
    solver: str
    times: tuple[float, ...]  # N + 1 sigmas
    latent_shape: tuple[int, int, int]  # C, h, w
    start_scale: float  # state at times[0] = start_scale * noise of unit variance
    end_scale: float  # latent = state at times[-1] / end_scale
    table: epd.Table | None = None  # epd only
    start_table: bool = False  # the table is `epd.start_table` on the family's grid

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    @property
    def steps(self) -> int:
        """N, the number of intervals."""
        return len(self.times) - 1

    @property
    def directions(self) -> int:
        """K, points asked for at once."""
        return self.table.directions if self.table is not None else 1

    @property
    def coroutine(self) -> Solver:
        if self.table is not None:
            return epd.solvers.epd(self.table)
        return {"euler": epd.solvers.euler, "heun": epd.solvers.heun, "dpm2": epd.solvers.dpm2}[self.solver](self.times)


def make_plan(
    bundle: Bundle,
    prompt: str,
    *,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    num_images_per_prompt: int = 1,
    seed: int = 0,
    solver: str | None = None,
    table: epd.Table | str | Path | None = None,
    k: int | None = None,
) -> Plan:
    """Checks what is asked for against the bundle and fills in its defaults; arguments as of `Pipeline.__call__`.

    Raises
    ------
    RequestError
        Something does not fit; the line says what would.
    """
    facts = bundle.facts
    if num_images_per_prompt < 1:
        raise RequestError(f"the number of images must be 1 or more, got {num_images_per_prompt}")
    if seed < 0:
        raise RequestError(f"a seed must be 0 or more, got {seed}")
    _check_text(prompt, negative_prompt)
    height, width = _size(bundle, height, width)
    name, chosen, source = _solver(bundle, solver, table, k)
    ours = chosen is None
    if chosen is not None:
        _check_table(facts, chosen, source, num_inference_steps)
        times = tuple(chosen.times.tolist())
    else:
        steps = facts.defaults.steps if num_inference_steps is None else num_inference_steps
        times = _grid(facts, steps)
        if name == "epd":
            chosen = epd.start_table(times, DIRECTIONS if k is None else k)
    guidance = guidance_scale
    if guidance is None:
        guidance = facts.defaults.guidance if chosen is None or chosen.guidance is None else chosen.guidance
    if not math.isfinite(guidance):
        raise RequestError(f"the guidance scale must be a finite number, got {guidance}")
    flow = facts.family == "sd3"
    factor = facts.latent.factor
    return Plan(
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        guidance=float(guidance),
        seeds=tuple(range(seed, seed + num_images_per_prompt)),
        solver=name,
        times=times,
        latent_shape=(facts.latent.channels, height // factor, width // factor),
        # DDIM starts from unit variance at abar < 1; published tables start, as their authors do, from sigma itself.
        start_scale=math.hypot(1, times[0]) if ours and not flow else times[0],
        end_scale=1.0 if flow else math.hypot(1, times[-1]),
        table=chosen,
        start_table=ours and chosen is not None,
    )


def _check_text(*prompts: str) -> None:
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise RequestError(f"a prompt must be Unicode text, got {prompt!a:.60}; type it in UTF-8") from None


def _size(bundle: Bundle, height: int | None, width: int | None) -> tuple[int, int]:
    facts = bundle.facts
    own = (facts.defaults.height, facts.defaults.width)
    default = own if (own[0] and own[1]) or (height and width) else bundle.sample_size()
    high = default[0] if height is None else height
    wide = default[1] if width is None else width
    if high is None or wide is None:
        raise RequestError(f"{facts.name} has no default size; give --height and --width")
    unit = facts.latent.factor * facts.latent.patch * facts.latent.down
    if high % unit or wide % unit or min(high, wide) < unit:
        near = [max(1, round(side / unit)) * unit for side in (high, wide)]
        raise RequestError(
            f"height and width must be multiples of {unit}, got {high}x{wide}; try --height {near[0]} --width {near[1]}"
        )
    if own[0] and own[1] and (high, wide) != own:
        raise RequestError(
            f"{facts.name} was exported for {own[0]}x{own[1]} (height x width), not {high}x{wide}; "
            f"type: python -m export {facts.source.id} --height {high} --width {wide} -o DIR"
        )
    return high, wide


def _solver(
    bundle: Bundle, solver: str | None, table: epd.Table | str | Path | None, k: int | None
) -> tuple[str, epd.Table | None, str | None]:
    """Name, table and the table's file: what was asked for, else the bundle's own."""
    facts = bundle.facts
    if (solver or facts.defaults.solver) not in SOLVERS:
        raise RequestError(f"unknown solver {solver or facts.defaults.solver!r}; choose from {', '.join(SOLVERS)}")
    if table is not None and solver not in (None, "epd"):
        raise RequestError(f"a table is for the solver epd, not for {solver}; leave one of them out")
    if k is not None and (table is not None or solver != "epd" or k < 1):
        raise RequestError("-k (1 or more) is for --solver epd without a table: a table has its own directions")
    if isinstance(table, epd.Table):
        return "epd", table, None
    if table is None and facts.tables and solver in (None, "epd") and k is None:
        table = bundle.folder / facts.tables[0]
    if table is not None:
        return "epd", load_table(Path(table)), str(table)
    return solver or facts.defaults.solver, None, None


def load_table(file: Path) -> epd.Table:
    """A solver table; RequestError if the file cannot be read or breaks a rule."""
    try:
        return epd.Table.load(file)
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror}; give a table file made by this program") from None
    except ValueError as error:
        raise RequestError(str(error)) from None


def _check_table(facts: Facts, table: epd.Table, source: str | None, steps: int | None) -> None:
    what = source or "the table"
    if table.family not in (None, facts.family):
        raise RequestError(
            f"{what} is for the family {table.family}, {facts.name} is {facts.family}; give another table"
        )
    flow = facts.family == "sd3"
    largest = (
        1.0 if flow else float(variance_preserving(facts).sigma(facts.schedule.get("num_train_timesteps", 1000) - 1))
    )
    if table.times[0] > largest * (1 if flow else _BEYOND):
        raise RequestError(
            f"{what} starts at sigma {table.times[0]:g}, {facts.name} at most at {largest:.4g}; give another table"
        )
    if flow and table.start == "afs":
        raise RequestError(f"{what} starts analytically (afs), a flow-matching model cannot; give another table")
    if steps not in (None, table.steps):
        raise RequestError(
            f"{what} has {table.steps} steps, asked for were {steps}; leave --steps out, or give another table"
        )


def _grid(facts: Facts, steps: int) -> tuple[float, ...]:
    """The grid that the checkpoint's scheduler has in diffusers, final value included: N + 1 sigmas."""
    schedule = facts.schedule
    for key, neutral in _UNSUPPORTED[facts.family].items():
        if schedule.get(key, neutral) != neutral:
            raise RequestError(
                f"{facts.name}: its scheduler sets {key} = {schedule[key]!r}, which is not supported; "
                "give --table with a grid of its own"
            )
    train_steps = schedule.get("num_train_timesteps", 1000)
    if not 1 <= steps <= train_steps:
        raise RequestError(f"the number of steps must be from 1 to {train_steps}, got {steps}")
    vp = variance_preserving(facts) if facts.family == "sd15" else None
    try:
        if vp is None:
            return tuple(epd.schedule.flow_euler(steps, schedule.get("shift", 1.0), train_steps).tolist())
        return tuple(
            epd.schedule.ddim(
                steps,
                vp,
                spacing=schedule.get("timestep_spacing", "leading"),
                steps_offset=schedule.get("steps_offset", 0),
                set_alpha_to_one=schedule.get("set_alpha_to_one", True),
            ).tolist()
        )
    except ValueError as error:
        raise RequestError(f"{facts.name} cannot be drawn in {steps} steps: {error}") from None
