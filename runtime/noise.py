"""The start noise of a seed: torch's own normal numbers, without torch.

Equal to `torch.randn(count, generator=torch.Generator("cpu").manual_seed(seed))` to 1e-6. Knows nothing of latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BLOCK = 16


def randn(shape: Sequence[int], seed: int) -> NDArray[np.float32]:
    """Normal numbers of `shape`, float32, row-major, of a seed's low 32 bits.

    torch's CPU generator is MT19937. From 16 numbers on it draws one 24-bit uniform per number and turns each block of
    16 into normals by Box-Muller, the cosine half first; where the count is no multiple of 16 the last 16 numbers are
    drawn anew. Below 16 it makes pairs from 53-bit uniforms instead.
    """
    count = math.prod(shape)
    values = _few(count, seed) if count < _BLOCK else _many(count, seed)
    return values.astype(np.float32).reshape(shape)


def _words(count: int, seed: int) -> NDArray[np.uint32]:
    """The first `count` 32-bit outputs of MT19937."""
    return np.frombuffer(np.random.RandomState(seed & 0xFFFFFFFF).bytes(4 * count), dtype="<u4")


def _many(count: int, seed: int) -> NDArray[np.float64]:
    ragged = count % _BLOCK != 0
    uniform = (_words(count + _BLOCK * ragged, seed) & 0xFFFFFF) / 2.0**24
    whole = count // _BLOCK * _BLOCK
    values = uniform[:count].copy()
    values[:whole] = _box_muller(uniform[:whole])
    if ragged:
        values[-_BLOCK:] = _box_muller(uniform[count:])
    return values


def _box_muller(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    u1, u2 = uniform.reshape(-1, 2, _BLOCK // 2).swapaxes(0, 1)  # (blocks, 8) each
    radius = np.sqrt(-2 * np.log(1 - u1))
    angle = np.float32(2 * math.pi) * u2.astype(np.float32)  # torch rounds the angle: 1e-6 in the result
    angle = angle.astype(np.float64)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


def _few(count: int, seed: int) -> NDArray[np.float64]:
    words = _words(4 * math.ceil(count / 2), seed).astype(np.uint64)
    uniform = ((words[::2] << np.uint64(32) | words[1::2]) & np.uint64(2**53 - 1)) / 2.0**53
    angle, radius = 2 * math.pi * uniform[::2], np.sqrt(-2 * np.log1p(-uniform[1::2]))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()[:count]
