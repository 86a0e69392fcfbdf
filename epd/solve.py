"""The driver: answers a solver's requests, counts them, yields finished steps; `together` runs solvers side by side.

Knows nothing of models, devices or particular solvers: a solver is a generator that yields `Points` and `State`.
"""

from collections.abc import Callable, Generator, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

Array = Any  # a numpy.ndarray, or a torch.Tensor: the maths is written with operators only


class Points(NamedTuple):
    """A request for the slopes dx/dt = (x - D(x, t)) / t at P independent points; the answer has the shape of `x`."""

    x: Array  # (P, B, ...)
    t: Array  # (P,), or (P, B) where images differ; times in (0, t_max]


class State(NamedTuple):
    """A finished step: the state `x` at time `t`. From `together`: two tuples, one entry per generator."""

    x: Any  # (B, ...)
    t: Any  # float


class Step(NamedTuple):
    """What the driver yields for each finished step."""

    index: int  # type: ignore[assignment]  # 0 for the first interval (hides tuple.index)
    t: Any  # float: the time reached
    x: Any  # (B, ...): the state there, float64 in numpy
    calls: int  # sequential calls so far: requests answered
    evaluations: int  # total evaluations per image so far: points answered
    points: Points | None = None  # the request answered last, and
    slopes: Array | None = None  # (P, B, ...): the answer

    @property
    def denoised(self) -> Array:
        """(B, ...): the network's estimate of the finished state, x - t * slope at the last point it was asked for.

        The state itself where nothing was asked yet. Of no use after `together`, whose points are of many solvers.
        """
        if self.points is None or self.slopes is None:
            return self.x
        x, t = self.points.x[-1], self.points.t[-1]
        return x - t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) * self.slopes[-1]


Coroutine = Generator[Any, Any, Any]  # yields Points | State, is sent slopes
Solver = Callable[[Array], Coroutine]
Slope = Callable[[Points], Array]


def solve(solver: Solver, x: Array, slope: Slope) -> Iterator[Step]:
    """Run `solver` from the start state and yield one `Step` per finished step.

    Parameters
    ----------
    solver : callable
        `solver(x)` gives the coroutine; see `epd.solvers`.
    x : (B, ...) array
        State at the first time of the grid. A numpy array is taken to float64; a torch tensor is used as it is.
    slope : callable
        `slope(points)` answers one request: the slopes at (points.x, points.t), shape (P, B, ...).

    Raises
    ------
    ValueError
        An answer has another shape than the points asked for.
    FloatingPointError
        An answer (or the start state) is not finite; the message names step and times.

    Closing this generator, or an error in `slope`, closes the solver.
    """
    x = np.asarray(x, dtype=np.float64) if isinstance(x, np.ndarray) else x
    if not _finite(x):
        raise FloatingPointError("the start state is not finite")
    run = solver(x)
    index = calls = evaluations = 0
    answer = asked = answered = None
    try:
        while True:
            try:
                event = run.send(answer)
            except StopIteration:
                return
            if isinstance(event, Points):
                asked, answer = event, _checked(slope(event), event, index)
                answered = answer
                calls += 1
                evaluations += len(event.x)
            else:
                answer = None
                yield Step(index, event.t, event.x, calls, evaluations, asked, answered)
                index += 1
    finally:
        run.close()


def together(*generators: Coroutine) -> Coroutine:
    """Run generators side by side: one generator whose requests are their simultaneous requests, concatenated along P.

    Takes running solvers, `together(*(solver(x) for solver in solvers))`, or one-step sub-generators; the images
    (B, ...) must have the same shape in all. In each round every generator that waits for slopes is answered; one that
    has finished a step waits until no other asks any more. Then one `State(x, t)` is yielded, `x` and `t` tuples with
    each generator's latest state (None where it has never finished a step; a generator that has ended keeps its last).
    Returns the tuple of the generators' return values. Times are (P,), or (P, B) as soon as one request has (P, B).
    Closing it closes all of them.
    """
    events: list[Any] = [None] * len(generators)  # what each waits at: Points, State, or None once it has ended
    returned: list[Any] = [None] * len(generators)
    reached: list[State] = [State(None, None)] * len(generators)

    def advance(i: int, answer: Array | None) -> None:
        try:
            events[i] = generators[i].send(answer)
        except StopIteration as end:
            events[i], returned[i] = None, end.value

    try:
        for i in range(len(generators)):
            advance(i, None)
        while any(event is not None for event in events):
            asking = [i for i, event in enumerate(events) if isinstance(event, Points)]
            if asking:
                answer = yield _concatenated([events[i] for i in asking])
                for i in asking:
                    size = len(events[i].x)
                    advance(i, answer[:size])
                    answer = answer[size:]
            else:
                arrived = [i for i, event in enumerate(events) if event is not None]
                for i in arrived:
                    reached[i] = events[i]
                yield State(tuple(state.x for state in reached), tuple(state.t for state in reached))
                for i in arrived:
                    advance(i, None)
        return tuple(returned)
    finally:
        for generator in generators:
            generator.close()


def _concatenated(requests: list[Points]) -> Points:
    """Join requests along P; times become (P, B) if any of them are."""
    shapes = {tuple(request.x.shape[1:]) for request in requests}
    if len(shapes) > 1:
        raise ValueError(f"together needs states of one shape, got {sorted(shapes)}")
    batch = requests[0].x.shape[1]
    per_image = any(request.t.ndim == 2 for request in requests)
    times = [r.t[:, None][:, [0] * batch] if per_image and r.t.ndim == 1 else r.t for r in requests]
    return Points(joined([request.x for request in requests], 0), joined(times, 0))


def joined(arrays: list[Array], axis: int) -> Array:
    """The arrays, all of one kind, one after the other along `axis`; gradients pass."""
    first = arrays[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(arrays, axis)
    sizes = [a.shape[axis] for a in arrays]
    result = first.new_empty((*first.shape[:axis], sum(sizes), *first.shape[axis + 1 :]))
    for a, end in zip(arrays, accumulate(sizes), strict=True):
        result[(slice(None),) * axis + (slice(end - a.shape[axis], end),)] = a
    return result


def _finite(a: Array) -> bool:
    return bool((abs(a) < float("inf")).all())  # false for NaN, too


def _checked(answer: Array, points: Points, index: int) -> Array:
    """The answer to one request, float64 in numpy, once its shape and values have been looked at."""
    if tuple(answer.shape) != tuple(points.x.shape):
        raise ValueError(f"slope answered shape {tuple(answer.shape)} to points of shape {tuple(points.x.shape)}")
    if isinstance(answer, np.ndarray):
        answer = answer.astype(np.float64, copy=False)
    if not _finite(answer):
        bad = [points.t[p].tolist() for p in range(len(answer)) if not _finite(answer[p])]
        raise FloatingPointError(f"slope is not finite (NaN or infinity) at step {index}, t = {_times(bad)}")
    return answer


def _times(times: list[Any]) -> str:
    return ", ".join(f"{t:.6g}" if isinstance(t, float) else f"[{_times(t)}]" for t in times)
