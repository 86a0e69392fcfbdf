"""Fits a solver table to a bundle, on the machine, provider and precision it will run with: forward passes alone.

Three sets of start noise and prompts: one is learned from, it and a second one choose among designs, a third one judges
the table and is used for nothing else. Converged trajectories and scores are kept in a work folder as they are made, so
that a run that was stopped goes on where it was. The algorithm is `epd.fit`; this module gives it a model.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import epd
from epd import catalogue
from epd.fit import Design, Trajectories, decibels, fit, search, teach
from epd.solve import Slope

from .designs import SHIFTS, described, moves, starts
from .errors import NotFiniteError, RequestError
from .judge import Judgement, competitors, curve, judge
from .noise import randn
from .order import Group, Order, groups
from .pipeline import Pipeline
from .png import version
from .slopes import Slopes

Array = NDArray[np.float64]
_BATCH = 1 << 16  # latent entries in one request, guidance and directions counted, at most (one image at least)
_GROUP = 16  # images in one request, at most
_KNOWN = 1 << 28  # bytes of answers that are remembered
_REFINED = 4  # halvings of a teacher's last interval that ends at 0
log = logging.getLogger(__name__)


Told = Callable[[str], None]  # one line of news
Ticked = Callable[[int], None]  # rows done


class Fitting:
    """One order carried out on one pipeline: `predict`, then `run`. Trajectories and scores are kept in `work`.

    `teacher`: another bundle of the same model, of higher precision, whose trajectories are to be met; the table then
    makes up for what the first one loses. None: its own.
    """

    def __init__(
        self,
        pipe: Pipeline,
        order: Order,
        work: Path,
        teacher: Pipeline | None = None,
        ticked: Ticked = lambda rows: None,
    ) -> None:
        order.check()
        facts = pipe.bundle.facts
        height, width = facts.defaults.height, facts.defaults.width
        if height is None or width is None:
            height, width = pipe.bundle.sample_size()
        if height is None or width is None:
            raise RequestError(f"{facts.name} has no default size; fit a bundle that was exported for one")
        if teacher is not None and (teacher.bundle.facts.family, teacher.bundle.facts.latent) != (
            facts.family,
            facts.latent,
        ):
            raise RequestError(f"{teacher.bundle.folder}: no bundle of the same model; give another --teacher")
        self.pipe, self.order, self.work, self.ticked = pipe, order, work, ticked
        self.teacher = teacher or pipe
        self.size = (height, width)
        self.shape = (facts.latent.channels, height // facts.latent.factor, width // facts.latent.factor)
        self.scales = order.guidance or (facts.defaults.guidance,)
        rows = 2 * order.directions * math.prod(self.shape)
        self.groups = groups(order, self.scales, max(1, min(_GROUP, _BATCH // rows)))
        self._slopes: dict[tuple[bool, Group], Slopes] = {}
        self._kept: set[Path] = set()

    def predict(self) -> tuple[int, float, int]:
        """Rows the network will see, seconds they will take (from one request, timed), bytes of kept trajectories."""
        order, intervals = self.order, self.order.calls - 1
        rows: dict[str, int] = {"learn": 0, "choose": 0, "judge": 0}
        for group in self.groups:
            rows[group.role] += group.rows
        candidate = 1 + intervals * order.directions
        total = sum(rows.values()) * self._requests()
        total += (rows["learn"] + rows["choose"]) * self._asked(intervals)
        total += rows["judge"] * (candidate + 2 * len(competitors(self.pipe.bundle.facts)) * order.calls)
        total += rows["judge"] * len(self._fine())
        group = self.groups[0]
        points = epd.Points(self._start(group)[None], self._fine()[:1])
        slope = self._slope([group], tick=False)
        slope(points)
        started = time.perf_counter()
        slope(points)
        seconds = time.perf_counter() - started
        images = sum(len(group.seeds) for group in self.groups)
        return total, total * seconds / group.rows, 8 * images * len(self._fine()) * math.prod(self.shape)

    def run(self, told: Told = lambda line: None) -> tuple[epd.Table, Judgement]:
        """The best table found, and how it does on images that nothing was chosen by.

        Raises
        ------
        NotFiniteError
            The model gave NaN or infinity on the way to a converged picture, or with every candidate.
        OSError
            The work folder cannot be written.
        """
        started = time.perf_counter()
        try:
            table, design, judgement = self._run(told)
        except FloatingPointError as error:
            raise NotFiniteError(f"{self.pipe.bundle.backbone}: {error}; give a smaller guidance scale") from None
        return self._signed(table, design, judgement, time.perf_counter() - started), judgement

    def clear(self) -> None:
        """Removes what this order has kept."""
        for file in self._kept:
            file.unlink(missing_ok=True)

    def _run(self, told: Told) -> tuple[epd.Table, Design, Judgement]:
        slope, teacher = self.lesson("learn", "choose")
        slope, count = remembering(slope), self.order.trajectories
        first = starts(self.pipe.bundle.facts, self.order.calls - 1, self.order.directions)
        best: Design | None = None
        score = partial(self._score, slope, teacher, count)
        for design, decibel in search(score, first, moves, self.order.candidates):
            best = design
            told(f"{decibel:6.2f} dB  {described(design)}")
        assert best is not None  # there is always a first candidate
        table, _ = fit(best, slope, teacher, count)
        slope, reference = self.lesson("judge")
        noise = reference.x[0].astype(np.float64) / reference.times[0]
        prompts = [prompt for group in self.groups if group.role == "judge" for prompt in group.prompts]
        return table, best, judge(self.pipe, table, slope, noise, reference, self._fine().tolist(), prompts)

    def lesson(self, *roles: str) -> tuple[Slope, Trajectories]:
        """The network over the images of these roles (learn, choose, judge), and their converged trajectories.

        Raises
        ------
        FloatingPointError
            The model gave NaN or infinity.
        OSError
            The work folder cannot be written.
        """
        wanted = [group for role in roles for group in self.groups if group.role == role]
        return self._slope(wanted), _joined([self._taught(group) for group in wanted])

    def _fine(self) -> NDArray[np.float64]:
        """The teacher's grid: an interval for every two calls."""
        facts, intervals = self.pipe.bundle.facts, self.order.teacher_calls // 2
        if facts.family != "sd3":
            return np.array(curve(facts, intervals, SHIFTS[facts.family][0]))
        grid = np.array(curve(facts, intervals - _REFINED, SHIFTS[facts.family][0]))
        return np.concatenate([grid[:-1], grid[-2] / 2.0 ** np.arange(1, _REFINED + 1), [0.0]])

    def _requests(self) -> int:
        """Of a teacher: two an interval and one at the end; where that is 0, one for its last interval."""
        fine = self._fine()
        return 2 * len(fine) - 1 if fine[-1] > 0 else 2 * len(fine) - 3

    def _asked(self, intervals: int) -> int:
        """Points of all candidates but those that are remembered, if the first of them remained the best."""
        order = self.order
        every = order.candidates * intervals * order.directions
        first = starts(self.pipe.bundle.facts, intervals, order.directions)[: order.candidates]
        around = itertools.islice(itertools.cycle(moves(first[0])), order.candidates - len(first))
        points = intervals * order.directions * sum(len(g.seeds) for g in self.groups if g.role != "judge")
        if 8 * points * math.prod(self.shape) > _KNOWN:  # a candidate's answers
            return every + order.candidates + intervals * order.directions + 1  # the best one once more, at the end
        return 1 + every - order.directions * sum(first[0].begins_as(each) for each in around)

    def _start(self, group: Group) -> Array:
        """States at the first time, (B, C, h, w): the noise of the group's seeds."""
        noise = np.stack([randn(self.shape, seed) for seed in group.seeds]).astype(np.float64)
        return np.asarray(self._fine()[0] * noise)

    def _slope(self, groups: Sequence[Group], tick: bool = True, teaching: bool = False) -> Slope:
        """The network over the images of several groups, one group after the other."""
        self._encode(teaching)
        ends = np.cumsum([len(group.seeds) for group in groups])[:-1]
        parts = [self._slopes[teaching, group] for group in groups]

        def slope(points: epd.Points) -> Array:
            answers = []
            for part, x in zip(parts, np.split(points.x, ends, axis=1), strict=True):
                before = part.guided_forwards
                answers.append(part(epd.Points(x, points.t)))
                if tick:
                    self.ticked(part.guided_forwards - before)
            return np.concatenate(answers, axis=1)

        return slope

    def _encode(self, teaching: bool) -> None:
        """All prompts at once, so that text encoders are loaded once, and before the backbone."""
        if (teaching, self.groups[0]) in self._slopes:
            return
        pipe = self.teacher if teaching else self.pipe
        whole = pipe.slopes([prompt for group in self.groups for prompt in group.prompts], max(self.scales))
        end = 0
        for group in self.groups:
            start, end = end, end + len(group.prompts)
            self._slopes[teaching, group] = whole.part(slice(start, end), group.guidance)

    def _taught(self, group: Group) -> Trajectories:
        """Converged trajectories of a group, from the work folder if they are there and whole."""
        file = self._file("teacher", [asdict(group), self._fine().tolist(), self.teacher is not self.pipe], ".npz")
        try:
            with file.open("rb") as opened, np.load(opened) as stored:
                found = Trajectories(stored["times"], stored["x"], stored["d"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or damaged: made anew
            found = teach(self._slope([group], teaching=True), self._start(group), self._fine())
            with _written(file) as whole:
                np.savez(whole, times=found.times, x=found.x, d=found.d)
        else:
            self.ticked(group.rows * self._requests())
        return found

    def _score(self, slope: Slope, teacher: Trajectories, learn: int, design: Design) -> float:
        """Mean dB of all the images, learned from or not; -inf where a slope is not finite. Kept in the work folder."""
        used = [asdict(group) for group in self.groups if group.role != "judge"]
        file = self._file(
            "decibels", [asdict(design), used, self._fine().tolist(), self.teacher is not self.pipe], ".txt"
        )
        try:
            return float(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass
        try:
            _, x = fit(design, slope, teacher, learn)
            found = float(decibels(x, teacher.x[-1]).mean())
        except FloatingPointError:
            found = -math.inf
        with _written(file) as opened:
            opened.write(repr(found).encode())
        return found

    def _file(self, kind: str, of: Any, suffix: str) -> Path:
        """Where something is kept: named by everything it depends on."""
        told = [of, version(), [(pipe.identity(), pipe.provider, pipe.options) for pipe in (self.pipe, self.teacher)]]
        name = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:24]
        file = self.work / f"{kind}-{name}{suffix}"
        self._kept.add(file)
        return file

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
                "provider_options": dict(self.pipe.options),
                "precision": facts.components[bundle.backbone].precision,
                "teacher": f"dpm2, {order.teacher_calls} calls, {self.teacher.bundle.facts.name}",
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


def remembering(slope: Slope) -> Slope:
    """The same, but that what was asked lately is not asked again: designs that begin alike ask alike there."""
    known: OrderedDict[bytes, Array] = OrderedDict()

    def asked(points: epd.Points) -> Array:
        digest = hashlib.blake2b(np.ascontiguousarray(points.t).data)
        digest.update(np.ascontiguousarray(points.x).data)
        key = digest.digest()
        if key in known:
            known.move_to_end(key)
            return known[key]
        answer = known[key] = np.asarray(slope(points))
        answer.flags.writeable = False
        while sum(each.nbytes for each in known.values()) > _KNOWN:
            known.popitem(last=False)
        return answer

    return asked


def fit_bundle(
    pipe: Pipeline, order: Order, output: Path, work: Path | None = None, teacher: Pipeline | None = None
) -> tuple[epd.Table, Judgement]:
    """Carries out an order with progress on a terminal, and writes the table: says how long it will take, then does it.

    Trajectories and scores are kept under `work`, where several tables of one bundle share them and a stopped run goes
    on. None: in the user's cache, and removed once the table is written.
    """
    folder = work or catalogue.cache_folder() / "fit"
    fitting = Fitting(pipe, order, folder, teacher)
    folder.mkdir(parents=True, exist_ok=True)
    rows, seconds, size = fitting.predict()
    log.warning(
        "about %s on this machine (%d rows of the network); a stopped run goes on from %s (%.2g GB)",
        _long(seconds),
        rows,
        folder,
        size / 1e9,
    )
    with tqdm(total=rows, unit="row", disable=None, leave=False, smoothing=0.05) as bar:
        fitting.ticked = bar.update
        table, judgement = fitting.run(partial(bar.write, file=sys.stderr))
    table.save(output)
    if work is None:
        fitting.clear()
    return table, judgement


@contextmanager
def _written(file: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name when it is whole."""
    partial_file = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with partial_file.open("wb") as opened:
            yield opened
        os.replace(partial_file, file)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error
    finally:
        partial_file.unlink(missing_ok=True)


def _long(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _joined(parts: list[Trajectories]) -> Trajectories:
    if len(parts) == 1:
        return parts[0]
    return Trajectories(
        parts[0].times, np.concatenate([part.x for part in parts], 1), np.concatenate([part.d for part in parts], 1)
    )
