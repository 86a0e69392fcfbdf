"""The same drawing through diffusers and through our runtime, as float pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray

from runtime.pipeline import Pipeline
from shapes.publish import ABSENT, PIPELINES


def psnr(one: NDArray[Any], other: NDArray[Any]) -> float:
    """PSNR in dB of pictures in [0, 1]; the smallest over the first axis."""
    error = np.square(one.astype(np.float64) - other).mean(axis=tuple(range(1, one.ndim)))
    return float(10 * np.log10(1 / max(error.max(), 1e-20)))


def diffusers_pipeline(folder: Path, family: str) -> DiffusionPipeline:
    """The checkpoint in diffusers, fp32, quiet."""
    pipeline = PIPELINES[family].from_pretrained(folder, **ABSENT[family]).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_diffusers(pipeline: DiffusionPipeline, prompts: list[str], seed: int, **drawing: Any) -> NDArray[np.float32]:
    """(len(prompts), H, W, 3); picture i from seed + i."""
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    pictures: NDArray[np.float32] = pipeline(prompts, generator=generators, output_type="np", **drawing).images
    return pictures


def by_runtime(pipeline: Pipeline, prompts: list[str], seed: int, **drawing: Any) -> NDArray[np.float32]:
    """(len(prompts), H, W, 3); picture i from seed + i."""
    return np.concatenate(
        [pipeline(prompt, seed=seed + i, output_type="np", **drawing).images for i, prompt in enumerate(prompts)]
    )
