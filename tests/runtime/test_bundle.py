import dataclasses
import json
import shutil

import pytest
import tiny_bundle

from runtime.bundle import Bundle
from runtime.errors import BundleError
from runtime.facts import read_facts, write_facts


@pytest.fixture
def copy(bundles, tmp_path):
    return shutil.copytree(bundles["sd3"], tmp_path / "copy")


def test_facts_survive_writing(bundles, family, tmp_path):
    facts = read_facts(bundles[family] / "bundle.json")
    write_facts(tmp_path, facts)
    assert read_facts(tmp_path / "bundle.json") == facts
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.json"]


def _set(content, path, value):
    *parents, last = path.split(".")
    for name in parents:
        content = content[int(name) if name.isdigit() else name]
    content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("format", 2, "format 2, this program reads 1"),
        ("format", None, "format None"),
        ("family", "sdxl", "family is 'sdxl', expected one of sd3, sd15"),
        ("name", 5, "name is 5, expected str"),
        ("nonsense", 1, "unknown field 'nonsense' in the file"),
        ("source", [], "source is [], expected an object"),
        ("source.random_weights", "no", "source.random_weights is 'no', expected bool"),
        ("latent.channels", "4", "latent.channels is '4', expected int"),
        ("latent.scaling", None, "latent.scaling is None, expected float"),
        ("defaults.height", 1.5, "defaults.height is 1.5, expected int"),
        ("components", [], "components is [], expected an object"),
        ("components.transformer.files", "x", "components.transformer.files is 'x', expected a list"),
        ("components.transformer.files.0.bytes", "x", "components.transformer.files[0].bytes is 'x', expected int"),
        ("components.transformer.graph", "../model.onnx", "'../model.onnx' leads out of the bundle"),
        ("components.transformer.graph", "/model.onnx", "'/model.onnx' leads out of the bundle"),
        ("components.transformer.graph", "C:\\model.onnx", "leads out of the bundle"),
        ("components.transformer.files.0.path", "a/../../b", "leads out of the bundle"),
        ("tables", ["../t.json"], "leads out of the bundle"),
        ("files", [{"path": "../x", "bytes": 1, "sha256": ""}], "leads out of the bundle"),
        ("latent.factor", 0, "latent.factor is 0, out of its range"),
        ("latent.patch", 0, "latent.patch is 0, out of its range"),
        ("latent.channels", 10**30, "latent.channels is 1000"),
        ("latent.scaling", 0, "latent.scaling is 0.0, out of its range"),
        ("latent.scaling", 10**400, "latent.scaling is 1000"),
        ("latent.scaling", float("nan"), "latent.scaling is nan, out of its range"),
        ("text.clip_tokens", 0, "text.clip_tokens is 0, out of its range"),
        ("text.clip_tokens", -5, "text.clip_tokens is -5, out of its range"),
        ("text.t5_tokens", -1, "text.t5_tokens is -1, out of its range"),
        ("text.joint_width", 0, "text.joint_width is 0, out of its range"),
        ("defaults.height", 0, "defaults.height is 0, out of its range"),
        ("defaults.steps", 0, "defaults.steps is 0, out of its range"),
        ("schedule.num_train_timesteps", "abc", "schedule.num_train_timesteps is 'abc', out of its range"),
        ("schedule.num_train_timesteps", None, "schedule.num_train_timesteps is None, out of its range"),
        ("schedule.shift", None, "schedule.shift is None, out of its range"),
        ("schedule.shift", "abc", "schedule.shift is 'abc', out of its range"),
        ("name", "../../evil", "not one plain file name"),
        ("name", "a\\b", "not one plain file name"),
        ("name", "c:evil", "not one plain file name"),
        ("name", "..", "not one plain file name"),
        ("name", "", "not one plain file name"),
        ("name", "line\nbreak", "not one plain file name"),
        ("name", "half \ud800", "not one plain file name"),
        ("name", "x" * 101, "not one plain file name"),
        ("components.transformer.parity.rows", [1, "2"], "components.transformer.parity.rows[1] is '2', expected int"),
    ],
)
def test_a_broken_rule_names_the_field(copy, path, value, words):
    file = copy / "bundle.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    _set(content, path, value)
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BundleError) as refused:
        Bundle.open(copy)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("missing", ["family", "latent", "components.transformer.graph"])
