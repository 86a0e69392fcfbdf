"""The student: a table whose numbers are tensors that can be learned. It begins as exactly the table it is made of.

    r             top sigmoid(.), so that points stay inside their interval
    w             softmax(.) where weights are a simplex, free numbers otherwise
    scales        the table's own times 1 + bound tanh(.); no time is asked for above the first one
    times         the first and the last stay; the intervals between are softmax(.) of the whole
    place, carry  free numbers

Free numbers are learned in coordinates in which the slopes they weigh are orthonormal (`Student.orthogonal`): slopes
that follow one another are nearly the same, and in plain coordinates a gradient step hardly changes what they differ
in. Knows nothing of models or losses; `epd.solvers.epd` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..solve import Points, Slope, solve
from ..solvers import epd
from ..table import Table, point_times

LEARNED = ("r", "w", "scale_dir", "scale_time", "place", "carry", "times")
LINEAR = ("place", "weigh")  # parameters that enter the solver linearly; the others are logits
_BEYOND = 1.05  # top of r where points are arithmetic: r = 1 is reached, and left again
_INSIDE = {"geometric": (1e-3, 1 - 1e-3), "arithmetic": (1e-3, 1.0)}
_LAST = 0.98  # largest r in an interval that ends at 0, where no slope is asked


@dataclass(frozen=True)
class Numbers:
    """`epd.solvers.Coefficients` as tensors with gradients."""

    times: Tensor
    r: Tensor
    w: Tensor
    scale_dir: Tensor
    scale_time: Tensor
    start: str
    order: int
    midpoint: str
    place: Tensor | None
    carry: Tensor | None


class Student(nn.Module):  # type: ignore[misc]
    """What can be learned of `table`; every parameter is 0 where the numbers are the table's.

    Parameters
    ----------
    table : Table
    frozen : sequence of str
        Of LEARNED: what keeps the table's numbers. Of weights that are free scale_dir does anyway: w has its part.
    bound : float
        Largest relative change of a scale; in [0, 1).

    Raises
    ------
    ValueError
        An unknown name to freeze.
    """

    def __init__(self, table: Table, frozen: Sequence[str] = ("times",), bound: float = 0.05) -> None:
        super().__init__()
        if strangers := sorted(set(frozen) - set(LEARNED)):
            raise ValueError(f"cannot freeze {', '.join(strangers)}; choose from {', '.join(LEARNED)}")
        self.start_table, self.bound = table, bound
        self._free = table.weights == "free"
        for name in ("times", "r", "w", "scale_dir", "scale_time"):
            self.register_buffer(f"base_{name}", torch.tensor(getattr(table, name)))
        shapes = dict.fromkeys(("r", "w", "scale_dir", "scale_time"), table.r.shape) | {"times": (table.steps,)}
        if self._free:
            del shapes["w"], shapes["scale_dir"]
        shapes = {name: shape for name, shape in shapes.items() if name not in frozen}
        self._known = {name: _known(table, name, frozen) for name in _blocks(table)}
        for name, block in _blocks(table).items():
            self.register_buffer(f"base_{name}", torch.tensor(block))
            self.register_buffer(
                f"basis_{name}", torch.diag_embed(torch.tensor(self._known[name], dtype=torch.float64))
            )
            if self._known[name].any():
                shapes[name] = block.shape
        self.raw = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in shapes.items()}
        )

    def forward(self) -> Numbers:
        """The numbers now."""
        table, k = self.start_table, self.start_table.directions
        place, weigh = (self._block(name) if name in self._known else None for name in LINEAR)
        if self._free:
            assert weigh is not None
            w, carry = weigh[:, :k], weigh[:, k:] if table.carry is not None else None
        else:
            w, carry = torch.softmax(self.base_w.log() + self._moved("w"), 1), weigh
        times, r, scale_dir, scale_time = (
            self._times(),
            self._positions(),
            self._scale("scale_dir"),
            self.base_scale_time,
        )
        if "scale_time" in self.raw:
            t_k = point_times(table.midpoint, times[:-1, None], times[1:, None], r).clamp(min=1e-9)
            highest = torch.maximum(scale_time, times[0] / t_k)
            scale_time = torch.minimum(self._scale("scale_time"), highest)
        return Numbers(times, r, w, scale_dir, scale_time, table.start, table.order, table.midpoint, place, carry)

    def table(self) -> Table:
        """The student's numbers now, with the facts and the provenance of the table it was made of."""
        with torch.no_grad():
            now = self()
        names = ("times", "r", "w", "scale_dir", "scale_time", "place", "carry")
        found = {name: value.cpu().numpy() for name in names if (value := getattr(now, name)) is not None}
        return replace(self.start_table, **found)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def orthogonal(self, x: Tensor, slope: Slope, floor: float = 1e-4) -> None:
        """Choose the coordinates of free numbers by the slopes met on the way from states x (B, ...).

        `floor`: directions in which the slopes vary by less, relative to the largest mean square, count as this much.
        """
        if not self._known:
            return
        for i, (past, new) in enumerate(self._slopes(x, slope)):
            for name, known in self._known.items():
                slopes = [*new, *past] if name == "weigh" and self._free else past
                gram = _gram(slopes, known.shape[-1], x)
                basis = getattr(self, f"basis_{name}")[i]
                for part, rows in zip(
                    basis.reshape(-1, *gram.shape), np.atleast_2d(known[i]), strict=True
                ):  # a view of the buffer
                    part.copy_(_whitening(gram, rows, floor))

    def _slopes(self, x: Tensor, slope: Slope) -> Iterator[tuple[list[Tensor | None], list[Tensor | None]]]:
        """Known slopes, newest first, and new ones (None: not asked for) of every interval."""
        answers: list[Tensor] = []

        def recording(points: Points) -> Tensor:
            answers.append(slope(points))
            return answers[-1]

        past: list[Tensor | None] = []
        for step in solve(epd(self()), x, recording):
            past = past or [answers[0][0]]
            given = iter(answers[-1])
            new = [next(given) if w != 0 else None for w in self.start_table.w[step.index]]
            yield past, new
            past = [*new, *past]

    def _moved(self, name: str) -> Tensor | float:
        return self.raw.get(name, 0.0)

    def _block(self, name: str) -> Tensor:
        base: Tensor = getattr(self, f"base_{name}")
        if name not in self.raw:
            return base
        return base + (getattr(self, f"basis_{name}") @ self.raw[name][..., None])[..., 0]

    def _times(self) -> Tensor:
        times: Tensor = self.base_times
        if "times" not in self.raw:
            return times
        parts = torch.softmax(torch.log(times[:-1] - times[1:]) + self.raw["times"], 0)
        inner = times[0] + (times[-1] - times[0]) * parts.cumsum(0)[:-1]
        return torch.cat([times[:1], inner, times[-1:]])

    def _positions(self) -> Tensor:
        table, base = self.start_table, self.base_r
        if "r" not in self.raw:
            return base
        top = 1.0 if table.midpoint == "geometric" else _BEYOND
        low, high = _INSIDE[table.midpoint]
        limit = torch.full_like(base, high)
        if table.times[-1] == 0:
            limit[-1] = max(_LAST, float(table.r[-1].max()))
        r = top * torch.sigmoid(torch.logit(base / top) + self.raw["r"])
        return torch.minimum(r.clamp(min=low), limit)

    def _scale(self, name: str) -> Tensor:
        base: Tensor = getattr(self, f"base_{name}")
        return base * (1 + self.bound * torch.tanh(self.raw[name])) if name in self.raw else base


