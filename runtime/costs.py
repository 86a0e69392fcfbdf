"""What a drawing takes on a device, from what its calls take: the requests of a solver, in rows, times their costs.

The costs are one sitting of a profile (`runtime.profiles`): calls of several row counts, calls at once, a whole drawing
in one call, and a decoding. The backbone and the decoder are loaded; the text encoders are loaded for every drawing, as
they are released in it: that is a part of it. Knows nothing of quality.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import epd
from epd.solve import Solver

from .directions import Directions
from .profiles import Timings

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .plan import Plan

Requests = Sequence[tuple[int, ...]]  # of a drawing of one image: for every request the rows of each of its points
DECODE = "decode"  # a task of a profile, beside those that `runtime.directions` names
_CALL = re.compile(r"(\d+) rows?")
_AT_ONCE = re.compile(r"(\d+) calls of (\d+) rows? at once")


@dataclass(frozen=True)
class Costs:
    """Seconds on one device, of one bundle at one size."""

    rows: Mapping[int, float]  # rows -> one call of so many
    at_once: Mapping[int, float]  # K -> K calls at once, as a share of what they take in turn
    encode: float  # all of a drawing beside its calls and decoding: most is the text encoders, loaded and released
    decode: float  # one image

    def call(self, rows: int) -> float | None:
        """Seconds of one call: measured, or on the straight line between the nearest two; None beyond them."""
        known = sorted(self.rows)
        if not known or not known[0] <= rows <= known[-1]:
            return None
        return float(np.interp(rows, known, [self.rows[n] for n in known]))

    def request(self, points: Sequence[int], way: Directions) -> float | None:
        """Seconds of one request whose points have so many rows; None: not known."""
        if way == "batch" or len(points) == 1:
            return self.call(sum(points))
        if way == "spread" or (way == "async" and len(points) not in self.at_once):
            return None
        calls = [self.call(rows) for rows in points]
        share = self.at_once[len(points)] if way == "async" else 1.0
        return None if None in calls else share * sum(seconds for seconds in calls if seconds is not None)

    def drawing(self, requests: Requests, way: Directions, images: int = 1) -> float | None:
        """Seconds from a prompt to its pictures, everything loaded; None: some call of it was never measured."""
        each = {points: self.request([rows * images for rows in points], way) for points in dict.fromkeys(requests)}
        found = [each[points] for points in requests]
        if None in found:
            return None
        return self.encode + sum(seconds for seconds in found if seconds is not None) + images * self.decode


def costs(sittings: Sequence[Timings], rows: int) -> Costs | None:
    """Of the sitting that has a drawing, calls of `rows` (those of one guided point) and the most others, the newest of
    these; None: there is none."""
    for sitting in sorted(sittings, key=len, reverse=True):
        calls = {int(m[1]): sitting[name].seconds for name in sitting if (m := _CALL.fullmatch(name))}
        if {_picture(rows), DECODE} <= sitting.keys() and rows in calls:
            at_once = [(m, sitting[name].seconds) for name in sitting if (m := _AT_ONCE.fullmatch(name))]
            shares = {
                int(m[1]): seconds / (int(m[1]) * calls[int(m[2])]) for m, seconds in at_once if int(m[2]) in calls
            }
            decode = sitting[DECODE].seconds
            return Costs(calls, shares, max(sitting[_picture(rows)].seconds - calls[rows] - decode, 0.0), decode)
    return None


def _picture(rows: int) -> str:
    """The task of a drawing in one call of so many rows."""
    return f"a picture in one call of {rows} row{'s' * (rows > 1)}"


def ends(pipe: Pipeline, plan: Plan) -> dict[str, Callable[[], object]]:
    """The tasks of a profile beside the backbone's calls, those of one image: name -> doing it."""
    latents = np.zeros((1, *plan.latent_shape))
    single = pipe.plan("", solver="euler", num_inference_steps=1, guidance_scale=plan.guidance)
    return {
        _picture(2 if single.guided else 1): lambda: pipe.draw(single),
        DECODE: lambda: pipe.decode(latents),
    }


def requests_of(plan: Plan) -> Requests:
    """Of a drawing of a plan, of one image."""
    return requests(plan.coroutine(np.zeros_like), 2 if plan.guided else 1, plan.guidance_interval)


def predicted(pipe: Pipeline, plan: Plan, way: Directions) -> float | None:
    """Seconds of a plan's drawing, everything loaded, by the costs that are kept of this device; None: not known."""
    known = costs(pipe.profile(plan).sittings, 2 if plan.guided else 1)
    return None if known is None else known.drawing(requests_of(plan), way, len(plan.seeds))


def times_of(solver: Solver) -> list[tuple[float, ...]]:
    """The times of every request of a solver whose requests do not depend on the slopes, found by a dry run."""
    found: list[tuple[float, ...]] = []

    def still(points: epd.Points) -> object:
        found.append(tuple(np.ravel(points.t).tolist()))
        return np.zeros_like(points.x)

    for _ in epd.solve(solver, np.zeros((1, 1)), still):
        pass
    return found


def requests(solver: Solver, halves: int, interval: tuple[float, float] | None = None) -> Requests:
    """Rows of the points of every request: `halves` (2 with guidance), or 1 outside the guidance interval (sigma)."""
    low, high = interval or (-np.inf, np.inf)
    return [tuple(halves if low <= t <= high else 1 for t in times) for times in times_of(solver)]
