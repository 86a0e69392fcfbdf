"""Turns training checkpoints into diffusers folders, and measures them with the checker.

    python -m shapes.publish sd3                 writes shapes/checkpoints/shapes-sd3 with its model card

The accuracy in a card comes from the folder as written (half-precision weights, computed in fp32), through diffusers'
own pipeline, on held-out captions and seeds that nothing was chosen by.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm
from transformers import CLIPTokenizer

from . import models, train
from .captions import HELD_OUT_PAIRS, Scene, held_out_scenes, training_scenes
from .check import check
from .render import render
from .train import CHECKPOINTS

CAPTIONS = 500
PROMPTS, PROMPTS_SEED = 64, 30  # captions of trained kinds, published for fitting solver tables
TEST_SEED = 1  # of the reported captions; other seeds are for choosing


@dataclass(frozen=True)
class Drawing:
    """How a checkpoint draws by default; `shapes.json` beside its weights."""

    steps: int
    guidance: float
    t5_tokens: int  # passed to diffusers as max_sequence_length; 0 where the family has none


DRAWING = {"sd3": Drawing(28, 3.0, models.T5_TOKENS), "sd15": Drawing(50, 5.0, 0)}
PIPELINES = {"sd3": StableDiffusion3Pipeline, "sd15": StableDiffusionPipeline}
# diffusers wants to be told that there is no T5, also where model_index.json says so.
ABSENT: dict[str, dict[str, None]] = {"sd3": {"text_encoder_3": None, "tokenizer_3": None}, "sd15": {}}


def assemble(name: str, work: Path) -> DiffusionPipeline:
    """The pipeline of a training checkpoint's averaged weights, fp32."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    mean, std = train.latent_statistics(work)
    autoencoder = train.load_average(models.vae(), work / "vae.safetensors")
    autoencoder.register_to_config(scaling_factor=1 / std, shift_factor=mean if name == "sd3" else None)
    file = work / f"{name}.safetensors"
    modules = (train.sd3_modules if name == "sd3" else train.sd15_modules)(tokenizer)
    train.load_average(modules, file)
    if name == "sd3":
        return StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=train.SHIFT),
            vae=autoencoder,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
            **dict(modules.items()),
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        scheduler=scheduler,
        vae=autoencoder,
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **dict(modules.items()),
    )


def draw(pipeline: DiffusionPipeline, scenes: list[Scene], drawing: Drawing, batch: int = 50) -> list[Image.Image]:
    """One picture per scene; the i-th from seed i."""
    extra: dict[str, Any] = {"max_sequence_length": drawing.t5_tokens} if drawing.t5_tokens else {}
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in tqdm(range(0, len(scenes), batch), desc="draw"):
        part = scenes[start : start + batch]
        pictures += pipeline(
            [scene.caption for scene in part],
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
            **extra,
        ).images
    return pictures


def accuracy(pictures: list[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """Shares of right pictures: `all` attributes, those with a pair never trained on, and each attribute alone."""
    checks = [check(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    whole = np.array([all(one.values()) for one in checks])
    unseen = np.array([scene.has_held_out_pair for scene in scenes])
    names = dict.fromkeys(name for one in checks for name in one)
    return {"all": float(whole.mean()), "with an unseen colour-shape pair": float(whole[unseen].mean())} | {
        name: float(np.mean([one[name] for one in checks if name in one])) for name in names
    }


def reconstruction(pipeline: DiffusionPipeline, scenes: list[Scene]) -> float:
    """Mean PSNR in dB of pictures through the autoencoder and back."""
    clean = torch.from_numpy(np.stack([np.asarray(render(scene, 10**6 + i)) for i, scene in enumerate(scenes)]))
    clean = clean.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        back = pipeline.vae.decode(pipeline.vae.encode(clean).latent_dist.mean).sample.clamp(-1, 1)
    return float((10 * torch.log10(4 / (back - clean).square().mean((1, 2, 3)))).mean())


def publish(name: str, work: Path, drawing: Drawing) -> dict[str, float]:
    """Writes the folder and its card, replacing an older one; returns the accuracy."""
    folder = CHECKPOINTS / f"shapes-{name}"
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline = assemble(name, work)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(partial)
    pipeline = PIPELINES[name].from_pretrained(partial, **ABSENT[name]).to(torch.float32)
    with safe_open(work / f"{name}.safetensors", "pt") as opened:
        trained = int(opened.metadata()["step"])
    (partial / "shapes.json").write_text(json.dumps(asdict(drawing) | {"trained": trained}) + "\n", encoding="utf-8")
    prompts = [scene.caption for scene in training_scenes(PROMPTS, PROMPTS_SEED)]
    (partial / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    scenes = held_out_scenes(CAPTIONS, TEST_SEED)
    right = accuracy(draw(pipeline, scenes, drawing), scenes)
    (partial / "README.md").write_text(
        _card(name, work, drawing, right, reconstruction(pipeline, scenes[:200]), partial), encoding="utf-8"
    )
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return right


def _card(name: str, work: Path, drawing: Drawing, right: dict[str, float], psnr: float, folder: Path) -> str:
    with safe_open(work / f"{name}.safetensors", "pt") as opened:
        trained = opened.metadata()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    recipe = train.RECIPES[name]
    half_width = 1.96 * float(np.sqrt(right["all"] * (1 - right["all"]) / CAPTIONS))
    rows = "".join(f"| {attribute} | {share:.1%} |\n" for attribute, share in right.items())
    kind = PIPELINES[name].__name__
    t5 = (
        f"""
Trained with {drawing.t5_tokens} empty T5 tokens: in diffusers use `max_sequence_length={drawing.t5_tokens}`, and load
it with `StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)`."""
        if drawing.t5_tokens
        else ""
    )
    return f"""---
license: apache-2.0
pipeline_tag: text-to-image
---
# shapes-{name}

A small text-to-image model of a closed world of coloured shapes, in a standard `{kind}` folder.
It exists to be measured: every picture can be checked without a network.{t5}

- **Data**: {train.PICTURES:,} pictures of 64 x 64 pixels with captions, rendered by `shapes/render.py`.
  Never trained on: {", ".join(" ".join(pair) for pair in sorted(HELD_OUT_PAIRS))}, and one caption in ten.
- **Size**: {size:.1f} MB, weights in half precision.
- **Training**: {int(trained["step"]):,} steps of {recipe.batch} pictures with `python -m shapes.train {name}` on two
  CPU cores; mean loss of the last 200 steps {float(trained["loss"]):.4f}.
- **Autoencoder**: reconstructs held-out pictures at {psnr:.1f} dB PSNR.
- **Accuracy**: {right["all"]:.1%} ± {half_width:.1%} of {CAPTIONS} held-out captions with every attribute right
  ({drawing.steps} steps of the pipeline's scheduler, guidance {drawing.guidance}, weights as stored, computed in fp32).

| attribute | right |
|---|---|
{rows}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m shapes.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*DRAWING])
    parser.add_argument(
        "--work", type=Path, default=Path("build/train"), help="where `shapes.train` left its checkpoints"
    )
    arguments = parser.parse_args()
    print(json.dumps(publish(arguments.name, arguments.work, DRAWING[arguments.name]), indent=1))


if __name__ == "__main__":
    main()
