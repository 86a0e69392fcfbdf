"""What is measured of pictures: `METRICS`, and `Judge`, which takes them. Weights of networks come from files."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.judge import psnr

from . import perceptual
from .bench import Attempt, Bench, Trajectories, shown, slices
from .bootstrap import Bootstrap, Estimate

if TYPE_CHECKING:
    from shapes.captions import Scene

Array = NDArray[np.float64]
Pictures = NDArray[np.float32]  # (B, H, W, 3) in [0, 1]

AT_ONCE = 16  # pictures: those of a large model are large
KEPT_BYTES = 2**30  # of converged pictures; those beyond are decoded again for every attempt
RENDER_SEED = 7_000_000  # of the first rendered picture that Frechet distances are taken to


@dataclass(frozen=True)
class Metric:
    """One column of the result."""

    title: str
    higher: bool  # is better
    form: str  # of its numbers
    features: bool = False  # a Frechet distance of features; else a mean over the images


METRICS = {  # the first of those measured is what attempts are ordered by
    "psnr_db": Metric("PSNR dB", True, ".2f"),
    "lpips": Metric("LPIPS", False, ".4f"),
    "latent_rmse": Metric("latent RMSE", False, ".4f"),
    "right": Metric("right", True, ".1%"),
    "frechet": Metric("Frechet", False, ".3f", features=True),
    "inception": Metric("Frechet Inception", False, ".2f", features=True),
}


def metric(name: str) -> Metric:
    """Of a column; those that are not in METRICS are rewards."""
    return METRICS.get(name, Metric(name, True, ".4f"))


@dataclass(frozen=True)
class Networks:
    """Files of weights, and rewards by name."""

    lpips: Path | None = None
    inception: Path | None = None
    rewards: Mapping[str, Path | None] = field(default_factory=dict)  # name -> weights

    def open(self, prompts: Sequence[str], size: tuple[int, int]) -> Opened:
        """Loads them; RequestError for weights or prompts that will not do. `size`: height, width of the pictures."""
        return Opened(
            None if self.lpips is None else perceptual.lpips(self.lpips),
            None if self.inception is None else perceptual.inception(self.inception),
            {name: perceptual.reward(name, weights, prompts, size) for name, weights in self.rewards.items()},
            self._identity(),
        )

    def _identity(self) -> str:
        """Of the files, and those under folders: their sizes and times; of a user's own rewards the source."""
        given = [path for path in (self.lpips, self.inception, *self.rewards.values()) if path is not None]
        files = [file for path in given for file in (path, *sorted(path.rglob("*"))) if file.is_file()]
        known = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return repr([known, [f"{name} {_source(name)}" if "." in name else name for name in self.rewards]])


def _source(name: str) -> str:
    """SHA-256 of the file of `package.module.function`; empty: it has none."""
    file = importlib.import_module(name.rpartition(".")[0]).__file__
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Opened:
    """The networks, ready: pictures (B, H, W, 3) in [0, 1] to (B,) or, of Inception, (B, features).

    Rewards are told which of all images their pictures are, too.
    """

    lpips: Callable[[Pictures, Pictures], Array] | None
    inception: Callable[[Pictures], Array] | None
    rewards: Mapping[str, Callable[[Pictures, slice], Array]]
    identity: str


