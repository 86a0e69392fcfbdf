"""The settings of a policy's training, its advantages and PPO's objective. Knows nothing of tables or models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.errors import RequestError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """How a policy is trained. The same settings on the same model give the same table."""

    iterations: int = 40
    batch: int = 16  # prompts of an iteration, each with noise of its own
    group: int = 8  # G: tables for each prompt
    concentration: float = 200.0  # kappa, at the start
    scales: float = 0.0  # standard deviation of the logarithms of the scales; 0: not learned
    rate: float = 1e-3  # of AdamW
    epochs: int = 4  # steps of the optimiser an iteration
    clip: float = 0.2  # of the ratio
    kl: float = 0.0  # weight of the divergence from the first policy
    every: int = 5  # iterations from one validation to the next
    validation: int = 32  # prompts set aside to choose by
    export: str = "mean"  # mean | mode of the policy
    seed: int = 0

    def check(self) -> None:
        """Raises RequestError for the first thing that cannot be."""
        for name, least in (
            ("iterations", 1),
            ("batch", 1),
            ("group", 2),
            ("epochs", 1),
            ("every", 1),
            ("validation", 2),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise RequestError(f"--{name} must be {least} or more, got {getattr(self, name)}")
        for name in ("concentration", "rate", "clip"):
            if not 0 < getattr(self, name) < 1e9:
                raise RequestError(f"--{name} must be above 0, got {getattr(self, name)}")
        for name in ("scales", "kl"):
            if not 0 <= getattr(self, name) < 1e9:
                raise RequestError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        if self.iterations % self.every:
            raise RequestError(f"--iterations must be a multiple of --every {self.every}, got {self.iterations}")
        if self.export not in ("mean", "mode"):
            raise RequestError(f"--export must be mean or mode, got {self.export!r}")


def advantages(rewards: Array) -> Array:
    """Each reward (P, G) minus the mean of its group's others, in units of the root mean square of all; (P, G).

    Leave-one-out (RLOO; Kool et al. 2019): sums to 0 in every group. All 0 where no table differs from another.
    """
    group = rewards.shape[1]
    over = rewards - rewards[:, :1]  # exactly 0 where all are equal
    found = (over - over.mean(1, keepdims=True)) * group / (group - 1)
    scale = np.sqrt(np.square(found).mean())
    return np.asarray(found / scale if scale > 0 else found)


def surrogate(log_prob: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's objective (Schulman et al. 2017, arXiv 1707.06347), to be made larger; and the share of clipped ratios.

    `log_prob`, `old` (tables, N); `advantage` (tables,). A mean over tables and intervals.
    """
    ratio = torch.exp(log_prob - old)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    advantage = advantage[:, None]
    return torch.minimum(ratio * advantage, clipped * advantage).mean(), (ratio != clipped).double().mean()
