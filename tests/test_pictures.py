"""Our picture is diffusers' picture: same checkpoint, seed, steps and scheduler, compared as fp32 pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusion3Pipeline

import epd
from epd.diffusers import EPDScheduler
from epd.train.rollout import Recipe, Rollout
from export.__main__ import main as export
from runtime.bundle import Bundle
from runtime.pipeline import Pipeline
from runtime.session import Session
from runtime.slopes import Slopes
from shapes.captions import held_out_scenes
from shapes.publish import CHECKPOINTS, DRAWING
from tests.compare import by_diffusers, by_runtime, diffusers_pipeline, psnr
from tests.conftest import SIZES

PROMPTS = [scene.caption for scene in held_out_scenes(14, 7)] + ["", "an astronaut riding a horse, oil on canvas!"]
T5_TOKENS = {"sd3": 256, "sd15": 0}
FAMILIES = ["sd3", "sd15"]


def both(family: str, checkpoint: Path, bundle: Path, steps: int, guidance: float, t5_tokens: int) -> tuple:
    extra = {"max_sequence_length": t5_tokens} if t5_tokens else {}
    reference = diffusers_pipeline(checkpoint, family)
    size = dict(zip(("height", "width"), SIZES[family], strict=True)) if t5_tokens == T5_TOKENS[family] else {}
    common = {"num_inference_steps": steps, "guidance_scale": guidance}
    theirs = by_diffusers(reference, PROMPTS, 100, **common, **size, **extra)
    ours = by_runtime(Pipeline.from_pretrained(bundle), PROMPTS, 100, solver="euler", **common)
    return ours, theirs


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_small_random_pipelines_draw_what_diffusers_draws(family, guidance, tiny_checkpoints, tiny_bundles):
    ours, theirs = both(family, tiny_checkpoints[family], tiny_bundles[family], 5, guidance, T5_TOKENS[family])
    assert ours.shape == theirs.shape == (16, *SIZES[family], 3)
    assert theirs.std() > 0.02, "a flat picture proves nothing"
    assert psnr(ours, theirs) >= 60


@pytest.mark.slow
def test_a_third_text_encoder_tells_what_it_tells_in_diffusers(tmp_path):
    """T5's weights are stored at fp16 and computed with in fp32; without T5 the picture is another one."""
    from tests.pipelines import tiny_sd3

    checkpoint = tiny_sd3(tmp_path / "checkpoint", t5=True)
    height, width = SIZES["sd3"]
    size = ["--height", str(height), "--width", str(width)]
    assert export([str(checkpoint), "-o", str(tmp_path / "bundle"), "--t5", "fp16", *size]) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.facts.components["text_encoder_3"].precision == "fp16-weights"
    reference = StableDiffusion3Pipeline.from_pretrained(checkpoint)
    reference.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": 5, "guidance_scale": 4.5}
    theirs = by_diffusers(reference, PROMPTS, 100, **common, height=height, width=width)
    ours = by_runtime(Pipeline(bundle), PROMPTS, 100, solver="euler", **common)
    assert psnr(ours, theirs) >= 60
    reference.register_modules(text_encoder_3=None, tokenizer_3=None)
    without = by_diffusers(reference, PROMPTS, 100, **common, height=height, width=width)
    assert psnr(without, theirs) < 40


@pytest.fixture(scope="module", params=FAMILIES)
def shapes_model(request, tmp_path_factory):
    """Family, our trained checkpoint, its bundle."""
    name = f"shapes-{request.param}"
    bundle = tmp_path_factory.mktemp("shapes") / name
    assert export([name, "-o", str(bundle)]) == 0
    return request.param, CHECKPOINTS / name, bundle


