"""The network as the solver sees it: guided slopes at K points of B images, as one batch of rows or as calls in turn.

Rows are ordered (guidance half, point, image); the negative half holds guided points only. Knows nothing of solvers,
text or pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import epd

from .errors import BundleError
from .facts import Facts
from .session import Session

Array = NDArray[np.float64]
Directions = Literal["batch", "calls"]


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
    directions : "batch" | "calls"
        All P points in one call of H * P * B rows, or P calls of H * B. A graph whose timestep is one scalar for all
        rows can only do the latter: see `directions_of`.
    interval : (lo, hi), optional
        Sigma, 0 <= lo < hi: guidance at lo <= sigma <= hi only. Outside, the slope is the prompt's own and its point
        has one row instead of two (Kynkäänniemi et al. 2024, arXiv 2404.07724). None: everywhere.

    Attributes
    ----------
    guided_forwards : int
        Rows evaluated so far.
    """

    def __init__(
        self,
        backbone: Session,
        facts: Facts,
        conditioning: Mapping[str, NDArray[Any]],
        guidance: float,
        directions: Directions,
        interval: tuple[float, float] | None = None,
    ) -> None:
        self.backbone, self.guidance, self.directions, self.interval = backbone, guidance, directions, interval
        self._facts = facts
        self.guided_forwards = 0
        rank = {tensor.name: len(tensor.shape) for tensor in backbone.inputs}
        self._conditioning = {  # (H, 1 or B, ...)
            name: value if value.ndim > rank.get(name, 0) else value[:, None] for name, value in conditioning.items()
        }
        self._halves = len(next(iter(conditioning.values())))
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

    def part(self, images: slice, guidance: float) -> Slopes:
        """The same network told of some of the images only, at a guidance scale of their own (above 1 only if this is).

        Images: of a conditioning with one entry per image.
        """
        told = {name: value[-1 - (guidance > 1) :, images] for name, value in self._conditioning.items()}
        return Slopes(self.backbone, self._facts, told, guidance, self.directions, self.interval)

    def __call__(self, points: epd.Points) -> Array:
        x = np.asarray(points.x, np.float64)  # (P, B, C, h, w)
        t = np.asarray(points.t, np.float64)
        t = np.broadcast_to(t[:, None] if t.ndim == 1 else t, x.shape[:2])  # (P, B)
        if self.directions == "batch":
            return self._evaluate(x, t)
        return np.concatenate([self._in_turn(x[p : p + 1], t[p : p + 1]) for p in range(len(x))])

    def _in_turn(self, x: Array, t: Array) -> Array:
        """One point: one call, or one an image where their times differ and the graph takes a single one."""
        if _per_row(self._times_shape) or (t == t[0, 0]).all():
            return self._evaluate(x, t)
        return np.concatenate([self._evaluate(x[:, b : b + 1], t[:, b : b + 1], b) for b in range(x.shape[1])], axis=1)

    def _evaluate(self, x: Array, t: Array, first: int = 0) -> Array:
        """One call: x (P, B, C, h, w) at t (P, B), of the B images from the first on."""
        sigma = t.reshape(*t.shape, *(1,) * (x.ndim - t.ndim))
        guided = self._guided(t).ravel()  # (P B,): points of two rows
        point = np.concatenate([np.flatnonzero(guided), np.arange(t.size)])  # of every row
        half = np.repeat([0, self._halves - 1], [guided.sum(), t.size])
        timestep = self._network_time(t).ravel()[point]
        if not _per_row(self._times_shape):
            timestep = timestep[:1].reshape((1,) * len(self._times_shape))
        image = first + point % x.shape[1]
        feeds = {  # (H, 1 or B, ...) -> (rows, ...)
            name: value[half, image if value.shape[1] > 1 else 0] for name, value in self._conditioning.items()
        }
        feeds |= {self._sample: self._network_input(x, sigma).reshape(-1, *x.shape[2:])[point], "timestep": timestep}
        answer: Array = self.backbone(want=[self._answer], **feeds)[self._answer].astype(np.float64)
        self.guided_forwards += len(answer)
        negative, slope = np.split(answer, [len(answer) - t.size])
        with np.errstate(over="ignore", invalid="ignore"):  # `epd.solve` looks at every slope
            slope[guided] = negative + self.guidance * (slope[guided] - negative)
        return slope.reshape(x.shape)

    def _guided(self, t: Array) -> NDArray[np.bool_]:
        """Where guidance applies, shape of t."""
        if self._halves == 1:
            return np.zeros(t.shape, bool)
        low, high = self.interval or (-math.inf, math.inf)
        return (low <= t) & (t <= high)


def directions_of(backbone: Session) -> Directions:
    """`batch` where the graph takes a timestep per row; `calls` where it takes one for all of them."""
    return "batch" if _per_row(_timestep_shape(backbone)) else "calls"


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
