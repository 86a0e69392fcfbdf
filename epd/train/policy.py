"""A distribution over tables around a given one: Dirichlet positions and weights, behind an option log-normal scales.

In every interval the K positions cut [0, 1] into K + 1 segments, a point of a simplex, and the weights are one, too.
Both are Dirichlet with concentrations

    alpha = kappa * mean * exp(residual / sqrt(kappa))

where `mean` is the given table's and the residual comes from a small network of the step index alone whose last layer
begins at zero: at the start the mean of the policy is the table. What cannot move keeps its value: a segment of length
0 (a point at r = 1), a point of weight 0, weights that are not on the simplex. Positions keep their order.

Source: arXiv 2512.22796 (RDPO), with these differences: segments and weights of zero are left alone in place of being
given a floor; the network sees the index as a learned vector; what it adds is in units of about a standard deviation,
which may differ from number to number (`epd.train.reach`); all in float64. Knows nothing of networks or rewards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from epd.table import Table

from .reach import Reach

SMALLEST = 1e-6  # of a drawn segment or weight: the logarithm of a smaller one is no help, and 0 breaks a table


class Simplex(NamedTuple):
    """Rows of a simplex in part: `mean` (N, M), of which the entries under `free` (N, M) can move."""

    mean: Tensor
    free: Tensor


class Draw(NamedTuple):
    """G drawn tables; float64."""

    segments: Tensor  # (G, N, K + 1), in order of position
    weights: Tensor  # (G, N, K)
    scales: Tensor  # (G, N, 2 K) logarithms: K of scale_dir, K of scale_time; (G, N, 0) where they are not learned


def dirichlet_log_prob(x: Tensor, alpha: Tensor, free: Tensor) -> Tensor:
    """Log-density of x (..., M) over its free entries, (...); 0 where none are free."""
    used = torch.where(free, alpha, 1.0)  # lgamma(1) = 0
    terms = torch.where(free, (used - 1) * torch.log(torch.where(free, x, 1.0)), 0.0)
    return torch.lgamma(_total(alpha, free)) - torch.lgamma(used).sum(-1) + terms.sum(-1)


def dirichlet_kl(alpha: Tensor, other: Tensor, free: Tensor) -> Tensor:
    """KL(Dirichlet(alpha) || Dirichlet(other)) over the free entries, (...); 0 where none are free."""
    a, b = (torch.where(free, value, 1.0) for value in (alpha, other))
    total, other_total = _total(alpha, free), _total(other, free)
    spread = torch.where(free, (a - b) * (torch.digamma(a) - torch.digamma(total)[..., None]), 0.0)
    norms = torch.lgamma(total) - torch.lgamma(other_total) - (torch.lgamma(a) - torch.lgamma(b)).sum(-1)
    return norms + spread.sum(-1)


def _total(alpha: Tensor, free: Tensor) -> Tensor:
    """Sum of the free concentrations; 1 where none are free."""
    return torch.where(free.any(-1), torch.where(free, alpha, 0.0).sum(-1), 1.0)


@dataclass(frozen=True)
class Distribution:
    """The policy for one value of its parameters."""

    segments: Tensor  # (N, K + 1) concentrations
    weights: Tensor  # (N, K) concentrations
    scales: Tensor  # (N, 2 K) means of the logarithms, or (N, 0)
    spread: Tensor  # standard deviation of those: of all, or (N, 2 K)
    given: tuple[Simplex, Simplex]

    def draw(self, count: int, rng: np.random.Generator) -> Draw:
        """`count` tables, independent of each other."""
        drawn = []
        for alpha, simplex in zip((self.segments, self.weights), self.given, strict=True):
            gamma = rng.standard_gamma(alpha.detach().numpy(), (count, *alpha.shape))
            share = _share(torch.from_numpy(gamma), simplex).clamp_min(SMALLEST)
            drawn.append(torch.where(simplex.free, _share(share, simplex), simplex.mean))
        noise = torch.from_numpy(rng.standard_normal((count, *self.scales.shape)))
        return Draw(drawn[0], drawn[1], self.scales.detach() + self.spread * noise)

    def log_prob(self, draw: Draw) -> Tensor:
        """Log-density of what was drawn, for each table and interval: (G, N)."""
        both = zip(draw[:2], (self.segments, self.weights), self.given, strict=True)
        simplices = sum(dirichlet_log_prob(x, alpha, simplex.free) for x, alpha, simplex in both)
        if not self.scales.shape[-1]:
            return simplices
        return simplices + torch.distributions.Normal(self.scales, self.spread).log_prob(draw.scales).sum(-1)

    def kl(self, other: Distribution) -> Tensor:
        """KL(self || other) of each interval: (N,)."""
        pairs = zip((self.segments, self.weights), (other.segments, other.weights), self.given, strict=True)
        simplices = sum(dirichlet_kl(a, b, simplex.free) for a, b, simplex in pairs)
        return simplices + ((self.scales - other.scales) / self.spread).square().sum(-1) / 2

    def mean(self) -> Draw:
        """The mean of every number, as one table (G = 1)."""
        return self._one([_share(alpha, simplex) for alpha, simplex in self._heads()], self.spread**2 / 2)

    def mode(self) -> Draw:
        """The most likely positions and weights, and scales, as one table (G = 1).

        Raises
        ------
        ValueError
            A free concentration is 1 or less: the density is highest at the border of the simplex.
        """
        if any(bool((alpha[simplex.free] <= 1).any()) for alpha, simplex in self._heads()):
            raise ValueError("this policy has no mode inside the simplex; export its mean, or draw closer to the table")
        return self._one([_share(alpha - 1, simplex) for alpha, simplex in self._heads()], -(self.spread**2))

    def _heads(self) -> list[tuple[Tensor, Simplex]]:
        return list(zip((self.segments.detach(), self.weights.detach()), self.given, strict=True))

    def _one(self, shares: list[Tensor], shift: Tensor) -> Draw:
        """`shift`: of a log-normal's logarithm, from its median."""
        found = [torch.where(s.free, x, s.mean)[None] for x, s in zip(shares, self.given, strict=True)]
        return Draw(found[0], found[1], (self.scales.detach() + shift)[None])


