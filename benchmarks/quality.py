"""How good each solver's pictures are, for the same prompts and start noise: against calls, evaluations and seconds.

    python -m benchmarks quality MODEL [--calls 4 6 8 ..] [--table FILE ..] [--seeds 2] [--plot FILE.png]
    python -m benchmarks quality MODEL --preset headline --prompts FILE --reward hpsv2 --reward-model hpsv2=DIR

Every solver gets the most steps that fit a number of sequential calls, on the grid that diffusers gives it for the
checkpoint (flow matching: Euler and Heun their own, the others `use_flow_sigmas`); a table has its own grid and calls.
Distances (PSNR of the decoded pictures in [0, 1], LPIPS, latents) are to a converged reference, which two solvers on
a fine grid have to agree on: the model's own, or a --teacher's. Solvers that add noise have none and are left out.
Where the prompts are captions of the closed world, the share of pictures is told that show what their caption says, and
the Frechet distance to renderings of the captions. Intervals are of 95 %, by resampling prompts, differences paired.

SD1.5: DDIM's `leading` steps begin below the first time, and at sqrt(1 + sigma^2) times the noise in place of sigma,
which alone bounds the PSNR of all solvers on that grid, the untrained start tables and those parallel in time included:
they are measured as users get them. The references begin at the first time, sigma times the noise, as learned tables
do; so does every solver once more, as NAME even, on evenly spaced network times.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import epd

from .bench import EVEN, NOISE_SEED, Attempt, Bench
from .bootstrap import Bootstrap, Estimate, Figure
from .common import add_outputs, check_outputs, publish
from .entrants import entrants, fetched, headline, references
from .metrics import Judge, Networks, check_classifier, metric
from .seconds import Watch

if TYPE_CHECKING:
    from runtime.figures import Figures
    from shapes.captions import Scene

CALLS = (4, 6, 8, 10, 15, 20, 28)
SCENES_SEED = 303  # nothing is trained, fitted or chosen by these captions
CONVERGED_DB = 40.0  # to which two references must agree
AGREEING = 64  # prompts whose images the second reference is run on: it is not what others are compared with

log = logging.getLogger(__name__)
Measured = Mapping[str, Estimate]  # metric -> what it is


@dataclass(frozen=True)
class Versus:
    """Paired differences of every metric to another attempt, this one minus that one."""

    name: str
    calls: int | None
    over: Mapping[str, Figure]


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    solver: str
    kind: str
    calls: int | None  # sequential calls allowed; None: parallel in time
    steps: int
    k: int | None  # of tables
    table: str | None  # digest of its numbers
    guidance_interval: tuple[float, float] | None
    sequential_calls: float  # of one image, in the mean; whole numbers unless parallel in time
    total_evaluations: float
    guided_forwards: float
    seconds: float | None  # of one image alone, from prompt to picture; None: not known
    figures: Mapping[str, Figure]
    baseline: Versus | None  # None: was not run at so many calls
    closest: Versus | None  # of a table: the best training-free solver within its sequential calls
    closest_by_work: Versus | None  # the same within its total evaluations


@dataclass(frozen=True)
class Quality:
    """The whole result; `to_json` of it is what --json prints."""

    model: str
    source: str
    family: str
    precision: str
    provider: str
    guidance: float
    prompts: int
    seeds: int  # images of each
    seed: int  # of the first start noise
    baseline: str
    references: tuple[str, ...]  # two, or none
    agreement_db: Figure | None  # between them
    frechet_to: str
    seconds_from: str
    left_out: tuple[str, ...]
    notes: tuple[str, ...]  # what a reader has to know besides
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def figures(self) -> Figures:
        """What the planner reads of it."""
        from runtime import figures

        rows = [
            figures.Figure(
                solver="epd" if row.table is not None else row.solver.partition(",")[0],
                steps=row.steps,
                psnr_db=round(row.figures["psnr_db"].mean, 2),
                half_db=round(row.figures["psnr_db"].half or 0.0, 2),
                k=row.k if row.kind == "start" else None,
                table=row.table if row.kind == "table" else None,
                guidance_interval=row.guidance_interval,
            )
            for row in self.rows
            if row.kind in ("solver", "start", "table") and not row.solver.partition(",")[0].endswith(EVEN)
        ]
        images = self.prompts * self.seeds
        return figures.Figures(
            self.source, self.family, self.precision, self.guidance, self.prompts, images, _first_of(rows)
        )


NO_NETWORKS = Networks()


def _first_of(rows: Sequence[Any]) -> tuple[Any, ...]:
    """Without those of the same solver in as many steps, as two budgets of calls may give."""
    return tuple({(r.solver, r.steps, r.k, r.table, r.guidance_interval): r for r in reversed(rows)}.values())[::-1]


def measure(
    bench: Bench,
    attempts: Sequence[Attempt],
    scenes: Sequence[Scene] | None,
    reference_steps: int,
    progress: Callable[[str], None] = lambda name: None,
    *,
    baseline: str = "euler",
    teacher: Bench | None = None,
    networks: Networks = NO_NETWORKS,
    notes: Sequence[str] = (),
) -> Quality:
    """Runs the references, then every attempt, and compares.

    Parameters
    ----------
    scenes : sequence, optional
        What the prompt of every image says, to be checked in the pictures.
    reference_steps : int
        0: no reference, and no distances to it.
    progress : callable
        Told the name of each attempt that is done.
    baseline : str
        NAME: within the same calls; NAME@CALLS: that one for all.
    teacher : Bench, optional
        Of the references, in place of `bench`: another bundle of the model, the same prompts and noise.

    Raises
    ------
    RequestError
        The references disagree, or the baseline is none of the attempts.
    """
    check_baseline(baseline, attempts)
    plan = bench.pipe.plan("", solver="euler")
    opened = networks.open(bench.prompts, (plan.height, plan.width))
    teacher = teacher or bench
    pair, ends = [], []
    for attempt, most in _most(teacher, reference_steps) if reference_steps else ():
        pair.append(attempt)
        ends.append(teacher.run(attempt, most))
        progress(attempt.name)
    judge = Judge(bench, ends[0] if ends else None, teacher.key(pair[0]) if pair else "", scenes, opened)
    agreement = _agreement(bench, pair, [end.latents for end in ends], reference_steps)
    watch = Watch(bench, [*pair[:1], *attempts])
    found: list[tuple[Attempt, Any, Measured]] = []
    if pair:
        found.append((pair[0], ends[0], judge.measure(pair[0], ends[0])))
    for attempt in attempts:
        ran = bench.run(attempt)
        found.append((attempt, ran, judge.measure(attempt, ran)))
        progress(attempt.name)
    measured = [(attempt, figures) for attempt, _, figures in found]
    rows = [
        _row(attempt, ran, figures, watch.seconds(attempt, ran), Others(measured, baseline))
        for attempt, ran, figures in found
    ]
    facts, noisy = bench.pipe.bundle.facts, tuple(m.name for m in epd.solvers.METHODS.values() if m.noisy)
    precision = facts.components[bench.pipe.bundle.backbone].precision
    prompts = len(bench.prompts) // bench.seeds
    return Quality(
        facts.name, facts.source.id, facts.family, precision, bench.pipe.provider, bench.guidance, prompts, bench.seeds,
        bench.noise_seed,
        baseline, tuple(attempt.name for attempt in pair), agreement, judge.frechet_to, watch.told, noisy, tuple(notes),
        tuple(rows),
    )  # fmt: skip


def _agreement(bench: Bench, pair: Sequence[Attempt], latents: Sequence[Any], steps: int) -> Figure | None:
    """PSNR of the two references to each other, where both were run; RequestError if it is too low."""
    from runtime.errors import RequestError
    from runtime.judge import psnr

    if not pair:
        return None
    both = min(map(len, latents))
    one, other = (bench.pictures(end[:both]) for end in latents)
    agreement = Bootstrap(both // bench.seeds, bench.seeds).mean(psnr(one, other)).figure()
    if agreement.mean < CONVERGED_DB:
        raise RequestError(
            f"no converged reference: {pair[0].name} and {pair[1].name} agree to {agreement.mean:.1f} dB only, "
            f"{CONVERGED_DB:g} are needed; raise --reference-steps {steps}"
        )
    return agreement


@dataclass(frozen=True)
class Others:
    """All that was measured, to be compared with."""

    measured: Sequence[tuple[Attempt, Measured]]
    baseline: str

    def versus(self, figures: Measured, other: tuple[Attempt, Measured] | None) -> Versus | None:
        if other is None:
            return None
        attempt, theirs = other
        over = {name: (figures[name] - theirs[name]).figure() for name in figures if name in theirs}
        return Versus(attempt.name, attempt.calls, over)

    def named(self, calls: int | None) -> tuple[Attempt, Measured] | None:
        """The baseline of an attempt within so many calls."""
        name, _, fixed = self.baseline.partition("@")
        wanted = int(fixed) if fixed else calls
        return next((one for one in self.measured if (one[0].name, one[0].calls) == (name, wanted)), None)

    def best(self, calls: int) -> tuple[Attempt, Measured] | None:
        """The training-free solver within so many calls that does best by the first metric."""
        free = [one for one in self.measured if one[0].kind == "solver" and one[0].calls == calls]
        if not free:
            return None
        first = next(iter(free[0][1]))
        sign = 1 if metric(first).higher else -1
        return max(free, key=lambda one: sign * one[1][first].value)


def _row(attempt: Attempt, ran: Any, figures: Measured, seconds: float | None, others: Others) -> Row:
    from runtime.figures import digest

    table = attempt.table
    learned = table is not None and attempt.kind == "table"
    return Row(
        solver=attempt.name,
        kind=attempt.kind,
        calls=attempt.calls,
        steps=len(attempt.times) - 1,
        k=None if table is None else table.directions,
        table=None if table is None else digest(table),
        guidance_interval=attempt.interval,
        sequential_calls=ran.sequential_calls,
        total_evaluations=ran.total_evaluations,
        guided_forwards=ran.guided_forwards,
        seconds=seconds,
        figures={name: estimate.figure() for name, estimate in figures.items()},
        baseline=others.versus(figures, others.named(attempt.calls)),
        closest=others.versus(figures, others.best(table.sequential_calls)) if learned else None,
        closest_by_work=others.versus(figures, others.best(table.total_evaluations)) if learned else None,
    )


def check_baseline(baseline: str, attempts: Sequence[Attempt]) -> None:
    """RequestError where it is no attempt's."""
    from runtime.errors import RequestError

    name, at, calls = baseline.partition("@")
    known = list(dict.fromkeys(attempt.name for attempt in attempts if attempt.calls is not None))
    if name not in known:
        raise RequestError(f"no baseline {name!r} among what is run; choose from {', '.join(known)}")
    have = sorted({attempt.calls or 0 for attempt in attempts if attempt.name == name})
    if at and calls not in map(str, have):
        raise RequestError(
            f"the baseline {name} is not run at {calls!r} calls; choose from {', '.join(map(str, have))}"
        )


