"""Ways to carry out a request of several points: in which calls, on which sessions, in turn or at once; which is best.

A *unit* is one image at one point, its guided pair with it: it is never divided. A request's units are ordered (point,
image). What was measured here is kept in the user's cache, one JSON file a question. Knows nothing of models or
guidance, and does not see that a device has got slower since: remove the folder `directions` of the cache to ask anew.
"""

from __future__ import annotations

import concurrent.futures
import copy
import hashlib
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

import epd
from epd.catalogue import cache_folder

from .errors import RequestError

if TYPE_CHECKING:
    from .slopes import Slopes

Directions = Literal["batch", "calls", "async", "spread"]
Value = TypeVar("Value")
Clock = Callable[[], float]  # seconds, of any origin

RUNS = 5  # timed, of everything that is measured; the first one more does not count
_CLOSE = 1.03  # a way of less is taken if it costs at most so much more
# No concurrent calls on one session: DirectML's documentation says so, AMD's own server keeps to it.
_ONE_AT_A_TIME = ("DmlExecutionProvider", "RyzenAILightExecutionProvider")
_WHY_NOT = {
    "batch": "this graph takes one timestep for all rows, so its points cannot be one batch",
    "async": "this provider allows one call at a time on a session",
}
_POINT = "a point"  # name of the time that one point takes
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
    """Results of the tasks in their order, each run in a thread of its own; of several errors, the first task's.

    Ctrl-C calls `stop` until all have ended.
    """
    with concurrent.futures.ThreadPoolExecutor(len(tasks)) as threads:
        futures = [threads.submit(task) for task in tasks]
        try:
            while concurrent.futures.wait(futures, timeout=0.2).not_done:  # Windows sees Ctrl-C between two waits
                pass
        except KeyboardInterrupt:
            stop()  # a call that was about to begin is ended by the next one
            while concurrent.futures.wait(futures, timeout=0.05).not_done:
                stop()
            raise
        return [future.result() for future in futures]


def measure(tasks: Mapping[str, Callable[[], object]], clock: Clock) -> dict[str, float]:
    """Seconds of each task: the median of RUNS, the tasks taking turns, after one of each that does not count."""
    for task in tasks.values():
        task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(RUNS):
        for name, task in tasks.items():
            started = clock()
            task()
            seconds[name].append(clock() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


class Profile:
    """What was measured of one question (`key`: all that it depends on): name -> seconds, kept in the user's cache."""

    def __init__(self, key: Mapping[str, Any], clock: Clock = time.perf_counter) -> None:
        self.key, self.clock, self.anew = json.loads(json.dumps(key)), clock, False
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self.file: Path | None = None
        try:
            self.file = cache_folder() / "directions" / f"{digest[:24]}.json"
        except ValueError as error:  # nothing is kept
            log.info("%s", error)
        self.seconds = self._read()

    def need(self, tasks: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Seconds of each task; those not known yet are measured, together, and kept."""
        if missing := {name: task for name, task in tasks.items() if name not in self.seconds}:
            log.warning("measuring, once for this device: %s", ", ".join(missing))
            self.seconds |= measure(missing, self.clock)
            self.anew = True
            self._keep()
        return {name: self.seconds[name] for name in tasks}

    def _keep(self) -> None:
        """A cache that cannot be written is told, not an error."""
        content = json.dumps({"format": 1, "key": self.key, "seconds": self.seconds}, indent=1)
        if self.file is None:
            return
        whole = self.file.with_name(f"{self.file.name}.{os.getpid()}.partial")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            try:
                whole.write_text(content, encoding="utf-8")
                os.replace(whole, self.file)
            finally:
                whole.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: %s; what was measured is not kept", self.file, error.strerror)

    def _read(self) -> dict[str, float]:
        """Nothing where the file is not there, damaged, or of another question: it is measured anew then."""
        if self.file is None:
            return {}
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            seconds = {str(name): float(value) for name, value in found["seconds"].items()}
            right = found["format"] == 1 and found["key"] == self.key
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return seconds if right and all(0 < value < math.inf for value in seconds.values()) else {}


def machine() -> dict[str, Any]:
    """What tells this machine from another that shares its cache."""
    return {"node": platform.node(), "processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}


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
    if asked is None and not several and len(ways) > 1 and profile.seconds.keys() >= {_POINT, *ways}:
        asked = "auto"
    trial = copy.copy(slopes)  # which counts for itself
    trial.interval = None  # guided everywhere, if at all
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
        "async": slopes.backbone.provider not in _ONE_AT_A_TIME,
        "spread": len(slopes.sessions) > 1,
    }
    return tuple(way for way in LANES if able.get(way, True))


def _speeds(trial: Slopes, points: epd.Points, profile: Profile) -> tuple[Speed, ...]:
    """Of every session, alone."""
    first, units = epd.Points(points.x[:1, :1], points.t[:1]), points.x.shape[0] * points.x.shape[1]
    tasks: dict[str, Callable[[], object]] = {}
    names = [(f"unit on {s.provider} {i}", f"{units} units on {s.provider} {i}") for i, s in enumerate(trial.sessions)]
    for session, (one, many) in zip(trial.sessions, names, strict=True):
        alone = copy.copy(trial)
        alone.sessions, alone.directions = (session,), possible(trial)[0]
        tasks |= {one: partial(alone, first), many: partial(alone, points)}
    seconds = profile.need(tasks)
    return tuple(Speed(seconds[one], seconds[many], units) for one, many in names)


def _fastest(trial: Slopes, ways: Sequence[Directions], points: epd.Points, profile: Profile) -> Directions:
    """By the clock; of several that are close, the simplest. Says so, where there is a choice."""
    if len(ways) == 1:
        return ways[0]
    tasks: dict[str, Callable[[], object]] = {_POINT: partial(trial, epd.Points(points.x[:1], points.t[:1]))}
    for way in ways:
        runner = copy.copy(trial)
        runner.directions = way
        tasks[way] = partial(runner, points)
    seconds = profile.need(tasks)
    chosen = next(way for way in ways if seconds[way] <= _CLOSE * min(seconds[way] for way in ways))
    cost = {way: f"{seconds[way] / seconds[_POINT]:.2f}" for way in ways}
    others = ", ".join(f"{way} {cost[way]}" for way in ways if way != chosen)
    log.warning(
        "%s: %d direction%s cost %s calls here; %s (a call: %.3g s, %s)",
        chosen, len(points.x), "s" * (len(points.x) > 1), cost[chosen], others, seconds[_POINT],
        "measured now" if profile.anew else f"measured before: {profile.file}",
    )  # fmt: skip
    return chosen


def _divided(slopes: Slopes, points: epd.Points) -> str:
    count, images = points.x.shape[:2]
    parts = zip(share(count * images, slopes.speeds), slopes.sessions, slopes.speeds, strict=True)
    told = ", ".join(f"{units} on {session.provider} ({speed.one:.3g} s alone)" for units, session, speed in parts)
    return f"spread: {count} x {images} points and images: {told}"
