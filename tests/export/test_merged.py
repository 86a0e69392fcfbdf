"""Equal text tokens computed once: the same answers, and none where they are not equal."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from export import checkpoint, plan
from export.__main__ import main
from export.checkpoint import Checkpoint
from export.components import Transformer
from export.merged import Merged
from runtime.bundle import Bundle
from runtime.facts import Source
from runtime.session import Session
from tests.conftest import SIZES

CLIP, EQUAL = 5, 11


def transformer(**changes: object) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "joint_attention_dim": 16,
        "caption_projection_dim": 24,
        "pooled_projection_dim": 12,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(**settings | changes).eval().requires_grad_(False)


def inputs(rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample, states, pooled = (
        torch.randn(rows, *shape, generator=generator) for shape in ((4, 8, 8), (CLIP + EQUAL, 16), (12,))
    )
    states[:, CLIP:] = states[:, CLIP : CLIP + 1]  # equal, and not zero
    return [sample, states, pooled, torch.linspace(900, 30, rows)]


@pytest.mark.parametrize("changes", [{}, {"dual_attention_layers": (0, 1)}])
def test_one_token_weighs_what_the_equal_ones_weigh(changes):
    model, given = transformer(**changes), inputs(3)
    expected = Transformer(model)(*given)[0]
    (answer,) = Merged(Transformer(copy.deepcopy(model)), CLIP, EQUAL)(*given)
    assert (answer - expected).abs().max() < 2e-6 * expected.abs().max()


def test_rows_whose_tokens_differ_have_no_answer():
    given = inputs(4)
    given[1][1, -1, 3] += 1e-3
    given[1][3, -1, 3] = float("nan")
    (answer,) = Merged(Transformer(transformer()), CLIP, EQUAL)(*given)
    assert answer[[1, 3]].isnan().all()
    assert answer[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("options", "config", "count"),
    [
        ({}, {}, 256),
        ({"target": "openvino"}, {}, 0),
        ({"t5": "fp16"}, {}, 0),
        ({}, {"qk_norm": "rms_norm"}, 0),
    ],
)
def test_where_it_is_done(tiny_checkpoints, tmp_path, options, config, count):
    folder = shutil.copytree(tiny_checkpoints["sd3"], tmp_path / "sd3")
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | config), encoding="utf-8")
    height, width = SIZES["sd3"]
    given = plan.Options(height=height, width=width, components=("transformer",), **options)
    assert plan.make(Checkpoint(folder, "sd3", Source("sd3")), given).equal_tokens == count


def test_the_few_of_our_own_model_stay_as_they_are():
    """Eight: their heads of 32 numbers would become 33."""
    assert plan.make(checkpoint.find("shapes-sd3", checkpoint.Hub(), None), plan.Options()).equal_tokens == 0


@pytest.mark.slow
def test_the_graph_does_less_and_answers_the_same(tiny_bundles, tiny_checkpoints, tmp_path):
    """Against the graph of a target for which nothing is merged."""
    height, width = map(str, SIZES["sd3"])
    command = [str(tiny_checkpoints["sd3"]), "--components", "transformer", "--height", height, "--width", width]
    assert main([*command, "--target", "cuda", "--dtype", "fp32", "-o", str(tmp_path / "b")]) == 0
    merged, whole = Bundle.open(tiny_bundles["sd3"]), Bundle.open(tmp_path / "b")
    macs = [sum(one.facts.components["transformer"].macs.values()) for one in (merged, whole)]
    assert macs[0] < 0.7 * macs[1]
    random = np.random.default_rng(0)
    feeds = {
        tensor.name: random.standard_normal((3, *tensor.shape[1:])).astype(np.float32)
        for tensor in whole.facts.components["transformer"].inputs
    }
    feeds["encoder_hidden_states"][:, -merged.facts.text.t5_tokens :] = 0
    with Session(merged, "transformer") as one, Session(whole, "transformer") as other:
        answer, expected = (session(**feeds)["out_hidden_states"] for session in (one, other))
    assert np.abs(answer - expected).max() < 1e-5 * np.abs(expected).max()
