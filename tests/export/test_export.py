"""Exports of small random pipelines: what is in the bundle, and what its graphs compute."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import pytest

from export import plan
from export.checkpoint import Hub, find
from runtime.bundle import Bundle
from shapes.publish import CHECKPOINTS
from tests.pipelines import tiny_sd15


@pytest.fixture(params=["sd15", "sd3", pytest.param("sd3-fp16", marks=pytest.mark.slow)])
def bundle(request) -> Bundle:
    family, made = request.param, request.getfixturevalue
    return Bundle.open(made("tiny_fp16_bundle") if family == "sd3-fp16" else made("tiny_bundles")[family])


def session(bundle: Bundle, component: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(bundle.graph(component), providers=["CPUExecutionProvider"])


def samples(bundle: Bundle, component: str, rows: int) -> dict[str, np.ndarray]:
    """Noise, zeros for T5's tokens, and timesteps that differ from row to row."""
    random = np.random.default_rng(rows)
    fed = {}
    for tensor in bundle.facts.components[component].inputs:
        shape = (rows, *tensor.shape[1:])
        fed[tensor.name] = random.standard_normal(shape).astype(tensor.dtype)
    fed["encoder_hidden_states"][:, bundle.facts.text.clip_tokens :] = 0
    fed["timestep"] = np.linspace(900, 20, rows, dtype=np.float32)
    return fed


def test_every_component_was_compared_with_torch_at_2_and_2k_rows(bundle: Bundle):
    bundle.verify()
    for component in bundle.facts.components.values():
        assert component.parity is not None
        assert component.parity.rows == (2, 6)
        assert 0 < component.parity.error <= component.parity.tolerance
        assert all(tensor.shape[0] == "rows" for tensor in (*component.inputs, *component.outputs))


def test_every_file_is_listed_with_its_bytes_and_hash(bundle: Bundle):
    stored = [*bundle.facts.files, *(one for part in bundle.facts.components.values() for one in part.files)]
    found = {path.relative_to(bundle.folder).as_posix(): path for path in bundle.folder.rglob("*") if path.is_file()}
    del found["bundle.json"]
    assert sorted(one.path for one in stored) == sorted(found)
    assert "tokenizer/tokenizer.json" in {one.path for one in bundle.facts.files}
    for one in stored:
        content = found[one.path].read_bytes()
        assert (one.bytes, one.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_layout_is_optimums(bundle: Bundle):
    for name in bundle.facts.components:
        assert {path.name for path in (bundle.folder / name).iterdir()} == {
            "config.json",
            "model.onnx",
            "model.onnx_data",
        }
    for tokenizer in bundle.folder.glob("tokenizer*"):
        assert {"vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"} <= {
            path.name for path in tokenizer.iterdir()
        }
    names = {path.name for path in bundle.folder.iterdir() if path.is_file()}
    compared = set() if bundle.facts.components[bundle.backbone].precision == "fp32" else {"picture.json"}
    assert names == {"bundle.json", "model_index.json"} | compared
    index = json.loads((bundle.folder / "model_index.json").read_text(encoding="utf-8"))
    assert index.get("text_encoder_3", [None, None]) == [None, None]


def test_timestep_has_one_entry_per_row(bundle: Bundle):
    declared = {tensor.name: tensor for tensor in bundle.facts.components[bundle.backbone].inputs}
    assert declared["timestep"].shape == ("rows",)
    assert declared["timestep"].dtype == "float32"


@pytest.mark.parametrize("directions", [1, 2, 3])
def test_permuting_rows_permutes_outputs(bundle: Bundle, directions: int):
    backbone, rows = session(bundle, bundle.backbone), 2 * directions
    fed = samples(bundle, bundle.backbone, rows)
    order = np.random.default_rng(0).permutation(rows)
    (straight,) = backbone.run(None, fed)
    (permuted,) = backbone.run(None, {name: array[order] for name, array in fed.items()})
    np.testing.assert_allclose(permuted, straight[order], rtol=0, atol=1e-4 * np.abs(straight).max())


def test_every_input_of_a_row_is_felt_in_that_row_alone(bundle: Bundle):
    backbone, fed = session(bundle, bundle.backbone), samples(bundle, bundle.backbone, 3)
    (before,) = backbone.run(None, fed)
    for name, array in fed.items():
        changed = array.copy()
        changed[1] = 400 if name == "timestep" else -array[1]
        (after,) = backbone.run(None, fed | {name: changed})
        difference = np.abs(after - before).max(axis=(1, 2, 3)) / np.abs(before).max()
        assert difference[1] > 0.01, name
        assert difference[[0, 2]].max() < 1e-5, name


def test_multiply_accumulates_follow_the_size_of_the_picture(bundle: Bundle):
    decoder = bundle.facts.components["vae_decoder"]
    *_, last = decoder.macs.values()
    height, width = bundle.facts.defaults.height, bundle.facts.defaults.width
    assert last == height * width * 3 * 8 * 9  # 3x3 from 8 channels to red, green and blue


@pytest.mark.parametrize("side", [2, 1024])
def test_trial_is_never_larger_than_the_picture_and_keeps_the_multiple(tmp_path: Path, side: int):
    from runtime.bundle import describe
    from runtime.facts import Source

    facts = describe(tiny_sd15(tmp_path), "tiny", Source("tiny"))
    multiple = facts.latent.factor * facts.latent.down
    height, width = plan.trial_size(facts, side * multiple, side * multiple)
    assert height % multiple == width % multiple == 0
    assert height <= side * multiple
    assert width <= side * multiple
    assert max(height, width) <= 24 * facts.latent.factor


@pytest.mark.slow
def test_random_weights_are_the_same_in_every_process():
    code = (
        "import torch; from pathlib import Path; from transformers import CLIPTextConfig, CLIPTextModel; import sys;"
        "from export.components import _draw; c = CLIPTextConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1,"
        "num_attention_heads=2, intermediate_size=64); c.save_pretrained(sys.argv[1]);"
        "print(sum(p.double().abs().sum().item() for p in _draw(CLIPTextModel, Path(sys.argv[1]), torch.float32)"
        ".parameters()))"
    )
    with TemporaryDirectory() as folder:
        told = [
            subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True).stdout
            for _ in range(2)
        ]
    assert told[0] == told[1] != ""


def test_shipped_tables_go_with_our_own_weights_only(tmp_path: Path):
    copy = shutil.copytree(CHECKPOINTS / "shapes-sd3", tmp_path / "shapes-sd3")
    assert find("shapes-sd3", Hub(), None).ours
    assert not find(str(copy), Hub(), None).ours