class Judge:
    """Takes every metric of an attempt's pictures, few at once; what it measured is kept with the bench's results.

    Parameters
    ----------
    truth : Trajectories, optional
        The converged reference; without it no distances are taken.
    source : str
        What tells this reference from others.
    scenes : sequence, optional
        What every image's prompt says, in the closed world.
    """

    def __init__(
        self,
        bench: Bench,
        truth: Trajectories | None,
        source: str,
        scenes: Sequence[Scene] | None,
        networks: Opened,
    ) -> None:
        self._bench, self._truth, self._scenes = bench, truth, scenes
        self.bootstrap = Bootstrap(bench.prompts)
        self._kept: dict[int, Pictures] = {}  # converged, by the first one's index
        self._identity = f"{source} {networks.identity} {_classifier() if scenes is not None else ''}"
        self._networks = networks
        self._features: dict[str, Callable[[Pictures], NDArray[np.floating]]] = {}
        if scenes is not None:
            from shapes.features import features

            self._features["frechet"] = features
        if networks.inception is not None:
            self._features["inception"] = networks.inception
        real = [self._real_features(images) for images in slices(len(bench.prompts), AT_ONCE)]
        self._real = {name: np.concatenate([part[name] for part in real]) for name in real[0]}

    @property
    def frechet_to(self) -> str:
        """What Frechet distances are taken to."""
        return "renderings of the same captions" if self._scenes is not None else "the converged pictures"

    def _real_features(self, images: slice) -> dict[str, NDArray[np.floating]]:
        """Of what Frechet distances are taken to: of the converged pictures, or as many renderings."""
        if self._scenes is None:
            return {name: of(self._converged(images)) for name, of in self._features.items() if self._truth is not None}
        from shapes.render import render

        seeds = range(RENDER_SEED + images.start, RENDER_SEED + images.stop)
        drawn = [np.asarray(render(scene, seed)) for scene, seed in zip(self._scenes[images], seeds, strict=True)]
        return {name: of(np.stack(drawn).astype(np.float32) / 255) for name, of in self._features.items()}

    def _converged(self, images: slice) -> Pictures:
        assert self._truth is not None
        if images.start in self._kept:
            return self._kept[images.start]
        made = self._bench.pictures(self._truth.latents[images])
        if sum(part.nbytes for part in self._kept.values()) + made.nbytes <= KEPT_BYTES:
            self._kept[images.start] = made
        return made

    def measure(self, attempt: Attempt, found: Trajectories) -> dict[str, Estimate]:
        """Every metric, in the order of METRICS, rewards last."""
        key = hashlib.sha256(f"{self._bench.key(attempt)} {self._identity}".encode()).hexdigest()[:32]
        raw = self._bench.kept(f"{key}-figures", lambda: self._raw(attempt, found))
        names = [*(name for name in METRICS if name in raw), *(name for name in raw if name not in METRICS)]
        return {
            name: self.bootstrap.frechet(raw[name], self._real[name])
            if metric(name).features
            else self.bootstrap.mean(raw[name])
            for name in names
        }

    def _raw(self, attempt: Attempt, found: Trajectories) -> dict[str, NDArray[Any]]:
        """Of every image: its value, or its features."""
        parts = [self._of(attempt, found.latents, images) for images in slices(len(found.latents), AT_ONCE)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _of(self, attempt: Attempt, latents: NDArray[np.float32], images: slice) -> dict[str, NDArray[Any]]:
        """The same of some images."""
        pictures, rewards = self._bench.pictures(latents[images]), self._networks.rewards
        raw: dict[str, NDArray[Any]] = {}
        if self._truth is not None and attempt.kind != "reference":
            converged = self._converged(images)
            raw["psnr_db"] = psnr(converged, pictures)
            raw["latent_rmse"] = rmse(latents[images], self._truth.latents[images])
            if self._networks.lpips is not None:
                raw["lpips"] = self._networks.lpips(pictures, converged)
        if self._scenes is not None:
            raw["right"] = shown(pictures, self._scenes[images])
        raw |= {name: features(pictures) for name, features in self._features.items() if name in self._real}
        return raw | {name: checked(name, of(pictures, images), len(pictures)) for name, of in rewards.items()}


def check_classifier() -> None:
    """RequestError where its weights cannot be read."""
    from importlib.util import find_spec

    from runtime.errors import RequestError

    if find_spec("safetensors") is None:
        raise RequestError("Frechet distances of the closed world need safetensors: pip install safetensors")


def _classifier() -> str:
    """SHA-256 of its weights."""
    from shapes.features import FILE

    return hashlib.sha256(FILE.read_bytes()).hexdigest()


def rmse(one: NDArray[np.float32], other: NDArray[np.float32]) -> Array:
    """(B,) of latents (B, C, h, w)."""
    return np.asarray(np.sqrt(np.square(one - other, dtype=np.float64).mean((1, 2, 3))))


def checked(name: str, values: object, images: int) -> Array:
    """RequestError where a reward did not give one finite number an image."""
    from runtime.errors import RequestError

    found = np.asarray(values, np.float64)
    if found.shape != (images,) or not np.isfinite(found).all():
        wrong = f"shape {found.shape}" if found.shape != (images,) else "NaN or infinity"
        raise RequestError(f"the reward {name} gave {wrong} for {images} pictures, expected as many finite numbers")
    return found
