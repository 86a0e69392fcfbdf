"""Stage 1: distillation. The student solves from the same noise as the teacher, and comes as close to it as it can.

As in arXiv 2507.14797, except that
- gradients pass through the whole trajectory with every loss (there: through one interval, and through all of them for
  very few steps only);
- errors are compared in decibels, so that easy images count as much as hard ones: their squares, which hard images and
  the first bad steps rule, come much less far with as many steps;
- free numbers (tables from history) are learned in orthonormal coordinates, see `epd.train.student`;
- the best table on images not learned from is kept; where a look finds it no better, learning goes back to it and on
  with lower rates, and ends when that has not helped either;
- the teacher is converged, and the same for every student.

Knows nothing of models: a `Lesson` has the network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..solve import Step, solve
from ..solvers import Coefficients, epd
from ..table import Table, write_whole
from .checkpoint import restore, state_of, under
from .student import LEARNED, LINEAR, Student
from .teacher import Lesson

LOSSES = ("state", "unrolled", "image")
_WARM = 10  # steps in which the learning rate rises
_ENDS = 0.02  # share of the learning rate that is left at the end
_FLOOR = 1e-7  # relative error below which nothing is gained: the logarithm's gradient would have no bound
_BACK = 1 / 3  # of the rates, after every look that found nothing better
_FORMAT = 2  # of a checkpoint
_BETTER = 0.01  # dB from which on a table is better


@dataclass(frozen=True)
class Recipe:
    """How to learn."""

    loss: str = "unrolled"  # of LOSSES: every state | the last one | its picture
    steps: int = 150  # of the optimiser (Adam)
    batch: int = 4  # images in a step
    rate: float = 0.1  # learning rate of positions, scales, weights on a simplex and times, which are logits
    linear_rate: float = 0.003  # of free numbers, relative to what they weigh
    frozen: tuple[str, ...] = ("times",)  # of student.LEARNED
    bound: float = 0.3  # largest relative change of a scale
    every: int = 15  # steps between two looks at the held-out images
    patience: int = 4  # looks without a better table, each followed by lower rates, after which learning ends
    drop: float | None = None  # dB that may be lost where a direction is dropped, before learning on; None: keep all
    seed: int = 0  # of the order of images

    def check(self) -> None:
        """Raises ValueError for the first thing that cannot be."""
        numbers = {"steps": self.steps, "batch": self.batch, "every": self.every, "patience": self.patience}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if not (0 < self.rate < 10 and 0 < self.linear_rate < 10):
            raise ValueError(f"learning rates must be in (0, 10), got {self.rate:g} and {self.linear_rate:g}")
        if not 0 <= self.bound < 1:
            raise ValueError(f"the bound of scales must be in [0, 1), got {self.bound:g}")
        if self.drop is not None and not self.drop >= 0:
            raise ValueError(f"what dropping may cost must be 0 dB or more, got {self.drop:g}")
        if self.loss == "state" and "times" not in self.frozen:
            raise ValueError("times are learned by the last state or picture: the states between move with them")


@dataclass
class Progress:
    """How far learning has come."""

    start: Table  # of this round: a new one begins where directions are dropped
    best: Table
    best_db: float
    step: int = 0
    round: int = 0
    worse: int = 0  # looks since the best
    backs: int = 0  # to the best, in this round: each lowers the rates
    looks: list[Sequence[float]] = field(default_factory=list)  # (round, step, dB of the held-out images)
    over: bool = False


class Learning:
    """Distils one table; goes on from its checkpoint if there is one.

    Parameters
    ----------
    recipe : Recipe
    table : Table
        To begin with. Its times begin and end where the teacher's do.
    learn, held : Lesson
        Images learned from, and images to choose the best table by.
    file : Path
        Of the checkpoint: written at every look at the held-out images, and when learning is interrupted.
    told, ticked : callable
        Told a line of news; called after every step.
    """

    def __init__(
        self,
        recipe: Recipe,
        table: Table,
        learn: Lesson,
        held: Lesson,
        file: Path,
        told: Callable[[str], None] = lambda line: None,
        ticked: Callable[[], None] = lambda: None,
    ) -> None:
        recipe.check()
        self.recipe, self.learn, self.held, self.file = recipe, learn, held, file
        self.told, self.ticked = told, ticked
        self._aim = held.pictures(held.states(range(held.count), table.times[-1]), float(table.times[-1]))
        self.progress = Progress(table, table, -math.inf)
        if not self._resumed():
            self._begin(table)
            self.progress.best_db = self._look(table)

    def run(self) -> Table:
        """Learns to the end; the best table. Where slopes are no more finite, that is the end.

        Raises
        ------
        KeyboardInterrupt
            With a checkpoint of the last step that was finished.
        """
        kept = self._snapshot()
        try:
            while not self.progress.over:
                self._step()
                if self.progress.step % self.recipe.every == 0 or self.progress.step == self.recipe.steps:
                    self._judge()
                    write_whole(self.file, self._snapshot())
                kept = self._snapshot()
                self.ticked()
        except KeyboardInterrupt:
            write_whole(self.file, kept)
            raise
        except FloatingPointError as error:
            self.told(
                f"learning diverged ({error}) and ends with the best table so far; a smaller --rate may do better"
            )
        return self.progress.best

    def _begin(self, table: Table) -> None:
        self._student = Student(table, self.recipe.frozen, self.recipe.bound).to(self.learn.device)
        images = range(min(self.recipe.batch, self.learn.count))
        self._student.orthogonal(self.learn.states(images, table.times[0]), self.learn.slope(images))
        raw = self._student.raw
        rates = {True: self.recipe.linear_rate, False: self.recipe.rate}
        groups = [{"params": [p for n, p in raw.items() if (n in LINEAR) == kind], "lr": rates[kind]} for kind in rates]
        self._adam = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.99))
        self._rates = [group["lr"] for group in self._adam.param_groups]
        self._best = self._state()

    def _state(self) -> dict[str, Tensor]:
        """Of the student and the optimiser, as it is now."""
        student = {f"student.{name}": value for name, value in self._student.state_dict().items()}
        state = student | state_of(self._adam, "adam")
        return {name: value.detach().clone().contiguous() for name, value in state.items()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        self._student.load_state_dict(under(state, "student."))
        restore(self._adam, state, "adam")

    def _step(self) -> None:
        recipe, step = self.recipe, self.progress.step
        done = step / recipe.steps
        factor = min(1.0, (step + 1) / _WARM) * (_ENDS + (1 - _ENDS) * (1 + math.cos(math.pi * done)) / 2)
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor * _BACK**self.progress.backs
        dice = np.random.default_rng([recipe.seed, self.progress.round, step])
        images = dice.permutation(self.learn.count)[: recipe.batch].tolist()
        self._adam.zero_grad()
        loss(recipe.loss, self._student(), self.learn, images).backward()
        self._adam.step()
        self.progress.step += 1

    def _judge(self) -> None:
        """Looks at the held-out images; ends the round where it is over."""
        now, recipe = self.progress, self.recipe
        try:
            table = self._student.table()
        except ValueError as error:  # numbers that no table can have
            raise FloatingPointError(str(error)) from None
        decibels = self._look(table)
        if decibels >= now.best_db + _BETTER:
            now.best, now.best_db, now.worse = table, decibels, 0
            self._best = self._state()
        else:
            now.worse, now.backs = now.worse + 1, now.backs + 1
            self._restore(self._best)
        if now.step < recipe.steps and now.worse < recipe.patience:
            return
        dropped = now.best
        if recipe.drop is not None and now.round == 0:
            dropped = without_idle(now.best, self._score, recipe.drop)
        now.over = dropped is now.best
        if not now.over:
            fewer = f"{now.best.total_evaluations} -> {dropped.total_evaluations} evaluations"
            now.start = now.best = dropped
            now.round, now.step, now.worse, now.backs = now.round + 1, 0, 0, 0
            self._begin(dropped)
            now.best_db = self._look(dropped)
            self.told(f"{now.best_db:6.2f} dB  {fewer}, learning on")

    def _look(self, table: Table) -> float:
        now, found = self.progress, self._score(table)
        now.looks.append((now.round, now.step, found))
        self.told(f"{found:6.2f} dB  step {now.step}")
        return found

    def _score(self, table: Table) -> float:
        return float(score(table, self.held, self.recipe.batch, self._aim).mean())

    def _snapshot(self) -> bytes:
        tensors = self._state() | {f"best.{name}": value for name, value in self._best.items()}
        now = self.progress
        told: dict[str, Any] = {
            "format": _FORMAT,
            "start": now.start.to_json(),
            "best": now.best.to_json(),
            "best_db": now.best_db,
        }
        told |= {name: getattr(now, name) for name in ("step", "round", "worse", "backs", "looks", "over")}
        return save(tensors, {"now": json.dumps(told)})

    def _resumed(self) -> bool:
        """Whether there is a checkpoint, and this goes on from it. A damaged one is as none."""
        if not self.file.is_file():
            return False
        try:
            with safe_open(self.file, "pt") as opened:
                told = json.loads(opened.metadata()["now"])
                if told.pop("format") != _FORMAT:
                    raise ValueError
                tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
        except (SafetensorError, KeyError, TypeError, ValueError):
            self.told(f"{self.file}: damaged, or of another version; begun anew")
            return False
        start, best = (Table.from_json(told.pop(name), str(self.file)) for name in ("start", "best"))
        self.progress = Progress(start, best, **told)
        self._begin(self.progress.start)
        self._restore(tensors)
        self._best = under(tensors, "best.")
        self.told(f"{self.progress.best_db:6.2f} dB  goes on from step {self.progress.step}")
        return True


def loss(kind: str, numbers: Coefficients, lesson: Lesson, images: Sequence[int]) -> Tensor:
    """Mean over images of their error relative to the teacher, in decibels; gradients pass to the numbers.

    state: of every state, in the mean; unrolled: of the last one; image: of its picture.
    """
    ends = numbers.times.tolist()
    run = solve(epd(numbers), lesson.states(images, ends[0]), lesson.slope(images))
    if kind == "state":
        parts = [_error(step.x, lesson.states(images, t)) for step, t in zip(run, ends[1:], strict=True)]
        error = torch.stack(parts).mean(0)
    else:
        last, aim = _last(run).x, lesson.states(images, ends[-1])
        if kind == "image":
            last, aim = lesson.pictures(last, ends[-1]), lesson.pictures(aim, ends[-1])
        error = _error(last, aim)
    return 10 * torch.log10(error + _FLOOR).mean()


def score(table: Table, lesson: Lesson, batch: int = 8, aim: Tensor | None = None) -> NDArray[np.float64]:
    """PSNR in dB of a table's pictures to the teacher's (`aim`, if they have been drawn), per image of a lesson."""
    numbers, found = Student(table, LEARNED).to(lesson.device)(), []
    end = float(table.times[-1])
    with torch.no_grad():
        for start in range(0, lesson.count, batch):
            images = range(start, min(start + batch, lesson.count))
            x = _last(solve(epd(numbers), lesson.states(images, float(table.times[0])), lesson.slope(images))).x
            theirs = lesson.pictures(lesson.states(images, end), end) if aim is None else aim[start : images.stop]
            error = _mean((lesson.pictures(x, end) - theirs).double() ** 2)
            found.append(-10 * torch.log10(error.clamp(min=1e-12)))
    return np.asarray(torch.cat(found).cpu().numpy(), np.float64)


def without(table: Table, i: int, k: int) -> Table:
    """The table without point k of interval i: all that its slope gave, the nearest other one of the interval gives."""
    others = [n for n in np.flatnonzero(table.w[i]) if n != k]
    n = min(others, key=lambda other: abs(table.r[i, other] - table.r[i, k]))
    changed: dict[str, Any] = {
        name: np.array(getattr(table, name)) for name in ("w", "place", "carry") if getattr(table, name) is not None
    }
    factor = table.scale_dir * table.scale_time if table.weights == "free" else np.ones_like(table.w)
    changed["w"][i, n] += changed["w"][i, k] * factor[i, k] / factor[i, n]
    changed["w"][i, k] = 0
    if "place" in changed:
        changed["place"][i, k] = 0
    for name in changed.keys() - {"w"}:
        for later in range(i + 1, table.steps):
            column, heir = ((later - 1 - i) * table.directions + point for point in (k, n))
            row, width = changed[name][later], changed[name].shape[-1]
            if column < width:
                if heir < width:
                    row[..., heir] += row[..., column]
                row[..., column] = 0
    return replace(table, **changed)


def without_idle(table: Table, score: Callable[[Table], float], tolerance: float) -> Table:
    """The table without the directions that can go for less than `tolerance` dB in all, the lightest tried first."""
    least = score(table) - tolerance
    for i, k in zip(*np.unravel_index(np.argsort(abs(table.w), axis=None), table.w.shape), strict=True):
        if table.w[i, k] != 0 and np.count_nonzero(table.w[i]) > 1:
            fewer = without(table, int(i), int(k))
            if score(fewer) >= least:
                table = fewer
    return table


def _error(x: Tensor, aim: Tensor) -> Tensor:
    return _mean((x - aim) ** 2) / _mean(aim**2)


def _mean(squares: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return squares.reshape(len(squares), -1).mean(1)


def _last(run: Iterable[Step]) -> Step:
    *_, last = run
    return last
