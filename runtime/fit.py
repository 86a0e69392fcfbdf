"""Fits a solver table to a bundle, on the machine, provider and precision it will run with: forward passes alone.

Three sets of start noise and prompts: one is learned from, one chooses among designs, one judges the table and is used
for nothing else. Converged trajectories and scores are kept in a work folder as they are made, so that a run that was
stopped goes on where it was. The algorithm is `epd.fit`; this module gives it a model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import epd
import epd.catalogue
from epd.fit import Design, Trajectories, decibels, fit, search, teach
from epd.solve import Slope, Solver
from epd.solvers import METHODS

from .bundle import PROMPTS, Facts
from .errors import NotFiniteError, RequestError
from .grid import own_grid
from .noise import randn
from .pipeline import Pipeline
from .png import version
from .slopes import Slopes, variance_preserving

Array = NDArray[np.float64]
SHIFTS = {"sd3": (2.0, 3.0, 1.5), "sd15": (1.0, 0.6, 1.6)}  # of the grids to try first
log = logging.getLogger(__name__)
_BATCH = 1 << 16  # latent entries in one request, at most (one image at least)
_GROUP = 16  # images in one request, at most
_LAST = 0.9  # position of a last point where the grid ends at 0: no slope is asked there


@dataclass(frozen=True)
class Order:
    """What is to be fitted. The same order on the same bundle gives the same table."""

    prompts: tuple[str, ...]  # at least 4: half to learn from, a quarter to choose by, a quarter to judge by
    calls: int = 6  # sequential calls of the table: N + 1
    directions: int = 2  # K
    guidance: tuple[float, ...] = ()  # scales; more than one: a table for all of them; none: the bundle's own
    trajectories: int = 16  # to learn from; half as many each to choose and to judge by
    teacher_calls: int = 120  # of a converged trajectory
    candidates: int = 24  # designs tried, at most
    seed: int = 100_000  # of the first start noise

    def check(self) -> None:
        """Raises RequestError for the first thing that cannot be."""
        for holds, text in (
            (self.calls >= 2, f"--calls must be 2 or more, got {self.calls}"),
            (self.directions >= 1, f"-k must be 1 or more, got {self.directions}"),
            (self.trajectories >= 2, f"--trajectories must be 2 or more, got {self.trajectories}"),
            (self.candidates >= 1, f"--candidates must be 1 or more, got {self.candidates}"),
            (
                self.teacher_calls >= 8 * self.calls,
                f"--teacher-calls must be 8 times --calls or more, got {self.teacher_calls}; give {8 * self.calls}",
            ),
            (len(self.prompts) >= 4, f"fitting needs 4 prompts or more, one a line, got {len(self.prompts)}"),
            (all(math.isfinite(scale) for scale in self.guidance), "guidance scales must be finite numbers"),
        ):
            if not holds:
                raise RequestError(text)


@dataclass(frozen=True)
class Group:
    """Images that go through the network together: one guidance scale, a prompt and a seed each."""

    role: str  # learn | choose | judge
    guidance: float
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Judgement:
    """How close pictures of held-out prompts and seeds come to converged ones, PSNR in dB, mean over the images."""

    psnr_db: float
    half_width_db: float  # of its 95 % interval
    images: int
    latent_db: float
    reference_db: float  # two converged solutions by different solvers agree to this
    training_free: dict[str, float]  # solver -> psnr_db at as many sequential calls, on the better of two grids

    @property
    def best_other(self) -> str:
        """The closest of the training-free solvers."""
        return max(self.training_free, key=lambda name: self.training_free[name])

    def told(self, calls: int) -> str:
        """In words, plainly also where the table does not win."""
        other, ours = self.best_other, f"{self.psnr_db:.1f} ± {self.half_width_db:.1f} dB"
        verdict = "closer than" if self.psnr_db > self.training_free[other] else "NO closer than"
        return (
            f"{ours} from converged pictures of {self.images} held-out prompts at {calls} sequential calls: {verdict} "
            f"every training-free solver (best: {other}, {self.training_free[other]:.1f} dB); "
            f"two converged solutions agree to {self.reference_db:.1f} dB"
        )


Told = Callable[[str], None]  # one line of news
Ticked = Callable[[int], None]  # rows done


class Fitting:
    """One order carried out on one pipeline: `predict`, then `run`."""

    def __init__(self, pipe: Pipeline, order: Order, work: Path, ticked: Ticked = lambda rows: None) -> None:
        order.check()
        facts = pipe.bundle.facts
        height, width = facts.defaults.height, facts.defaults.width
        if height is None or width is None:
            height, width = pipe.bundle.sample_size()
        if height is None or width is None:
            raise RequestError(f"{facts.name} has no default size; fit a bundle that was exported for one")
        self.pipe, self.order, self.work, self.ticked = pipe, order, work, ticked
        self.size = (height, width)
        self.shape = (facts.latent.channels, height // facts.latent.factor, width // facts.latent.factor)
        self.scales = order.guidance or (facts.defaults.guidance,)
        self.groups = _groups(order, self.scales, max(1, min(_GROUP, _BATCH // math.prod(self.shape))))
        self._slopes: dict[Group, Slopes] = {}

    def predict(self) -> tuple[int, float]:
        """Rows the network will see, and seconds they will take: from one request, timed after a first one."""
        order, intervals = self.order, self.order.calls - 1
        rows: dict[str, int] = {"learn": 0, "choose": 0, "judge": 0}
        for group in self.groups:
            rows[group.role] += len(group.seeds) * (2 if group.guidance > 1 else 1)
        candidate = 1 + intervals * order.directions
        total = sum(rows.values()) * (order.teacher_calls + 1)
        total += (rows["learn"] + rows["choose"]) * order.candidates * candidate + sum(rows.values()) * candidate
        total += rows["judge"] * (2 * len(_methods(self.pipe.bundle.facts)) * order.calls + order.teacher_calls)
        group = self.groups[0]
        points = epd.Points(self._start(group)[None], self._fine(8)[:1])
        slope = self._slope([group], tick=False)
        slope(points)
        started = time.perf_counter()
        slope(points)
        seconds = time.perf_counter() - started
        return total, total * seconds / (len(group.seeds) * (2 if group.guidance > 1 else 1))

    def run(self, told: Told = lambda line: None) -> tuple[epd.Table, Judgement]:
        """The best table found, and how it does on images that nothing was chosen by.

        Raises
        ------
        NotFiniteError
            The model gave NaN or infinity.
        OSError
            The work folder cannot be written.
        """
        started = time.perf_counter()
        try:
            return self._run(told, started)
        except FloatingPointError as error:
            raise NotFiniteError(f"{self.pipe.bundle.backbone}: {error}; give a smaller guidance scale") from None

    def _run(self, told: Told, started: float) -> tuple[epd.Table, Judgement]:
        learn, choose, judge = (
            [group for group in self.groups if group.role == role] for role in ("learn", "choose", "judge")
        )
        teacher = _joined([self._taught(group) for group in (*learn, *choose)])
        count = sum(len(group.seeds) for group in learn)
        slope = self._slope([*learn, *choose])
        design = None
        score = partial(self._score, slope, teacher, count)
        for design, decibel in search(score, self._starts(), _moves, self.order.candidates):
            told(f"{decibel:6.2f} dB  {_described(design)}")
        assert design is not None  # there is always a first candidate
        table, _ = fit(design, slope, teacher, count)
        judgement = self._judge(table, judge)
        return self._signed(table, design, judgement, time.perf_counter() - started), judgement

    def _starts(self) -> list[Design]:
        facts, k = self.pipe.bundle.facts, self.order.directions
        patterns = [[(j + 0.5) / k for j in range(k)], [(j + 1) / k for j in range(k)]]
        grids = [self._curve(self.order.calls - 1, shift) for shift in SHIFTS[facts.family]]
        return [_design(grid, pattern) for grid in grids for pattern in patterns]

    def _curve(self, n: int, shift: float) -> tuple[float, ...]:
        facts = self.pipe.bundle.facts
        vp = variance_preserving(facts) if facts.family == "sd15" else None
        return tuple(epd.schedule.shifted(n, shift, vp).tolist())

    def _fine(self, calls: int) -> NDArray[np.float64]:
        return np.array(self._curve(calls // 2, SHIFTS[self.pipe.bundle.facts.family][0]))

    def _start(self, group: Group) -> Array:
        """States at the first time, (B, C, h, w): the noise of the group's seeds."""
        noise = np.stack([randn(self.shape, seed) for seed in group.seeds]).astype(np.float64)
        return np.asarray(self._fine(8)[0] * noise)

    def _slope(self, groups: Sequence[Group], tick: bool = True) -> Slope:
        """The network over the images of several groups, one group after the other."""
        for group in groups:
            if group not in self._slopes:
                self._slopes[group] = self.pipe.slopes(group.prompts, group.guidance)
        ends = np.cumsum([len(group.seeds) for group in groups])[:-1]

        def slope(points: epd.Points) -> Array:
            answers = []
            for group, x in zip(groups, np.split(points.x, ends, axis=1), strict=True):
                part = self._slopes[group]
                before = part.guided_forwards
                answers.append(part(epd.Points(x, points.t)))
                if tick:
                    self.ticked(part.guided_forwards - before)
            return np.concatenate(answers, axis=1)

        return slope

    def _taught(self, group: Group) -> Trajectories:
        """Converged trajectories of a group, from the work folder if they are there."""
        file = self.work / f"teacher-{self.groups.index(group)}.npz"
        fine = self._fine(self.order.teacher_calls)
        if file.is_file():
            with np.load(file) as stored:
                self.ticked(len(group.seeds) * (2 if group.guidance > 1 else 1) * (self.order.teacher_calls + 1))
                return Trajectories(stored["times"], stored["x"], stored["d"])
        found = teach(self._slope([group]), self._start(group), fine)
        partial_file = file.with_suffix(".partial")
        with partial_file.open("wb") as opened:
            np.savez(opened, times=found.times, x=found.x, d=found.d)
        os.replace(partial_file, file)
        return found

    def _score(self, slope: Slope, teacher: Trajectories, learn: int, design: Design) -> float:
        """Mean dB of the images that choose; kept in the work folder."""
        file, key = self.work / "scores.jsonl", json.dumps(asdict(design))
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                stored = json.loads(line)
                if json.dumps(stored["design"]) == key:
                    return float(stored["decibels"])
        _, x = fit(design, slope, teacher, learn)
        found = float(decibels(x, teacher.x[-1])[learn:].mean())
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps({"design": asdict(design), "decibels": found}) + "\n")
        return found

    def _judge(self, table: epd.Table, groups: list[Group]) -> Judgement:
        slope, reference = self._slope(groups), _joined([self._taught(group) for group in groups])
        facts = self.pipe.bundle.facts
        noise = np.concatenate([self._start(group) for group in groups]) / reference.times[0]

        def drawn(solver: Solver, grid: Sequence[float], scale: float) -> tuple[Array, NDArray[Any]]:
            *_, last = epd.solve(solver, scale * noise, slope)
            x = last.x / _end_scale(facts, grid[-1])
            return x, self.pipe.decode(x)

        first, flow = reference.times[0], facts.family == "sd3"
        aim = reference.x[-1] / _end_scale(facts, reference.times[-1])
        picture = self.pipe.decode(aim)
        x, ours = drawn(epd.solvers.epd(table), table.times.tolist(), first)
        every = _psnr(ours, picture)
        others: dict[str, float] = {}
        for name in _methods(facts):
            steps = self.order.calls // METHODS[name].calls
            own, even = own_grid(facts, steps, name), self._curve(steps, SHIFTS[facts.family][0])
            grids = [(own, 1.0 if flow else math.hypot(1, own[0])), (even, first)]
            drawings = [drawn(METHODS[name].build(grid, flow), grid, scale)[1] for grid, scale in grids]
            others[name] = max(float(_psnr(drawing, picture).mean()) for drawing in drawings)
        fine = self._curve(self.order.teacher_calls, SHIFTS[facts.family][0])
        again = drawn(epd.solvers.dpmpp_2m(fine, flow), fine, first)[1]
        return Judgement(
            psnr_db=float(every.mean()),
            half_width_db=float(1.96 * every.std(ddof=1) / math.sqrt(len(every))),
            images=len(every),
            latent_db=float(decibels(x, aim).mean()),
            reference_db=float(_psnr(again, picture).mean()),
            training_free=others,
        )

    def _signed(self, table: epd.Table, design: Design, judgement: Judgement, seconds: float) -> epd.Table:
        """The table with what it belongs to and where it came from."""
        bundle, order = self.pipe.bundle, self.order
        facts = bundle.facts
        return replace(
            table,
            family=facts.family,
            model=facts.name,
            grid="fitted",
            guidance=self.scales[0] if len(self.scales) == 1 else None,
            size=self.size,
            t5="text_encoder_3" in facts.components if facts.family == "sd3" else None,
            provenance={
                "made by": f"runtime fit {version()}",
                "bundle": bundle.fingerprint(),
                "provider": self.pipe.provider,
                "precision": facts.components[bundle.backbone].precision,
                "teacher": f"dpm2, {order.teacher_calls} calls",
                "trajectories": order.trajectories,
                "prompts": len(order.prompts),
                "guidance_scales": list(self.scales),
                "first_seed": order.seed,
                "place": design.place,
                "carry": design.carry,
                "ridge": design.ridge,
                "seconds": round(seconds, 1),
                "held_out": asdict(judgement),
            },
        )


