"""Which solver, table, steps, directions, way, precision and guidance interval to draw with in a given time.

Every candidate has a predicted time, from the costs of calls on this device (`runtime.costs`), and a quality, from the
model's figures (`runtime.figures`): PSNR to converged pictures of full precision. A budget takes the best of those that
fit it; a wanted quality the quickest that reaches it. Knows nothing of single prompts: quality is a mean over many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

import epd
from epd.solvers import METHODS

from .costs import Costs, Requests, costs, requests_of
from .directions import Directions
from .errors import RequestError
from .figures import FILE, Figure, Figures, digest, of_bundle
from .judge import competitors
from .pipeline import Pipeline
from .plan import Plan
from .tables import load_table

# between: two measured numbers of steps; as told: by the table itself
Basis = Literal["measured", "between", "as told", "as fitted"]
WAYS: tuple[Directions, ...] = ("batch", "calls", "async")  # the simplest first


@dataclass(frozen=True)
class Candidate:
    """One way to draw, and what is known of it."""

    model: str  # folder of the bundle
    precision: str
    solver: str
    table: str | None  # file
    steps: int
    k: int
    way: Directions
    guidance_interval: tuple[float, float] | None
    sequential_calls: int
    total_evaluations: int
    guided_forwards: int  # of one image
    psnr_db: float
    basis: Basis
    seconds: float  # predicted: from a prompt to its pictures, everything loaded

    @property
    def name(self) -> str:
        """Solver, or table."""
        return self.solver if self.table is None else Path(self.table).stem

    @property
    def asked(self) -> dict[str, Any]:
        """Arguments of `Pipeline.plan`."""
        found: dict[str, Any] = {"solver": self.solver, "guidance_interval": self.guidance_interval}
        if self.table is not None:
            found["table"] = Path(self.table)
        else:
            found |= {"num_inference_steps": self.steps} | ({"k": self.k} if self.solver == "epd" else {})
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Advice:
    """What was chosen, among what, and what is not known."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]


def advise(
    pipes: Sequence[Pipeline], budget: float | None = None, quality: float | None = None, images: int = 1
) -> Advice:
    """Chooses among all ways to draw with one of several bundles of a model.

    Parameters
    ----------
    budget : float, optional
        Seconds from a prompt to its pictures, everything loaded: the best quality within it.
    quality : float, optional
        PSNR in dB: the quickest that reaches it. Neither: the best there is.

    Raises
    ------
    RequestError
        Nothing fits, the bundles are not of one model, or nothing is known of what calls cost here; the line says what
        to type.
    """
    found: list[Candidate] = []
    notes = _of_one_model(pipes)
    known = [of_bundle(pipe.bundle) for pipe in pipes]
    _check_alike(pipes, [figures for figures, _ in known])
    for pipe, (figures, note) in zip(pipes, known, strict=True):
        made, missing = candidates(pipe, figures, _costs(pipe), images)
        found += made
        notes += [note, *missing]
    return Advice(choose(found, budget, quality), tuple(found), tuple(dict.fromkeys(filter(None, notes))))


def _of_one_model(pipes: Sequence[Pipeline]) -> list[str]:
    """What is assumed of bundles that do not say their model; RequestError where two are of different ones.

    A foreign folder's source is its path: it has to look like the others, no more.
    """
    first, *others = sorted((pipe.bundle for pipe in pipes), key=lambda bundle: bundle.foreign)  # stable
    one, notes = first.facts, []
    for bundle in others:
        facts = bundle.facts
        alike = (one.family, one.latent) == (facts.family, facts.latent)
        named = (one.source.id, one.source.random_weights) == (facts.source.id, facts.source.random_weights)
        if not alike or not (named or bundle.foreign):
            raise RequestError(
                f"{bundle.folder} is not of the model of {first.folder} ({facts.source.id}, {one.source.id}): their dB "
                "cannot be compared; plan each by itself"
            )
        if not named:
            notes.append(f"{bundle.folder} does not say its model: ASSUMED to be that of {first.folder}")
    return notes


