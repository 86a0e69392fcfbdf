"""The network as the solver sees it: guided slopes at K points of B images, in calls that `runtime.directions` plans.

Rows are ordered (guidance half, point, image); the negative half holds guided points only. Knows nothing of solvers,
text or pictures.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

import epd

from .binding import KEPT
from .directions import LANES, Directions, Lane, Speed, at_once
from .errors import BundleError
from .facts import Facts
from .session import Session

Array = NDArray[np.float64]


class Slopes:
    """Answers `epd.Points` with slopes dx/dsigma, (P, B, C, h, w) float64.

    SD3: the state is the latent itself, the slope the velocity, the network's time num_train_timesteps * sigma.
    SD1.5: the state is x_hat = x / alpha = x sqrt(1 + sigma^2), the slope epsilon, the network's time the (fractional)
    timestep whose sigma it is.

    Parameters
    ----------
    backbone : Session
    facts : Facts
    conditioning : mapping
        Input name -> (H, ...) array, the same for all images, or (H, B, ...) array, one entry per image: H = 2 (for
        the negative prompt, then the prompt) if guided, else 1.
    guidance : float
        slope = negative + guidance * (positive - negative); not used where H = 1.
    directions : "batch" | "calls" | "async" | "spread"
        All P points in one call of H * P * B rows; P calls of H * B in turn, or at once; or the P * B points and images
        divided among all sessions by their `speeds`, at once. A graph whose timestep is one scalar for all rows takes a
        call for every time.
    interval : (lo, hi), optional
        Sigma, 0 <= lo < hi: guidance at lo <= sigma <= hi only. Outside, the slope is the prompt's own and its point
        has one row instead of two (Kynkäänniemi et al. 2024, arXiv 2404.07724). None: everywhere.
    others : sessions of the same graph
        On further devices, for `spread`.

    Attributes
    ----------
    speeds : (sessions,) Speed
        Of each session; until they are measured (`runtime.directions.settle`), all the same.
    guided_forwards : int
        Rows evaluated so far.
    ran : frozenset of int
        Indices of the sessions that have had something to do.
    """

    def __init__(
        self,
        backbone: Session,
        facts: Facts,
        conditioning: Mapping[str, NDArray[Any]],
        guidance: float,
        directions: Directions,
        interval: tuple[float, float] | None = None,
        others: Sequence[Session] = (),
    ) -> None:
        self.sessions = (backbone, *others)
        self.speeds = (Speed(),) * len(self.sessions)
        self.guidance, self.directions, self.interval = guidance, directions, interval
        self._facts = facts
        self.guided_forwards = 0
        self.ran: frozenset[int] = frozenset()
        rank = {tensor.name: len(tensor.shape) for tensor in backbone.inputs}
        self._conditioning = {  # (H, 1 or B, ...)
            name: value if value.ndim > rank.get(name, 0) else value[:, None] for name, value in conditioning.items()
        }
        self._halves = len(next(iter(conditioning.values())))
        self._rows: dict[tuple[bytes, bytes], dict[str, NDArray[Any]]] = {}  # see `_told`
        self._network_input: Callable[[Array, Array], Array]
        self._network_time: Callable[[Array], Array]
        if facts.family == "sd3":
            train_steps = facts.schedule.get("num_train_timesteps", 1000)
            self._sample, self._answer = "hidden_states", "out_hidden_states"
            self._network_time = lambda sigma: train_steps * sigma
            self._network_input = lambda x, sigma: x
        else:
            self._sample, self._answer = "sample", "out_sample"
            self._network_time = variance_preserving(facts).time
            self._network_input = lambda x, sigma: x / np.sqrt(1 + sigma**2)
        self._times_shape = _timestep_shape(backbone)

    @property
    def backbone(self) -> Session:
        """The first session."""
        return self.sessions[0]

    @property
    def per_row(self) -> bool:
        """Whether the graph takes a timestep for every row."""
        return _per_row(self._times_shape)

    @property
    def halves(self) -> int:
        """Rows of a unit where guidance applies: 2, or 1 without guidance."""
        return self._halves

    def part(self, images: slice, guidance: float) -> Slopes:
        """The same network told of some of the images only, at a guidance scale of their own (above 1 only if this is).

        Images: of a conditioning with one entry per image.
        """
        told = {name: value[-1 - (guidance > 1) :, images] for name, value in self._conditioning.items()}
        part = copy.copy(self)
        part._conditioning, part._halves, part._rows = told, len(next(iter(told.values()))), {}
        part.guidance, part.guided_forwards = guidance, 0
        return part

    def __call__(self, points: epd.Points) -> Array:
        x = np.asarray(points.x, np.float64)  # (P, B, C, h, w)
        t = np.asarray(points.t, np.float64)
        t = np.broadcast_to(t[:, None] if t.ndim == 1 else t, x.shape[:2])  # (P, B)
        units, image = x.reshape(-1, *x.shape[2:]), np.tile(np.arange(x.shape[1]), len(x))
        lanes = LANES[self.directions](len(x), x.shape[1], self.speeds)
        tasks = [partial(self._lane, lane, units, t.ravel(), image) for lane in lanes]
        done = [tasks[0]()] if len(tasks) == 1 else at_once(tasks, self._stop)
        self.guided_forwards += sum(rows for _, rows in done)
        self.ran |= {lane.session for lane in lanes}
        return np.concatenate([slopes for slopes, _ in done]).reshape(x.shape)

    def _lane(self, lane: Lane, x: Array, t: Array, image: NDArray[np.intp]) -> tuple[Array, int]:
        """Slopes (u, C, h, w) of a lane's units, and the rows evaluated; x (U, C, h, w), t (U,), image (U,): of all."""
        session = self.sessions[lane.session]
        done = [
            self._evaluate(session, x[part], t[part], image[part])
            for call in lane.calls
            for part in ([call] if self.per_row else _of_one_time(t, call))
        ]
        return np.concatenate([slopes for slopes, _ in done]), sum(rows for _, rows in done)

    def _evaluate(self, session: Session, x: Array, t: Array, image: NDArray[np.intp]) -> tuple[Array, int]:
        """One call: slopes of the units x (u, C, h, w) at t (u,), of these images (u,); and its rows."""
        guided = self._guided(t)  # (u,): units of two rows
        unit = np.concatenate([np.flatnonzero(guided), np.arange(len(t))])  # of every row
        half = np.repeat([0, self._halves - 1], [guided.sum(), len(t)])
        timestep = self._network_time(t)[unit]
        if not self.per_row:
            timestep = timestep[:1].reshape((1,) * len(self._times_shape))
        sigma = t.reshape(-1, *(1,) * (x.ndim - 1))
        feeds = {self._sample: self._network_input(x, sigma)[unit], "timestep": timestep}
        answer: Array = session(want=[self._answer], **self._told(half, image[unit]), **feeds)[self._answer]
        answer = answer.astype(np.float64)
        negative, slope = np.split(answer, [len(answer) - len(t)])
        with np.errstate(over="ignore", invalid="ignore"):  # `epd.solve` looks at every slope
            slope[guided] = negative + self.guidance * (slope[guided] - negative)
        return slope, len(answer)

    def _told(self, half: NDArray[np.intp], image: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        """Conditioning of rows of these halves and images, (rows,) each, as the graph takes it.

        The same arrays for the same rows: a session knows them again, and does not copy them to its device once more.
        """
        key = half.tobytes(), image.tobytes()
        if (rows := self._rows.get(key)) is None:
            rows = self.backbone.fit(  # (H, 1 or B, ...) -> (rows, ...)
                {name: value[half, image if value.shape[1] > 1 else 0] for name, value in self._conditioning.items()}
            )
            self._rows = dict([*self._rows.items(), (key, rows)][-KEPT:])  # a new one: other lanes read the old one
        return rows

    def _stop(self) -> None:
        for session in self.sessions:
            session.stop()

    def _guided(self, t: Array) -> NDArray[np.bool_]:
        """Where guidance applies, shape of t."""
        if self._halves == 1:
            return np.zeros(t.shape, bool)
        low, high = self.interval or (-math.inf, math.inf)
        return (low <= t) & (t <= high)


def directions_of(backbone: Session) -> Directions:
    """`batch` where the graph takes a timestep per row; `calls` where it takes one for all, or two rows and no more."""
    rows = backbone.bundle.facts.components[backbone.component].rows
    return "batch" if _per_row(_timestep_shape(backbone)) and rows != (2,) else "calls"


def _of_one_time(t: Array, call: slice) -> list[slice]:
    """The call's units in runs of one time each."""
    runs = [list(run) for _, run in groupby(range(call.start, call.stop), key=lambda unit: t[unit])]
    return [slice(run[0], run[-1] + 1) for run in runs]


def _timestep_shape(backbone: Session) -> tuple[int | str, ...]:
    shapes = {tensor.name: tensor.shape for tensor in backbone.inputs}
    if "timestep" not in shapes:
        raise BundleError(f"{backbone.path}: no input timestep in this graph (it has: {', '.join(shapes)})")
    return shapes["timestep"]


def _per_row(shape: tuple[int | str, ...]) -> bool:
    return shape not in ((), (1,))


def variance_preserving(facts: Facts) -> epd.schedule.VP:
    """The noise schedule of an SD1.5 checkpoint, with diffusers' defaults where its configuration is silent.

    Raises
    ------
    BundleError
        A beta schedule that is not known.
    """
    try:
        return epd.schedule.vp_of(facts.schedule)
    except ValueError as error:
        raise BundleError(f"{facts.name}: its scheduler is not supported: {error}; give another checkpoint") from None
