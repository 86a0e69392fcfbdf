"""Trains the two checkpoints of the closed world, from nothing, on a CPU.

    python -m shapes.train vae                   the autoencoder both share
    python -m shapes.train sd3                   shapes-sd3: flow matching, SD3's objective
    python -m shapes.train sd15                  shapes-sd15: epsilon prediction, SD1.5's objective

    python -m shapes.train sd3 --steps 13000 --published
                                                 trains the published weights on, where no checkpoint is left

Every run resumes from its last checkpoint (weights, running average and optimiser state, written every two minutes) and
ends with one; a run that is cut short is a shorter training, never a lost one.

Differences from the published recipes: the text encoders are trained jointly from nothing (SD freezes pretrained ones);
the autoencoder has no adversarial or perceptual loss; shapes-sd15 weighs its loss by 1 / alpha_bar, at most 50;
batches are drawn by step number, so that a resumed run sees the pictures an uninterrupted one would have seen;
bfloat16 autocast on CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from . import models
from .captions import training_scenes
from .render import render

PICTURES = 24_576
DATA_SEED = 0
SAVE_EVERY = 120.0  # seconds
EMPTY_CAPTIONS = 0.1  # share of captions dropped for classifier-free guidance
SHIFT = 3.0  # of the flow-matching grid
OUTLINES = 4000  # sd3: from this step half of the times are drawn without the shift, where outlines are settled

CHECKPOINTS = Path(__file__).parent / "checkpoints"  # the published folders

Loss = Callable[[int], Tensor]  # step number -> scalar loss


@dataclass(frozen=True)
class Recipe:
    steps: int  # learning rate: a warm-up and a cosine down to 1 %
    batch: int
    learning_rate: float
    average: float  # decay of the running average of the weights
    second: int = 0  # step at which a second warm-up and cosine begin, of half the learning rate; 0: none


RECIPES = {
    "vae": Recipe(steps=4000, batch=32, learning_rate=2e-3, average=0.995),
    "sd3": Recipe(steps=11000, batch=64, learning_rate=1e-3, average=0.999, second=9000),
    "sd15": Recipe(steps=5000, batch=32, learning_rate=1e-3, average=0.998),
}


def pictures(work: Path) -> Tensor:
    """The training set, drawn once: (PICTURES, 3, 64, 64) uint8."""
    return _cached(
        work / "pictures.safetensors",
        lambda: torch.from_numpy(
            np.stack(
                [
                    np.asarray(render(scene, seed)).transpose(2, 0, 1)
                    for seed, scene in enumerate(tqdm(training_scenes(PICTURES, DATA_SEED), desc="render"))
                ]
            )
        ),
    )


def latents(work: Path) -> Tensor:
    """The training set through the trained encoder, not yet scaled: (PICTURES, 8, 16, 16) float16."""

    def encode() -> Tensor:
        autoencoder = load_average(models.vae(), work / "vae.safetensors").eval()
        with torch.no_grad():
            return torch.cat(
                [
                    autoencoder.encode(part.float() / 127.5 - 1).latent_dist.mean.half()
                    for part in tqdm(pictures(work).split(64), desc="encode")
                ]
            )

    return _cached(work / "latents.safetensors", encode)


def latent_statistics(work: Path) -> tuple[float, float]:
    """Mean and standard deviation of the training set's latents."""
    known = latents(work).float()
    return float(known.mean()), float(known.std())


def _cached(file: Path, make: Callable[[], Tensor]) -> Tensor:
    if not file.exists():
        _save(file, {"data": make()}, {})
    with safe_open(file, "pt") as opened:
        return opened.get_tensor("data")