def _check_alike(pipes: Sequence[Pipeline], found: Sequence[Figures]) -> None:
    """RequestError where some figures are the model's own and others those of a model that stands in for it."""
    own = {pipe.bundle.facts.source.id for pipe in pipes}
    if len(measured := {None if figures.source in own else figures.source for figures in found}) > 1:
        pipe = next(pipe for pipe, figures in zip(pipes, found, strict=True) if figures.source not in own)
        told = ", ".join(sorted(filter(None, measured)))
        raise RequestError(
            f"quality of {pipe.bundle.folder} was never measured, dB of {told} cannot be compared with the others'; "
            f"`python -m benchmarks quality {pipe.bundle.folder} --figures {pipe.bundle.folder / FILE}` measures it"
        )


def choose(found: Sequence[Candidate], budget: float | None = None, quality: float | None = None) -> Candidate:
    """Of the candidates; RequestError says how near they come if none will do."""
    if not found:
        raise RequestError("nothing to choose from: no figure of the model fits what was measured here")
    quickest, best = min(found, key=_quick), max(found, key=_good)
    if budget is not None:
        fitting = [one for one in found if one.seconds <= budget]
        if not fitting:
            raise RequestError(
                f"nothing takes {budget:.3g} s or less here: the quickest, {quickest.name} in {quickest.steps} steps, "
                f"takes {quickest.seconds:.3g} s; give a larger --budget"
            )
        return max(fitting, key=_good)
    if quality is not None:
        fitting = [one for one in found if one.psnr_db >= quality]
        if not fitting:
            raise RequestError(
                f"nothing reaches {quality:g} dB: the best, {best.name} in {best.steps} steps, "
                f"has {best.psnr_db:.1f} dB; give a lower --quality"
            )
        return min(fitting, key=_quick)
    return best


def _good(one: Candidate) -> tuple[float, float]:
    return one.psnr_db, -one.seconds


def _quick(one: Candidate) -> tuple[float, float]:
    return one.seconds, -one.psnr_db


def candidates(pipe: Pipeline, figures: Figures, known: Costs, images: int = 1) -> tuple[list[Candidate], list[str]]:
    """All of one bundle, in the quickest way each; and what has been left out, in words."""
    bundle = pipe.bundle
    found: list[Candidate] = []
    missing: list[str] = []
    precision = bundle.facts.components[bundle.backbone].precision
    lost = None if figures.precision == precision or bundle.facts.picture is None else bundle.facts.picture.psnr_db
    tables = {path: load_table(bundle.folder / path) for path in bundle.facts.tables}
    rows = [*_with_tables(figures, tables, competitors(bundle.facts), missing), *_training_free(figures)]
    widest, batches = 0, _batches(pipe)
    for row, basis, path in rows:
        table = None if path is None else str(bundle.folder / path)
        interval = None if row.guidance_interval is None else (row.guidance_interval[0], row.guidance_interval[1])
        psnr = row.psnr_db if lost is None else _added(row.psnr_db, lost)
        draft = Candidate(
            str(bundle.folder), precision, row.solver, table, row.steps, row.k or 1, "batch", interval,
            0, 0, 0, psnr, basis, math.inf,
        )  # fmt: skip
        try:
            plan = pipe.plan("", **draft.asked)
        except RequestError as error:
            missing.append(f"{draft.name}: left out, {error}")
            continue
        if (done := _timed(draft, plan, requests_of(plan), known, images, batches)) is not None:
            found.append(done)
        else:
            widest = max(widest, plan.directions * images)
    if widest:
        missing.append(
            f"what {widest} directions at once cost is not known here; "
            f"`python -m benchmarks scaling {bundle.folder} -k {widest}` measures it"
        )
    return found, list(dict.fromkeys(missing))  # the steps of a solver may lack the same


