"""Leave-one-out advantages and the clipped objective of PPO. Knows nothing of tables or models."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def advantages(rewards: Array) -> Array:
    """Each reward (P, G) minus the mean of its group's others, (P, G): leave-one-out (RLOO; Kool et al. 2019).

    In units of their group's root mean square, or of the median group's where that is larger: one picture in which an
    attribute comes or goes is worth no more than others in which little changes, of which there are many. Sums to 0 in
    every group. All 0 where no table differs from another.
    """
    group = rewards.shape[1]
    over = rewards - rewards[:, :1]  # exactly 0 where all are equal
    found = (over - over.mean(1, keepdims=True)) * group / (group - 1)
    scale = np.sqrt(np.square(found).mean(1, keepdims=True))
    differ = scale > 0
    return np.asarray(found / np.maximum(scale, np.median(scale[differ])) if differ.any() else found)


def surrogate(log_prob: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's objective (Schulman et al. 2017, arXiv 1707.06347), to be made larger; and the share of clipped ratios.

    `log_prob`, `old` (tables, N); `advantage` (tables,). A mean over tables and intervals.
    """
    ratio = torch.exp(log_prob - old)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    advantage = advantage[:, None]
    return torch.minimum(ratio * advantage, clipped * advantage).mean(), (ratio != clipped).double().mean()
