"""Features of pictures of the closed world, for Frechet distances: the last hidden layer of a small classifier.

    python -m shapes.train_features          trains it (two minutes), writes classifier.safetensors beside this file

Four convolutions of stride 2 and a linear layer, on numpy alone: where pictures are judged there may be no torch. The
classifier was trained on rendered pictures to tell every attribute of a scene; it knows nothing of prompts, and its
features mean nothing for pictures that are not of this world.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .captions import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Scene
from .render import SIZE

FILE = Path(__file__).parent / "classifier.safetensors"
CHANNELS = (3, 16, 24, 32, 32)  # of the picture and after each convolution, which halves its sides
WIDTH = 32  # features
NONE = "none"  # of an attribute that a scene has not
CHOICES: dict[str, tuple[str, ...]] = {
    "background": tuple(BACKGROUNDS),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": (NONE, *SIZES),
    "place": (NONE, *PLACES),
    "relation": (NONE, *RELATIONS),
    "second colour": (NONE, *COLOURS),
    "second shape": (NONE, *SHAPES),
}
_BATCH = 64

Array = NDArray[np.float32]


@cache
def weights() -> Mapping[str, Array]:
    """The trained classifier's, by name; the file's metadata say how well it does."""
    from safetensors.numpy import load_file

    return load_file(FILE)


def features(pictures: NDArray[Any], of: Mapping[str, Array] | None = None) -> Array:
    """(B, WIDTH) of pictures (B, 64, 64, 3) in [0, 1]; `of`: other weights than the trained ones."""
    if pictures.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"features are of {SIZE} x {SIZE} pictures in colour, got shape {pictures.shape}")
    known = weights() if of is None else of
    parts = np.array_split(pictures.astype(np.float32), -(-len(pictures) // _BATCH))
    return np.concatenate([_hidden(part, known) for part in parts])


def told(hidden: Array, of: Mapping[str, Array] | None = None) -> dict[str, list[str]]:
    """What the classifier reads from features (B, WIDTH): for every attribute B values."""
    known = weights() if of is None else of
    scores = np.maximum(hidden, 0) @ known["heads.weight"].T + known["heads.bias"]
    ends = np.cumsum([len(choices) for choices in CHOICES.values()])[:-1]
    parts = zip(CHOICES.items(), np.split(scores, ends, 1), strict=True)
    return {name: [choices[i] for i in part.argmax(1)] for (name, choices), part in parts}


def labels(scene: Scene) -> list[int]:
    """Of a scene, for every attribute of CHOICES the index of its value."""
    return [choices.index(scene.attributes.get(name, NONE)) for name, choices in CHOICES.items()]


def _hidden(x: Array, known: Mapping[str, Array]) -> Array:
    """(B, WIDTH) of (B, H, W, 3)."""
    x = 2 * x - 1
    for i in range(len(CHANNELS) - 1):
        kernel, bias = known[f"convolutions.{i}.weight"], known[f"convolutions.{i}.bias"]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2]  # (B, h, w, C, 3, 3)
        x = np.maximum(np.tensordot(windows, kernel, ((3, 4, 5), (1, 2, 3))) + bias, 0)
    flat = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    hidden: Array = flat @ known["hidden.weight"].T + known["hidden.bias"]
    return hidden
