"""What to draw, decided and checked before anything is loaded: size, seeds, guidance, solver, grid.

Knows nothing of sessions or pictures.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import epd
from epd.solve import Array, Solver
from epd.solvers import METHODS

from .bundle import Bundle
from .errors import RequestError
from .facts import Facts
from .grid import own_grid
from .tables import best_table, check_table, differences, find_table, load_table

Noise = Callable[[Array], Array]

DIRECTIONS = 2  # of a start table, if nothing is said
MOST_DIRECTIONS = 64  # each is a row of the network: more is a slip of the finger
log = logging.getLogger(__name__)


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
    flow: bool  # the state is (1 - t) x0 + t n; else x0 + t n
    guidance_interval: tuple[float, float] | None = None  # sigma; None: guided everywhere
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
    def points(self) -> int:
        """The most points one request asks for."""
        return self.steps if self.table is None and METHODS[self.solver].calls == 0 else self.directions

    @property
    def wide(self) -> bool:
        """Whether some of its requests are for several points at once."""
        return self.points > 1

    def coroutine(self, noise: Noise) -> Solver:
        """The solver; `noise` gives those that draw any normal numbers in the shape of a state."""
        if self.table is not None:
            return epd.solvers.epd(self.table)
        method = METHODS[self.solver]
        options = {"noise": noise} if method.noisy else {}
        return method.build(self.times, self.flow, **options)


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
    calls: int | None = None,
    guidance_interval: Sequence[float] | None = None,
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
    name, chosen, what = _solver(bundle, solver, table, k, calls)
    ours = chosen is None
    if chosen is not None:
        check_table(facts, chosen, what, num_inference_steps)
        times = tuple(chosen.times.tolist())
    else:
        steps = facts.defaults.steps if num_inference_steps is None else num_inference_steps
        times = own_grid(facts, steps, name)
        if name == "epd":
            chosen = epd.start_table(times, DIRECTIONS if k is None else k)
    guidance = guidance_scale
    if guidance is None:
        guidance = facts.defaults.guidance if chosen is None or chosen.guidance is None else chosen.guidance
    if not math.isfinite(guidance):
        raise RequestError(f"the guidance scale must be a finite number, got {guidance}")
    interval = checked_interval(guidance_interval, times[0])
    if not ours and chosen is not None and (other := differences(facts, chosen, guidance, interval, (height, width))):
        log.warning("%s was made for %s", what, ", ".join(other))
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
        start_scale=1.0 if flow else math.hypot(1, times[0]) if ours else times[0],
        end_scale=1.0 if flow else math.hypot(1, times[-1]),
        flow=flow,
        guidance_interval=interval,
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
    if own[0] and own[1] and (high, wide) != own and bundle.foreign:
        raise RequestError(f"{facts.name} is prebuilt for {own[0]}x{own[1]} (height x width), not {high}x{wide}")
    if own[0] and own[1] and (high, wide) != own:
        raise RequestError(
            f"{facts.name} was exported for {own[0]}x{own[1]} (height x width), not {high}x{wide}; "
            f"type: python -m export {facts.source.id} --height {high} --width {wide} -o DIR"
        )
    return high, wide


def checked_interval(given: Sequence[float] | None, first: float) -> tuple[float, float] | None:
    """(lo, hi) sigma, checked against the grid's first."""
    if given is None:
        return None
    if len(given) != 2 or not 0 <= given[0] < given[1] < math.inf:
        told = " ".join(f"{sigma:g}" for sigma in given)
        raise RequestError(f"a guidance interval is two sigmas with 0 <= LO < HI, got {told}")
    low, high = map(float, given)
    if low > first:
        raise RequestError(
            f"the guidance interval {low:g} {high:g} lies above the grid, which starts at sigma {first:.4g}; "
            "give a lower one, or --guidance-scale 1 for no guidance"
        )
    return low, high


def _solver(
    bundle: Bundle, solver: str | None, table: epd.Table | str | Path | None, k: int | None, calls: int | None
) -> tuple[str, epd.Table | None, str]:
    """Name, table and what to call the table: what was asked for, else the bundle's own."""
    facts = bundle.facts
    name = facts.defaults.solver if solver is None else solver
    if name != "epd" and name not in METHODS:
        raise RequestError(f"unknown solver {name!r}; choose from {', '.join([*METHODS, 'epd'])}")
    if (table is not None or calls is not None) and solver not in (None, "epd"):
        raise RequestError(f"a table is for the solver epd, not for {solver}; leave one of them out")
    if table is not None and calls is not None:
        raise RequestError("--calls picks one of the bundle's tables; give it or --table, not both")
    if k is not None and (table is not None or calls is not None or solver != "epd" or not 1 <= k <= MOST_DIRECTIONS):
        raise RequestError(
            f"-k (1 to {MOST_DIRECTIONS}) is for --solver epd without a table: a table has its own directions"
        )
    if isinstance(table, epd.Table):
        return "epd", table, "the table"
    if table is not None:
        file = find_table(table)
    elif calls is not None:
        file = best_table(bundle, calls)
    elif facts.tables and solver in (None, "epd") and k is None:
        file = bundle.folder / facts.tables[0]
    else:
        if name != "epd" and facts.family not in METHODS[name].families:
            raise RequestError(f"the solver {name} is not for {facts.family}; choose from {', '.join(_for(facts))}")
        return name, None, ""
    return "epd", load_table(file), str(file)


def _for(facts: Facts) -> list[str]:
    return [*(name for name, method in METHODS.items() if facts.family in method.families), "epd"]
