"""Backbone inputs as a drawing makes them, to calibrate a quantised backbone with.

Recorded while the fp32 bundle draws on the CPU, for ranges depend on where a trajectory is: pure noise has other
activations than a finished picture, and the empty prompt others than a long one. Knows nothing of quantisation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

import epd
from runtime.bundle import Bundle
from runtime.noise import Stream
from runtime.pipeline import Pipeline
from runtime.rows import cut
from runtime.session import Session

SEED = 7_000_000  # of the first start noise: no picture that quality is reported on begins with one of these
WAYS: tuple[Mapping[str, Any], ...] = (  # to draw a prompt: one point at a time, or two midpoints at once
    {"solver": "euler", "num_inference_steps": 10},
    {"solver": "epd", "k": 2, "num_inference_steps": 5},
)
EACH = 12  # calls kept of a trajectory: half of them

Feed = dict[str, np.ndarray]


def record(folder: Path, *, prompts: Sequence[str], count: int, seed: int = SEED, sparing: bool = False) -> list[Feed]:
    """Inputs of a bundle's backbone along real trajectories: all noise levels, guided, one point or K = 2 at a time.

    A prompt is drawn twice, from noise of its own: by Euler's method, and with the start table of two directions, whose
    midpoints lie off Euler's path. Calls are cut to the rows of the backbone's first graph, to 2
    where it takes any number. Of a trajectory's calls only those that are wanted stay in memory.

    Parameters
    ----------
    folder : Path
        Of a bundle in fp32.
    prompts : sequence of str
        Some are drawn, evenly spread: one for every `EACH` calls, all of them if there are fewer.
    count : int
        Calls to keep, evenly spread over trajectories and times; where these have fewer, all.
    sparing : bool
        A prompt is drawn in one of the two ways, in turn: half the calls, of which most are kept.

    Returns
    -------
    list of dict
        Input name -> (rows, ...) in the dtype the graph declares.

    Raises
    ------
    BundleError, RequestError, NotFiniteError
    """
    if count < 1 or not prompts:
        raise ValueError(f"calibration needs prompts and a number of calls, got {len(prompts)} and {count}")
    bundle = Bundle.open(folder)
    rows = (*bundle.facts.components[bundle.backbone].rows, 2)[0]
    tap = _Tap(bundle, rows)
    pipe = Given(bundle, tap)
    halves = 2 if pipe.plan("").guided else 1
    images = rows // math.gcd(rows, halves)  # so that every call is some whole graphs' rows
    groups = [prompts[i : i + images] for i in range(0, len(prompts), images)]
    most = min(len(groups), -(-count // EACH))
    kept: list[Feed] = []
    try:
        for number in range(most):
            group = groups[number * len(groups) // most]
            told = [group[i % len(group)] for i in range(images)]
            calls = _drawn(pipe, tap, told, seed + number * images, WAYS[number % 2 :][:1] if sparing else WAYS)
            wanted = count * (number + 1) // most - count * number // most
            kept += [calls[i] for i in _spread(len(calls), wanted, number)]
    finally:
        pipe.close()
    return kept


class Given(Pipeline):
    """A pipeline whose backbone is a session that is given."""

    def __init__(self, bundle: Bundle, backbone: Session) -> None:
        super().__init__(bundle, directions="batch")
        self._sessions[bundle.backbone] = backbone


class _Tap(Session):
    """A backbone that keeps the inputs of its calls, cut to so many rows each."""

    def __init__(self, bundle: Bundle, each: int) -> None:
        super().__init__(bundle, bundle.backbone)
        self._each = each
        self.taken: list[Feed] = []

    def __call__(self, *, want: Collection[str] | None = None, **arrays: ArrayLike) -> dict[str, Any]:
        given = {tensor.name: np.asarray(arrays[tensor.name], tensor.dtype) for tensor in self.inputs}
        parts = cut((self._each,) * (len(next(iter(given.values()))) // self._each))
        self.taken += [{name: value[part] for name, value in given.items()} for part in parts]
        return super().__call__(want=want, **arrays)


def _drawn(
    pipe: Pipeline, tap: _Tap, prompts: Sequence[str], seed: int, ways: Sequence[Mapping[str, Any]]
) -> list[Feed]:
    """All calls of drawings of these prompts, each from noise of its own; image i has seed + i."""
    plans = [pipe.plan(prompts[0], **way) for way in ways]
    slopes = pipe.slopes(prompts, plans[0].guidance)
    tap.taken = []
    streams = [Stream(seed + i) for i in range(len(prompts))]
    for plan in plans:
        noise = np.stack([stream.randn(plan.latent_shape) for stream in streams]).astype(np.float64)
        for _ in epd.solve(plan.coroutine(np.zeros_like), plan.start_scale * noise, slopes):
            pass
    return tap.taken


def _spread(count: int, wanted: int, number: int) -> list[int]:
    """`wanted` of `count` places, evenly, or all of them; others for every `number`."""
    phase = (number + 1) * 0.6180339887 % 1  # by the golden ratio: no times are favoured
    return sorted({int((i + phase) * count / wanted) for i in range(wanted)})