def fit_bundle(pipe: Pipeline, order: Order, work: Path | None = None) -> tuple[epd.Table, Judgement]:
    """Carries out an order with progress on a terminal: says how long it will take, then does it.

    Trajectories and scores are kept under `work`, by bundle and what they depend on: several tables of one bundle can
    share them. None: in the user's cache, and removed at the end.
    """
    order.check()
    folder = (work or epd.catalogue.cache_folder() / "fit") / _key(pipe, order)
    folder.mkdir(parents=True, exist_ok=True)
    fitting = Fitting(pipe, order, folder)
    rows, seconds = fitting.predict()
    log.warning("about %s on this machine (%d rows of the network); a stopped run goes on", _long(seconds), rows)
    with tqdm(total=rows, unit="row", disable=None, leave=False, smoothing=0.05) as bar:
        fitting.ticked = bar.update
        table, judgement = fitting.run(partial(bar.write, file=sys.stderr))
    if work is None:
        shutil.rmtree(folder)
    return table, judgement


def _key(pipe: Pipeline, order: Order) -> str:
    """Of the converged trajectories: everything they depend on."""
    told = asdict(replace(order, calls=2, directions=1, candidates=1))
    told |= {"bundle": pipe.bundle.fingerprint() or str(pipe.bundle.folder.resolve()), "provider": pipe.provider}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _long(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def read_prompts(file: Path | None, bundle_folder: Path) -> tuple[str, ...]:
    """Prompts, one a line: of a file, else of the bundle, else those that come with this package.

    Raises
    ------
    RequestError
        The file cannot be read as UTF-8 text.
    """
    own = bundle_folder / PROMPTS
    chosen = file or (own if own.is_file() else Path(__file__).with_name(PROMPTS))
    try:
        lines = chosen.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise RequestError(f"{chosen}: {error.strerror}; give a text file with a prompt a line") from None
    except UnicodeDecodeError:
        raise RequestError(f"{chosen}: not UTF-8 text; give a text file with a prompt a line") from None
    return tuple(line.strip() for line in lines if line.strip())


def _groups(order: Order, scales: tuple[float, ...], size: int) -> list[Group]:
    """All images in groups of one role and guidance scale; no prompt and no seed has two roles."""
    half, quarter = len(order.prompts) // 2, len(order.prompts) // 4
    prompts = {
        "learn": order.prompts[:half],
        "choose": order.prompts[half : half + quarter],
        "judge": order.prompts[half + quarter :],
    }
    few = max(2, order.trajectories // 2)
    groups, seed = [], order.seed
    for role, count in (("learn", order.trajectories), ("choose", few), ("judge", few)):
        for place, scale in enumerate(scales):
            mine = list(range(place, count, len(scales)))  # scales take turns
            for start in range(0, len(mine), size):
                part = mine[start : start + size]
                own = prompts[role]
                groups.append(Group(role, scale, tuple(own[i % len(own)] for i in part), tuple(seed + i for i in part)))
        seed += count
    return groups


def _joined(parts: list[Trajectories]) -> Trajectories:
    if len(parts) == 1:
        return parts[0]
    return Trajectories(
        parts[0].times, np.concatenate([part.x for part in parts], 1), np.concatenate([part.d for part in parts], 1)
    )


def _design(grid: Sequence[float], pattern: Sequence[float]) -> Design:
    rows = [tuple(pattern)] * (len(grid) - 1)
    if grid[-1] == 0:
        rows[-1] = tuple(min(r, _LAST) for r in pattern)
    return Design(tuple(grid), tuple(rows), place=4, carry=4, ridge=1e-4)


def _moves(design: Design) -> Iterator[Design]:
    """Neighbours: more or less memory and ridge, a time moved by a quarter of its interval, a point moved by 0.15."""
    yield replace(design, ridge=design.ridge / 10)
    yield replace(design, carry=design.carry + 2)
    yield replace(design, ridge=design.ridge * 10)
    yield replace(design, place=design.place + 1)
    yield replace(design, place=max(1, design.place - 1))
    yield replace(design, carry=max(0, design.carry - 2))
    for i in reversed(range(1, len(design.r))):
        before, at, after = design.times[i - 1 : i + 2]
        for moved in (at + (before - at) / 4, at + (after - at) / 4):
            yield replace(design, times=(*design.times[:i], moved, *design.times[i + 1 :]))
    for i in reversed(range(len(design.r))):
        last = _LAST if design.times[i + 1] == 0 else 1.0
        for k, r in enumerate(design.r[i]):
            for moved in (r - 0.15, r + 0.15):
                if 0.05 <= moved <= last:
                    row = (*design.r[i][:k], round(moved, 4), *design.r[i][k + 1 :])
                    yield replace(design, r=(*design.r[:i], row, *design.r[i + 1 :]))


def _described(design: Design) -> str:
    times = " ".join(f"{t:.3g}" for t in design.times)
    points = " ".join(",".join(f"{r:.2g}" for r in row) for row in design.r)
    return f"times {times}; points {points}; place {design.place}, carry {design.carry}, ridge {design.ridge:.0e}"


def _methods(facts: Facts) -> list[str]:
    """Training-free solvers to compare with: deterministic, and of known sequential calls."""
    return [
        name
        for name, method in METHODS.items()
        if facts.family in method.families and not method.noisy and method.calls > 0
    ]


def _end_scale(facts: Facts, sigma: float) -> float:
    return 1.0 if facts.family == "sd3" else math.hypot(1, sigma)


def _psnr(one: NDArray[Any], other: NDArray[Any]) -> Array:
    """PSNR in dB of pictures (B, H, W, 3) in [0, 1], per picture."""
    error = np.square(one.astype(np.float64) - other).mean((1, 2, 3))
    return np.asarray(10 * np.log10(1 / np.maximum(error, 1e-12)))