@pytest.mark.slow
def test_shapes_models_draw_what_diffusers_draws(shapes_model):
    family, checkpoint, bundle = shapes_model
    reference, pipeline, drawing = (
        diffusers_pipeline(checkpoint, family),
        Pipeline(Bundle.open(bundle)),
        DRAWING[family],
    )
    extra = {"max_sequence_length": drawing.t5_tokens} if drawing.t5_tokens else {}
    for guidance in (1.0, drawing.guidance):
        common = {"num_inference_steps": drawing.steps, "guidance_scale": guidance}
        theirs = by_diffusers(reference, PROMPTS, 0, **common, **extra)
        ours = by_runtime(pipeline, PROMPTS, 0, solver="euler", **common)
        assert psnr(ours, theirs) >= 60, guidance


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["default", "fitted-k1-calls6", "fitted-k3-calls4", "distilled-two-requests-k2-calls8"]
)
def test_a_shipped_table_draws_the_same_here_in_torch_and_in_diffusers(shapes_model, kind):
    family, checkpoint, bundle = shapes_model
    opened = Bundle.open(bundle)
    table = epd.Table.load(
        bundle / next(p for p in opened.facts.tables if kind == "default" or p.endswith(f"{kind}.json"))
    )
    drawing, prompts = DRAWING[family], PROMPTS[:4]
    ours = by_runtime(Pipeline(opened), prompts, 0, table=table, guidance_scale=drawing.guidance)
    reference = diffusers_pipeline(checkpoint, family)
    reference.scheduler = EPDScheduler.from_config(reference.scheduler.config, table=table)
    common = {"num_inference_steps": table.steps, "guidance_scale": drawing.guidance}
    common |= {"max_sequence_length": drawing.t5_tokens} if drawing.t5_tokens else {}
    assert psnr(ours, by_diffusers(reference, prompts, 0, **common)) >= 60
    stage = Recipe(str(checkpoint), "shapes", backend="torch", guidance=drawing.guidance).open()
    drawn = [stage.pictures(Rollout(prompt, seed, (table,))) for seed, prompt in enumerate(prompts)]
    assert psnr(ours, np.concatenate(drawn)) >= 60


@pytest.mark.parametrize("points", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_directions_in_one_batch_equal_calls_in_turn(family, points, tiny_bundles):
    bundle = Bundle.open(tiny_bundles[family])
    facts, dice = bundle.facts, np.random.default_rng(points)
    text = {"encoder_hidden_states": dice.standard_normal((2, _tokens(facts), _width(bundle)))}
    text["encoder_hidden_states"][:, facts.text.clip_tokens :] = 0  # no T5
    if family == "sd3":
        text["pooled_projections"] = dice.standard_normal((2, 64))
    height, width = (side // facts.latent.factor for side in SIZES[family])
    x = dice.standard_normal((points, 2, facts.latent.channels, height, width))
    request = epd.Points(x, np.linspace(0.3, 0.9, points))
    with Session(bundle, bundle.backbone) as backbone:
        batch, calls = (Slopes(backbone, facts, text, 4.0, how) for how in ("batch", "calls"))
        together, in_turn = batch(request), calls(request)
        assert batch.guided_forwards == calls.guided_forwards == points * 2 * 2
        assert backbone.calls == 1 + points
    assert np.abs(together - in_turn).max() <= 1e-4 * np.abs(in_turn).max()
    assert np.abs(together).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_the_picture_of_a_seed_does_not_depend_on_its_batch(family, tiny_bundles):
    pipeline = Pipeline.from_pretrained(tiny_bundles[family])
    drawing = {"num_inference_steps": 3, "solver": "epd", "k": 2, "output_type": "np"}
    alone = pipeline("a red ring", seed=5, **drawing).images[0]
    among = pipeline("a red ring", seed=3, num_images_per_prompt=4, **drawing).images[2]
    assert np.array_equal(alone, among)


def _tokens(facts) -> int:
    return facts.text.clip_tokens + facts.text.t5_tokens


def _width(bundle: Bundle) -> int:
    return {"sd3": bundle.facts.text.joint_width, "sd15": 40}[bundle.facts.family]
