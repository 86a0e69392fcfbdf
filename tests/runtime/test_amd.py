"""AMD's prebuilt folder, built here in the same layout without AMD's operators: it draws what our own bundle draws.

The transformer is diffusers' own, traced with 77 + 83 tokens; around it stand graphs of a few nodes.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_bundle
from onnx import TensorProto, helper, numpy_helper

from runtime import amd, amd_session, ryzenai
from runtime.__main__ import main
from runtime.bundle import Bundle
from runtime.errors import BundleError, ProviderError, RequestError
from runtime.facts import Component, Defaults, Facts, Latent, Source, Text, write_facts
from runtime.pipeline import Pipeline
from runtime.session import Session

HEIGHT, WIDTH, CLIP, T5 = 80, 112, 77, 83
LATENT = (6, HEIGHT // 4, WIDTH // 4)
FLOAT, HALF, INT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
PROMPT = "a red ring above a blue cross"


def halved(model: onnx.ModelProto, rename=None) -> onnx.ModelProto:
    """The same graph with half-precision inputs and outputs, cast inside; `rename`: names of its outputs."""
    graph = model.graph
    before, after = [], []
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type != FLOAT:
            continue
        value.type.tensor_type.elem_type = HALF
        inner = f"{value.name}_f32"
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [inner if name == value.name else name for name in names]
        if value in graph.input:
            before.append(helper.make_node("Cast", [value.name], [inner], to=FLOAT))
        else:
            value.name = (rename or {}).get(value.name, value.name)
            after.append(helper.make_node("Cast", [inner], [value.name], to=HALF))
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def controlled(model: onnx.ModelProto, blocks: int = 12) -> onnx.ModelProto:
    """A graph of 2 rows that adds the sums of its ControlNet inputs to its answer, as AMD's would feel them."""
    graph = model.graph
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    tokens = LATENT[1] * LATENT[2] // 4
    last = graph.node[-1]  # the cast of the answer
    sums = []
    for index in range(blocks):
        name = f"block_controlnet_hidden_states_{index}"
        shape = [2, tokens, 48] if index % 2 else ["batch", "tokens", 48]
        graph.input.append(helper.make_tensor_value_info(name, HALF, shape))
        sums.append(f"sum_{index}")
        graph.node.append(helper.make_node("Cast", [name], [f"{name}_f32"], to=FLOAT))
        graph.node.append(helper.make_node("ReduceSum", [f"{name}_f32", "width"], [sums[-1]], keepdims=1))
    graph.initializer.append(numpy_helper.from_array(np.array([1, 2], np.int64), "width"))
    graph.initializer.append(numpy_helper.from_array(np.array([3], np.int64), "fourth"))
    graph.node.append(helper.make_node("Sum", sums, ["control"]))
    graph.node.append(helper.make_node("Unsqueeze", ["control", "fourth"], ["control_4"]))
    graph.node.append(helper.make_node("Add", [last.input[0], "control_4"], ["felt"]))
    nodes = [node for node in graph.node if node is not last]
    last.input[0] = "felt"
    nodes.append(last)
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copied)
    return model


def encoder(folder: Path, name: str, width: int, tokens: int, seed: int) -> Component:
    """Embeds the ids; CLIP's has a pooled output and three hidden states, T5's the embedding alone."""
    states = [f"hidden_states.{i}" for i in range(3)]
    clip = [
        ("Gather", ["words", "input_ids"], [states[0]], {}),
        ("Sin", [states[0]], [states[1]], {}),
        ("Sin", [states[1]], [states[2]], {}),
        ("ReduceMean", [states[2], "axis"], ["text_embeds"], {"keepdims": 0}),
        ("Identity", [states[2]], ["last_hidden_state"], {}),
    ]
    t5 = [("Gather", ["words", "input_ids"], ["last_hidden_state"], {})]
    state = (FLOAT, ["rows", tokens, width])
    outputs = {"text_embeds": (FLOAT, ["rows", width]), "last_hidden_state": state} | dict.fromkeys(states, state)
    weights = {"words": tiny_bundle.random(400, width, seed=seed), "axis": np.array([1], np.int64)}
    if name == "text_encoder_3":
        clip, outputs = t5, {"last_hidden_state": state}
        del weights["axis"]
    return tiny_bundle.graph(
        folder / name / "model.onnx", clip, {"input_ids": (INT, ["rows", tokens])}, outputs, weights
    )


