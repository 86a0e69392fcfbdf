"""Teacher trajectories: converged solutions of the images that are learned from, kept on disk as they are made.

Knows nothing of students.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.designs import SHIFTS
from runtime.facts import Facts
from runtime.judge import curve
from runtime.noise import randn
from runtime.order import Group
from runtime.png import version

from ..fit import Trajectories, teach
from ..schedule import Floats
from ..solve import Points, Slope, Solver
from ..solvers import dpm2, heun, unipc
from ..table import write_whole
from .cluster import same_everywhere, spread
from .model import Model, load

TEACHERS: dict[str, Callable[..., Solver]] = {
    "dpm2": lambda times, flow: dpm2(times),
    "heun": lambda times, flow: heun(times),
    "unipc": lambda times, flow: unipc(times, 3, flow),
}
REQUESTS = {"dpm2": 2, "heun": 2, "unipc": 1}  # of one step
_REFINED = 4  # halvings of the last interval where it ends at 0


@dataclass(frozen=True)
class Lesson:
    """Images to learn from or to be judged by.

    Attributes
    ----------
    slope : callable
        slope(images) is the network over some of the B images, by their indices: a `Slope` on tensors.
    teacher : Trajectories
        Of all B, float32 arrays.
    pictures : callable
        pictures(x, sigma): states to what is compared, (B, ...) each; see `Model.pictures`.
    """

    slope: Callable[[Sequence[int]], Slope]
    teacher: Trajectories
    pictures: Callable[[Tensor, float], Tensor]
    device: str = "cpu"
    told: str = ""  # a name for all that the trajectories depend on

    @property
    def count(self) -> int:
        """B."""
        return int(self.teacher.x.shape[1])

    def states(self, images: Sequence[int], t: float) -> Tensor:
        """The teacher's states (len(images), ...) float64 at time t."""
        return torch.from_numpy(self.teacher.at(t)[list(images)].astype(np.float64)).to(self.device)


@dataclass(frozen=True)
class Taught:
    """Trajectories of groups of images from a teacher's grid, made when first asked for.

    Attributes
    ----------
    times : (M + 1,) float64
        The teacher's grid; students begin and end with it.
    method : str
        Of TEACHERS.
    folder : Path
        Where trajectories are kept, in a file for every group.
    """

    model: Model
    times: Floats
    method: str
    folder: Path
    ticked: Callable[[int], None] = lambda rows: None  # rows of the network done

    def rows(self, groups: Sequence[Group]) -> int:
        """Rows of the network that their trajectories take, but for those that are there."""
        return sum(self._rows(group) for group in groups if not self._file(group).is_file())

    def _rows(self, group: Group) -> int:
        return group.rows * (REQUESTS[self.method] * (len(self.times) - 1) + 1)

    def lesson(self, groups: Sequence[Group]) -> Lesson:
        """All images of some groups.

        Raises
        ------
        FloatingPointError
            The model gave NaN or infinity.
        OSError
            The folder cannot be written.
        """
        prompts = [prompt for group in groups for prompt in group.prompts]
        whole = self.model.slopes(prompts, [group.guidance for group in groups for _ in group.seeds])
        parts, names = [self._taught(group) for group in groups], [self._file(group).name for group in groups]
        x, d = (np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("x", "d"))
        return Lesson(whole.part, Trajectories(self.times, x, d), self.model.pictures, self.model.device, digest(names))

    def gather(self, groups: Sequence[Group], address: str) -> None:
        """Has a Ray cluster (see `cluster.spread`), whose machines have the checkpoint's folder, make what is missing.

        Raises
        ------
        RequestError
            The cluster is not reached, or its workers died again and again: what they had made is kept.
        """
        missing = [group for group in groups if self._kept(group) is None]
        model = self.model
        job = Teaching(str(model.folder.absolute()), tuple(self.times.tolist()), self.method, model.fingerprint)
        answers = spread(job, missing, address)
        for group, found in zip(missing, answers, strict=True):
            self._keep(group, found)
            self.ticked(self._rows(group))

    def _taught(self, group: Group) -> Trajectories:
        found = self._kept(group)
        if found is None:
            found = trajectories(self.model, group, self.times, self.method, self.ticked)
            self._keep(group, found)
        return found

    def _kept(self, group: Group) -> Trajectories | None:
        """None: not there, or damaged."""
        try:
            with self._file(group).open("rb") as opened, np.load(opened) as stored:
                return Trajectories(stored["times"], stored["x"], stored["d"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def _keep(self, group: Group, found: Trajectories) -> None:
        whole = io.BytesIO()
        np.savez(whole, times=found.times, x=found.x, d=found.d)
        write_whole(self._file(group), whole.getvalue())

    def _file(self, group: Group) -> Path:
        told = [asdict(group), self.times.tolist(), self.method, self.model.fingerprint, version()]
        return self.folder / f"teacher-{digest(told)}.npz"


@dataclass(frozen=True)
class Teaching:
    """The trajectories of one group after the other, as a worker of a cluster makes them: on one core each."""

    model: str
    times: tuple[float, ...]
    method: str
    fingerprint: str  # of the checkpoint
    threads: int = 1

    def open(self) -> Callable[[Group], Trajectories]:
        """Raises RequestError where the checkpoint is another one here."""
        torch.set_num_threads(self.threads)
        model, times = load(self.model), np.array(self.times)
        same_everywhere(self.model, model.fingerprint, self.fingerprint)
        return lambda group: trajectories(model, group, times, self.method)


def trajectories(
    model: Model, group: Group, times: Floats, method: str, ticked: Callable[[int], None] = lambda rows: None
) -> Trajectories:
    """Of a group's images, which depend on the group alone, not on what else is made.

    Raises
    ------
    FloatingPointError
        The model gave NaN or infinity.
    """
    slopes = model.slopes(group.prompts, [group.guidance] * len(group.seeds))
    quick = on_arrays(slopes.part(range(len(group.seeds))), model.device)

    def slope(points: Any) -> Any:
        answer = quick(points)
        ticked(group.rows)
        return answer

    first = np.stack([randn(model.shape, seed) for seed in group.seeds]).astype(np.float64)
    solver = partial(TEACHERS[method], flow=model.facts.family == "sd3")
    return teach(slope, (1.0 if model.facts.family == "sd3" else times[0]) * first, times, solver)


def on_arrays(slope: Slope, device: str) -> Slope:
    """A slope function on tensors as one on arrays, without gradients: what `epd.fit` takes."""

    def arrays(points: Points) -> Any:
        x, t = (torch.as_tensor(np.asarray(a, np.float64), device=device) for a in points)
        with torch.no_grad():
            return slope(Points(x, t)).cpu().numpy()

    return arrays


def fine_grid(facts: Facts, steps: int, first: float | None = None, last: float | None = None) -> Floats:
    """About `steps` intervals over the whole range of a model, or from `first` to `last`; shorter towards a last 0."""
    grid = np.array(curve(facts, max(2, steps - _REFINED), SHIFTS[facts.family][0]))
    if grid[-1] == 0:
        grid = np.concatenate([grid[:-1], grid[-2] / 2.0 ** np.arange(1, _REFINED + 1), [0.0]])
    first, last = grid[0] if first is None else first, grid[-1] if last is None else last
    inner = grid[(grid < first * (1 - 1e-9)) & (grid > last * (1 + 1e-9))]
    return np.concatenate([[first], inner, [last]])


def digest(told: Any) -> str:
    """A name for something that depends on all this."""
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:24]
