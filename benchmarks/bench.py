"""A model, prompts and start noise, on which solvers are run; and how pictures are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import epd
from epd.solve import Solver

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline
    from runtime.slopes import Slopes
    from shapes.captions import Scene

Array = NDArray[np.float64]

EVEN = " even"  # ends the name of a solver that runs on evenly spaced network times
NOISE_SEED = 9_000_000  # of the first image, image i has NOISE_SEED + i; nothing is trained, fitted or chosen by these


@dataclass(frozen=True)
class Attempt:
    """One solver on one grid, ready to run."""

    name: str
    solver: Solver
    times: tuple[float, ...]
    start_scale: float  # state at times[0] = start_scale * noise of unit variance
    end_scale: float  # latent = state at times[-1] / end_scale
    calls: int | None = None  # the number of sequential calls it was made to fit; None: found by running
    numbers: str = ""  # what else it is made of, as text: a table, a tolerance
    kind: str = "solver"  # solver | start (an untrained table) | table | parallel (in time)


@dataclass(frozen=True)
class Trajectories:
    """What running an attempt gave: latents (B, C, h, w) float32, and the work for one image (a mean over them)."""

    latents: NDArray[np.float32]
    sequential_calls: float
    total_evaluations: float
    guided_forwards: float


class Bench:
    """A model, prompts and noise, on which attempts are run; results are kept in the folder `work`, if one is given."""

    def __init__(
        self, pipe: Pipeline, prompts: Sequence[str], guidance: float, batch: int, work: Path | None = None
    ) -> None:
        from runtime.noise import randn

        self.pipe, self.prompts, self.guidance, self.work = pipe, prompts, guidance, work
        self.flow = pipe.bundle.facts.family == "sd3"
        shape = pipe.plan("", solver="euler").latent_shape
        self._noise = np.stack([randn(shape, NOISE_SEED + i) for i in range(len(prompts))]).astype(np.float64)
        self._batch = batch
        self._slopes: dict[tuple[int, int], Slopes] = {}  # by the images: each costs a run of the text encoders

    def run(self, attempt: Attempt) -> Trajectories:
        """The trajectories' ends and what they cost; from the folder `work` where they are known.

        Raises
        ------
        NotFiniteError
        """
        file = None if self.work is None else self.work / f"{self._key(attempt)}.npz"
        if file is not None and file.is_file():
            with np.load(file, allow_pickle=False) as kept:
                return Trajectories(kept["latents"], *kept["work"].tolist())
        size = 1 if attempt.kind == "parallel" else self._batch  # in a batch the slowest image would be counted
        parts = [self._part(attempt, slice(i, i + size)) for i in range(0, len(self.prompts), size)]
        latents, work = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        if file is not None:
            _save(file, latents=latents, work=work.mean(0))
        return Trajectories(latents, *work.mean(0).tolist())

    def pictures(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, H, W, 3) in [0, 1]."""
        return self.pipe.decode(latents.astype(np.float64))

    def _part(self, attempt: Attempt, images: slice) -> tuple[NDArray[np.float32], Array]:
        """Latents, and (B, 3) sequential calls, total evaluations, guided forwards of some images."""
        from runtime.errors import NotFiniteError

        noise, slopes = self._noise[images], self._told(images)
        before = slopes.guided_forwards
        try:
            *_, last = epd.solve(attempt.solver, attempt.start_scale * noise, slopes)
        except FloatingPointError as error:
            raise NotFiniteError(f"{attempt.name}: {error}; leave it out with --solvers") from None
        forwards = (slopes.guided_forwards - before) / len(noise)
        work = np.tile([last.calls, last.evaluations, forwards], (len(noise), 1)).astype(np.float64)
        return (last.x / attempt.end_scale).astype(np.float32), work

    def _told(self, images: slice) -> Slopes:
        key = (images.start, images.stop)
        if key not in self._slopes:
            self._slopes[key] = self.pipe.slopes(self.prompts[images], self.guidance)
        return self._slopes[key]

    def _key(self, attempt: Attempt) -> str:
        """What the result depends on; of the code only the version: give another folder when the solvers change."""
        from runtime.png import version

        bundle = self.pipe.bundle
        parts: list[Any] = [version(), self.pipe.provider]
        parts += [bundle.fingerprint() or str(bundle.folder.resolve()), list(self.prompts), NOISE_SEED, self.guidance]
        parts += [attempt.name, attempt.times, attempt.start_scale, attempt.numbers]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def shown(pictures: NDArray[np.float32], scenes: Sequence[Scene]) -> float:
    """The share of pictures in which the checker finds all that their caption says."""
    from PIL import Image

    from shapes.check import accepts

    drawn = [Image.fromarray(np.rint(picture * 255).astype(np.uint8)) for picture in pictures]
    return float(np.mean([accepts(picture, scene) for picture, scene in zip(drawn, scenes, strict=True)]))


def _save(file: Path, **arrays: Any) -> None:
    """Written to another name first: what is found under its own name is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.stem}.partial.npz")
    try:
        np.savez(partial, **arrays)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