def _save(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = file.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    os.replace(partial, file)


def load_average(model: nn.Module, file: Path, prefix: str = "") -> nn.Module:
    """`model` with the averaged weights of a training checkpoint."""
    with safe_open(file, "pt") as opened:
        head = f"average.{prefix}"
        model.load_state_dict(
            {name.removeprefix(head): opened.get_tensor(name) for name in list(opened.keys()) if name.startswith(head)}
        )
    return model


def train(name: str, model: nn.Module, loss: Loss, recipe: Recipe, work: Path) -> None:
    """Runs a recipe to its last step, from its checkpoint if there is one."""
    file = work / f"{name}.safetensors"
    average = {key: value.clone() for key, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    first = _resume(file, model, average, optimiser) if file.exists() else 0
    saved, recent = time.monotonic(), []
    for step in (bar := tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc=name, mininterval=5)):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * _rate(step, recipe)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(step)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        decay = min(recipe.average, (1 + step) / (10 + step))
        for key, weight in model.state_dict().items():
            if weight.is_floating_point():
                average[key].lerp_(weight, 1 - decay)
        recent = [*recent[-199:], float(value.detach())]
        bar.set_postfix(loss=f"{np.mean(recent):.4f}", refresh=False)
        if time.monotonic() - saved > SAVE_EVERY or step + 1 == recipe.steps:
            _checkpoint(file, model, average, optimiser, step + 1, float(np.mean(recent)))
            saved = time.monotonic()


def _rate(step: int, recipe: Recipe) -> float:
    """Factor of the learning rate."""
    again = 0 < recipe.second <= step
    first, last = (recipe.second, recipe.steps) if again else (0, recipe.second or recipe.steps)
    done = (step - first) / (last - first)
    warm = min(1.0, (step - first + 1) / 200)
    return (0.5 if again else 1.0) * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _checkpoint(
    file: Path, model: nn.Module, average: dict[str, Tensor], optimiser: torch.optim.Optimizer, step: int, loss: float
) -> None:
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in average.items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{key}": value for key, value in state.items()}
    _save(file, tensors, {"step": str(step), "loss": f"{loss:.5f}"})


def _resume(file: Path, model: nn.Module, average: dict[str, Tensor], optimiser: torch.optim.Optimizer) -> int:
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(file, "pt") as opened:
        model.load_state_dict({key: opened.get_tensor(f"model.{key}") for key in average})
        for key in average:
            average[key] = opened.get_tensor(f"average.{key}")
        for name in list(opened.keys()):
            if name.startswith("adam."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = opened.get_tensor(name)
        if state:  # none in a checkpoint made of published weights
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        return int(opened.metadata()["step"])


def vae_loss(model: nn.Module, work: Path, recipe: Recipe) -> Loss:
    """Squared error on random 32 x 32 crops, and a light pull of the latents towards a unit normal."""
    data = pictures(work)

    def loss(step: int) -> Tensor:
        dice = torch.Generator().manual_seed(step)
        rows = torch.randint(len(data), (recipe.batch,), generator=dice)
        corners = (4 * torch.randint(9, (recipe.batch, 2), generator=dice)).tolist()
        crops = torch.stack([data[row, :, y : y + 32, x : x + 32] for row, (y, x) in zip(rows, corners, strict=True)])
        clean = crops.float() / 127.5 - 1
        latent = model.encode(clean).latent_dist
        noise = torch.randn(latent.mean.shape, generator=dice)
        decoded = model.decode(latent.mean + latent.std * noise).sample
        return (decoded.float() - clean).square().mean() + 1e-4 * latent.kl().mean() / latent.mean[0].numel()

    return loss


class Texts:
    """Token ids of the training captions, some of them empty."""

    def __init__(self, work: Path) -> None:
        models.write_tokenizer(work / "tokenizer")
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        captions = [scene.caption for scene in training_scenes(PICTURES, DATA_SEED)]
        self.ids, self.empty = self(captions), self([""])

    def __call__(self, captions: list[str]) -> Tensor:
        return self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def batch(self, rows: Tensor, dice: torch.Generator) -> Tensor:
        dropped = torch.rand(len(rows), 1, generator=dice) < EMPTY_CAPTIONS
        return torch.where(dropped, self.empty, self.ids[rows])


def sd3_modules(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    first, second = models.sd3_text_encoders(tokenizer)
    return nn.ModuleDict({"transformer": models.transformer(), "text_encoder": first, "text_encoder_2": second})


def sd3_conditioning(first: nn.Module, second: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, TEXT_TOKENS + T5_TOKENS, 192) and pooled text (B, 160), laid out as StableDiffusion3Pipeline does."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in (first, second)]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    tokens = nn.functional.pad(tokens, (0, 192 - tokens.shape[-1], 0, models.T5_TOKENS))
    return tokens, torch.cat([output.text_embeds for output in outputs], -1)


def sd3_loss(modules: nn.ModuleDict, texts: Texts, work: Path, recipe: Recipe) -> Loss:
    """Flow matching: the velocity noise - x0 at logit-normal times, shifted.

    In the second stage three of four pictures show a single thing, and latents of a thing weigh four times those of the
    background: what is left to learn then is the outline of small things.
    """
    mean, std = latent_statistics(work)
    data = (latents(work).float() - mean) / std
    single = torch.tensor([i for i, scene in enumerate(training_scenes(PICTURES, DATA_SEED)) if not scene.relation])

    def loss(step: int) -> Tensor:
        dice = torch.Generator().manual_seed(step)
        second = step >= recipe.second
        rows = torch.randint(len(data), (recipe.batch,), generator=dice)
        if second:
            alone = single[torch.randint(len(single), (recipe.batch,), generator=dice)]
            rows = torch.where(torch.arange(recipe.batch) % 4 == 0, rows, alone)
        clean, noise = data[rows], torch.randn((recipe.batch, *data.shape[1:]), generator=dice)
        uniform = torch.sigmoid(torch.randn(recipe.batch, generator=dice))
        shift = torch.where(torch.arange(recipe.batch) % 2 == 0, SHIFT, 1.0 if step >= OUTLINES else SHIFT)
        t = shift * uniform / (1 + (shift - 1) * uniform)
        tokens, pooled = sd3_conditioning(modules["text_encoder"], modules["text_encoder_2"], texts.batch(rows, dice))
        mix = t.view(-1, 1, 1, 1)
        velocity = modules["transformer"](
            (1 - mix) * clean + mix * noise, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=1000 * t
        ).sample
        weight = 1 + 3 * _thing(clean) if second else 1.0
        return (weight * (velocity.float() - (noise - clean)).square()).mean()

    return loss


def _thing(clean: Tensor) -> Tensor:
    """1.0 where latents (B, C, h, w) differ from their picture's background, (B, 1, h, w)."""
    background = clean.flatten(2).median(2).values[..., None, None]
    return ((clean - background).norm(dim=1, keepdim=True) > 1).float()


def sd15_modules(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    return nn.ModuleDict({"unet": models.unet(), "text_encoder": models.sd15_text_encoder(tokenizer)})


def sd15_loss(modules: nn.ModuleDict, texts: Texts, work: Path, recipe: Recipe) -> Loss:
    """Epsilon prediction at uniform discrete times of the scaled-linear schedule."""
    _, std = latent_statistics(work)
    data = latents(work).float() / std
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)

    def loss(step: int) -> Tensor:
        dice = torch.Generator().manual_seed(step)
        rows = torch.randint(len(data), (recipe.batch,), generator=dice)
        clean, noise = data[rows], torch.randn((recipe.batch, *data.shape[1:]), generator=dice)
        t = torch.randint(1000, (recipe.batch,), generator=dice)
        signal = alpha_bar[t].view(-1, 1, 1, 1)
        text = modules["text_encoder"](texts.batch(rows, dice)).last_hidden_state
        epsilon = modules["unet"](signal.sqrt() * clean + (1 - signal).sqrt() * noise, t, text).sample
        weight = (1 / signal).clamp(max=50)  # the error as one of velocity, so that noisy times, of layout, weigh too
        return (weight * (epsilon.float() - noise).square()).mean()

    return loss


def take_published(name: str, work: Path) -> None:
    """Turns published weights into training checkpoints, of the autoencoder too: without the optimiser's state."""
    for one in ("vae", name):
        if (work / f"{one}.safetensors").exists():
            continue
        folder = CHECKPOINTS / ("shapes-sd3" if one == "vae" else f"shapes-{one}")
        parts = ["vae"] if one == "vae" else [*_modules(one, work)]
        found: dict[str, Tensor] = {}
        for part in parts:
            head = "" if one == "vae" else f"{part}."
            for file in (folder / part).glob("*.safetensors"):
                found |= {head + key: value.float() for key, value in load_file(file).items()}
        step = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))["trained"] if one != "vae" else 0
        both = {f"{head}.{key}": value.clone() for head in ("model", "average") for key, value in found.items()}
        _save(work / f"{one}.safetensors", both, {"step": str(step), "loss": "nan"})


def _modules(name: str, work: Path) -> nn.ModuleDict:
    models.write_tokenizer(work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    return (sd3_modules if name == "sd3" else sd15_modules)(tokenizer)


def run(name: str, work: Path, steps: int | None) -> None:
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[name]
    if steps:
        recipe = replace(recipe, steps=steps)
    if name == "vae":
        autoencoder = models.vae()
        train(name, autoencoder, vae_loss(autoencoder, work, recipe), recipe, work)
    else:
        texts = Texts(work)
        objective = sd3_loss if name == "sd3" else sd15_loss
        modules = _modules(name, work).train()
        train(name, modules, objective(modules, texts, work, recipe), recipe, work)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m shapes.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*RECIPES])
    parser.add_argument("--work", type=Path, default=Path("build/train"), help="checkpoints and cached data")
    parser.add_argument("--steps", type=int, help="length of the run, if not the recipe's")
    parser.add_argument("--published", action="store_true", help="start from the published weights")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.published:
        arguments.work.mkdir(parents=True, exist_ok=True)
        take_published(arguments.what, arguments.work)
    run(arguments.what, arguments.work, arguments.steps)


if __name__ == "__main__":
    main()
