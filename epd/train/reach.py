"""How far each number of a table may be tried: as far as leaves its pictures alike, measured.

Numbers of early intervals move pictures thousands of times as much as those of late ones. Drawn with one spread for
all, as the published recipe has it, the early ones ruin pictures before the late ones change any.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from epd.table import Table

Floats = NDArray[np.float64]
Change = Callable[[Table, Sequence[Table]], Floats]  # (G,): how far others' pictures are, root mean square

FIRST, LEAST, MOST = 0.01, 1e-4, 0.3  # standard deviations of logarithms that are tried
ROUNDS = 3
NEAR = 2.0  # times the change that was asked for, above which a number has missed it
log = logging.getLogger(__name__)


class Reach(NamedTuple):
    """How widely a policy draws: numbers for all of a table, or arrays."""

    segments: float | Floats  # (N, 1) concentration of what positions cut [0, 1] into
    weights: float | Floats  # (N, 1) concentration
    scales: float | Floats  # (N, 2 K) standard deviation of the logarithms of scale_dir, then scale_time; 0: as given


def measured(table: Table, change: Change, alike: float) -> Reach:
    """Of every number so far that, when it alone is moved, pictures are `alike` dB (PSNR) to the table's own.

    Of positions and weights, those of an interval are moved together, one up, the next one down. A table in which all
    numbers are drawn so is farther away: by 10 log10 of how many they are.
    """
    import torch

    from .policy import Draw, Policy

    policy = Policy(table, Reach(1.0, 1.0, 1.0))
    still = [*(simplex.mean.numpy() for simplex in policy.given), policy.logarithms.numpy()]
    wanted = 10 ** (-alike / 20)
    sides = [_sides(simplex.free.numpy()) for simplex in policy.given]
    places: list[tuple[int, int, int | None]] = [
        (part, int(i), None) for part in (0, 1) for i in np.flatnonzero(sides[part].any(1))
    ]
    places += [(2, i, j) for i, j in np.ndindex(*still[2].shape)]
    sizes = np.full(len(places), FIRST)
    for number in range(ROUNDS):
        parts = [np.repeat(part[None], len(places), 0) for part in still]
        for g, ((part, i, j), size) in enumerate(zip(places, sizes, strict=True)):
            if j is None:
                parts[part][g, i] = _moved(still[part][i], size * sides[part][i])
            else:
                parts[part][g, i, j] += size
        found = change(table, policy.tables(Draw(*map(torch.from_numpy, parts))))
        if number == ROUNDS - 1 and (missed := int((found > NEAR * wanted).sum())):
            log.warning(
                "%d of %d numbers change pictures more than to %g dB however little they are moved: this is near the "
                "network's own rounding; give a lower --alike",
                missed, len(places), alike,
            )  # fmt: skip
        sizes = np.clip(sizes * wanted / np.maximum(found, 1e-12), LEAST, MOST)
    reach = Reach(np.ones((table.steps, 1)), np.ones((table.steps, 1)), np.zeros_like(still[2]))
    for (part, i, j), size in zip(places, sizes, strict=True):
        held = np.asarray(reach[part])
        if j is None:
            held[i] = _concentration(still[part][i], size * sides[part][i])
        else:
            held[i, j] = size
    return reach


def _sides(free: NDArray[np.bool_]) -> Floats:
    """1 and -1 in turns among the free entries of every row, 0 elsewhere."""
    return np.where(free, 1 - 2 * ((np.cumsum(free, 1) - 1) % 2), 0.0)


def _moved(mean: Floats, by: Floats) -> Floats:
    """Entries of a simplex with `by` added to their logarithms; those where it is 0 stay, and so does their sum."""
    free = by != 0
    moved = np.where(free, mean * np.exp(by), 0.0)
    return np.where(free, moved * (mean[free].sum() / moved.sum()), mean)


def _concentration(mean: Floats, by: Floats) -> float:
    """Of the Dirichlet whose draws lie as far from the mean, in the mean square, as `_moved` goes."""
    free = by != 0
    share = mean[free] / mean[free].sum()
    moved = _moved(mean, by)[free] / mean[free].sum()
    return float(max((share * (1 - share)).sum() / np.square(moved - share).sum() - 1, 1.0))