def _share(value: Tensor, simplex: Simplex) -> Tensor:
    """Free entries made to sum to what the free entries of the mean do, which is 1."""
    free = torch.where(simplex.free, value, 0.0)
    return free / free.sum(-1, keepdim=True).clamp_min(1e-300)


class Policy(nn.Module):  # type: ignore[misc]
    """The residual network over a table; `policy()` is its distribution.

    Parameters
    ----------
    table : Table
        Any start; with weights that are not on the simplex only positions (and scales) are learned.
    reach : Reach
        kappa of positions and of weights, the sum of concentrations at the start: a number with mean m has the variance
        m (1 - m) / (kappa + 1). And the standard deviation of the logarithms of scale_dir and scale_time; 0: they are
        not learned (the authors found that learning them under a reward over-saturates pictures).
    seed : int
        Of the network's weights.

    Raises
    ------
    ValueError
        Nothing in the table can be learned so.
    """

    def __init__(self, table: Table, reach: Reach, seed: int = 0) -> None:
        super().__init__()
        scales = bool(np.any(reach.scales))
        self.table = table
        self.concentrations = [torch.as_tensor(kappa, dtype=torch.float64) for kappa in (reach.segments, reach.weights)]
        self.spread = torch.as_tensor(reach.scales, dtype=torch.float64)
        self.order = np.argsort(table.r, axis=1, kind="stable")  # (N, K)
        self.given = (_simplex(_segments(table.r)), _weights(table))
        self.sizes = [simplex.mean.shape[1] for simplex in self.given]
        self.sizes.append(2 * table.directions if scales else 0)
        if not scales and not any(bool(simplex.free.any()) for simplex in self.given):
            raise ValueError("nothing in this table can be learned: one point a step at its end, and no scales")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Embedding(table.steps, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, sum(self.sizes))
            ).double()
        last = self.net[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self) -> Distribution:
        residual = self.net(torch.arange(self.table.steps)).split(self.sizes, dim=1)
        heads = [
            torch.where(simplex.free, kappa * simplex.mean * torch.exp(change / kappa.sqrt()), 1.0)
            for simplex, kappa, change in zip(self.given, self.concentrations, residual[:2], strict=True)
        ]
        spread = self.spread if self.sizes[2] else torch.zeros(())
        location = self.logarithms - spread**2 / 2 + spread * residual[2]  # the mean of exp is the table's
        return Distribution(heads[0], heads[1], location, spread, self.given)

    @property
    def logarithms(self) -> Tensor:
        """Of the table's scales, as far as they are learned: (N, 2 K) or (N, 0)."""
        both = np.concatenate([self.table.scale_dir, self.table.scale_time], 1)
        return torch.from_numpy(np.log(both)[:, : self.sizes[2]])

    def tables(self, draw: Draw) -> list[Table]:
        """What was drawn, as tables in the given one's order of points, (G)."""
        r = np.clip(draw.segments.numpy().cumsum(-1)[..., :-1], None, 1.0)
        unsorted = np.empty_like(r)
        np.put_along_axis(unsorted, np.broadcast_to(self.order, r.shape), r, axis=-1)
        found = []
        for positions, weights, scales in zip(unsorted, draw.weights.numpy(), draw.scales.numpy(), strict=True):
            changed = {"r": positions, "w": weights}
            if scales.size:
                changed |= dict(zip(("scale_dir", "scale_time"), np.split(np.exp(scales), 2, axis=1), strict=True))
            found.append(replace(self.table, **changed))
        return found


def _segments(r: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions (N, K) in any order to the K + 1 lengths they cut [0, 1] into."""
    ends = np.pad(np.sort(r, axis=1), ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1)))
    return np.diff(ends, axis=1)


def _simplex(mean: NDArray[np.float64]) -> Simplex:
    """With two or more entries above 0 in a row, these are free."""
    free = (mean > 0) & ((mean > 0).sum(1, keepdims=True) > 1)
    return Simplex(torch.from_numpy(mean.copy()), torch.from_numpy(free))


def _weights(table: Table) -> Simplex:
    """None are free unless they are on the simplex. Table checks that to 1e-6: made exact here."""
    if table.weights == "simplex":
        return _simplex(table.w / table.w.sum(1, keepdims=True))
    return Simplex(torch.from_numpy(table.w.copy()), torch.zeros(table.w.shape, dtype=torch.bool))
