"""What calls cost here: tasks measured in turns, and a file of the results for each device, in the user's cache.

Costs are compared only within one *sitting*, for the machine may have been slower in another one. A sitting in which
the runs of a task differ by more than BUSY, or in which other programs took more than OTHERS of the processors (seen on
Linux only), is made again, and not kept if that is no better: a steady load flatters calls at once, which take more of
the processors from the others. Knows nothing of sessions or models, and does not see that a device has got slower
since: `python -m benchmarks scaling` measures anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from epd.catalogue import cache_folder
from epd.table import write_whole

from . import cachekey

Clock = Callable[[], float]  # seconds, of any origin
Tasks = Mapping[str, Callable[[], object]]  # what is done, in words -> doing it

RUNS = 5  # timed, of everything that is measured; the first one more does not count
TURN, MOST = 0.05, 8  # seconds that a task has in each turn, and the times that it is done then
BUSY = 1.5  # upper over lower quartile of a task's runs, above which the machine was busy with something else, too
OTHERS = 0.25  # of the processors, above which other programs were in the way
_FORMAT = 3
_ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RYZEN_AI_INSTALLATION_PATH", "VK_ICD_FILENAMES")
_AT_WORK = (0, 1, 2, 5, 6, 7)  # of /proc/stat: user, nice, system, interrupts hard and soft, stolen by a host
_TICKS = 20  # of its clock, below which a share says nothing
log = logging.getLogger(__name__)


class Timing(NamedTuple):
    """Seconds of one task: the median of its runs, and their quartiles."""

    seconds: float
    low: float
    high: float

    @property
    def busy(self) -> bool:
        return self.high > BUSY * self.low


Timings = dict[str, Timing]


def timing(runs: Collection[float]) -> Timing:
    """Of two runs or more, in seconds."""
    low, middle, high = statistics.quantiles(runs, n=4, method="inclusive")
    return Timing(middle, low, high)


def measure(tasks: Tasks, clock: Clock, runs: int = RUNS) -> Timings:
    """What each task takes in `runs` of it, the tasks taking turns, after one of each that does not count.

    A run is the mean of as many of a task in a row as TURN has room for, at most MOST: a drawing, too, makes its
    calls in a row, and a short call after one of another shape is dearer than after its like.
    """
    for task in tasks.values():
        task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(runs):
        for name, task in tasks.items():
            seconds[name].append(_turn(task, clock))
    return {name: timing(taken) for name, taken in seconds.items()}


def _turn(task: Callable[[], object], clock: Clock) -> float:
    started, done, taken = clock(), 0, 0.0
    while done == 0 or (taken < TURN and done < MOST):
        task()
        done, taken = done + 1, clock() - started
    return taken / done


class Others:
    """What other programs take of the processors that this process may use, from now on; Linux only."""

    def __init__(self) -> None:
        self._before, self._started = self._seconds(), time.perf_counter()

    def share(self) -> float | None:
        """0 to 1, since this object was made; None where the system does not tell, or hardly any time has passed."""
        now, wall = self._seconds(), time.perf_counter() - self._started
        if now is None or self._before is None or wall < _TICKS / os.sysconf("SC_CLK_TCK"):
            return None
        return min(max(now - self._before, 0.0) / (wall * len(os.sched_getaffinity(0))), 1.0)

    @staticmethod
    def _seconds() -> float | None:
        """Of processor time taken so far by all that is not this process."""
        status = Path("/proc/stat")
        if sys.platform != "linux" or not status.is_file():
            return None
        ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = [line.split() for line in status.read_text(encoding="utf-8").splitlines()]
        ticks = sum(int(line[1 + field]) for line in lines if line[0] in ours for field in _AT_WORK)
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


class Profile:
    """What is known of one device (`key`: all that its speed depends on): sittings, the newest first.

    Attributes
    ----------
    file : Path, optional
        Where it is kept; None: there is no place.
    anew, kept : bool
        Whether something was measured by this object; whether all of that is in the file.
    others : float, optional
        Share of the processors that other programs took meanwhile, 0 to 1; None: not known.
    """

    def __init__(self, key: Mapping[str, Any], clock: Clock = time.perf_counter) -> None:
        self.key, self.clock, self.anew, self.kept = json.loads(json.dumps(key)), clock, False, True
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self.file: Path | None = None
        try:
            self.file = cache_folder() / "directions" / f"{digest[:24]}.json"
        except ValueError as error:  # nothing is kept
            log.info("%s", error)
        self.sittings = self._read()
        self.others: float | None = None
        self._passing: list[Timings] = []  # of a busy machine: known to this object alone

    def known(self, names: Iterable[str]) -> Timings | None:
        """Timings of one sitting that has all of them, the newest; None if there is none."""
        wanted = list(names)
        sittings = [*self.sittings, *self._passing]
        found = next((sitting for sitting in sittings if sitting.keys() >= set(wanted)), None)
        return None if found is None else {name: found[name] for name in wanted}

    def need(self, tasks: Tasks) -> Timings:
        """What each task takes: as it is known, else measured, all of them, and kept."""
        found = self.known(tasks)
        if found is None:
            log.warning("measuring, once for this device: %s", ", ".join(tasks))
            found = self.sit(tasks)
        return found

    def sit(self, tasks: Tasks, runs: int = RUNS, *, alone: bool = False) -> Timings:
        """Measures the tasks and keeps the result, unless the machine was busy; `alone`: in place of all there was."""
        found, why = self._measured(tasks, runs)
        if why:
            log.warning("the machine was busy with something else (%s); measuring again", why)
            found, why = self._measured(tasks, runs)
        if why:
            self.kept, self._passing = False, [found, *self._passing]
            log.warning("the machine is still busy (%s): what was measured is used now, not kept", why)
        else:
            others = [] if alone else [sitting for sitting in self.sittings if sitting.keys() - found.keys()]
            self.sittings = [found, *others]
            self._keep()
        self.anew = True
        return found

    def _measured(self, tasks: Tasks, runs: int) -> tuple[Timings, str]:
        """And why it is not to be relied on; empty if it is."""
        others = Others()
        found = measure(tasks, self.clock, runs)
        self.others = others.share()
        if self.others is not None and self.others > OTHERS:
            return found, f"other programs took {self.others:.0%} of the processors"
        return found, _busy(found)

    def _keep(self) -> None:
        """A cache that cannot be written is told, not an error."""
        content = json.dumps({"format": _FORMAT, "key": self.key, "sittings": self.sittings}, indent=1)
        if self.file is None:
            self.kept = False
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, content.encode())
        except OSError as error:
            self.kept = False
            log.warning("%s: %s; what was measured is not kept", self.file, error.strerror)

    def _read(self) -> list[Timings]:
        """Nothing where the file is not there, damaged, or of another question: it is measured anew then."""
        if self.file is None:
            return []
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            sittings = [
                {str(name): Timing(*map(float, taken)) for name, taken in sitting.items()}
                for sitting in found["sittings"]
            ]
            right = found["format"] == _FORMAT and found["key"] == self.key
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []
        numbers = [value for sitting in sittings for taken in sitting.values() for value in taken]
        return sittings if right and all(0 < value < math.inf for value in numbers) else []


def _busy(found: Timings) -> str:
    """The task whose runs differ most, in words; empty if none differ by more than BUSY."""
    name, worst = max(found.items(), key=lambda item: item[1].high / item[1].low if item[1].low > 0 else math.inf)
    return f"{name}: {worst.low:.3g} to {worst.high:.3g} s" if worst.busy else ""


def machine() -> dict[str, Any]:
    """What tells this machine, as it is set up, from another that shares its cache."""
    return {
        **cachekey.machine(),
        "cores": usable_cores(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }


def usable_cores() -> int | None:
    """Logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
