"""Attempts judged and compared, each with its equals: the result of `benchmarks quality`.

Knows nothing of the command and of how the result is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import epd

from .bench import EVEN, Attempt, Bench, slices
from .bootstrap import Bootstrap, Estimate, Figure
from .entrants import own_solver, references
from .metrics import AT_ONCE, Judge, Networks, metric
from .seconds import Watch

if TYPE_CHECKING:
    from runtime.figures import Figures
    from shapes.captions import Scene

CONVERGED_DB = 40.0  # to which two references must agree
FEW = 20  # different prompts: intervals of fewer hold the truth less often than they say; of 8, in 88 %
AGREEING = 64  # prompts whose images the second reference is run on: it is not what others are compared with

Measured = Mapping[str, Estimate]  # metric -> what it is


@dataclass(frozen=True)
class Versus:
    """Paired differences of every metric to another attempt, this one minus that one."""

    name: str
    calls: int | None
    over: Mapping[str, Figure]
    among: int = 1  # how many it was the best of


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
    own_solver: Versus | None  # of a table: the model's own solver in its own steps


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
    different_prompts: int  # of which intervals are resampled
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
    for attempt, most in with_images(teacher, reference_steps) if reference_steps else ():
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
    own = own_solver(bench)
    others = Others(
        [(attempt, figures) for attempt, _, figures in found], baseline, f"{own.name}@{own.calls}" if own else ""
    )
    rows = [_row(attempt, ran, figures, watch.seconds(attempt, ran), others) for attempt, ran, figures in found]
    facts, noisy = bench.pipe.bundle.facts, tuple(m.name for m in epd.solvers.METHODS.values() if m.noisy)
    precision = facts.components[bench.pipe.bundle.backbone].precision
    prompts, different = len(bench.prompts) // bench.seeds, len({*bench.prompts})
    return Quality(
        facts.name, facts.source.id, facts.family, precision, bench.pipe.provider, bench.guidance, prompts, different,
        bench.seeds, bench.noise_seed,
        baseline, tuple(attempt.name for attempt in pair), agreement, judge.frechet_to, watch.told, noisy,
        (*notes, *_few(different)), tuple(rows),
    )  # fmt: skip


def _few(different: int) -> list[str]:
    """What a reader of intervals has to know."""
    return [f"Intervals of so few prompts, {different}, are too narrow"] if different < FEW else []


def _agreement(bench: Bench, pair: Sequence[Attempt], latents: Sequence[Any], steps: int) -> Figure | None:
    """PSNR of the two references to each other, where both were run; RequestError if it is too low."""
    from runtime.errors import RequestError
    from runtime.judge import psnr

    if not pair:
        return None
    both = min(map(len, latents))
    each = [psnr(*(bench.pictures(end[images]) for end in latents)) for images in slices(both, AT_ONCE)]
    agreement = Bootstrap(bench.prompts[:both]).mean(np.concatenate(each)).figure()
    if agreement.mean < CONVERGED_DB:
        raise RequestError(
            f"no converged reference: {pair[0].name} and {pair[1].name} agree to {agreement.mean:.1f} dB only, "
            f"{CONVERGED_DB:g} are needed; raise --reference-steps {steps}"
        )
    return agreement


def with_images(teacher: Bench, steps: int) -> list[tuple[Attempt, int | None]]:
    """The references, with the images that each is run on."""
    return list(zip(references(teacher, steps), (None, AGREEING * teacher.seeds), strict=True))


@dataclass(frozen=True)
class Others:
    """All that was measured, to be compared with."""

    measured: Sequence[tuple[Attempt, Measured]]
    baseline: str
    own: str  # NAME@CALLS: the model's own solver in its own steps; empty: it adds noise

    def versus(self, figures: Measured, other: tuple[Attempt, Measured] | None, among: int = 1) -> Versus | None:
        if other is None:
            return None
        attempt, theirs = other
        over = {name: (figures[name] - theirs[name]).figure() for name in figures if name in theirs}
        return Versus(attempt.name, attempt.calls, over, among)

    def versus_best(self, figures: Measured, calls: int) -> Versus | None:
        """Against the training-free solver within so many calls that does best by the first metric."""
        free = [one for one in self.measured if one[0].kind == "solver" and one[0].calls == calls]
        if not free:
            return None
        first = next(iter(free[0][1]))
        sign = 1 if metric(first).higher else -1
        best = max(free, key=lambda one: sign * one[1][first].value)
        return self.versus(figures, best, len(free))

    def named(self, calls: int | None, baseline: str) -> tuple[Attempt, Measured] | None:
        """A baseline of an attempt within so many calls."""
        name, _, fixed = baseline.partition("@")
        wanted = int(fixed) if fixed else calls
        return next((one for one in self.measured if (one[0].name, one[0].calls) == (name, wanted)), None)


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
        baseline=others.versus(figures, others.named(attempt.calls, others.baseline)),
        closest=others.versus_best(figures, table.sequential_calls) if learned else None,
        closest_by_work=others.versus_best(figures, table.total_evaluations) if learned else None,
        own_solver=others.versus(figures, others.named(None, others.own)) if learned else None,
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
