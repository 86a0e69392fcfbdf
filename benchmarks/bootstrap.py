"""95 % intervals by resampling prompts: of means, of Frechet distances, and of paired differences of either.

Images of one prompt are not independent, so that whole prompts are drawn, all their images with them. All figures of a
run are resampled alike: the difference of two estimates is a paired one. Intervals are basic ("reverse percentile")
ones, which undo the bias that resampling gives a Frechet distance. Knows nothing of solvers.
"""

from __future__ import annotations

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
    """DRAWS resamples of P prompts, the same for all estimates; prompt p has images p * S to p * S + S - 1."""

    def __init__(self, prompts: int, seeds: int = 1, draws: int = DRAWS, seed: int = SEED) -> None:
        rng = np.random.default_rng(seed)
        self._prompts, self._seeds = prompts, seeds
        self._shares = rng.multinomial(prompts, np.full(prompts, 1 / prompts), draws) / prompts  # (draws, P)

    def mean(self, values: Array) -> Estimate:
        """Of (P * S,) values."""
        each = np.asarray(values, np.float64).reshape(self._prompts, self._seeds).mean(1)
        return Estimate(float(each.mean()), self._shares @ each)

    def frechet(self, one: Array, other: Array) -> Estimate:
        """The Frechet distance of the Gaussians of two sets of features, (P * S, d) each; below 0 never.

        |m1 - m2|^2 + tr(c1 + c2 - 2 (c1 c2)^(1/2)), Dowson and Landau 1982. It grows as images get fewer: compare it
        at equal numbers only.
        """
        moments = [self._moments(features) for features in (one, other)]
        value = float(frechet(*(_gaussian(np.full((1, self._prompts), 1 / self._prompts), m) for m in moments))[0])
        if one.shape[1] > MOST_FEATURES:
            return Estimate(value, None)
        parts = np.array_split(self._shares, -(-len(self._shares) // 256))
        return Estimate(value, np.concatenate([frechet(*(_gaussian(part, m) for m in moments)) for part in parts]))

    def _moments(self, features: Array) -> tuple[Array, Array]:
        """Means of every prompt: (P, d), and of the products (P, d * d)."""
        by_prompt = np.asarray(features, np.float64).reshape(self._prompts, self._seeds, -1)
        products = np.einsum("psi,psj->pij", by_prompt, by_prompt) / self._seeds
        return by_prompt.mean(1), products.reshape(self._prompts, -1)


Gaussian = tuple[Array, Array]  # (n, d) means, (n, d, d) covariances


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