def _timed(draft: Candidate, plan: Plan, asked: Requests, known: Costs, images: int, batches: bool) -> Candidate | None:
    """The candidate in its quickest way; None where no way is known."""
    ways = WAYS if plan.wide else WAYS[:1]
    seconds = {
        way: taken
        for way in ways
        if (batches or way != "batch" or not plan.wide) and (taken := known.drawing(asked, way, images)) is not None
    }
    if not seconds:
        return None
    way = min(seconds, key=lambda one: seconds[one])
    work = (len(asked), sum(map(len, asked)), sum(map(sum, asked)))
    return replace(
        draft, k=plan.directions, way=way, sequential_calls=work[0], total_evaluations=work[1],
        guided_forwards=work[2], seconds=seconds[way],
    )  # fmt: skip


def _training_free(figures: Figures) -> Iterator[tuple[Figure, Basis, None]]:
    """Solvers and untrained tables at every number of steps from the fewest to the most that were measured."""
    lines: dict[tuple[Any, ...], dict[int, Figure]] = {}
    for row in figures.rows:
        known = row.solver in METHODS and METHODS[row.solver].calls > 0
        if row.table is None and (known or row.solver == "epd"):
            lines.setdefault((row.solver, row.k, row.guidance_interval), {})[row.steps] = row
    for line in lines.values():
        measured = sorted(line)
        for steps in range(measured[0], measured[-1] + 1):
            if steps in line:
                yield line[steps], "measured", None
            else:
                psnr = np.interp(math.log(steps), np.log(measured), [line[n].psnr_db for n in measured])
                yield replace(line[measured[0]], steps=steps, psnr_db=float(psnr)), "between", None


def _with_tables(
    figures: Figures, tables: dict[str, epd.Table], others: Sequence[str], missing: list[str]
) -> Iterator[tuple[Figure, Basis, str]]:
    """The bundle's tables: as measured, else as they tell (`shapes.tables` draws other captions), else as far above the
    best of the `others`, the solvers they were judged beside, as their fit found them."""
    for path, table in tables.items():
        key = digest(table)
        own = [row for row in figures.rows if row.table == key]
        for row in own:
            yield row, "measured", path
        if own:
            continue
        if table.quality_psnr is not None:
            yield Figure("epd", table.steps, table.quality_psnr, math.inf, table=key), "as told", path
            continue
        over = ((table.provenance or {}).get("held_out") or {}).get("over_best_db")
        beside = {  # each in the most steps that fit, which come last
            row.solver: row.psnr_db
            for row, _, _ in _training_free(figures)
            if row.solver in others
            and row.guidance_interval is None
            and row.steps * METHODS[row.solver].calls <= table.sequential_calls
        }
        if isinstance(over, int | float) and beside:
            psnr = max(beside.values()) + over
            yield Figure("epd", table.steps, psnr, math.inf, table=key), "as fitted", path
        else:
            missing.append(f"{path}: left out, its quality was never measured")


def _added(one: float, other: float) -> float:
    """PSNR in dB of two independent errors together."""
    return -10 * math.log10(10 ** (-one / 10) + 10 ** (-other / 10))


def _costs(pipe: Pipeline) -> Costs:
    """Of the kept profile; RequestError with the line to type if there is none."""
    if len(pipe.providers) > 1 or pipe.low_memory:
        what = "on one provider" if len(pipe.providers) > 1 else "without --low-memory"
        raise RequestError(f"what calls cost is known {what} only; plan so, or name the solver and leave --budget out")
    plan = pipe.plan("", solver="euler")
    known = costs(pipe.profile(plan).sittings, 2 if plan.guided else 1)
    if known is None:
        provider = "" if pipe.provider == "cpu" else f" --provider {pipe.provider}"
        provider += "".join(f" --provider-option {key}={value}" for key, value in pipe.options.items())
        raise RequestError(
            "what calls cost on this device is not known; "
            f"measure it once: python -m benchmarks scaling {pipe.bundle.folder}{provider}"
        )
    return known


def _batches(pipe: Pipeline) -> bool:
    """Whether the backbone takes a time for every row, so that the points of a request can be one batch."""
    name = pipe.bundle.backbone
    inputs = pipe.bundle.facts.components[name].inputs or pipe._session(name).load().inputs  # a foreign one is asked
    return {tensor.name: tensor.shape for tensor in inputs}.get("timestep") not in ((), (1,))
