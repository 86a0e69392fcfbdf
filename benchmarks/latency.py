"""How long a picture takes here, and where the time goes: start, stages, components, steps, calls.

    python -m benchmarks latency MODEL [--provider P] [--solver NAME] [--runs 5] [--plot FILE.png]

The first picture starts from nothing: sessions are loaded, compiled and called for the first time. It and further
warm-ups do not count as runs. Every picture is drawn from the same prompt and seed by `Pipeline.draw`, as `generate`
does it; a call is timed from a solver's request to its answer. Text encoders are loaded and released in each picture,
as they are in use. Overhead is what a picture takes beside loading and the time inside ONNX Runtime.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import epd
from runtime.costs import predicted
from runtime.memory import peak_rss_bytes
from runtime.plan import Plan
from runtime.profiles import Others, timing

from .common import add_device, add_outputs, check_outputs, comma_separated, device, publish
from .machine import Machine, machine
from .watch import Call, Watch, Watched

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline
    from runtime.report import Report, Result

PROMPT = "a red circle on a white background"
_BACKBONES = ("transformer", "unet")
_IMPORT = "import time; t = time.perf_counter(); import onnxruntime, runtime.pipeline; print(time.perf_counter() - t)"


class Spread(NamedTuple):
    """Seconds over the runs."""

    median: float
    low: float  # quartiles
    high: float
    p90: float


def spread(values: Iterable[float]) -> Spread:
    """Of two runs or more."""
    seconds = list(values)
    return Spread(*timing(seconds), float(np.quantile(seconds, 0.9)))


@dataclass(frozen=True)
class Run:
    """One picture, or as many as were asked for at once."""

    calls: tuple[Call, ...]
    stages: dict[str, float]  # seconds: load, compile, encode, denoise, decode, total, per_call
    components: dict[str, float]  # seconds inside ONNX Runtime
    loads: dict[str, float]  # seconds of loading, by component
    sha256: str  # of the pictures, float32
    finite: bool

    @property
    def overhead(self) -> float | None:
        """Seconds neither loading nor inside ONNX Runtime; None where calls at once cannot be told apart."""
        inside = [call.inside for call in self.calls]
        if None in inside:
            return None
        backbone = sum(one for one in inside if one is not None)
        others = sum(seconds for name, seconds in self.components.items() if name.split()[0] not in _BACKBONES)
        spent = self.stages["load"] + self.stages["compile"] + self.stages.get("measure", 0.0)
        return self.stages["total"] - spent - backbone - others


@dataclass(frozen=True)
class Latency:
    """The whole result; `to_json` of it is what --json prints."""

    model: str
    bundle: str | None  # SHA-256 of bundle.json
    solver: str
    steps: int
    directions: int  # K
    images: int
    size: tuple[int, int]  # width, height
    guidance: float
    sequential_calls: int
    total_evaluations: int
    guided_forwards: int
    way: str  # in which the directions run
    provider: Mapping[str, Any]  # as `generate --json` tells
    placed: tuple[str, ...]  # in words, by component
    low_memory: bool  # drawn so
    predicted_rss_bytes: int | None  # as `generate --json` tells
    peak_rss_bytes: int | None
    import_seconds: float  # of this program and ONNX Runtime, in a process of its own
    predicted_seconds: float | None  # as `plan` tells, by what `scaling` measured before; None: it did not
    first: Run
    runs: tuple[Run, ...]
    others: float | None  # share of the processors that other programs took during the runs
    machine: Machine

    @property
    def same(self) -> bool:
        """Whether every run drew the same pictures, to the last bit."""
        return len({run.sha256 for run in (self.first, *self.runs)}) == 1

    @property
    def finite(self) -> bool:
        return all(run.finite for run in (self.first, *self.runs))

    @property
    def drift(self) -> float:
        """Seconds per call in the second half of the runs over those in the first."""
        calls = [call.seconds for run in self.runs for call in run.calls]
        half = len(calls) // 2
        return float(np.median(calls[-half:]) / np.median(calls[:half]))

    @property
    def start(self) -> dict[str, float]:
        """Seconds of the first picture's parts, before and in it."""
        stages = self.first.stages
        first = self.first.calls[0].seconds
        parts = {name: seconds for name, seconds in stages.items() if name not in ("total", "per_call")}
        parts["denoise"] -= first
        begun = {name: parts.pop(name) for name in ("load", "compile", "encode")}
        return {
            "import": self.import_seconds,
            **begun,
            "first call": first,
            "other calls": parts.pop("denoise"),
            **parts,
        }

    def summary(self) -> dict[str, Any]:
        """Medians over the runs with their spread, in seconds."""
        names = self.runs[0].components
        calls = [
            [call for call in run.calls if call.step == step + 1] for run in self.runs for step in range(self.steps)
        ]
        per_step = [sum(call.seconds for call in step) for step in calls]
        known = [(run.overhead, run.stages["total"]) for run in self.runs if run.overhead is not None]
        return {
            "picture": spread(run.stages["total"] for run in self.runs)._asdict(),
            "call": spread(call.seconds for run in self.runs for call in run.calls)._asdict(),
            "step": [spread(per_step[step :: self.steps])._asdict() for step in range(self.steps)],
            "stages": {name: spread(run.stages[name] for run in self.runs)._asdict() for name in _stages(self.runs)},
            "components": {name: spread(run.components[name] for run in self.runs)._asdict() for name in names},
            "overhead": spread(overhead for overhead, _ in known)._asdict() if known else None,
            "overhead_share": spread(overhead / total for overhead, total in known).median if known else None,
            "rows_per_call": sorted({call.rows for call in self.runs[0].calls}),
            "drift": self.drift,
            "sha256": self.first.sha256,
            "same_in_every_run": self.same,
            "finite": self.finite,
            "start": self.start,
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"summary": self.summary()}


