"""What a drawing is heading for: the denoised estimate, decoded by a tiny decoder or the whole one."""

import logging

import numpy as np
import pytest
from onnx import TensorProto
from PIL import Image

from runtime.__main__ import main
from runtime.facts import TINY_DECODER, read_facts
from runtime.pipeline import Pipeline
from tests.runtime import tiny_bundle


@pytest.fixture
def with_tiny(tmp_path):
    """A bundle with a decoder that shows the first three of four channels as they are."""
    folder = tiny_bundle.bundle(tmp_path / "sd15", "sd15")
    weights = {"first": np.eye(3, 4, dtype=np.float32)[..., None, None], "scales": np.array([1, 1, 4, 4], np.float32)}
    component = tiny_bundle.graph(
        folder / TINY_DECODER / "model.onnx",
        [
            ("Conv", ["latent_sample", "first"], ["small"], {}),
            ("Resize", ["small", "", "scales"], ["sample"], {"mode": "nearest"}),
        ],
        {"latent_sample": (TensorProto.FLOAT, ["rows", 4, "height", "width"])},
        {"sample": (TensorProto.FLOAT, ["rows", 3, "high", "wide"])},
        weights,
    )
    facts = read_facts(folder / "bundle.json")
    tiny_bundle.change(folder, components=facts.components | {TINY_DECODER: component})
    return folder


def test_the_tiny_decoder_takes_latents_as_they_are(with_tiny):
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 4))
    shown = Pipeline.from_pretrained(with_tiny).preview(x)
    expected = np.clip(x[:, :3].transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1).repeat(4, 1).repeat(4, 2)
    np.testing.assert_allclose(shown, expected, atol=1e-6)


def test_without_one_the_whole_decoder_shows_it_and_that_is_told_once(bundles, caplog):
    pipe, x = Pipeline.from_pretrained(bundles["sd15"]), np.random.default_rng(0).standard_normal((1, 4, 4, 4))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(pipe.preview(x), pipe.decode(x))
    assert [record.message for record in caplog.records] == [
        "tiny-sd15 has no tiny VAE decoder: each preview is a whole decoding"
    ]


def test_previews_are_not_taken_for_denoising(with_tiny):
    pipe = Pipeline.from_pretrained(with_tiny)
    plan = pipe.plan("red", seed=1, solver="euler", num_inference_steps=4)

    def seen(step):
        pipe.preview(step.denoised)
        pipe.preview_seconds += 25  # as on a slow device

    seconds = pipe.draw(plan, callback_on_step_end=seen).report.seconds
    assert 100 < seconds["preview"] < 110
    assert -100 < seconds["denoise"] < 0  # it took no 100 seconds in truth
    assert "preview" not in pipe.draw(plan).report.seconds


def test_generate_keeps_a_preview(with_tiny, tmp_path, capsys):
    """Of the first of two pictures; after the last step, of the estimate that led there."""
    files = {name: tmp_path / f"{name}.png" for name in ("out", "seen")}
    command = ["generate", "red", "--model", str(with_tiny), "--seed", "3", "--num-images", "2", "--solver", "euler"]
    assert main([*command, "-o", str(files["out"]), "--preview", str(files["seen"])]) == 0
    pipe, last = Pipeline.from_pretrained(with_tiny), []
    plan = pipe.plan("red", seed=3, solver="euler")
    pipe.draw(plan, callback_on_step_end=lambda step: last.append(pipe.preview(step.denoised / plan.end_scale)))
    np.testing.assert_array_equal(np.asarray(Image.open(files["seen"])), np.rint(last[-1][0] * 255).astype(np.uint8))
    assert main([*command, "--preview", str(tmp_path / "seen.jpg")]) == 2
    assert "it is written as .png" in capsys.readouterr().err
