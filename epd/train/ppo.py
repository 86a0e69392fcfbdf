"""Advantages within groups and the clipped objective of PPO. Knows nothing of tables or models."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
LEAST = 0.01  # of the root mean square of all groups: a group that differs by less is not worth a unit of its own


def advantages(rewards: Array) -> Array:
    """Each reward (P, G) minus the mean of its group, in units of the group's spread; (P, G), 0 in sum in every group.

    The unit is the root mean square of what a group's members are over the mean of the others (RLOO, Kool et al. 2019;
    that mean's own share in it cancels), as in GRPO (Shao et al. 2024), but never less than the median group's, nor
    than `LEAST` of all groups'. So rare pictures in which an attribute comes or goes are heard, but do not drown all
    others; and this is no unbiased gradient of the mean reward: that is what validation is for. All 0 where no table
    differs from another.
    """
    over = rewards - rewards[:, :1]  # exactly 0 where all are equal
    found = over - over.mean(1, keepdims=True)
    spread = np.sqrt(np.square(found).mean(1, keepdims=True))
    differ = spread > 0
    if not differ.any():
        return np.asarray(found)
    least = max(np.median(spread[differ]), LEAST * np.sqrt(np.square(spread).mean()))
    return np.asarray(found / np.maximum(spread, least))


def surrogate(log_prob: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's objective (Schulman et al. 2017, arXiv 1707.06347), to be made larger; and the share of clipped ratios.

    `log_prob`, `old` (tables, N); `advantage` (tables,). A mean over tables and intervals.
    """
    ratio = torch.exp(log_prob - old)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    advantage = advantage[:, None]
    return torch.minimum(ratio * advantage, clipped * advantage).mean(), (ratio != clipped).double().mean()
