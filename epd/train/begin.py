"""The tables that learning begins with. Knows nothing of how they are learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from runtime.designs import SHIFTS, moves, starts
from runtime.errors import RequestError
from runtime.facts import Facts
from runtime.judge import curve

from ..fit import Design, Trajectories, decibels, fit, search
from ..solve import Points
from ..table import Table, start_table
from .teacher import Lesson, on_arrays

FITTED_TO = (16, 8)  # images, at most: to fit a table to, to choose it by


def even(
    facts: Facts, intervals: int, directions: int, start: str, order: int, midpoint: str | None, weights: str
) -> Table:
    """`epd.table.start_table` over the model's whole range; points arithmetic on a grid that ends at 0.

    Raises
    ------
    RequestError
        Geometric points on such a grid.
    """
    times = curve(facts, intervals, SHIFTS[facts.family][0])
    table = start_table(times, directions)
    try:
        midpoint = midpoint or table.midpoint
        return replace(table, start=start, order=order, midpoint=midpoint, weights=weights, grid="even")
    except ValueError as error:
        raise RequestError(f"{error}; give another --midpoint") from None


def fitted(
    facts: Facts,
    intervals: int,
    directions: int,
    learn: Lesson,
    held: Lesson,
    candidates: int,
    ticked: Callable[[], object] = lambda: None,
) -> Table:
    """The best of `candidates` designs that start from history, fitted to some images, chosen by others (`epd.fit`)."""
    lessons = (learn, held)
    counts = [min(most, lesson.count) for most, lesson in zip(FITTED_TO, lessons, strict=True)]
    parts = [on_arrays(one.slope(range(count)), one.device) for one, count in zip(lessons, counts, strict=True)]

    def slope(points: Points) -> NDArray[np.float64]:
        pieces = np.split(points.x, counts[:1], axis=1)
        return np.concatenate([part(Points(x, points.t)) for part, x in zip(parts, pieces, strict=True)], axis=1)

    pairs = [(one.teacher, count) for one, count in zip(lessons, counts, strict=True)]
    x = np.concatenate([teacher.x[:, :count] for teacher, count in pairs], axis=1)
    d = np.concatenate([teacher.d[:, :count] for teacher, count in pairs], axis=1)
    teacher = Trajectories(learn.teacher.times, x, d)

    def judged(design: Design) -> float:
        ticked()
        try:
            _, ends = fit(design, slope, teacher, counts[0])
        except FloatingPointError:
            return -math.inf
        return float(decibels(ends, x[-1])[counts[0] :].mean())

    *_, (best, _) = search(judged, starts(facts, intervals, directions), moves, candidates)
    table, _ = fit(best, slope, teacher, counts[0])
    return replace(table, grid="fitted", provenance={"made by": "epd.fit", "design": asdict(best)})