def add(commands: Any) -> None:
    """Registers the command with `argparse`'s subparsers."""
    command = commands.add_parser("quality", help="how good every solver's pictures are, with paired intervals")
    command.set_defaults(run=_run)
    command.add_argument("model", metavar="MODEL", help="a bundle folder, or the name of a shipped one")
    command.add_argument(
        "--preset",
        choices=["headline"],
        help="headline: the model's own steps and 20, iPNDM-20, DPM-Solver++-20, tables",
    )
    command.add_argument("--calls", type=int, nargs="+", default=CALLS, metavar="M", help=f"default {CALLS}")
    command.add_argument(
        "--most-work", type=float, default=math.inf, metavar="E",
        help="tables of more evaluations are not compared with solvers of as many (default: all are)",
    )  # fmt: skip
    command.add_argument("--table", type=Path, nargs="+", default=[], metavar="FILE", help="beside the bundle's own")
    command.add_argument(
        "--solvers", nargs="+", metavar="NAME", help="only these and euler; epd: the start tables (default: all)"
    )
    command.add_argument("--prompts", type=Path, metavar="FILE", help="one a line (default: held-out captions)")
    command.add_argument("--count", type=int, default=64, metavar="B", help="prompts used (default 64)")
    command.add_argument("--seeds", type=int, default=1, metavar="S", help="images of each prompt (default 1)")
    command.add_argument(
        "--seed", type=int, default=NOISE_SEED, metavar="S",
        help=f"of the first image (default {NOISE_SEED}; another one, to choose by other pictures than are told)",
    )  # fmt: skip
    command.add_argument("--guidance-scale", type=float, metavar="G", help="default: the model's own")
    command.add_argument(
        "--guidance-interval", type=float, nargs=2, action="append", default=[], metavar=("LO", "HI"),
        help="everything once more, guided at these sigmas only; may be repeated",
    )  # fmt: skip
    command.add_argument(
        "--baseline", metavar="NAME[@M]", help="paired differences are to it, at the same calls or at M (default euler)"
    )
    command.add_argument(
        "--reference-steps",
        type=int,
        default=80,
        metavar="N",
        help="of dpm2 (default 80); 0: no reference, no distances",
    )
    command.add_argument(
        "--teacher", metavar="DIR", help="a bundle of higher precision that the reference is drawn with"
    )
    _add_networks(command)
    command.add_argument("--batch", type=int, default=16, metavar="B", help="images at once (default 16)")
    command.add_argument("--work", type=Path, metavar="DIR", help="keep results here; a run that was stopped goes on")
    command.add_argument("--ray", metavar="ADDRESS", help="pictures on a Ray cluster, or local: on all cores here")
    command.add_argument("--provider", default="cpu", metavar="NAME", help="ONNX Runtime execution provider")
    command.add_argument("--figures", type=Path, metavar="JSON", help="write what `python -m runtime plan` reads, too")
    add_outputs(command)


