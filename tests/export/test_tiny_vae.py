"""A tiny VAE decoder beside the whole one: what it must fit, and that it decodes as diffusers' does."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from export import architectures, checkpoint
from export.__main__ import main
from runtime.bundle import Bundle
from runtime.facts import TINY_DECODER
from runtime.session import Session


def tiny(folder: Path, channels: int, blocks: int = 3) -> AutoencoderTiny:
    """Saved in `folder`: random weights, 2 ** (blocks - 1) pixels a latent, a scale and a shift of its own."""
    torch.manual_seed(1)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * blocks,
        decoder_block_out_channels=(8,) * blocks,
        num_encoder_blocks=(1,) * blocks,
        num_decoder_blocks=(1,) * blocks,
        latent_channels=channels,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    vae.save_pretrained(folder)
    return vae


def export(model: Path | str, folder: Path, *options: str) -> int:
    return main([str(model), "-o", str(folder), "--height", "72", "--width", "104", *options])


def test_it_decodes_as_in_diffusers(tiny_checkpoints, tmp_path):
    vae = tiny(tmp_path / "vae", 4)
    options = ["--tiny-vae", str(tmp_path / "vae"), "--components", "vae_decoder", TINY_DECODER]
    assert export(tiny_checkpoints["sd15"], tmp_path / "bundle", *options) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.facts.components[TINY_DECODER].inputs == bundle.facts.components["vae_decoder"].inputs
    x = np.random.default_rng(0).standard_normal((2, 4, 18, 26)).astype(np.float32)
    with Session(bundle, TINY_DECODER) as session, torch.inference_mode():
        expected = vae.decode(torch.from_numpy(x) / 0.5 + 0.25).sample.numpy()
        assert np.abs(session(latent_sample=x)["sample"] - expected).max() < 1e-5


def test_one_that_is_not_among_the_components_is_refused(tiny_checkpoints, tmp_path, capsys):
    tiny(tmp_path / "vae", 4)
    options = ["--tiny-vae", str(tmp_path / "vae"), "--components", "vae_decoder"]
    assert export(tiny_checkpoints["sd15"], tmp_path / "bundle", *options) == 2
    assert "not among --components" in capsys.readouterr().err


@pytest.mark.slow
def test_the_variant_of_a_checkpoint_is_not_the_tiny_one_s(tiny_checkpoints, tmp_path):
    """--variant names the checkpoint's files; and where it is local, --offline is for a tiny VAE on the hub."""
    home = tmp_path / "cache" / "models--madebyollin--taesd"
    tiny(home / "snapshots" / "abc", 4)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc", encoding="utf-8")
    checkpoint = shutil.copytree(tiny_checkpoints["sd15"], tmp_path / "sd15")
    file = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    options = ["--tiny-vae", "taesd", "--cache-dir", str(tmp_path / "cache"), "--offline", "--variant", "fp16"]
    assert export(checkpoint, tmp_path / "bundle", *options, "--components", "vae_decoder", TINY_DECODER) == 0
    assert {"vae_decoder", TINY_DECODER} == Bundle.open(tmp_path / "bundle").facts.components.keys()


@pytest.mark.parametrize(("channels", "blocks"), [(16, 3), (4, 4)])
def test_one_of_other_latents_is_refused(tiny_checkpoints, tmp_path, capsys, channels, blocks):
    tiny(tmp_path / "vae", channels, blocks)
    assert export(tiny_checkpoints["sd15"], tmp_path / "bundle", "--tiny-vae", str(tmp_path / "vae")) == 2
    assert f"of {channels} channels, {2 ** (blocks - 1)} pixels a latent" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_a_folder_of_something_else_is_refused(tiny_checkpoints, tmp_path, capsys):
    whole = tiny_checkpoints["sd15"] / "vae"
    assert export(tiny_checkpoints["sd15"], tmp_path / "bundle", "--tiny-vae", str(whole)) == 2
    assert "is AutoencoderKL" in capsys.readouterr().err
    assert export(tiny_checkpoints["sd15"], tmp_path / "bundle", "--tiny-vae", str(tmp_path)) == 2
    assert "config.json is missing; give taesd, taesd3, a folder of a tiny VAE" in capsys.readouterr().err


def test_one_without_weights_is_refused(tiny_checkpoints, tmp_path, capsys):
    tiny(tmp_path / "vae", 4)
    next((tmp_path / "vae").glob("*.safetensors")).unlink()
    options = ["--tiny-vae", str(tmp_path / "vae"), "--components", TINY_DECODER]
    assert export(tiny_checkpoints["sd15"], tmp_path / "bundle", *options) == 2
    assert f"{TINY_DECODER}: its weights in {tmp_path / 'vae'} cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_one_that_is_on_the_hub_comes_from_its_cache(tmp_path, capsys):
    """A cache folder as huggingface_hub lays it out."""
    home = tmp_path / "cache" / "models--madebyollin--taesd"
    tiny(home / "snapshots" / "abc", 4)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc", encoding="utf-8")
    hub = checkpoint.Hub(cache_dir=str(tmp_path / "cache"), offline=True)
    assert checkpoint.find_tiny("taesd", hub) == home / "snapshots" / "abc"
    with pytest.raises(checkpoint.ExportError, match="madebyollin/taesd3: not in the cache"):
        checkpoint.find_tiny("taesd3", hub)


@pytest.mark.parametrize(("model", "name"), [("sd15", "taesd"), ("sd3-medium", "taesd3")])
def test_a_published_one_without_weights(tmp_path, capsys, model, name):
    assert main([model, "--random-weights", "--tiny-vae", name, "--dry-run"]) == 0
    assert f"{TINY_DECODER}: fp32, 0.00 GB of disk" in capsys.readouterr().err
    other = ({*architectures.TINY} - {name}).pop()
    assert main([model, "--random-weights", "--tiny-vae", other, "--dry-run"]) == 2
    assert "needs an AutoencoderTiny of" in capsys.readouterr().err
    assert main([model, "--random-weights", "--tiny-vae", "mine", "--dry-run"]) == 2
    assert "--tiny-vae mine: --random-weights knows taesd, taesd3" in capsys.readouterr().err
