"""How far from the converged picture each solver ends, for the same calls, prompts and start noise.

    python -m benchmarks quality MODEL [--calls 4 6 8 ..] [--table FILE ..] [--plot FILE.png]

Every solver gets the most steps that fit a number of sequential calls, on the grid that diffusers gives it for the
checkpoint (flow matching: Euler and Heun their own, the others `use_flow_sigmas`); a table has its own grid and calls.
The error is the PSNR of the decoded pictures (floats in [0, 1]) to those of a converged reference, which two solvers on
a fine grid have to agree on. Solvers that add noise have no such reference and are left out. Where the prompts are
captions of the closed world, the share of pictures is told that show what their caption says.

SD1.5: DDIM's `leading` steps begin below the first time, and at sqrt(1 + sigma^2) times the noise in place of sigma,
which alone bounds the PSNR of all solvers on that grid, the untrained start tables and those parallel in time included:
they are measured as users get them. The references begin at the first time, sigma times the noise, as learned tables
do; so does every solver once more, as NAME even, on evenly spaced network times.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import epd
from runtime.interval import Interval, interval
from runtime.judge import psnr

from .bench import Attempt, Bench, shown
from .common import add_outputs, check_outputs, publish
from .entrants import entrants, references

if TYPE_CHECKING:
    from shapes.captions import Scene

CALLS = (4, 6, 8, 10, 15, 20, 28)
SCENES_SEED = 303  # nothing is trained, fitted or chosen by these captions
CONVERGED_DB = 40.0  # to which two references must agree


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    solver: str
    kind: str
    calls: int | None  # sequential calls allowed; None: parallel in time
    steps: int
    sequential_calls: float  # of one image, in the mean; whole numbers unless parallel in time
    total_evaluations: float
    guided_forwards: float
    psnr_db: Interval
    over_euler_db: Interval | None  # paired differences of PSNR to Euler within the same calls
    closest: str | None  # of a table: the best training-free solver within its calls
    over_closest_db: Interval | None  # paired differences to that one
    latent_rmse: float
    right: float | None  # share of pictures that show their caption; None: not captions of the closed world


@dataclass(frozen=True)
class Quality:
    """The whole result; `to_json` of it is what --json prints."""

    model: str
    family: str
    guidance: float
    prompts: int
    references: tuple[str, str]
    agreement_db: Interval  # between the two references
    left_out: tuple[str, ...]
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    bench: Bench,
    attempts: Sequence[Attempt],
    scenes: Sequence[Scene] | None,
    reference_steps: int,
    progress: Callable[[str], None] = lambda name: None,
) -> Quality:
    """Runs the references, then every attempt, and compares.

    Parameters
    ----------
    scenes : sequence, optional
        What the prompts say, to be checked in the pictures.
    progress : callable
        Told the name of each attempt that is done.

    Raises
    ------
    RequestError
        The references disagree.
    """
    from runtime.errors import RequestError

    pair = references(bench, reference_steps)
    ends = []
    for attempt in pair:
        ends.append(bench.run(attempt).latents)
        progress(attempt.name)
    truth = bench.pictures(ends[0])
    agreement = interval(psnr(truth, bench.pictures(ends[1])))
    if agreement.mean < CONVERGED_DB:
        raise RequestError(
            f"no converged reference: {pair[0].name} and {pair[1].name} agree to {agreement.mean:.1f} dB only, "
            f"{CONVERGED_DB:g} are needed; raise --reference-steps {reference_steps}"
        )
    rows: list[Row] = []
    errors_of: dict[tuple[str, int | None], NDArray[np.float64]] = {}  # of the training-free solvers within some calls
    for attempt in attempts:
        found = bench.run(attempt)
        pictures = bench.pictures(found.latents)
        errors = psnr(truth, pictures)
        if attempt.kind == "solver":
            errors_of[attempt.name, attempt.calls] = errors
        over = None if attempt.calls is None else interval(errors - errors_of["euler", attempt.calls])
        closest, over_closest = _over_closest(attempt, errors, errors_of)
        rmse = np.sqrt(np.square(found.latents - ends[0], dtype=np.float64).mean((1, 2, 3))).mean()
        work = (found.sequential_calls, found.total_evaluations, found.guided_forwards)
        right = None if scenes is None else shown(pictures, scenes)
        name, kind, steps = attempt.name, attempt.kind, len(attempt.times) - 1
        compared = (interval(errors), over, closest, over_closest)
        rows.append(Row(name, kind, attempt.calls, steps, *work, *compared, float(rmse), right))
        progress(attempt.name)
    facts, noisy = bench.pipe.bundle.facts, tuple(m.name for m in epd.solvers.METHODS.values() if m.noisy)
    told = (pair[0].name, pair[1].name)
    return Quality(facts.name, facts.family, bench.guidance, len(truth), told, agreement, noisy, tuple(rows))


def _over_closest(
    attempt: Attempt, errors: NDArray[np.float64], others: Mapping[tuple[str, int | None], NDArray[np.float64]]
) -> tuple[str | None, Interval | None]:
    """Of a table: the best training-free solver within as many calls, and what the table is above it."""
    if attempt.kind != "table":
        return None, None
    name = max(
        (name for name, calls in others if calls == attempt.calls), key=lambda n: others[n, attempt.calls].mean()
    )
    return name, interval(errors - others[name, attempt.calls])


def add(commands: Any) -> None:
    """Registers the command with `argparse`'s subparsers."""
    command = commands.add_parser("quality", help="error of every solver against a converged reference")
    command.set_defaults(run=_run)
    command.add_argument("model", metavar="MODEL", help="a bundle folder, or the name of a shipped one")
    command.add_argument("--calls", type=int, nargs="+", default=CALLS, metavar="M", help=f"default {CALLS}")
    command.add_argument("--table", type=Path, nargs="+", default=[], metavar="FILE", help="beside the bundle's own")
    command.add_argument(
        "--solvers", nargs="+", metavar="NAME", help="only these and euler; epd: the start tables (default: all)"
    )
    command.add_argument("--prompts", type=Path, metavar="FILE", help="one a line (default: held-out captions)")
    command.add_argument("--count", type=int, default=64, metavar="B", help="prompts used (default 64)")
    command.add_argument("--guidance-scale", type=float, metavar="G", help="default: the model's own")
    command.add_argument("--reference-steps", type=int, default=80, metavar="N", help="of dpm2 (default 80)")
    command.add_argument("--batch", type=int, default=16, metavar="B", help="images at once (default 16)")
    command.add_argument("--work", type=Path, metavar="DIR", help="keep latents here; a run that was stopped goes on")
    command.add_argument("--provider", default="cpu", metavar="NAME", help="ONNX Runtime execution provider")
    add_outputs(command)


