"""The noise of a seed: torch's own normal numbers, without torch.

`Stream(seed)` is equal to `torch.randn(count, generator=generator)`, called again and again on one
`generator = torch.Generator("cpu").manual_seed(seed)`, to 1e-6. Knows nothing of latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BLOCK = 16


def randn(shape: Sequence[int], seed: int) -> NDArray[np.float32]:
    """The first normal numbers of a seed, float32, row-major; only its low 32 bits count."""
    return Stream(seed).randn(shape)


class Stream:
    """All normal numbers of one seed, in the order torch draws them: every call goes on where the last one stopped.

    torch's CPU generator is MT19937. From 16 numbers on it draws one 24-bit uniform per number and turns each block of
    16 into normals by Box-Muller, the cosine half first; where the count is no multiple of 16 the last 16 numbers are
    drawn anew. Below 16 it makes pairs from 53-bit uniforms instead, and keeps the second of a pair for the next such
    call.
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.RandomState(seed & 0xFFFFFFFF)
        self._kept = np.empty(0)

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Normal numbers of `shape`, float32, row-major."""
        count = math.prod(shape)
        values = self._few(count) if count < _BLOCK else self._many(count)
        return values.astype(np.float32).reshape(shape)

    def _words(self, count: int) -> NDArray[np.uint32]:
        """The next `count` 32-bit outputs of MT19937."""
        return np.frombuffer(self._generator.bytes(4 * count), dtype="<u4")

    def _many(self, count: int) -> NDArray[np.float64]:
        ragged = count % _BLOCK != 0
        uniform = (self._words(count + _BLOCK * ragged) & 0xFFFFFF) / 2.0**24
        whole = count // _BLOCK * _BLOCK
        values = uniform[:count].copy()
        values[:whole] = _box_muller(uniform[:whole])
        if ragged:
            values[-_BLOCK:] = _box_muller(uniform[count:])
        return values

    def _few(self, count: int) -> NDArray[np.float64]:
        words = self._words(4 * math.ceil((count - len(self._kept)) / 2)).astype(np.uint64)
        uniform = ((words[::2] << np.uint64(32) | words[1::2]) & np.uint64(2**53 - 1)) / 2.0**53
        angle, radius = 2 * math.pi * uniform[::2], np.sqrt(-2 * np.log1p(-uniform[1::2]))
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
        values = np.append(self._kept, pairs)
        self._kept = values[count:]
        return values[:count]


def _box_muller(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    u1, u2 = uniform.reshape(-1, 2, _BLOCK // 2).swapaxes(0, 1)  # (blocks, 8) each
    radius = np.sqrt(-2 * np.log(1 - u1))
    angle = np.float32(2 * math.pi) * u2.astype(np.float32)  # torch rounds the angle: 1e-6 in the result
    angle = angle.astype(np.float64)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
