"""95 % intervals by resampling prompts: of means, of Frechet distances, and of paired differences of either.

Images of one prompt are not independent, so that whole prompts are drawn, all their images with them, wherever they
stand. All figures of a run are resampled alike: the difference of two estimates is a paired one. Intervals are basic
("reverse percentile") ones, which undo the bias that resampling gives a Frechet distance, by which they may leave the
figure itself outside. Knows nothing of solvers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DRAWS = 2000
MOST_FEATURES = 128  # above it a Frechet distance is not resampled: each draw costs the cube of them
SEED = 606


@dataclass(frozen=True)
class Figure:
    """A figure and the ends of its 95 % interval; None: not resampled."""

    mean: float
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def clear(self, higher: bool = True) -> bool | None:
        """Of a difference: True if better without doubt, False if worse; None: its interval holds 0, or has no ends."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return None
        return (self.low > 0) == higher


@dataclass(frozen=True)
class Estimate:
    """A figure, and what it is on every resample (DRAWS,); None: not resampled."""

    value: float
    draws: Array | None

    def __sub__(self, other: Estimate) -> Estimate:
        """The paired difference."""
        draws = None if self.draws is None or other.draws is None else self.draws - other.draws
        return Estimate(self.value - other.value, draws)

    def figure(self) -> Figure:
        if self.draws is None:
            return Figure(self.value, None, None)
        low, high = np.quantile(self.draws, [0.025, 0.975])
        return Figure(self.value, float(2 * self.value - high), float(2 * self.value - low))


class Bootstrap:
    """DRAWS resamples of P different prompts with all their images, the same for all estimates.

    `prompts`: of every image; a number: so many images, no two of one prompt.
    """

    def __init__(self, prompts: Sequence[Hashable] | int, draws: int = DRAWS, seed: int = SEED) -> None:
        images: dict[Hashable, list[int]] = {}
        for image, prompt in enumerate(range(prompts) if isinstance(prompts, int) else prompts):
            images.setdefault(prompt, []).append(image)
        self._images = list(images.values())  # of each prompt
        times = np.random.default_rng(seed).multinomial(len(images), np.full(len(images), 1 / len(images)), draws)
        drawn = times * np.array([len(own) for own in self._images])
        self._shares = drawn / drawn.sum(1, keepdims=True)  # (draws, P), of the images

    def mean(self, values: Array) -> Estimate:
        """Of one value an image."""
        values = np.asarray(values, np.float64)
        return Estimate(float(values.mean()), self._shares @ np.array([values[own].mean() for own in self._images]))

    def frechet(self, one: Array, other: Array) -> Estimate:
        """The Frechet distance of the Gaussians of two sets of features, (images, d) each; below 0 never.

        |m1 - m2|^2 + tr(c1 + c2 - 2 (c1 c2)^(1/2)), Dowson and Landau 1982. It grows as images get fewer: compare it
        at equal numbers only.
        """
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        value = float(frechet(_whole(one), _whole(other))[0])
        if one.shape[1] > MOST_FEATURES:
            return Estimate(value, None)
        moments = [self._moments(features) for features in (one, other)]
        parts = np.array_split(self._shares, -(-len(self._shares) // 256))
        return Estimate(value, np.concatenate([frechet(*(_gaussian(part, m) for m in moments)) for part in parts]))

    def _moments(self, features: Array) -> tuple[Array, Array]:
        """Means of every prompt: (P, d), and of the products (P, d * d)."""
        by_prompt = [features[own] for own in self._images]
        products = [(own.T @ own).ravel() / len(own) for own in by_prompt]
        return np.stack([own.mean(0) for own in by_prompt]), np.stack(products)


Gaussian = tuple[Array, Array]  # (n, d) means, (n, d, d) covariances


def _whole(features: Array) -> Gaussian:
    """Of all images."""
    mean = features.mean(0)
    apart = features - mean
    return mean[None], (apart.T @ apart / len(features))[None]


def _gaussian(shares: Array, moments: tuple[Array, Array]) -> Gaussian:
    """Of n resamples, shares (n, P)."""
    mean, square = (shares @ moment for moment in moments)
    return mean, square.reshape(*mean.shape, -1) - mean[:, :, None] * mean[:, None, :]


def frechet(one: Gaussian, other: Gaussian) -> Array:
    """(n,) distances of n pairs."""
    values, vectors = np.linalg.eigh(one[1])
    root = (vectors * np.sqrt(np.maximum(values, 0))[:, None, :]) @ vectors.swapaxes(1, 2)
    crossed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other[1] @ root), 0)).sum(1)
    traces = np.trace(one[1], axis1=1, axis2=2) + np.trace(other[1], axis1=1, axis2=2)
    found: Array = np.square(one[0] - other[0]).sum(1) + traces - 2 * crossed
    return found
