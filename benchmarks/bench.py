"""A model, prompts and start noise, on which solvers are run; and how pictures are compared."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
NOISE_SEED = 9_000_000  # of the first image, image i has one i higher; nothing is trained, fitted or chosen by these
MOST_TOLD = 16  # batches whose conditioning is kept: that of a large model is large


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
    kind: str = "solver"  # solver | start (an untrained table) | table | parallel (in time) | reference
    interval: tuple[float, float] | None = None  # sigma: guidance inside only; None: everywhere
    table: epd.Table | None = None


@dataclass(frozen=True)
class Trajectories:
    """What running an attempt gave: latents (B, C, h, w) float32, and the work for one image (a mean over them)."""

    latents: NDArray[np.float32]
    sequential_calls: float
    total_evaluations: float
    guided_forwards: float


class Bench:
    """A model, prompts and noise, on which attempts are run; results are kept in the folder `work`, if one is given.

    Every prompt has `seeds` images, one after the other: image i shows prompt i // seeds from noise of its own.
    """

    def __init__(
        self,
        pipe: Pipeline,
        prompts: Sequence[str],
        guidance: float,
        batch: int,
        work: Path | None = None,
        seeds: int = 1,
        noise_seed: int = NOISE_SEED,
    ) -> None:
        from runtime.noise import randn

        self.pipe, self.guidance, self.work, self.seeds = pipe, guidance, work, seeds
        self.noise_seed = noise_seed
        self.prompts = [prompt for prompt in prompts for _ in range(seeds)]  # of every image
        self.flow = pipe.bundle.facts.family == "sd3"
        shape = pipe.plan("", solver="euler").latent_shape
        self._noise = np.stack([randn(shape, noise_seed + i) for i in range(len(self.prompts))])
        self._batch = batch
        self._slopes: dict[tuple[int, int], Slopes] = {}  # by the images: each costs a run of the text encoders

    def run(self, attempt: Attempt, most: int | None = None) -> Trajectories:
        """The trajectories' ends and what they cost; batches that are in the folder `work` are not run again.

        `most`: of the first images only.

        Raises
        ------
        NotFiniteError
        """
        key = self.key(attempt)
        parts = [
            self.kept(_name(key, images), partial(self.part, attempt, images)) for images in self._parts(attempt, most)
        ]
        latents, work = (np.concatenate([part[name] for part in parts]) for name in ("latents", "work"))
        return Trajectories(latents, *work.mean(0).tolist())

    def gather(
        self,
        attempts: Sequence[tuple[Attempt, int | None]],
        address: str,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Has a Ray cluster (see `epd.train.cluster`) run what is not in the folder `work`, which has to be given.

        Its machines need the bundle, at the same path.

        Parameters
        ----------
        attempts : sequence
            Each with the number of the first images that it is run on, None for all.
        progress : callable
            Told how many parts are done, and of how many.

        Raises
        ------
        NotFiniteError
        RequestError
            The cluster is not reached, or its workers died again and again: what they had made is kept.
        """
        from epd.train.cluster import spread

        assert self.work is not None
        keys = [self.key(attempt) for attempt, _ in attempts]
        wanted = [
            (images, index) for index, (attempt, most) in enumerate(attempts) for images in self._parts(attempt, most)
        ]
        named = {_name(keys[i], images): (images, attempts[i][0]) for images, i in wanted}
        missing = {name: part for name, part in named.items() if not (self.work / f"{name}.npz").is_file()}
        if not missing:
            return
        names = sorted(missing, key=lambda name: missing[name][0].start)  # so that prompts are encoded once
        job = Drawing(
            str(self.pipe.bundle.folder.absolute()), self.pipe.provider, tuple(self.prompts[:: self.seeds]),
            self.guidance, self._batch, self.seeds, self.noise_seed, self.pipe.identity(),
        )  # fmt: skip
        found = spread(job, [missing[name] for name in names], address)
        for done, (name, made) in enumerate(zip(names, found, strict=True), 1):
            self.kept(name, lambda made=made: made)  # type: ignore[misc]
            progress(done, len(names))

    def _parts(self, attempt: Attempt, most: int | None) -> list[slice]:
        """The images of each batch."""
        size = 1 if attempt.kind == "parallel" else self._batch  # in a batch the slowest image would be counted
        return slices(len(self.prompts) if most is None else min(most, len(self.prompts)), size)

    def kept(self, name: str, make: Callable[[], dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        """What `make` gives; from the folder `work` where it is known by that name."""
        file = None if self.work is None else self.work / f"{name}.npz"
        found = None if file is None else _load(file)
        if found is not None:
            return found
        made = make()
        if file is not None:
            _save(file, **made)
        return made

    def pictures(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, H, W, 3) in [0, 1]."""
        return self.pipe.decode(latents.astype(np.float64))

    def part(self, attempt: Attempt, images: slice) -> dict[str, NDArray[Any]]:
        """Latents, and work (B, 3): sequential calls, total evaluations, guided forwards of some images."""
        from runtime.errors import NotFiniteError

        noise, slopes = self._noise[images].astype(np.float64), self._told(images)
        slopes.interval = attempt.interval
        before = slopes.guided_forwards
        try:
            *_, last = epd.solve(attempt.solver, attempt.start_scale * noise, slopes)
        except FloatingPointError as error:
            fixed = attempt.kind in ("reference", "table")
            remedy = "give another --guidance-scale" if fixed else "leave it out with --solvers"
            raise NotFiniteError(f"{attempt.name}: {error}; {remedy}") from None
        forwards = (slopes.guided_forwards - before) / len(noise)
        work = np.tile([last.calls, last.evaluations, forwards], (len(noise), 1)).astype(np.float64)
        return {"latents": (last.x / attempt.end_scale).astype(np.float32), "work": work}

    def _told(self, images: slice) -> Slopes:
        key = (images.start, images.stop)
        if key not in self._slopes:
            if len(self._slopes) >= MOST_TOLD:
                self._slopes.clear()
            self._slopes[key] = self.pipe.slopes(self.prompts[images], self.guidance)
        return self._slopes[key]

    def key(self, attempt: Attempt) -> str:
        """What the result depends on; of the code only the version: give another folder when the solvers change."""
        from runtime.png import version

        parts: list[Any] = [version(), self.pipe.provider]
        parts += [self.pipe.identity(), list(self.prompts), self.noise_seed, self.guidance]
        parts += [attempt.name, attempt.times, attempt.start_scale, attempt.numbers, attempt.interval]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Drawing:
    """Batches of images by one attempt or another, as a worker of a cluster draws them: on one core each."""

    model: str
    provider: str
    prompts: tuple[str, ...]
    guidance: float
    batch: int
    seeds: int
    noise_seed: int
    identity: str  # of the weights
    threads: int = 1

    def open(self) -> Callable[[tuple[slice, Attempt]], dict[str, NDArray[Any]]]:
        """Raises RequestError where the bundle is another one here."""
        from epd.train.cluster import same_everywhere
        from runtime.pipeline import Pipeline

        pipe = Pipeline.from_pretrained(self.model, provider=self.provider, threads=self.threads)
        same_everywhere(self.model, pipe.identity(), self.identity)
        bench = Bench(pipe, self.prompts, self.guidance, self.batch, None, self.seeds, self.noise_seed)
        return lambda task: bench.part(task[1], task[0])


def slices(count: int, size: int) -> list[slice]:
    """Of `count` images, `size` of them each, the last perhaps fewer."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _name(key: str, images: slice) -> str:
    return f"{key}-{images.start}-{images.stop}"


def shown(pictures: NDArray[np.float32], scenes: Sequence[Scene]) -> NDArray[np.float64]:
    """(B,): 1 for every picture in which the checker finds all that its caption says, else 0."""
    from PIL import Image

    from shapes.check import accepts

    drawn = [Image.fromarray(np.rint(picture * 255).astype(np.uint8)) for picture in pictures]
    return np.array([accepts(picture, scene) for picture, scene in zip(drawn, scenes, strict=True)], np.float64)


def _load(file: Path) -> dict[str, NDArray[Any]] | None:
    """None: not there, or damaged."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as found:
            return dict(found)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save(file: Path, **arrays: Any) -> None:
    """Written to another name first: what is found under its own name is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.stem}.{os.getpid()}.partial.npz")
    try:
        np.savez(part, **arrays)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