def _run(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from runtime.pipeline import Pipeline

    from . import report

    _check(options)
    pipe = Pipeline.from_pretrained(options.model, provider=options.provider)
    facts = pipe.bundle.facts
    prompts, scenes = _prompts(options, facts.source.id, pipe.plan("", solver="euler").height)
    guidance = facts.defaults.guidance if options.guidance_scale is None else options.guidance_scale
    bench = Bench(pipe, prompts, guidance, options.batch, options.work)
    tables = [*(pipe.bundle.folder / name for name in facts.tables), *options.table]
    attempts = entrants(bench, options.calls, tables, options.solvers)
    with tqdm(total=len(attempts) + 2, unit="run", disable=None, leave=False) as bar:  # None: on a terminal only

        def progress(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(1)

        quality = measure(bench, attempts, scenes, options.reference_steps, progress)
    publish(options, quality, report, report.comma_separated(quality))


def _check(options: argparse.Namespace) -> None:
    """Refuses what cannot work before anything is run."""
    from runtime.errors import RequestError

    if min(*options.calls, options.reference_steps, options.batch) < 1 or options.count < 2:
        raise RequestError("--calls, --reference-steps and --batch must be 1 or more, --count 2 or more")
    if options.reference_steps <= max(options.calls):
        raise RequestError(
            f"--reference-steps {options.reference_steps} must be above the largest of --calls, {max(options.calls)}: "
            "references as coarse as what they judge may agree by chance"
        )
    check_outputs(options)


def _prompts(options: argparse.Namespace, source: str, height: int) -> tuple[list[str], list[Scene] | None]:
    """The prompts, and what they say where all of them are captions of the closed world (which has 64 x 64 pixels)."""
    from runtime.errors import RequestError
    from shapes.captions import held_out_scenes, parse
    from shapes.render import SIZE

    if options.prompts is None:
        if not source.startswith("shapes-"):
            raise RequestError(f"{source} is no model of the closed world; give --prompts FILE, one prompt a line")
        scenes = held_out_scenes(options.count, SCENES_SEED)
        return [scene.caption for scene in scenes], scenes
    try:
        lines = options.prompts.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise RequestError(f"{options.prompts}: not UTF-8 text") from None
    prompts = [line.strip() for line in lines if line.strip()][: options.count]
    if len(prompts) < 2:
        raise RequestError(f"{options.prompts}: {len(prompts)} prompts; give two or more, one a line")
    try:
        return prompts, [parse(prompt) for prompt in prompts] if height == SIZE else None
    except ValueError:
        return prompts, None
