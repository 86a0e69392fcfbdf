"""Means with their 95 % confidence intervals. Knows nothing of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half its width: mean +- half."""
        return (self.high - self.low) / 2


def interval(values: Any) -> Interval:
    """Student's interval of the mean of n >= 2 independent values, (n,): mean +- t(0.975, n - 1) s / sqrt(n)."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval needs two values or more, got shape {values.shape}")
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    half = student(0.975, len(values) - 1) * error
    return Interval(mean, mean - half, mean + half)


def independent(values: Any, groups: Sequence[str]) -> NDArray[np.float64]:
    """Means over the groups of values (n,), each of a named group; of one group alone: its values, as they are."""
    values, names = np.asarray(values, np.float64), np.asarray(groups)
    kinds = list(dict.fromkeys(groups))
    return np.array([values[names == kind].mean() for kind in kinds]) if len(kinds) > 1 else values


def student(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, to 1e-5, for a probability in [0.01, 0.99] and freedom >= 1.

    With t = sqrt(freedom) tan(a) its density is cos(a)^(freedom - 1), which is integrated numerically.
    """
    angle: NDArray[np.float64] = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    density = np.cos(angle[1:] / 2 + angle[:-1] / 2) ** (freedom - 1)
    reached = np.concatenate([[0.0], np.cumsum(density)])
    return float(np.sqrt(freedom) * np.tan(np.interp(probability * reached[-1], reached, angle)))
