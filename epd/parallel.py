"""Solvers that are parallel in time: the whole trajectory is guessed, and all its steps are corrected at once.

Both iterate over a sliding window of the grid. One iteration takes the one-step method of every interval in the window,
side by side (`together`): P points per request, P the steps in the window. They trade evaluations for sequential calls
and end where the one-step method ends. Both are built on the residuals

    e_j = step(x_j) - x_{j+1}                 how far state j + 1 is from what the step makes of state j
    E_j = e_s + ... + e_j                     the same, all the way from the window's start s, whose state is final

so that x_{j+1} + E_j is the Picard update. A state is final once the states before it have |E| <= tolerance; the first
state after s always is, so there are at most N iterations, and with tolerance 0 the result is the sequential one.

The tolerance is the root mean square of the change over one image, in units of the state's own size on data of unit
variance (`_size`): 1e-3 is 60 dB at any noise level. Every image has its own window and is stopped by its own
residuals: its result does not depend on the others in the batch. Where the windows of a batch are of different lengths,
the shorter ones repeat a point (its slope is not used, the evaluation is counted).

Knows nothing of models or devices.
"""

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import accumulate, pairwise, takewhile
from typing import Any

import numpy as np

from .schedule import Floats, decreasing
from .solve import Array, Coroutine, Points, Solver, State, joined, together
from .solvers.one_step import OneStep, euler_step

RCOND = 1e-10  # of the normal equations: differences this nearly dependent (their squares) are not told apart

Snapshot = Mapping[int, tuple[Array, Array]]  # index of a state -> the state and its residual, in one iteration
Update = Callable[[int, list[Array], list[Array]], list[Array]]  # (s, x_{s+1}.., e_s..) -> the next guess of x_{s+1}..


def paradigms(
    times: Any, flow: bool = False, *, step: OneStep = euler_step, window: int | None = None, tolerance: float = 1e-3
) -> Solver:
    """ParaDiGMS (Shih et al. 2023, arXiv 2305.16317, algorithm 1): Picard iteration over a sliding window.

    Parameters
    ----------
    times : (N + 1,) sigma, decreasing
    flow : bool
        The state is (1 - t) x0 + t n (True) or x0 + t n (False): the size a state has at t, for guess and tolerance.
    step : one-step method
        `step(x, t, t_next)`: a generator that yields `Points` and returns the state at t_next; its order is the order.
    window : int, optional
        Steps corrected at once; None: the whole grid.
    tolerance : float
        >= 0; see the module. Trap: it bounds what one slide of the window adds to the error, not the error itself.

    The first guess of a state is the window's last one, scaled to the size at its time (the paper's copy, which is of
    states of unit variance). Raises ValueError for a window below 1 or a negative tolerance.
    """
    return _sliding(times, flow, step, window, tolerance, lambda sizes: _picard)


def parataa(
    times: Any,
    flow: bool = False,
    *,
    step: OneStep = euler_step,
    window: int | None = None,
    tolerance: float = 1e-3,
    memory: int = 3,
    order: int | None = None,
) -> Solver:
    """ParaTAA (Tang et al. 2024, arXiv 2402.09970): triangular Anderson acceleration of the same iteration.

    Parameters
    ----------
    times, flow, step, window, tolerance
        As of `paradigms`.
    memory : int
        m >= 1, earlier iterations a correction is combined of. Each is a trajectory of the window kept in memory.
    order : int, optional
        k >= 1, order of the nonlinear system x_{j+1} = x_{j+1-k} + steps of the k intervals between; None: all from the
        window's start, which is Picard's system.

    Triangular: the coefficients of a state are fitted to its own residual and those of the noisier states, never to
    later ones. Safeguard: states that become final take the Picard update, so that at least one more state is final in
    each iteration, whatever the acceleration does. Final is decided on E, as in `paradigms` (the paper: on e). The
    coefficients are constants to a gradient. Raises ValueError, too, for memory or order below 1.
    """
    if memory < 1 or (order is not None and order < 1):
        raise ValueError(f"parataa needs memory and order of 1 or more, got memory {memory}, order {order}")
    return _sliding(times, flow, step, window, tolerance, lambda sizes: _anderson(memory, order, sizes))