def decoder(folder: Path) -> Component:
    nodes = [
        ("Conv", ["latent_sample", "colours"], ["small"], {}),
        ("Resize", ["small", "", "scales"], ["sample"], {"mode": "nearest"}),
    ]
    weights = {"colours": tiny_bundle.random(3, 6, 1, 1, seed=9), "scales": np.array([1, 1, 4, 4], np.float32)}
    shapes = ["rows", *LATENT], ["rows", 3, HEIGHT, WIDTH]
    given, answer = ({name: (FLOAT, shape)} for name, shape in zip(("latent_sample", "sample"), shapes, strict=True))
    return tiny_bundle.graph(folder / "vae_decoder" / "model.onnx", nodes, given, answer, weights)


def transformer(folder: Path, checkpoint: Path) -> Component:
    """diffusers' small transformer, traced with 160 tokens, any number of rows, half-precision in and out."""
    from export import graph
    from export.components import contract, module
    from runtime.bundle import describe

    facts = describe(checkpoint, "tiny", Source("tiny"), t5_tokens=T5)
    facts = dataclasses.replace(facts, text=Text(CLIP, T5, facts.text.joint_width))
    agreed = contract("transformer", checkpoint, facts, HEIGHT, WIDTH)
    network = module("transformer", checkpoint, facts, "fp32", None, False).eval()
    with warnings.catch_warnings(action="ignore"):  # torch's own
        traced = graph.trace(network, agreed.inputs, agreed.outputs, agreed.samples(2), 18)
    path = folder / "transformer" / "model.onnx"
    path.parent.mkdir(parents=True)
    graph.save(traced, path)
    onnx.save(halved(onnx.load(path)), path)
    inputs, outputs = (
        tuple(dataclasses.replace(t, dtype="float16") for t in ts) for ts in (agreed.inputs, agreed.outputs)
    )
    return Component("transformer/model.onnx", (), "fp16", 18, inputs, outputs)


def tokenizers(folder: Path) -> None:
    from tests.pipelines import _t5_tokenizer

    for suffix in ("", "_2"):
        tiny_bundle.tokenizer(folder / f"tokenizer{suffix}", pad="!" if suffix else tiny_bundle.END)
        file = folder / f"tokenizer{suffix}" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": CLIP}), encoding="utf-8")
    _t5_tokenizer().save_pretrained(folder / "tokenizer_3")


@pytest.fixture(scope="module")
def ours(tiny_checkpoints, tmp_path_factory) -> Path:
    """Our own bundle of 77 + 83 tokens, half-precision in and out of its transformer and VAE."""
    folder = tmp_path_factory.mktemp("ours") / "tiny"
    components = {
        "text_encoder": encoder(folder, "text_encoder", 24, CLIP, 1),
        "text_encoder_2": encoder(folder, "text_encoder_2", 40, CLIP, 2),
        "text_encoder_3": encoder(folder, "text_encoder_3", 72, T5, 3),
        "transformer": transformer(folder, tiny_checkpoints["sd3"]),
        "vae_decoder": decoder(folder),
    }
    file = folder / components["vae_decoder"].graph
    onnx.save(halved(onnx.load(file)), file)
    components = {name: dataclasses.replace(part, files=()) for name, part in components.items()}
    tokenizers(folder)
    facts = Facts(
        family="sd3",
        name="tiny",
        source=Source("tiny"),
        prediction="flow",
        schedule=tiny_bundle.SD3_SCHEDULE,
        latent=Latent(6, 4, 2, 1.5, 0.06),
        text=Text(CLIP, T5, 72),
        defaults=Defaults(HEIGHT, WIDTH, 4.0, 3),
        components=components,
    )
    write_facts(folder, facts)
    return folder


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory) -> Path:
    """The same weights in AMD's layout; not to be changed by a test."""
    return as_amds(ours, tmp_path_factory.mktemp("theirs") / "sd3-medium-amdnpu")


