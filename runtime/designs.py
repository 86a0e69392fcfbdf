"""The designs a fit tries: those it starts from, and the neighbours of the best one so far.

A design is what least squares cannot find: the grid, the places of the points on it, and how much memory the table has.
Knows nothing of networks; `epd.fit` says how good a design is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from epd.fit import Design

from .facts import Facts
from .judge import curve

SHIFTS = {"sd3": (2.0, 3.0, 1.5), "sd15": (1.0, 0.6, 1.6)}  # of the grids to try first
_LAST = 0.9  # position of a last point where the grid ends at 0: no slope is asked there


def starts(facts: Facts, intervals: int, directions: int) -> list[Design]:
    """Those tried first: each of the grids with the points in the middle of equal parts, and at their ends."""
    k = directions
    patterns = [[(j + 0.5) / k for j in range(k)], [(j + 1) / k for j in range(k)]]
    grids = [curve(facts, intervals, shift) for shift in SHIFTS[facts.family]]
    return [_design(grid, pattern) for grid in grids for pattern in patterns]


def _design(grid: Sequence[float], pattern: Sequence[float]) -> Design:
    rows = [tuple(pattern)] * (len(grid) - 1)
    if grid[-1] == 0:
        rows[-1] = tuple(min(r, _LAST) for r in pattern)
    return Design(tuple(grid), tuple(rows), place=4, carry=4, ridge=1e-4)


def moves(design: Design) -> Iterator[Design]:
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


def described(design: Design) -> str:
    """One line of its numbers."""
    times = " ".join(f"{t:.3g}" for t in design.times)
    points = " ".join(",".join(f"{r:.2g}" for r in row) for row in design.r)
    return f"times {times}; points {points}; place {design.place}, carry {design.carry}, ridge {design.ridge:.0e}"