def _sliding(
    times: Any,
    flow: bool,
    step: OneStep,
    window: int | None,
    tolerance: float,
    update: Callable[[list[float]], Update],
) -> Solver:
    """The window's loop, for every image by itself; `update(sizes)` makes the update of one image."""
    grid = decreasing(times).tolist()
    sizes = [_size(t, flow) for t in grid]
    width = len(grid) - 1 if window is None else window
    if width < 1 or not tolerance >= 0:
        raise ValueError(f"window must be 1 or more and tolerance 0 or more, got {width} and {tolerance}")

    def one_image(x: Array) -> Coroutine:  # x: (1, ...)
        guess, start, states = update(sizes), 0, [x]  # states[j]: the one at grid[start + j]; [0] is final
        while start < len(grid) - 1:
            for j in range(start + len(states), min(start + width, len(grid) - 1) + 1):
                states.append(states[-1] * (sizes[j] / sizes[j - 1]))
            intervals = pairwise(grid[start : start + len(states)])
            ends = yield from together(*(step(x, *ends) for x, ends in zip(states, intervals, strict=False)))
            residuals = [end - x for end, x in zip(ends, states[1:], strict=True)]
            changes = list(accumulate(residuals))
            small = (_rms(c) <= tolerance * size for c, size in zip(changes[:-1], sizes[start + 1 :], strict=False))
            final = 1 + sum(takewhile(bool, small))
            reached = [x + change for x, change in zip(states[1:], changes[:final], strict=False)]
            for j, x in enumerate(reached, start + 1):
                yield State(x, grid[j])
            states = [reached[-1], *guess(start, states[1:], residuals)[final:]]
            start += final

    return _each_image(one_image)


def _picard(start: int, states: list[Array], residuals: list[Array]) -> list[Array]:
    return [x + change for x, change in zip(states, accumulate(residuals), strict=True)]


def _anderson(memory: int, order: int | None, sizes: list[float]) -> Update:
    """The update of triangular Anderson acceleration, which remembers `memory` iterations before the present one."""
    past: deque[Snapshot] = deque(maxlen=memory + 1)  # newest first

    def update(start: int, states: list[Array], residuals: list[Array]) -> list[Array]:
        sums = list(accumulate(residuals))
        if order is not None:  # over the last k intervals only
            sums = sums[:order] + [a - b for a, b in zip(sums[order:], sums, strict=False)]
        past.appendleft({start + 1 + j: pair for j, pair in enumerate(zip(states, sums, strict=True))})
        gram, rhs = np.zeros((memory, memory)), np.zeros(memory)
        result = []
        for j, (x, r) in past[0].items():
            known = [snapshot[j] for snapshot in past if j in snapshot]  # a state stays in the window until it is final
            dx = [newer[0] - older[0] for newer, older in pairwise(known)]
            dr = [newer[1] - older[1] for newer, older in pairwise(known)]
            m = len(dr)
            gram[:m, :m] += _products(dr, dr) / sizes[j] ** 2  # every state counts in units of its own size
            rhs[:m] += _products(dr, [r])[:, 0] / sizes[j] ** 2
            weights = np.linalg.lstsq(gram[:m, :m], rhs[:m], rcond=RCOND)[0] if m else rhs[:0]
            result.append(x + r - sum(c * (a + b) for c, a, b in zip(weights, dx, dr, strict=True)))
        return result

    return update


def _products(a: list[Array], b: list[Array]) -> Floats:
    """Inner products, (len(a), len(b))."""
    return np.array([[(x * y).sum().item() for y in b] for x in a]).reshape(len(a), len(b))


def _size(t: float, flow: bool) -> float:
    """Root mean square of a state at t, for data of unit variance."""
    return float(np.hypot(1 - t if flow else 1.0, t))


def _rms(a: Array) -> float:
    return float((a * a).mean().item() ** 0.5)


def _each_image(solver: Solver) -> Solver:
    """Every image of a batch with a `solver(x)` of its own, x (1, ...); their simultaneous requests joined along B.

    A request has as many points as the largest of them; a smaller one repeats its first point, and an image that has
    finished takes those of its last request. A step is finished when it is finished in every image.
    """

    def run(x: Array) -> Coroutine:
        images = [solver(x[b : b + 1]) for b in range(len(x))]
        reached: list[deque[State]] = [deque() for _ in images]
        requests: dict[int, Points] = {}
        asking = set(range(len(images)))

        def advance(b: int, answer: Array | None) -> None:
            try:
                event = images[b].send(answer)
                while not isinstance(event, Points):
                    reached[b].append(event)
                    event = next(images[b])
                requests[b] = event
            except StopIteration:
                asking.remove(b)

        with ExitStack() as stack:
            for b, image in enumerate(images):
                stack.callback(image.close)
                advance(b, None)
            while True:
                while all(reached):
                    states = [queue.popleft() for queue in reached]
                    yield State(joined([state.x for state in states], 0), states[0].t)
                if not asking:
                    return
                size = max(len(requests[b].x) for b in asking)
                slopes = yield _side_by_side([requests[b] for b in range(len(images))], size)
                for b in sorted(asking):
                    advance(b, slopes[:, b : b + 1])

    return run


def _side_by_side(requests: list[Points], size: int) -> Points:
    """Requests of one image each, as one of `size` points: cut, or filled up with the first point."""
    kept = [[*range(len(request.x)), *([0] * size)][:size] for request in requests]
    x = joined([request.x[which] for request, which in zip(requests, kept, strict=True)], 1)
    t = joined([request.t[which][:, None] for request, which in zip(requests, kept, strict=True)], 1)
    return Points(x, t)