def as_amds(ours: Path, folder: Path, room: str = "dynamic", pieces: str = "cache") -> Path:
    common = folder / "common"
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(ours / name, common / name)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        model = onnx.load(ours / name / "model.onnx")
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1
        if name == "text_encoder":  # names of their own, in the order of AMD's program
            for value, new in zip(model.graph.output, ("pooled", "last", "x", "input.95", "end"), strict=True):
                for node in model.graph.node:
                    for names in (node.input, node.output):
                        names[:] = [new if one == value.name else one for one in names]
                value.name = new
        (common / name).mkdir()
        onnx.save(model, common / name / ("model.onnx" if name == "text_encoder" else f"{name}.onnx"))
    size = "" if room == "dynamic" else room.partition("_")[0]
    graphs = {
        folder / "normal" / "transformer" / room: controlled(renamed(ours / "transformer" / "model.onnx", "velocity")),
        common / "vae_decoder" / (size or room): renamed(ours / "vae_decoder" / "model.onnx", "picture"),
    }
    for place, model in graphs.items():
        (place / "dd" / pieces).mkdir(parents=True)
        onnx.save(model, place / "dd" / "replaced.onnx")
    configurations = {
        "common/scheduler/scheduler_config.json": tiny_bundle.SD3_SCHEDULE,
        "normal/transformer/config.json": {
            "in_channels": 6, "patch_size": 2, "joint_attention_dim": 72, "sample_size": [HEIGHT // 4, WIDTH // 4],
        },
        "common/vae_decoder/config.json": {
            "block_out_channels": [8, 16, 20], "scaling_factor": 1.5, "shift_factor": 0.06,
        },
    }  # fmt: skip
    for path, content in configurations.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content), encoding="utf-8")
    return folder


def renamed(file: Path, answer: str) -> onnx.ModelProto:
    """A graph whose answer has another name."""
    model = onnx.load(file)
    model.graph.node[-1].output[0] = model.graph.output[0].name = answer
    return model


def test_the_facts_of_the_folder(theirs, tmp_path):
    bundle = Bundle.open(theirs)
    facts = bundle.facts
    assert (bundle.foreign, facts.target, facts.family, facts.name) == (True, "ryzenai", "sd3", "sd3-medium-amdnpu")
    assert (facts.text.clip_tokens, facts.text.t5_tokens) == (77, 83)
    assert facts.components["transformer"].rows == (2,)
    assert facts.latent == Latent(6, 4, 2, 1.5, 0.06)
    assert bundle.sample_size() == (HEIGHT, WIDTH)
    assert bundle.fingerprint() is None
    plain = tmp_path / "plain"  # a folder without configurations is Stable Diffusion 3 Medium
    shutil.copytree(theirs, plain)
    for file in plain.rglob("config.json"):
        file.unlink()
    shutil.rmtree(plain / "common" / "scheduler")
    facts = Bundle.open(plain).facts
    assert facts.latent == Latent(16, 8, 2, 1.5305, 0.0609)
    assert (facts.text.joint_width, facts.schedule["shift"]) == (4096, 3.0)


@pytest.mark.parametrize("k", [1, 2])
def test_it_draws_what_our_own_bundle_draws(ours, theirs, k, caplog):
    asked = {"solver": "epd", "k": k, "num_inference_steps": 2, "guidance_scale": 4.0, "seed": 3, "output_type": "np"}
    size = {"height": HEIGHT, "width": WIDTH}
    reference = Pipeline.from_pretrained(ours)(PROMPT, negative_prompt="a square", **asked)
    result = Pipeline.from_pretrained(theirs)(PROMPT, negative_prompt="a square", **asked, **size)
    assert reference.images.std() > 0.02
    assert np.abs(result.images - reference.images).max() < 1e-3  # the last place of half precision
    one, other = result.report, reference.report
    assert (one.directions, other.directions) == ("calls", "batch")
    assert one.guided_forwards == other.guided_forwards == 2 * one.total_evaluations
    assert one.total_evaluations == 2 * (1 + k)
    assert not caplog.records  # calls of two rows are how it is, and no warning


def test_the_t5_is_felt_and_its_want_is_told(theirs, tmp_path, caplog):
    folder = tmp_path / "torch"
    shutil.copytree(theirs, folder)
    (folder / "common" / "text_encoder_3").rename(folder / "common" / "text_encoder_3_gptq_v1")
    asked = {"num_inference_steps": 1, "seed": 3, "output_type": "latent"}
    whole, without = (Pipeline.from_pretrained(one)(PROMPT, **asked).images for one in (theirs, folder))
    assert np.abs(whole - without).max() > 1e-3
    assert "no T5 for ONNX Runtime" in caplog.text


