"""Rewards by name: what a picture is worth to its prompt. Weighted mixes of them are written `shapes:1,psnr:0.2`.

shapes      the closed world's checker: the share of the caption's attributes that are right, plus sharpness; 0 to 2
psnr        PSNR to the converged picture of the same prompt and noise, in units of 10 dB

and, by the weights in a folder or file of the user's (`--reward-model NAME=PATH`), see `epd.train.preferences`:

clip        cosine of CLIP's embeddings of picture and prompt
pickscore   the same, times the learned logit scale (Kirstain et al. 2023, arXiv 2305.01569)
hpsv2       the cosine under HPSv2's or HPSv2.1's weights (Wu et al. 2023, arXiv 2306.09341)
imagereward Xu et al. 2023, arXiv 2304.05977

A name with a dot is a callable of the user's own, `package.module.function`, called as `function(shot)`.
Knows nothing of solvers, tables or training.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import RequestError
from runtime.judge import psnr as decibels

Array = NDArray[np.float64]
SHARP = 0.86  # sharpness of rendered pictures, in the mean: more is no better


class Shot(NamedTuple):
    """Pictures of one prompt and start noise."""

    prompt: str
    pictures: NDArray[np.float32]  # (G, H, W, 3) in [0, 1]
    reference: Callable[[], NDArray[np.float32]]  # makes the converged picture of this prompt and noise, (H, W, 3)


Reward = Callable[[Shot], Array]  # -> (G,), finite, more is better


@dataclass(frozen=True)
class Rewards:
    """A weighted mix."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    parts: tuple[Reward, ...]

    def __call__(self, shot: Shot) -> Array:
        """Every part alone, unweighted: (G, parts).

        Raises
        ------
        RequestError
            A part returns another shape than (G,), or a number that is not finite.
        """
        found = []
        for name, part in zip(self.names, self.parts, strict=True):
            value = np.asarray(part(shot), np.float64)
            if value.shape != (len(shot.pictures),):
                raise RequestError(
                    f"the reward {name} returned the shape {value.shape} for {len(shot.pictures)} pictures; "
                    "it must return one number a picture"
                )
            if not np.isfinite(value).all():
                raise RequestError(f"the reward {name} is not finite for {shot.prompt!r:.100}")
            found.append(value)
        return np.stack(found, axis=1)

    def check(self, prompts: Sequence[str], size: tuple[int, int]) -> None:
        """RequestError where a part cannot judge such prompts, or pictures of this height and width."""
        if "shapes" in self.names:
            _check_captions(prompts, size)


def mix(text: str) -> dict[str, float]:
    """`shapes:1,psnr:0.2` as names and weights; a name alone weighs 1."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition(":")
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not name or name in found or not math.isfinite(value):
            raise RequestError(f"--reward {text!r}: give NAME or NAME:WEIGHT, each once, as in shapes:1,psnr:0.2")
        found[name] = value
    return found


def load(text: str, models: Mapping[str, Path]) -> Rewards:
    """The rewards of a mix, ready to call.

    Parameters
    ----------
    models : mapping
        Reward -> where its weights are.

    Raises
    ------
    RequestError
        An unknown name, or weights that are not given or cannot be loaded.
    """
    weights = mix(text)
    unused = sorted(models.keys() - weights.keys())
    if unused:
        raise RequestError(f"--reward-model {unused[0]}=..: this reward is not asked for; add it to --reward")
    parts = tuple(_load(name, models.get(name)) for name in weights)
    return Rewards(tuple(weights), tuple(weights.values()), parts)


def _load(name: str, path: Path | None) -> Reward:
    if name in OURS:
        return OURS[name]
    if "." in name:
        return _own(name)
    from . import preferences

    if name not in preferences.LOADERS:
        known = ", ".join([*OURS, *preferences.LOADERS])
        raise RequestError(f"unknown reward {name!r}; choose from {known}, or package.module.function")
    if path is None:
        raise RequestError(f"the reward {name} needs its weights: give --reward-model {name}=PATH")
    return preferences.LOADERS[name](path)


def _own(name: str) -> Reward:
    module, _, function = name.rpartition(".")
    try:
        found: Reward | None = getattr(importlib.import_module(module), function, None)
    except (ImportError, SyntaxError, ValueError) as error:
        raise RequestError(f"the reward {name}: {error}") from None
    if not callable(found):
        raise RequestError(f"the reward {name}: {module} has no such function")
    return found


def shapes(shot: Shot) -> Array:
    """Share of the caption's attributes that the checker finds, plus `sharpness`: (G,) in [0, 2]."""
    from shapes.captions import parse
    from shapes.check import check

    scene = parse(shot.prompt)
    pictures = [Image.fromarray(np.rint(picture * 255).astype(np.uint8)) for picture in shot.pictures]
    graded = [np.mean([*check(picture, scene).values()]) for picture in pictures]
    return np.asarray(graded, np.float64) + sharpness(shot.pictures)


def sharpness(pictures: NDArray[np.float32]) -> Array:
    """How steep the edges of flat drawings (G, H, W, 3) are, in [0, 1]; 1: as those that are rendered.

    The range of colour among 3 x 3 pixels over that among 7 x 7, averaged where both are large: a ratio, so that
    contrast changes nothing, and one that cannot exceed that of a clean edge.
    """
    near, far = _range(pictures, 1), _range(pictures, 3)
    steep = np.square(near).sum((1, 2)) / np.maximum((near * far).sum((1, 2)), 1e-9)
    return np.asarray(np.minimum(steep / SHARP, 1.0), np.float64)


def _range(pictures: NDArray[np.float32], reach: int) -> Array:
    """Largest minus smallest value in a square of 2 reach + 1 pixels, of the channel where this is most: (G, H, W)."""
    high = low = pictures.astype(np.float64)
    for axis in (1, 2):
        pad = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        view = [
            np.lib.stride_tricks.sliding_window_view(np.pad(a, pad, mode="edge"), 2 * reach + 1, axis)
            for a in (high, low)
        ]
        high, low = view[0].max(-1), view[1].min(-1)
    return np.asarray((high - low).max(-1))


def psnr(shot: Shot) -> Array:
    """PSNR to the converged picture, (G,), in units of 10 dB."""
    return decibels(shot.pictures, shot.reference()[None]) / 10


OURS: Mapping[str, Reward] = {"shapes": shapes, "psnr": psnr}


def _check_captions(prompts: Sequence[str], size: tuple[int, int]) -> None:
    from shapes.captions import parse
    from shapes.render import SIZE

    if size != (SIZE, SIZE):
        raise RequestError(f"the reward shapes reads {SIZE}x{SIZE} pictures, this model draws {size[0]}x{size[1]}")
    for prompt in prompts:
        try:
            parse(prompt)
        except ValueError as error:
            raise RequestError(f"the reward shapes: {error}") from None