def _add_networks(command: argparse.ArgumentParser) -> None:
    command.add_argument("--lpips", type=Path, metavar="FILE", help="LPIPS: torchvision's weights of alexnet or vgg16")
    command.add_argument(
        "--inception", type=Path, metavar="FILE", help="Frechet Inception distance: torch-fidelity's weights"
    )
    command.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="NAME",
        help="of epd.train.rewards: hpsv2, clip, ..; may be repeated",
    )
    command.add_argument(
        "--reward-model", action="append", default=[], metavar="NAME=PATH", help="its weights; may be repeated"
    )


def _run(options: argparse.Namespace) -> None:
    from . import report

    _check(options)
    with tempfile.TemporaryDirectory() if options.ray and options.work is None else nullcontext(options.work) as work:
        quality = _measured(options, None if work is None else Path(work))
    if options.figures is not None:
        quality.figures().save(options.figures)
    publish(options, quality, report, report.comma_separated(quality))


def _measured(options: argparse.Namespace, work: Path | None) -> Quality:
    """Results are kept in the folder `work`."""
    from runtime.errors import RequestError
    from runtime.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(options.model, provider=options.provider)
    facts = pipe.bundle.facts
    prompts, scenes = _prompts(options, facts.source.id, pipe.plan("", solver="euler").height)
    if scenes is not None:
        check_classifier()
    if scenes is None and not options.reference_steps and (options.inception or not options.reward):
        raise RequestError("--reference-steps 0: nothing is left to measure by; leave it out, or give --reward alone")
    guidance = facts.defaults.guidance if options.guidance_scale is None else options.guidance_scale
    bench = Bench(pipe, prompts, guidance, options.batch, work, options.seeds, options.seed)
    attempts, baseline = _attempts(bench, options)
    notes = []
    if options.preset == "headline" and not any(attempt.kind == "table" for attempt in attempts):
        notes = [
            f"NO LEARNED TABLE of {facts.name} is here, so EPD-Solver is not compared; bring the authors' with `python "
            "-m epd fetch NAME`, or give --table FILE"
        ]
        log.warning(notes[0])
    check_baseline(baseline, attempts)
    teacher = bench if options.teacher is None else _teacher(bench, options, prompts)
    networks = Networks(options.lpips, options.inception, _rewards(options))
    if options.ray:
        _gather(options, bench, attempts, teacher)
    with _bar(len(attempts) + 2 * (options.reference_steps > 0), "run") as bar:

        def progress(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(1)

        return measure(
            bench, attempts, scenes, options.reference_steps, progress, baseline=baseline, teacher=teacher,
            networks=networks, notes=notes,
        )  # fmt: skip


def _gather(options: argparse.Namespace, bench: Bench, attempts: Sequence[Attempt], teacher: Bench) -> None:
    """Has a cluster draw what `measure` will ask for."""
    runs: list[tuple[Bench, list[tuple[Attempt, int | None]]]] = [(bench, [(attempt, None) for attempt in attempts])]
    if options.reference_steps:
        runs.insert(0, (teacher, _most(teacher, options.reference_steps)))
    for where, wanted in runs:
        with _bar(None, "batch") as bar:

            def progress(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            where.gather(wanted, options.ray, progress)


def _most(teacher: Bench, steps: int) -> list[tuple[Attempt, int | None]]:
    """The references, with the images that each is run on."""
    return list(zip(references(teacher, steps), (None, AGREEING * teacher.seeds), strict=True))


def _bar(total: int | None, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=None, leave=False)  # None: on a terminal


def _rewards(options: argparse.Namespace) -> dict[str, Path | None]:
    """Names, and where their weights are."""
    from runtime.errors import RequestError
    from runtime.parse import pairs

    models = {name: Path(path) for name, path in pairs("--reward-model", options.reward_model).items()}
    if strangers := sorted(models.keys() - {*options.reward}):
        raise RequestError(f"--reward-model {strangers[0]}=...: not among --reward; leave it out")
    return {name: models.get(name) for name in options.reward}


def _attempts(bench: Bench, options: argparse.Namespace) -> tuple[list[Attempt], str]:
    """What is compared, and the baseline."""
    facts = bench.pipe.bundle.facts
    tables = [*(bench.pipe.bundle.folder / name for name in facts.tables), *options.table]
    if options.preset == "headline":
        tables += fetched(bench)
        made = headline(bench, tables)
        return made, options.baseline or f"{facts.defaults.solver}@{facts.defaults.steps}"
    intervals = [(low, high) for low, high in options.guidance_interval]
    return entrants(
        bench, options.calls, tables, options.solvers, intervals, options.most_work
    ), options.baseline or "euler"


def _teacher(bench: Bench, options: argparse.Namespace, prompts: Sequence[str]) -> Bench:
    from runtime.errors import RequestError
    from runtime.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(options.teacher, provider=options.provider)
    ours, theirs = bench.pipe.bundle.facts, pipe.bundle.facts
    if (theirs.family, theirs.latent) != (ours.family, ours.latent):
        raise RequestError(f"{options.teacher}: no bundle of the same model as {options.model}; give another --teacher")
    return Bench(pipe, prompts, bench.guidance, options.batch, options.work, options.seeds, options.seed)


def _check(options: argparse.Namespace) -> None:
    """Refuses what cannot work before anything is run."""
    from runtime.errors import RequestError

    if min(*options.calls, options.batch, options.seeds) < 1 or options.count < 2:
        raise RequestError("--calls, --seeds and --batch must be 1 or more, --count 2 or more")
    if options.reference_steps < 0 or options.seed < 0:
        raise RequestError("--reference-steps and --seed must be 0 or more")
    most = max(options.calls)
    if 0 < options.reference_steps <= most:
        raise RequestError(
            f"--reference-steps {options.reference_steps} must be above the largest of --calls, {most}: "
            "references as coarse as what they judge may agree by chance"
        )
    for low, high in options.guidance_interval:
        if not 0 <= low < high:
            raise RequestError(f"--guidance-interval is two sigmas with 0 <= LO < HI, got {low:g} {high:g}")
    if options.reference_steps == 0 and (options.figures or options.lpips):
        raise RequestError("--figures and --lpips need a reference; leave --reference-steps 0 out")
    if options.preset == "headline" and options.most_work < math.inf:
        raise RequestError("--preset headline compares at the model's own calls; leave --most-work out")
    if options.figures is not None and (options.figures.is_dir() or not options.figures.parent.is_dir()):
        raise RequestError(f"{options.figures}: not a file in a folder that is there; give another name")
    check_outputs(options)


def _prompts(options: argparse.Namespace, source: str, height: int) -> tuple[list[str], list[Scene] | None]:
    """The prompts; and what that of every image says, where all are captions of the closed world (64 x 64 pixels)."""
    from runtime.errors import RequestError
    from runtime.order import read_prompts
    from shapes.captions import held_out_scenes, parse
    from shapes.render import SIZE

    def each(scenes: list[Scene]) -> list[Scene]:
        return [scene for scene in scenes for _ in range(options.seeds)]

    if options.prompts is None:
        if not source.startswith("shapes-"):
            raise RequestError(f"{source} is no model of the closed world; give --prompts FILE, one prompt a line")
        scenes = held_out_scenes(options.count, SCENES_SEED)
        return [scene.caption for scene in scenes], each(scenes)
    prompts = list(read_prompts(options.prompts, options.prompts.parent))[: options.count]
    if len(prompts) < 2:
        raise RequestError(f"{options.prompts}: {len(prompts)} prompts; give two or more, one a line")
    try:
        return prompts, each([parse(prompt) for prompt in prompts]) if height == SIZE else None
    except ValueError:
        return prompts, None