def test_what_the_control_inputs_get(theirs):
    """Zeros: the same numbers as from the graph fed by hand; anything else is felt."""
    bundle = Bundle.open(theirs)
    random = np.random.default_rng(0)
    feeds = {
        "hidden_states": random.standard_normal((2, *LATENT)),
        "encoder_hidden_states": random.standard_normal((2, CLIP + T5, 72)),
        "pooled_projections": random.standard_normal((2, 64)),
        "timestep": np.array([500.0, 500.0]),
    }
    answer = Session(bundle, "transformer")(**feeds)["out_hidden_states"]
    raw = onnxruntime.InferenceSession(bundle.graph("transformer"), providers=["CPUExecutionProvider"])
    tokens = LATENT[1] * LATENT[2] // 4
    names = [one.name for one in raw.get_inputs() if "controlnet" in one.name]
    assert len(names) == 12
    half = {name: value.astype(np.float16) for name, value in feeds.items()}
    zeros = half | {name: np.zeros((2, tokens, 48), np.float16) for name in names}
    assert answer.dtype == np.float16
    assert np.array_equal(answer, raw.run(None, zeros)[0])
    zeros[names[5]][:] = 1e-3
    assert np.abs(answer - raw.run(None, zeros)[0]).max() > 1


def test_what_does_not_fit_is_refused(theirs, ours, tmp_path, capsys):
    pipe = Pipeline.from_pretrained(theirs)
    with pytest.raises(RequestError, match=r"1 rows cannot be made up .* 2 rows; give a --guidance-scale above 1"):
        pipe("x", guidance_scale=1.0, num_inference_steps=1)
    with pytest.raises(RequestError, match=r"hidden_states must be float16 \[rows, 6, 20, 28\]; got .*20, 20\]"):
        pipe("x", width=80, num_inference_steps=1)
    sized = as_amds(ours, tmp_path / "sized", "1024_83")
    assert Bundle.open(sized).facts.defaults.height == 1024
    with pytest.raises(RequestError, match=r"hidden_states must be float16 \[rows, 6, 20, 28\]; got .*256, 256"):
        Pipeline.from_pretrained(sized)("x", num_inference_steps=1)
    assert main(["generate", "x", "--model", str(sized), "-W", "512"]) == 2
    assert "is prebuilt for 1024x1024 (height x width), not 1024x512" in capsys.readouterr().err
    short = tmp_path / "short"
    shutil.copytree(theirs, short)
    (short / "normal" / "transformer" / "dynamic").rename(short / "normal" / "transformer" / "dynamic_77")
    with pytest.raises(
        RequestError, match=r"text_encoder_3: input input_ids must be int64 \[rows, 83\]; got int64 \[2, 77\]"
    ):
        Pipeline.from_pretrained(short)("x", num_inference_steps=1)


