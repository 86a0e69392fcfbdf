"""How good each solver's pictures are, for the same prompts and start noise: against calls, evaluations and seconds.

    python -m benchmarks quality MODEL [--calls 4 6 8 ..] [--table FILE ..] [--seeds 2] [--plot FILE.png]
    python -m benchmarks quality MODEL --table FILE --solvers 'dpmpp_2m@6' 'ipndm_2@6'
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
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import NOISE_SEED, Attempt, Bench
from .common import add_outputs, check_outputs, publish
from .comparison import Quality, check_baseline, measure, with_images
from .entrants import entrants, fetched, headline
from .metrics import Networks, check_classifier

if TYPE_CHECKING:
    from shapes.captions import Scene

CALLS = (4, 6, 8, 10, 15, 20, 28)
SCENES_SEED = 303  # nothing is trained, fitted or chosen by these captions

log = logging.getLogger(__name__)


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
    command.add_argument("--calls", type=int, nargs="+", metavar="M", help=f"default {CALLS}")
    command.add_argument(
        "--most-work", type=float, default=math.inf, metavar="E",
        help="tables of more evaluations are not compared with solvers of as many (default: all are)",
    )  # fmt: skip
    command.add_argument("--table", type=Path, nargs="+", default=[], metavar="FILE", help="beside the bundle's own")
    command.add_argument(
        "--solvers",
        nargs="+",
        metavar="NAME[@M]",
        help="only these and euler: NAME at every number of calls, NAME@M at M alone; 'NAME even' (SD1.5): on even "
        "times; epd: the start tables (default: all); tables meet the model's own solver in any case",
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

    def figures() -> None:
        if options.figures is not None:
            quality.figures().save(options.figures)

    publish(options, quality, report, report.comma_separated(quality), figures)


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
    _check_fine(options.reference_steps, max(attempt.calls or 0 for attempt in attempts if attempt.kind == "solver"))
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
        runs.insert(0, (teacher, with_images(teacher, options.reference_steps)))
    for where, wanted in runs:
        with _bar(None, "batch") as bar:

            def progress(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            where.gather(wanted, options.ray, progress)


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
        return made, options.baseline or f"{made[0].name}@{made[0].calls}"
    intervals = [(low, high) for low, high in options.guidance_interval]
    return entrants(
        bench, options.calls or CALLS, tables, options.solvers, intervals, options.most_work
    ), options.baseline or "euler"


def _teacher(bench: Bench, options: argparse.Namespace, prompts: Sequence[str]) -> Bench:
    from runtime.errors import RequestError
    from runtime.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(options.teacher, provider=options.provider)
    ours, theirs = bench.pipe.bundle.facts, pipe.bundle.facts
    if (theirs.family, theirs.latent) != (ours.family, ours.latent):
        raise RequestError(f"{options.teacher}: no bundle of the same model as {options.model}; give another --teacher")
    return Bench(pipe, prompts, bench.guidance, options.batch, bench.work, options.seeds, options.seed)


def _check(options: argparse.Namespace) -> None:
    """Refuses what cannot work before anything is run."""
    from runtime.errors import RequestError

    calls = options.calls or CALLS
    if min(*calls, options.batch, options.seeds) < 1 or options.count < 2:
        raise RequestError("--calls, --seeds and --batch must be 1 or more, --count 2 or more")
    if options.reference_steps < 0 or options.seed < 0:
        raise RequestError("--reference-steps and --seed must be 0 or more")
    own = options.solvers is not None and all("@" in name for name in options.solvers)
    if own and options.calls:
        raise RequestError("--calls: each of --solvers has its own number; leave --calls out, or a @M")
    _check_fine(options.reference_steps, 0 if own else max(calls))
    for low, high in options.guidance_interval:
        if not 0 <= low < high:
            raise RequestError(f"--guidance-interval is two sigmas with 0 <= LO < HI, got {low:g} {high:g}")
    if options.reference_steps == 0 and (options.figures or options.lpips):
        raise RequestError("--figures and --lpips need a reference; leave --reference-steps 0 out")
    if options.ray and options.provider != "cpu":
        raise RequestError(f"--ray draws on the cores of a cluster; leave --provider {options.provider} or --ray out")
    choices = {
        "--most-work": options.most_work < math.inf,
        "--calls": options.calls,
        "--solvers": options.solvers,
        "--guidance-interval": options.guidance_interval,
    }
    chosen = [name for name, given in choices.items() if given]
    if options.preset == "headline" and chosen:
        raise RequestError(f"--preset headline has solvers and calls of its own; leave {', '.join(chosen)} out")
    check_outputs(options, options.figures)


def _check_fine(steps: int, most: int) -> None:
    """Refuses references no finer than what they judge, which has `most` calls."""
    from runtime.errors import RequestError

    if 0 < steps <= most:
        raise RequestError(
            f"--reference-steps {steps} must be above the most calls that are compared, {most}: "
            "references as coarse as what they judge may agree by chance"
        )


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
