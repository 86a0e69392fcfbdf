"""The gate on the end picture: the new bundle's pictures against those it draws with the backbone in fp32, by torch.

Both are drawn on the CPU, through the runtime, with the bundle's own encoders, decoder and default solver, so that what
differs is the backbone's precision alone. ONNX Runtime's CPU has no kernels for bf16: there, and only there, the new
pictures are torch's, too, at that precision.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from runtime.bundle import Bundle
from runtime.errors import NotFiniteError
from runtime.facts import Tensor
from runtime.pipeline import Pipeline
from runtime.session import Session

from . import ExportError
from .calibrate import Given
from .plan import PICTURE_STEPS

if TYPE_CHECKING:
    from .worker import Job

# PSNR; the shapes models show 10 dB more and above.
LIMIT_DB = {"fp16": 35.0, "bf16": 30.0, "int8": 25.0, "w8a16": 25.0, "int8-weights": 35.0, "int4-weights": 25.0}
_REMEDY = "nothing was written; give another --dtype, such as fp32"
SEED = 8_000_000  # of the first picture; its neighbour is calibration's


class ByTorch(Session):
    """A backbone that torch computes, under the contract of the bundle's graph. Keeps its calls: inputs and answer."""

    def __init__(self, bundle: Bundle, module: nn.Module) -> None:
        super().__init__(bundle, bundle.backbone)
        self._parts = {}
        self._module = module
        self.answered: list[tuple[dict[str, np.ndarray], np.ndarray]] = []

    def load(self) -> Session:
        return self

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.bundle.facts.components[self.component].inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return self.bundle.facts.components[self.component].outputs

    def __call__(self, *, want: Collection[str] | None = None, **arrays: ArrayLike) -> dict[str, Any]:
        feeds = {tensor.name: np.array(arrays[tensor.name], tensor.dtype) for tensor in self.inputs}  # torch may write
        with torch.inference_mode():
            answer = self._module(*map(torch.from_numpy, feeds.values()))[0].numpy()
        self.answered.append((feeds, answer))
        return {self.outputs[0].name: answer}


def compare(job: Job) -> dict[str, Any]:
    """PSNR in dB of pictures, and the backbone's largest error in them; ExportError below the precision's limit."""
    bundle = Bundle.open(Path(job.folder).parent)
    reference = ByTorch(bundle, _module(job, "fp32"))
    expected = _draw(Given(bundle, reference), job.prompts)
    answered = reference.answered
    del reference
    gc.collect()
    by_torch = job.precision == "bf16"
    session = ByTorch(bundle, _module(job, job.precision)) if by_torch else Session(bundle, bundle.backbone)
    limit = LIMIT_DB[job.precision]
    try:
        psnr = float(np.mean(_psnr(_draw(Given(bundle, session), job.prompts), expected)))
        error = _largest_error(session, answered)
    except NotFiniteError as failure:
        raise ExportError(f"{failure}; {_REMEDY}") from None
    if not psnr >= limit:
        raise ExportError(
            f"{job.component}: pictures at {job.precision} agree with those at fp32 to {psnr:.1f} dB PSNR only, "
            f"{limit:.0f} dB are wanted; {_REMEDY}"
        )
    told = {"psnr_db": psnr, "tolerance_db": limit, "error": error, "prompts": len(job.prompts)}
    return told | {"steps": _steps(bundle), "by": "torch" if by_torch else "graph"}


def _module(job: Job, at: str) -> nn.Module:
    from .worker import open_module

    module: nn.Module = open_module(replace(job, precision=at))[1]
    return module


def _steps(bundle: Bundle) -> int:
    """N: the default table's own, or, for a solver that takes any, few."""
    return Pipeline(bundle).plan("", num_inference_steps=None if bundle.facts.tables else PICTURE_STEPS, seed=0).steps


def _draw(pipe: Pipeline, prompts: Sequence[str]) -> np.ndarray:
    """(prompts, H, W, 3) in [0, 1]; picture i from SEED + i."""
    steps = _steps(pipe.bundle)
    try:
        return np.concatenate(
            [
                pipe(prompt, seed=SEED + i, num_inference_steps=steps, output_type="np").images
                for i, prompt in enumerate(prompts)
            ]
        )
    finally:
        pipe.close()


def _psnr(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(pictures,) in dB, of pictures (pictures, H, W, 3) in [0, 1]; equal ones 200."""
    error = np.square(one.astype(np.float64) - other).mean((1, 2, 3))
    return np.asarray(-10 * np.log10(np.maximum(error, 1e-20)))


def _largest_error(session: Session, answered: Sequence[tuple[dict[str, np.ndarray], np.ndarray]]) -> float:
    """At the same inputs, relative to the largest magnitude of all answers."""
    with session:
        name = session.outputs[0].name
        errors = [np.abs(session(want=[name], **feeds)[name] - answer).max() for feeds, answer in answered]
    return float(np.max(errors) / max(np.abs(answer).max() for _, answer in answered))