def test_of_several_sizes_one_is_named(theirs, tmp_path, caplog):
    folder = tmp_path / "sizes"
    shutil.copytree(theirs, folder)
    net = folder / "normal" / "transformer"
    for room in ("512_83", "1024_83"):
        shutil.copytree(net / "dynamic", net / room)
    shutil.rmtree(net / "dynamic")
    assert Bundle.open(folder).graph("transformer") == net / "1024_83" / "dd" / "replaced.onnx"
    assert f"for others give --model {net / '512_83'}" in caplog.text
    bundle = Bundle.open(net / "512_83")
    assert (bundle.folder, bundle.facts.defaults.height) == (folder, 512)
    (net / "link").symlink_to(tmp_path / "elsewhere")  # as a cache of the hub's has them
    (net / "512_83").rename(tmp_path / "elsewhere")
    assert Bundle.open(net / "link").graph("transformer") == net / "link" / "dd" / "replaced.onnx"
    (net / "link").rename(net / "512_83")
    (net / "other").mkdir()
    with pytest.raises(BundleError, match="choose from 1024_83, 512_83"):
        Bundle.open(net / "other")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("common/vae_decoder/config.json", {"block_out_channels": 4}, "a configuration holds another kind of value"),
        ("common/tokenizer/tokenizer_config.json", {"model_max_length": "77"}, "another kind of value"),
        ("normal/transformer/config.json", {"in_channels": 0}, "latent.channels is 0, out of its range"),
        ("normal/transformer/config.json", {"patch_size": "2"}, "patch"),
    ],
)
def test_a_damaged_configuration_is_one_line(theirs, tmp_path, file, content, words):
    folder = tmp_path / "damaged"
    shutil.copytree(theirs, folder)
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BundleError, match=words) as told:
        Bundle.open(folder)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("normal/transformer/dynamic/dd/replaced.onnx", r"no \*/dd/replaced.onnx in it; AMD's folder is not whole"),
        ("common/vae_decoder/dynamic", "vae_decoder: none of vae_decoder/dynamic/dd/replaced.onnx, .*not whole"),
        ("common/text_encoder_2", "text_encoder_2: none of text_encoder_2/model.onnx, "),
    ],
)
def test_a_missing_piece_is_one_line(theirs, tmp_path, missing, words):
    folder = tmp_path / "part"
    shutil.copytree(theirs, folder)
    shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
    with pytest.raises(BundleError, match=words) as told:
        Bundle.open(folder)
    assert "\n" not in str(told.value)


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """Makes an installation of a release, with libraries that have AMD's entry point and no operators."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    monkeypatch.delenv("CONDA_DEFAULT_ENV", raising=False)

    def make(release: str, library: str) -> Path:
        folder = tmp_path / "RyzenAI" / release / "deployment"
        folder.mkdir(parents=True)
        source = folder / "none.c"
        source.write_text("void *RegisterCustomOps(void *options, const void *api) { return 0; }\n", encoding="utf-8")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / library, source], check=True)
        monkeypatch.setenv("RYZEN_AI_INSTALLATION_PATH", str(folder.parent))
        return folder / library

    return make


class OnPlugin(amd_session.Adapted):
    """As if AMD's plugin ran all of a graph for the NPU."""

    def get_providers(self):
        return [amd_session.LIGHT.ort] if amd.is_compiled(self._graph) else super().get_providers()

    def get_provider_graph_assignment_info(self):
        parts = super().get_provider_graph_assignment_info()
        if not amd.is_compiled(self._graph):
            return parts
        return [part._replace(ep_name=amd_session.LIGHT.ort) for part in parts]


def drawn(folder: Path, provider: str):
    pipe = Pipeline.from_pretrained(folder, provider=provider)
    return pipe(PROMPT, num_inference_steps=1, seed=3, output_type="np", height=HEIGHT, width=WIDTH)


@pytest.mark.parametrize("provider", ["vitisai", "ryzenai"])
def test_up_to_1_7_a_library_of_operators_within_the_cpu_provider(theirs, installation, monkeypatch, provider):
    installation("1.7.1", "libonnx_custom_ops.so")
    with pytest.raises(ProviderError, match="none of its nodes would run on the NPU"):
        drawn(theirs, provider)  # no operator here is AMD's
    entries = []
    told = amd_session._told
    monkeypatch.setattr(amd_session, "_told", lambda graph: entries.append(told(graph)) or entries[-1])
    monkeypatch.setattr(amd_session, "_DOMAINS", ())  # all operators are
    result = drawn(theirs, provider)
    assert np.abs(result.images - drawn(theirs, "cpu").images).max() < 1e-3
    assert result.report.provider["ran"] == "RyzenAILightExecutionProvider"
    assert set(result.report.provider["nodes"]) == {"RyzenAILightExecutionProvider", "CPUExecutionProvider"}  # CLIP, T5
    places = [theirs / "common" / "vae_decoder" / "dynamic", theirs / "normal" / "transformer" / "dynamic"]
    assert [one["dd_cache"] for one in entries] == [(place / "dd" / "cache").as_posix() for place in places]


def test_from_1_8_on_a_plugin_provider(theirs, installation, monkeypatch, tmp_path):
    library = installation("1.8.0", "libonnxruntime_providers_ryzenai.so")
    reference = drawn(theirs, "cpu").images
    with pytest.raises(ProviderError, match=r"RyzenAILightExecutionProvider: its library .* does not load"):
        drawn(theirs, "vitisai")  # for it is none
    given = []
    monkeypatch.setattr(amd_session, "add_provider", lambda ort, options, row, told: given.append((row.name, told)))
    with pytest.raises(ProviderError, match="none of its nodes would run on the NPU"):
        drawn(theirs, "vitisai")
    given.clear()
    monkeypatch.setattr(amd_session, "Adapted", OnPlugin)
    folder = tmp_path / "folder"
    shutil.copytree(theirs, folder)
    graph = folder / "normal" / "transformer" / "dynamic" / "dd" / "replaced.onnx"
    data = graph.with_name("replaced.onnx.data")
    data.write_bytes(b"weights")
    pipe = Pipeline.from_pretrained(folder, provider="vitisai", provider_options={"fusion_opt_stack_size": "60"})
    result = pipe(PROMPT, num_inference_steps=1, seed=3, output_type="np", height=HEIGHT, width=WIDTH)
    assert np.abs(result.images - reference).max() < 1e-3
    assert [name for name, _ in given] == ["ryzenai", "ryzenai"]
    told = given[1][1]
    assert told["dd_cache"] == (graph.parent / "cache").as_posix()
    assert told["external_data_file"] == data.as_posix()
    assert told["fusion_opt_stack_size"] == "60"
    assert "external_data_file" not in given[0][1]  # the VAE is loaded first, and has none
    assert ryzenai.provider_library(ryzenai.software()) == library


