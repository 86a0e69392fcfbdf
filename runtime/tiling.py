"""Pictures from a decoder smaller than they are: overlapping tiles of latents, decoded one by one, blended linearly.

A tile does not see the picture around it (its normalisations and attention are over the tile alone), so that the result
is close to the whole decode, not equal to it. Knows nothing of ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

OVERLAP = 0.25  # of a tile, at least


def tile_of(declared: Sequence[int | str], shape: Sequence[int]) -> tuple[int, int]:
    """Latents, height and width, that a decoder with this input takes at once of some in this shape.

    All of them where it takes any, or does not take fewer: it then refuses what does not fit.
    """
    height, width = shape[-2:]
    high, wide = declared[-2:] if len(declared) == len(shape) else (height, width)
    if isinstance(high, str) or isinstance(wide, str) or high > height or wide > width:
        return height, width
    return high, wide


def told(tile: tuple[int, int], shape: Sequence[int], factor: int) -> str:
    """What there is to say of tiles in which latents are decoded; nothing of a single one."""
    high, wide = (len(starts(size, side)) for size, side in zip(shape[-2:], tile, strict=True))
    if high * wide == 1:
        return ""
    size = f"{tile[1] * factor}x{tile[0] * factor}"
    return (
        f"vae_decoder: is for {size} pixels, the picture is decoded in {wide} x {high} tiles of that size, blended; "
        "it differs a little from one decoded whole"
    )


def starts(size: int, tile: int) -> list[int]:
    """Where tiles (of 2 or more) begin on an axis of `size`: the fewest, evenly spread, that overlap by OVERLAP."""
    most = max(1, math.floor(tile * (1 - OVERLAP)))  # from one to the next
    count = math.ceil((size - tile) / most) + 1
    return [round(i * (size - tile) / max(1, count - 1)) for i in range(count)]


def weights(begin: list[int], tile: int, factor: int) -> NDArray[np.float64]:
    """(tiles, tile * factor) of an axis: each pixel's share of what its tiles show, 1 in all; linear in an overlap."""
    width = tile * factor
    ramp = np.arange(width) + 0.5
    rows = np.ones((len(begin), width))
    whole = np.zeros((begin[-1] + tile) * factor)
    for i, (row, start) in enumerate(zip(rows, begin, strict=True)):
        if i > 0:
            row *= np.minimum(1, ramp / ((begin[i - 1] + tile - start) * factor))
        if i < len(begin) - 1:
            row *= np.minimum(1, ramp[::-1] / ((start + tile - begin[i + 1]) * factor))
        whole[start * factor :][:width] += row
    return np.stack([row / whole[start * factor :][:width] for row, start in zip(rows, begin, strict=True)])


def decode(
    run: Callable[[NDArray[np.float64]], NDArray[Any]], x: NDArray[np.float64], tile: tuple[int, int]
) -> NDArray[Any]:
    """(1, C, h, w) latents as a picture (1, 3, H, W).

    Parameters
    ----------
    run
        The decoder: (1, C, *tile) latents to (1, 3, factor * tile height, factor * tile width).
    tile
        Latents, height and width, at most those of `x`.
    """
    if x.shape[2:] == tile:
        return run(x)
    high, wide = (starts(size, side) for size, side in zip(x.shape[2:], tile, strict=True))
    picture: NDArray[np.float64] | None = None
    for (i, top), (j, left) in product(enumerate(high), enumerate(wide)):
        part = run(x[:, :, top : top + tile[0], left : left + tile[1]])
        factor = part.shape[2] // tile[0]
        if picture is None:
            picture = np.zeros((*part.shape[:2], x.shape[2] * factor, x.shape[3] * factor))
            down, across = weights(high, tile[0], factor), weights(wide, tile[1], factor)
        place = picture[:, :, top * factor :, left * factor :][:, :, : part.shape[2], : part.shape[3]]
        place += part * down[i][:, None] * across[j]
    assert picture is not None
    return picture.astype(np.float32)
