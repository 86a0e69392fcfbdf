"""Ways to carry out a request of several points: in which calls, on which sessions, in turn or at once; which is best.

A *unit* is one image at one point, its guided pair with it: it is never divided. A request's units are ordered (point,
image). What calls cost here is measured once and kept (`runtime.profiles`): that of a call depends on its rows alone,
so that two images of one direction tell what one image of two takes. Knows nothing of models.
"""

from __future__ import annotations

import concurrent.futures
import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar, cast

import numpy as np

import epd

from .errors import RequestError
from .profiles import Profile

if TYPE_CHECKING:
    from .slopes import Slopes

Directions = Literal["batch", "calls", "async", "spread"]
Value = TypeVar("Value")

_CLOSE = 1.03  # a way of less is taken if it costs at most so much more
# No concurrent calls on one session: DirectML's documentation says so, AMD's own server keeps to it.
_ONE_AT_A_TIME = ("DmlExecutionProvider", "RyzenAILightExecutionProvider")
_WHY_NOT = {
    "batch": "this graph takes one timestep for all rows, so its points cannot be one batch",
    "async": "this provider, or a CUDA graph, allows one call at a time on a session",
}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speed:
    """What the calls of a session cost: seconds of one unit and of `units`, a straight line through both."""

    one: float = 1.0
    many: float = 1.0
    units: int = 1  # 1: every unit costs as much as the first

    def seconds(self, units: int) -> float:
        each = self.one if self.units == 1 else max(0.0, (self.many - self.one) / (self.units - 1))
        return self.one + each * (units - 1)


class Lane(NamedTuple):
    """What one thread does: calls of these units, in turn, on the session of that index."""

    session: int
    calls: tuple[slice, ...]


def _batch(points: int, images: int, speeds: Sequence[Speed]) -> list[Lane]:
    return [Lane(0, (slice(0, points * images),))]


def _calls(points: int, images: int, speeds: Sequence[Speed]) -> list[Lane]:
    return [Lane(0, tuple(slice(p * images, (p + 1) * images) for p in range(points)))]


def _async(points: int, images: int, speeds: Sequence[Speed]) -> list[Lane]:
    return [Lane(0, (call,)) for call in _calls(points, images, speeds)[0].calls]


def _spread(points: int, images: int, speeds: Sequence[Speed]) -> list[Lane]:
    shares, lanes, end = share(points * images, speeds), [], 0
    for session, units in enumerate(shares):
        if units:
            lanes.append(Lane(session, (slice(end, end + units),)))
        end += units
    return lanes


LANES: Mapping[Directions, Callable[[int, int, Sequence[Speed]], list[Lane]]] = {  # the simplest first
    "batch": _batch,
    "calls": _calls,
    "async": _async,
    "spread": _spread,
}


def share(units: int, speeds: Sequence[Speed]) -> list[int]:
    """Units for every session, so that the last to end ends as soon as can be; of equal ones, the first gets more."""
    shares = [0] * len(speeds)
    for _ in range(units):
        shares[min(range(len(speeds)), key=lambda i: speeds[i].seconds(shares[i] + 1))] += 1
    return shares


def at_once(tasks: Sequence[Callable[[], Value]], stop: Callable[[], None]) -> list[Value]:
    """Results of the tasks in their order, each run in a thread of its own.

    An error, or Ctrl-C, calls `stop` until all others have ended. Of several errors the one that came first is raised;
    of those that came at once, the first task's.
    """
    with concurrent.futures.ThreadPoolExecutor(len(tasks)) as threads:
        futures = [threads.submit(task) for task in tasks]
        try:
            while _waits(futures, 0.2) and not any(map(_failed, futures)):  # Windows sees Ctrl-C between two waits
                pass
            first = next(filter(_failed, futures), None)
            if first is not None:
                _end(futures, stop)
        except KeyboardInterrupt:
            _end(futures, stop)
            raise
        return [future.result() for future in ([first] if first is not None else futures)]


def _waits(futures: Sequence[concurrent.futures.Future[Value]], seconds: float) -> bool:
    """Whether some have not ended after so long, or when one failed."""
    return bool(concurrent.futures.wait(futures, seconds, concurrent.futures.FIRST_EXCEPTION).not_done)


def _failed(future: concurrent.futures.Future[Value]) -> bool:
    return future.done() and future.exception() is not None


def _end(futures: Sequence[concurrent.futures.Future[Value]], stop: Callable[[], None]) -> None:
    """A call that was about to begin is ended by the next `stop`."""
    stop()
    while concurrent.futures.wait(futures, 0.05).not_done:
        stop()


def check(asked: str | None, providers: int) -> None:
    """Raises RequestError where the way is none, or none for so many providers."""
    if asked not in (None, "auto", *LANES):
        raise RequestError(f"directions must be one of {', '.join(['auto', *LANES])}; got {asked!r}")
    if asked == "spread" and providers == 1:
        raise RequestError("spread needs several providers: give them as in --provider webgpu,cpu")
    if asked in ("batch", "calls", "async") and providers > 1:
        raise RequestError(f"{asked} is for one provider: give one, or --directions spread or auto")