@pytest.mark.parametrize(
    ("release", "library", "change", "words"),
    [
        ("1.8.0", "other.so", None, "is not in the installed onnxruntime .*; install AMD's Ryzen AI software"),
        (
            "1.7.1",
            "other.so",
            None,
            r"no library of AMD's operators \(onnx_custom_ops\) in this Ryzen AI 1\.7\.1; install",
        ),
        ("1.4.1", "other.so", None, r"Ryzen AI 1\.4\.1 has no Stable Diffusion 3; install 1\.8"),
        (
            "1.8.0",
            "other.so",
            "readme",
            r"made for Ryzen AI 1\.7\.1, installed is 1\.8\.0 .*download the folder's revision",
        ),
        ("1.7.1", "libonnx_custom_ops.so", "pieces", "no folder cache or .cache of compiled pieces"),
    ],
)
def test_what_stands_in_the_way_is_one_line(theirs, installation, tmp_path, capsys, release, library, change, words):
    installation(release, library)
    folder = tmp_path / "folder"
    shutil.copytree(theirs, folder)
    if change == "readme":
        (folder / "README.md").write_text("# SD3\nRuns with Ryzen AI Software 1.7.1.\n", encoding="utf-8")
    if change == "pieces":
        shutil.rmtree(folder / "common" / "vae_decoder" / "dynamic" / "dd" / "cache")
    size = ["-H", str(HEIGHT), "-W", str(WIDTH), "-o", str(tmp_path / "x.png")]
    assert main(["generate", "x", "--model", str(folder), "--provider", "vitisai", *size]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert re.search(words, told), told


def test_amds_operators_want_its_provider(theirs, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(theirs, folder)
    file = Bundle.open(folder).graph("vae_decoder")
    model = onnx.load(file)
    model.graph.node[0].op_type, model.graph.node[0].domain = "DynamicDispatch", "com.ryzenai"
    model.opset_import.append(helper.make_opsetid("com.ryzenai", 1))
    onnx.save(model, file)
    with pytest.raises(ProviderError, match=r"has operators of AMD's own \(.*com.ryzenai.*\); give --provider vitisai"):
        Session(Bundle.open(folder), "vae_decoder").load()


def test_other_machines_are_refused(theirs, monkeypatch):
    monkeypatch.setattr(ryzenai, "npus", lambda: [ryzenai.Npu("1502", "00", None)])
    with pytest.raises(ProviderError, match="need a Strix or newer, here is AMD Phoenix or Hawk Point"):
        drawn(theirs, "vitisai")


def test_other_providers_and_a_missing_installation_are_refused(theirs, monkeypatch):
    monkeypatch.delenv("RYZEN_AI_INSTALLATION_PATH", raising=False)
    with pytest.raises(ProviderError, match="AMD's prebuilt graphs run on its NPU alone; give --provider vitisai"):
        Pipeline.from_pretrained(theirs, provider="directml")
    with pytest.raises(ProviderError, match="RYZEN_AI_INSTALLATION_PATH names no folder; install AMD's Ryzen AI"):
        drawn(theirs, "vitisai")
    with pytest.raises(ProviderError, match="has no option 'cache_dir'"):
        Pipeline.from_pretrained(theirs, provider="vitisai", provider_options={"cache_dir": "x"})
    with pytest.raises(ProviderError, match="text_encoder: AMD's folder has it as a plain graph, for the CPU"):
        Session(Bundle.open(theirs), "text_encoder", provider="vitisai", fallback="never")