def _stages(runs: Sequence[Run]) -> list[str]:
    return [name for name in runs[0].stages if name not in ("total", "per_call", "measure")]


def measure(pipe: Pipeline, plan: Plan, runs: int, warmup: int, progress: Callable[[], None] = lambda: None) -> Latency:
    """Draws a plan's pictures once from nothing, then until `warmup` pictures are done, then `runs` timed ones.

    The pipeline must not have been used.

    Raises
    ------
    BundleError, ProviderError, RequestError, NotFiniteError
    """
    from runtime.ort import onnxruntime
    from runtime.providers import provider_of

    onnxruntime()  # what importing it takes is no part of the first picture
    here = machine([provider_of(name.strip()) for name in pipe.provider.split(",")])
    first, result = _draw(pipe, plan)
    progress()
    imported = _import_seconds()
    progress()
    for _ in range(warmup - 1):
        _draw(pipe, plan)
        progress()
    timed, others = [], Others()
    for _ in range(runs):
        timed.append(_draw(pipe, plan)[0])
        progress()
    report: Report = result.report
    return Latency(
        model=pipe.bundle.facts.name,
        bundle=report.bundle["sha256"],
        solver=plan.solver,
        steps=plan.steps,
        directions=plan.directions,
        images=len(plan.seeds),
        size=(plan.width, plan.height),
        guidance=plan.guidance,
        sequential_calls=report.sequential_calls,
        total_evaluations=report.total_evaluations,
        guided_forwards=report.guided_forwards,
        way=report.directions,
        provider=report.provider,
        placed=tuple(str(one.assignment) for one in pipe.sessions.values() if one.assignment is not None),
        low_memory=pipe.low_memory,
        predicted_rss_bytes=report.predicted_rss_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        import_seconds=imported,
        predicted_seconds=predicted(pipe, plan, report.directions),
        first=first,
        runs=tuple(timed),
        others=others.share(),
        machine=here,
    )


