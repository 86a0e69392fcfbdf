"""Training resumes where it stopped, and a published folder opens in plain diffusers."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors import safe_open

from shapes import models, train
from shapes.publish import ABSENT, CHECKPOINTS, DRAWING, PIPELINES


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PICTURES", 48)
    monkeypatch.setattr(train, "RECIPES", {name: train.Recipe(2, 4, 1e-3, 0.9) for name in train.RECIPES})
    return tmp_path


@pytest.mark.parametrize("name", ["vae", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd3", "sd15"))])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(name, work, monkeypatch):
    if name != "vae":
        train.run("vae", work, None)
    monkeypatch.setattr(train, "_rate", lambda step, steps: 1.0)
    train.run(name, work, 3)
    whole = _weights(work / f"{name}.safetensors")
    (work / f"{name}.safetensors").unlink()
    train.run(name, work, 2)
    train.run(name, work, 3)
    resumed = _weights(work / f"{name}.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.allclose(whole[key], resumed[key], atol=1e-6) for key in whole)


def test_published_weights_are_trained_on(work):
    published = PIPELINES["sd15"].from_pretrained(CHECKPOINTS / "shapes-sd15")
    train.take_published("sd15", work)
    first = _weights(work / "sd15.safetensors")
    weight = published.to(torch.float32).unet.conv_in.weight.detach()
    assert torch.equal(first["average.unet.conv_in.weight"], weight)
    with safe_open(work / "sd15.safetensors", "pt") as opened:
        step = int(opened.metadata()["step"])
    train.run("sd15", work, step + 1)
    with safe_open(work / "sd15.safetensors", "pt") as opened:
        assert int(opened.metadata()["step"]) == step + 1


def test_the_longest_caption_fits_the_text_encoders(tmp_path):
    from transformers import CLIPTokenizer

    from shapes.captions import scenes

    models.write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    longest = max((scene.caption for scene in scenes()), key=lambda caption: len(caption.split()))
    assert len(tokenizer(longest).input_ids) <= models.TEXT_TOKENS


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_a_published_checkpoint_opens_in_plain_diffusers(family):
    pipeline = PIPELINES[family].from_pretrained(CHECKPOINTS / f"shapes-{family}", **ABSENT[family])
    assert next(iter(pipeline.vae.parameters())).isfinite().all()
    card = (CHECKPOINTS / f"shapes-{family}" / "README.md").read_text(encoding="utf-8")
    assert f"{DRAWING[family].steps} steps" in card
    assert float(re.search(r"at ([0-9.]+) dB PSNR", card)[1]) >= 30
    assert float(re.search(r"\*\*Accuracy\*\*: ([0-9.]+)%", card)[1]) >= 95
    assert float(re.search(r"with an unseen colour-shape pair \| ([0-9.]+)%", card)[1]) >= 95


def test_both_checkpoints_stay_small():
    assert sum(file.stat().st_size for file in CHECKPOINTS.rglob("*") if file.is_file()) <= 25e6


def _weights(file) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in list(opened.keys()) if key.startswith("average.")}