def _blocks(table: Table) -> dict[str, NDArray[np.float64]]:
    """The free numbers that are learned together: those that place a point, and those of an update."""
    blocks = {}
    if table.place is not None:
        blocks["place"] = table.place  # (N, K, J)
    update = [] if table.weights == "simplex" else [table.w]
    update += [] if table.carry is None else [table.carry]
    if update:
        blocks["weigh"] = np.concatenate(update, axis=1)  # (N, K + Q); without w beside a simplex
    return blocks


def _known(table: Table, block: str, frozen: Sequence[str]) -> NDArray[np.bool_]:
    """Which numbers of a block belong to slopes that are there, and are not frozen; shape of the block."""
    asked = table.w != 0
    known: NDArray[np.bool_] = np.zeros(_blocks(table)[block].shape, bool)
    for i in range(table.steps):
        past = np.concatenate([*asked[:i][::-1], [True]])
        if block == "place":
            past = past[: known.shape[-1]]
            known[i, :, : len(past)] = asked[i][:, None] & past & ("place" not in frozen)
            continue
        row = past & ("carry" not in frozen)
        if table.weights == "free":
            row = np.concatenate([asked[i] & ("w" not in frozen), row])
        row = row[: known.shape[-1]]
        known[i, : len(row)] = row
    return known


def _gram(slopes: Sequence[Tensor | None], depth: int, x: Tensor) -> Tensor:
    """Mean products of the first `depth` slopes, (depth, depth); 0 where there is none."""
    there = [torch.zeros_like(x) if slope is None else slope for slope in slopes[:depth]]
    flat = torch.stack([*there, *[torch.zeros_like(x)] * (depth - len(there))]).reshape(depth, -1)
    return flat @ flat.T / flat.shape[1]


def _whitening(gram: Tensor, known: NDArray[np.bool_], floor: float) -> Tensor:
    """A with A^T gram A = 1 on the known slopes, but for directions below the floor; 0 elsewhere."""
    basis = torch.zeros_like(gram)
    at = torch.from_numpy(np.flatnonzero(known)).to(gram.device)
    if len(at):
        values, vectors = torch.linalg.eigh(gram[at][:, at])
        values = values.clamp(min=floor * float(values[-1]))
        basis[at[:, None], at] = vectors / values.sqrt()
    return basis
