"""Many independent tasks, carried out here or on a Ray cluster: the same code, the same numbers, in the same order.

A job says how to get ready (load a model) and is told one task at a time. What a task's answer is must depend on the
job and the task alone; then one worker and many give the same, and a task that a worker died with is simply done again
by another. Knows nothing of what the tasks are.
"""

from __future__ import annotations

import collections
import functools
import itertools
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from runtime.errors import RequestError

RETRIES = 5  # of one task whose worker died
AHEAD = 4  # tasks a core that are handed over; the few that an end finds there end by themselves, for Ray's own
# ray.cancel can take the whole process with it (a race with a task that is just done: ray-project/ray#54798)
CONNECT_SECONDS = 10.0


class Job(Protocol):
    """A frozen dataclass of text and numbers: it travels to the workers, and workers know it again."""

    @property
    def threads(self) -> int:
        """Cores that a task takes; 0: one on a cluster."""
        ...

    def open(self) -> Callable[[Any], Any]:
        """Gets ready; what is called with each task."""
        ...

    def __hash__(self) -> int: ...


def spread(job: Job, tasks: Sequence[Any], address: str) -> Iterator[Any]:
    """The answers to all tasks, in their order, from the workers of a Ray cluster.

    Parameters
    ----------
    address : str
        "local": one is started on this machine, on all its cores, and ends with this process. Else of a running one:
        HOST:PORT, ray://HOST:PORT or auto; this package must be installed on its machines.

    Raises
    ------
    RequestError
        Ray is not installed or not reached, or workers died again and again. Errors of a task are raised as they are.
    """
    ray = connected(address)
    answer = ray.remote(num_cpus=job.threads or 1, max_retries=RETRIES)(_answer)
    known = ray.put(job)
    left, waiting = iter(tasks), collections.deque[Any]()
    try:
        while True:
            cores = max(1, int(ray.cluster_resources().get("CPU", 1)))  # a cluster may grow
            following = itertools.islice(left, max(0, AHEAD * cores - len(waiting)))
            waiting.extend(answer.remote(known, task) for task in following)
            if not waiting:
                return
            yield ray.get(waiting.popleft())
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        told = " ".join(str(error).split())
        raise RequestError(f"--ray {address}: {told:.200}; the same command goes on") from None


def same_everywhere(model: str, here: str, wanted: str) -> None:
    """RequestError where a worker's model is not that of whom it works for."""
    if here != wanted:
        raise RequestError(f"{model}: another model on a machine of the cluster; copy this one there")


def connected(address: str) -> Any:
    """The module ray, once it is connected; RequestError where it cannot be."""
    try:
        import ray
    except ImportError:
        raise RequestError("--ray needs Ray; install the extra: pip install 'epd-toolkit[ray]'") from None
    if not ray.is_initialized():
        where = {"include_dashboard": False} if address == "local" else {"address": address}
        try:
            _reach(address)
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
        except (ValueError, OSError, RuntimeError) as error:
            told = " ".join(str(error).split())
            raise RequestError(f"--ray {address}: no cluster is reached there ({told:.150})") from None
    return ray


def _reach(address: str) -> None:
    """OSError at once where nothing listens at HOST:PORT: Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def _answer(job: Job, task: Any) -> Any:
    return _opened(job)(task)


@functools.lru_cache(1)
def _opened(job: Job) -> Callable[[Any], Any]:
    """A worker loads a model once, not once a task."""
    return job.open()