def test_a_missing_field_is_named(copy, missing):
    file = copy / "bundle.json"
    content = inner = json.loads(file.read_text(encoding="utf-8"))
    *parents, last = missing.split(".")
    for name in parents:
        inner = inner[name]
    del inner[last]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BundleError, match=f"missing field '{last}'"):
        Bundle.open(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"a":' * 100_000, '{"a": %s}' % ("1" * 5000)])
def test_damaged_json(copy, text):
    (copy / "bundle.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match="the file is damaged"):
        Bundle.open(copy)


def test_a_truncated_file_is_seen_at_opening_and_a_changed_one_by_verify(copy):
    graph = copy / "transformer" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        bundle.verify()
    graph.write_bytes(content[:-1])
    with pytest.raises(BundleError, match="truncated or replaced"):
        Bundle.open(copy)
    graph.unlink()
    with pytest.raises(BundleError, match="missing"):
        Bundle.open(copy)


def test_files_beside_the_graphs_are_checked_too(copy):
    vocabulary = copy / "tokenizer_2" / "vocab.json"
    content = vocabulary.read_text(encoding="utf-8")
    vocabulary.write_text(content.replace('"a": 1, "b": 2', '"a": 2, "b": 1'), encoding="utf-8")
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match=r"vocab\.json: SHA-256 differs"):
        bundle.verify()
    vocabulary.write_text(content[:-9], encoding="utf-8")
    with pytest.raises(BundleError, match=r"vocab\.json: .* truncated or replaced"):
        Bundle.open(copy)
    shutil.rmtree(copy / "tokenizer_2")
    with pytest.raises(BundleError, match=r"tokenizer_2.*: missing"):
        Bundle.open(copy)


def test_folders_that_are_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"neither bundle\.json nor model_index\.json"):
        Bundle.open(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    with pytest.raises(BundleError, match="a FluxPipeline; supported are StableDiffusion3Pipeline"):
        Bundle.open(tmp_path)


def test_a_missing_component_names_what_there_is(bundles):
    bundle = Bundle.open(bundles["sd3"])
    with pytest.raises(BundleError, match=r"no vae_encoder .*\(it has: text_encoder, .* without --components"):
        bundle.require("transformer", "vae_encoder")


def test_a_folder_of_optimum_is_described_as_its_bundle(bundles):
    foreign, ours = Bundle.open(bundles["optimum"]), Bundle.open(bundles["sd15"])
    assert foreign.foreign
    assert foreign.fingerprint() is None
    for name in ("family", "prediction", "latent", "text"):
        assert getattr(foreign.facts, name) == getattr(ours.facts, name)
    assert foreign.facts.components.keys() == ours.facts.components.keys()
    assert foreign.sample_size() == (16, 16)


def test_another_prediction_type_is_refused(tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "v", "sd15", bare=True)
    schedule = {**tiny_bundle.SD15_SCHEDULE, "prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule), encoding="utf-8")
    with pytest.raises(BundleError, match="v_prediction"):
        Bundle.open(folder)


def test_facts_cannot_be_changed(bundles):
    with pytest.raises(dataclasses.FrozenInstanceError):
        Bundle.open(bundles["sd3"]).facts.name = "other"


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("unet/config.json", "in_channels", "4", "latent.channels is '4', expected int"),
        ("unet/config.json", "block_out_channels", None, "another kind of value"),
        ("vae_decoder/config.json", "block_out_channels", None, "another kind of value"),
        ("vae_decoder/config.json", "block_out_channels", [], "latent.factor is 0.5, expected int"),
        ("vae_decoder/config.json", "scaling_factor", -1, "latent.scaling is -1.0, out of its range"),
        ("tokenizer/tokenizer_config.json", "model_max_length", "77", "another kind of value"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", None, "num_train_timesteps is None"),
        ("scheduler/scheduler_config.json", "beta_end", "0.012", "schedule.beta_end is '0.012'"),
    ],
)
def test_a_damaged_configuration_is_one_line(tmp_path, name, key, value, words):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", bare=True)
    _rewrite(folder / name, key, value)
    with pytest.raises(BundleError) as refused:
        Bundle.open(folder)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def _rewrite(file, key, value):
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {key: value}), encoding="utf-8")


def test_a_folder_whose_name_cannot_begin_a_files_is_refused(tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", bare=True)
    with pytest.raises(BundleError, match="not one plain file name"):
        Bundle.open(folder.rename(tmp_path / ("x" * 101)))


def test_sd3_patches_are_not_empty(tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd3", bare=True)
    _rewrite(folder / "transformer" / "config.json", "patch_size", 0)
    with pytest.raises(BundleError, match=r"latent\.patch is 0, out of its range"):
        Bundle.open(folder)


def test_a_tokenizer_without_a_limit_has_that_of_clip(tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", bare=True)
    _rewrite(folder / "tokenizer" / "tokenizer_config.json", "model_max_length", int(1e30))  # as transformers writes it
    assert Bundle.open(folder).facts.text.clip_tokens == 77


@pytest.mark.parametrize("size", ["abc", 0, [64], [64, None, 1], [64, 1.5]])
def test_a_damaged_sample_size_is_one_line(tmp_path, size):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", bare=True)
    _rewrite(folder / "unet" / "config.json", "sample_size", size)
    with pytest.raises(BundleError, match="sample_size is"):
        Bundle.open(folder).sample_size()


def test_a_configuration_without_a_key(tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", bare=True)
    (folder / "unet" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError, match="a configuration lacks 'in_channels'"):
        Bundle.open(folder)
