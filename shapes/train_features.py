"""Trains the classifier whose features `benchmarks quality` takes Frechet distances of, from nothing, on a CPU.

    python -m shapes.train_features [--steps 3000] [-o FILE]

Rendered pictures of scenes of every kind, a little noise and shade on half of them; one cross-entropy for every
attribute. A judge has to know the captions that no model may train on, too: nothing is held out but the renderings.
Seeds are fixed: the same machine gives the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from .captions import Scene, held_out_scenes, scenes
from .features import CHANNELS, CHOICES, FILE, WIDTH, features, labels, told
from .render import SIZE, render

PICTURES, BATCH, RATE, HELD_OUT = 16_384, 128, 2e-3, 1024
SEED = 11


class Classifier(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] to the scores of all attributes, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(CHANNELS))
        side = SIZE // 2 ** (len(CHANNELS) - 1)
        self.hidden = nn.Linear(CHANNELS[-1] * side * side, WIDTH)
        self.heads = nn.Linear(WIDTH, sum(map(len, CHOICES.values())))

    def features(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = functional.relu(convolution(x))
        hidden: Tensor = self.hidden(x.flatten(1))
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.heads(functional.relu(self.features(x)))
        return scores


def chosen(count: int) -> list[Scene]:
    """Scenes of all kinds, half with one thing and half with two."""
    rng, every = np.random.default_rng(SEED), list(scenes())
    pools = [[scene for scene in every if len(scene.things) == number] for number in (1, 2)]
    return [pools[i % 2][rng.integers(len(pools[i % 2]))] for i in range(count)]


def drawn(shown: list[Scene], first: int) -> np.ndarray:
    """(B, 64, 64, 3) uint8; the seed of picture i is first + i."""
    return np.stack([np.asarray(render(scene, first + i)) for i, scene in enumerate(tqdm(shown, desc="render"))])


def loss(scores: Tensor, right: Tensor) -> Tensor:
    """The sum over the attributes; scores (B, all choices), right (B, attributes)."""
    parts = scores.split([len(choices) for choices in CHOICES.values()], 1)
    total: Tensor = sum(functional.cross_entropy(part, right[:, i]) for i, part in enumerate(parts))  # type: ignore
    return total


def train(steps: int, pictures: Tensor, right: Tensor) -> Classifier:
    """`pictures` (N, 3, 64, 64) uint8, `right` (N, attributes)."""
    torch.manual_seed(SEED)
    model = Classifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-3)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in tqdm(range(steps), desc="train", mininterval=5):
        chosen = torch.randint(len(pictures), (BATCH,))
        x = pictures[chosen].float() / 127.5 - 1
        worse = torch.rand(BATCH, 1, 1, 1) < 0.5
        x = x + worse * (0.1 * torch.randn_like(x) + 0.1 * torch.randn(BATCH, 3, 1, 1))
        optimiser.zero_grad(set_to_none=True)
        loss(model(x), right[chosen]).backward()
        optimiser.step()
        falling.step()
    return model.eval()


@torch.no_grad()
def standardise(model: Classifier, pictures: Tensor) -> None:
    """Scales every feature to unit variance over the pictures; the scores stay what they are."""
    spread = model.features(pictures.float() / 127.5 - 1).std(0) + 1e-6
    model.hidden.weight /= spread[:, None]
    model.hidden.bias /= spread
    model.heads.weight *= spread


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m shapes.train_features", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("-o", "--output", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    shown = chosen(options.pictures)
    pictures = torch.from_numpy(drawn(shown, 0)).permute(0, 3, 1, 2).contiguous()
    model = train(options.steps, pictures, torch.tensor([labels(scene) for scene in shown]))
    standardise(model, pictures[:HELD_OUT])
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    held = held_out_scenes(options.held_out, SEED)
    read = told(features(drawn(held, 10**6) / 255, of := {n: v.numpy() for n, v in state.items()}), of)
    right = {
        name: float(
            np.mean([CHOICES[name][labels(scene)[i]] == value for scene, value in zip(held, values, strict=True)])
        )
        for i, (name, values) in enumerate(read.items())
    }
    partial = options.output.with_suffix(".partial")
    save_file(state, partial, {"held out": json.dumps(right), "steps": str(options.steps)})
    partial.chmod(0o644)
    os.replace(partial, options.output)
    print(json.dumps(right))


if __name__ == "__main__":
    main()