def _draw(pipe: Pipeline, plan: Plan) -> tuple[Run, Result]:
    def rows(points: epd.Points) -> int:
        return int(points.x.shape[0] * points.x.shape[1]) * (2 if plan.guided else 1)

    watch = Watch(pipe, rows)
    before = _totals(pipe)
    result = pipe.draw(Watched(**vars(plan), watch=watch), output_type="np")
    after = _totals(pipe)
    spent = {
        name: tuple(a - b for a, b in zip(after[name], before.get(name, (0.0, 0.0)), strict=True)) for name in after
    }
    calls = watch.calls
    if result.report.directions == "async":  # whose runs overlap in one session's total
        calls = [Call(call.step, call.points, call.rows, call.seconds, None) for call in calls]
    pictures = np.ascontiguousarray(result.images, np.float32)
    run = Run(
        calls=tuple(calls),
        stages=dict(result.report.seconds),
        components={name: seconds for name, (seconds, _) in spent.items()},
        loads={name: seconds for name, (_, seconds) in spent.items()},
        sha256=hashlib.sha256(pictures.tobytes()).hexdigest(),
        finite=bool(np.isfinite(pictures).all()),
    )
    return run, result


def _totals(pipe: Pipeline) -> dict[str, tuple[float, float]]:
    """Seconds inside and of loading so far, by component."""
    return {name: (session.run_seconds, session.load_seconds) for name, session in pipe.sessions.items()}


def _import_seconds() -> float:
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, encoding="utf-8", check=True)
    return float(done.stdout.split()[-1])


def add(commands: Any) -> None:
    """Registers the command with `argparse`'s subparsers."""
    from runtime.__main__ import _add_low_memory

    command = commands.add_parser("latency", help="how long a picture takes here, and where the time goes")
    command.set_defaults(run=_run)
    command.add_argument("model", metavar="MODEL", help="a bundle folder, or the name of a shipped one")
    command.add_argument("--steps", type=int, metavar="N", help="intervals of the time grid")
    command.add_argument("--guidance-scale", type=float, metavar="G", help="1 or less: no guidance, half the work")
    command.add_argument("--num-images", type=int, default=1, metavar="B", help="images at once (default 1)")
    command.add_argument("--solver", metavar="NAME", help="one of `python -m runtime solvers`")
    command.add_argument("--table", metavar="FILE|NAME", help="table for epd")
    command.add_argument("--calls", type=int, metavar="M", help="the bundle's best table of at most M sequential calls")
    command.add_argument("-k", type=int, metavar="K", help="directions of epd without a table")
    command.add_argument("--directions", metavar="WAY", help="auto, batch, calls, async or spread; as for generate")
    command.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"default: {PROMPT}")
    command.add_argument("-s", "--seed", type=int, default=0, metavar="S", help="of the first image (default 0)")
    command.add_argument("--runs", type=int, default=5, metavar="N", help="timed, 3 or more (default 5)")
    command.add_argument(
        "--warmup", type=int, default=1, metavar="N", help="pictures before, the first too (default 1)"
    )
    add_device(command)
    _add_low_memory(command)
    add_outputs(command)


def _run(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from runtime.errors import RequestError
    from runtime.pipeline import Pipeline

    from . import latency_report

    check_outputs(options)
    if options.runs < 3 or options.warmup < 1:
        raise RequestError("--runs must be 3 or more, --warmup 1 or more")
    pipe = Pipeline.from_pretrained(
        options.model, **device(options), directions=options.directions, low_memory=options.low_memory
    )
    asked = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "num_images_per_prompt": options.num_images,
        "solver": options.solver,
        "table": options.table,
        "calls": options.calls,
        "k": options.k,
        "seed": options.seed,
    }
    plan = pipe.plan(options.prompt, **asked)
    with tqdm(
        total=1 + options.warmup + options.runs, unit="picture", disable=None, leave=False
    ) as bar:  # on a terminal
        result = measure(pipe, plan, options.runs, options.warmup, lambda: bar.update(1) and None)
    publish(options, result, latency_report, comma_separated(latency_report.rows(result)))