def settle(slopes: Slopes, asked: str | None, points: epd.Points, profile: Profile) -> None:
    """Sets the way in which `slopes` carries out its requests; measures what has to be known for that.

    Parameters
    ----------
    asked : str, optional
        A key of `LANES`; or "auto": the fastest here. None: `spread` where there are several sessions, else the
        fastest if that was measured before, else what `slopes` has already.
    points : epd.Points
        Of the shape of the widest request that is to come.

    Raises
    ------
    RequestError
        The graph or the provider cannot do what is asked.
    """
    ways = possible(slopes)
    if asked in _WHY_NOT and asked not in ways:
        raise RequestError(f"{slopes.backbone.path}: {_WHY_NOT[asked]}; give --directions {ways[0]} or auto")
    if len(points.x) == 1:  # these are then one call of all images
        ways = tuple(way for way in ways if way in (ways[0], "spread"))
    several = len(slopes.sessions) > 1
    trial = copy.copy(slopes)  # which counts for itself
    trial.interval = None  # guided everywhere, if at all
    if asked is None and not several and len(ways) > 1 and profile.known(tasks_of(trial, ways, points)):
        asked = "auto"
    if several:
        slopes.speeds = trial.speeds = _speeds(trial, points, profile)
        asked = asked or "spread"
    if asked == "auto":
        asked = _fastest(trial, ways, points, profile)
    slopes.directions = cast(Directions, asked or slopes.directions)
    if slopes.directions == "spread":
        log.warning("%s", _divided(slopes, points))


def possible(slopes: Slopes) -> tuple[Directions, ...]:
    """What graph, provider and sessions allow, the simplest first."""
    able = {
        "batch": slopes.per_row,
        "async": slopes.backbone.provider not in _ONE_AT_A_TIME and not slopes.backbone.captures,
        "spread": len(slopes.sessions) > 1,
    }
    return tuple(way for way in LANES if able.get(way, True))


def one_call(slopes: Slopes, points: epd.Points, rows: int, session: int = 0) -> tuple[str, Callable[[], object]]:
    """One call of so many rows, the points' first state in all of them, on the session of that index: name and task."""
    chosen = slopes.sessions[session]
    alone = slopes.part(slice(0, 1), 1.0)  # not guided: a unit is a row
    alone.sessions, alone.directions = (chosen,), "calls"
    where = f" on {chosen.provider} {session}" if session else ""
    state = np.repeat(points.x[:1, :1], rows, 1)
    return f"{rows} row{'s' * (rows > 1)}{where}", partial(alone, epd.Points(state, points.t[:1]))


class Work(NamedTuple):
    """What a way makes of a request: `times` a task."""

    name: str
    task: Callable[[], object]
    times: int = 1


def work_of(slopes: Slopes, way: Directions, points: epd.Points) -> Work:
    """Of a request whose units are all guided, if `slopes` is."""
    count, images = points.x.shape[:2]
    rows = images * slopes.halves
    if way in ("batch", "calls"):
        batch = way == "batch"
        return Work(*one_call(slopes, points, count * rows if batch else rows), 1 if batch else count)
    runner = copy.copy(slopes)
    runner.directions = way
    if way == "async":
        return Work(f"{count} calls of {rows} rows at once", partial(runner, points))
    shares = " + ".join(map(str, share(count * images, slopes.speeds)))
    return Work(f"{shares} units of {slopes.halves} rows, spread", partial(runner, points))


def tasks_of(slopes: Slopes, ways: Sequence[Directions], points: epd.Points) -> dict[str, Callable[[], object]]:
    """What has to be measured to choose among the ways: each one's task, and the call that they are compared with."""
    works = (work_of(slopes, way, points) for way in ("calls", *ways))
    return {work.name: work.task for work in works}


def _speeds(trial: Slopes, points: epd.Points, profile: Profile) -> tuple[Speed, ...]:
    """Of every session, alone."""
    units = points.x.shape[0] * points.x.shape[1]
    every = range(len(trial.sessions))
    ones = [one_call(trial, points, trial.halves, session) for session in every]
    wholes = [one_call(trial, points, units * trial.halves, session) for session in every]
    found = profile.need(dict([*ones, *wholes]))
    pairs = zip(ones, wholes, strict=True)
    return tuple(Speed(found[one].seconds, found[whole].seconds, units) for (one, _), (whole, _) in pairs)


def _fastest(trial: Slopes, ways: Sequence[Directions], points: epd.Points, profile: Profile) -> Directions:
    """By the clock; of several that are close, the simplest. Says so, where there is a choice."""
    if len(ways) == 1:
        return ways[0]
    found = profile.need(tasks_of(trial, ways, points))
    works = {way: work_of(trial, way, points) for way in ways}
    call = found[work_of(trial, "calls", points).name].seconds
    cost = {way: work.times * found[work.name].seconds / call for way, work in works.items()}  # in calls of one point
    chosen = next(way for way in ways if cost[way] <= _CLOSE * min(cost.values()))
    others = ", ".join(f"{way} {cost[way]:.2f}" for way in ways if way != chosen)
    log.warning(
        "%s: %d direction%s cost %.2f calls here; %s (a call: %.3g s, %s)",
        chosen, len(points.x), "s" * (len(points.x) > 1), cost[chosen], others, call,
        "measured now" if profile.anew else f"measured before{f': {profile.file}' if profile.kept else ''}",
    )  # fmt: skip
    return chosen


def _divided(slopes: Slopes, points: epd.Points) -> str:
    count, images = points.x.shape[:2]
    parts = zip(share(count * images, slopes.speeds), slopes.sessions, slopes.speeds, strict=True)
    told = ", ".join(f"{units} on {session.provider} ({speed.one:.3g} s alone)" for units, session, speed in parts)
    return f"spread: {count} x {images} points and images: {told}"
