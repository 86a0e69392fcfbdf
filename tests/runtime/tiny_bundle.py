"""Bundles small enough to read: each component is a handful of ONNX nodes, its weights a few random numbers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.bundle import sha256
from runtime.facts import Component, Defaults, Facts, Latent, Parity, Source, Stored, Tensor, Text, write_facts

TOKENS, WIDTH, JOINT, CHANNELS, T5_TOKENS = 8, 6, 16, 4, 3
START, END = "<|startoftext|>", "<|endoftext|>"
NUMPY = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.FLOAT16: "float16"}
SD3_SCHEDULE = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
SD15_SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "timestep_spacing": "leading",
}


def graph(path: Path, nodes, inputs, outputs, weights=None) -> Component:
    """Writes nodes (op, inputs, outputs, attributes) as a graph and describes it; inputs: name -> (type, shape)."""
    made = [helper.make_node(op, ins, outs, **attributes) for op, ins, outs, attributes in nodes]
    infos = [[helper.make_tensor_value_info(n, k, s) for n, (k, s) in io.items()] for io in (inputs, outputs)]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    model = helper.make_model(
        helper.make_graph(made, path.parent.name, *infos, initializer=initializers),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    relative = path.relative_to(path.parent.parent).as_posix()
    inputs, outputs = (tuple(Tensor(n, NUMPY[k], tuple(s)) for n, (k, s) in io.items()) for io in (inputs, outputs))
    stored = Stored(relative, path.stat().st_size, sha256(path))
    return Component(relative, (stored,), "fp32", 18, inputs, outputs, Parity((2, 4), 1e-6, 1e-4))


def random(*shape, seed=0):
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * 0.5).astype(np.float32)


def text_encoder(folder: Path, name: str, projection: bool, seed: int) -> Component:
    """Embeds the ids; every hidden state is a multiple of that, the pooled output its mean."""
    nodes = [
        ("Gather", ["words", "input_ids"], ["hidden_states.0"], {}),
        ("Mul", ["hidden_states.0", "two"], ["hidden_states.1"], {}),
        ("Sin", ["hidden_states.1"], ["hidden_states.2"], {}),
        ("Sin", ["hidden_states.2"], ["last_hidden_state"], {}),
        ("ReduceMean", ["hidden_states.2", "axis"], ["pooled"], {"keepdims": 0}),
        ("Identity", ["pooled"], ["text_embeds" if projection else "pooler_output"], {}),
    ]
    weights = {
        "words": random(len(vocabulary()), WIDTH, seed=seed),
        "two": np.float32(2),
        "axis": np.array([1], np.int64),
    }
    state = (TensorProto.FLOAT, ["rows", "tokens", WIDTH])
    pooled = {"text_embeds" if projection else "pooler_output": (TensorProto.FLOAT, ["rows", WIDTH])}
    states = {f"hidden_states.{i}": state for i in range(3)}
    last = {"last_hidden_state": state}
    outputs = pooled | last | states if projection else last | pooled | states
    ids = {"input_ids": (TensorProto.INT64, ["rows", "tokens"])}
    return graph(folder / name / "model.onnx", nodes, ids, outputs, weights)


def backbone(folder: Path, family: str, scalar_timestep: bool = False, breaks_above: float | None = None) -> Component:
    """tanh(mix(x) + mean of the text + time / 1000): depends on everything, rows do not see each other.

    `breaks_above`: NaN wherever the time is larger.
    """
    sd3 = family == "sd3"
    name, sample, answer = (
        ("transformer", "hidden_states", "out_hidden_states") if sd3 else ("unet", "sample", "out_sample")
    )
    nodes = [
        ("Conv", [sample, "mix"], ["mixed"], {"pads": [1, 1, 1, 1]}),
        ("ReduceMean", ["encoder_hidden_states", "last"], ["text"], {"keepdims": 1}),
        ("ReduceMean", ["text", "middle"], ["mean"], {"keepdims": 1}),
        ("Unsqueeze", ["mean", "last"], ["told"], {}),
        ("Mul", ["timestep", "thousandth"], ["early"], {}),
        ("Reshape", ["early", "rows"], ["when"], {}),
        ("Sum", ["mixed", "told", "when"] + (["pooled"] if sd3 else []), ["total"], {}),
        ("Tanh", ["total"], ["calm"], {}),
        ("Mul", ["calm", "whole"], [answer], {}),
    ]
    if sd3:
        nodes[6:6] = [
            ("ReduceMean", ["pooled_projections", "middle"], ["pooled_2"], {"keepdims": 1}),
            ("Reshape", ["pooled_2", "rows"], ["pooled"], {}),
        ]
    weights = {
        "mix": random(CHANNELS, CHANNELS, 3, 3, seed=7),
        "last": np.array([2], np.int64),
        "middle": np.array([1], np.int64),
        "thousandth": np.float32(1e-3),
        "rows": np.array([-1, 1, 1, 1], np.int64),
    }
    if breaks_above is None:
        nodes[-1] = ("Identity", ["calm"], [answer], {})
    else:  # sqrt(limit - time), NaN where the time is beyond the limit
        nodes[-1:-1] = [("Sub", ["limit", "when"], ["left"], {}), ("Sqrt", ["left"], ["whole"], {})]
        weights["limit"] = np.float32(breaks_above / 1000)
    width = JOINT if sd3 else WIDTH
    picture = (TensorProto.FLOAT, ["rows", CHANNELS, "height", "width"])
    inputs = {
        sample: picture,
        "timestep": (TensorProto.FLOAT, [] if scalar_timestep else ["rows"]),
        "encoder_hidden_states": (TensorProto.FLOAT, ["rows", "tokens", width]),
    }
    if sd3:
        inputs["pooled_projections"] = (TensorProto.FLOAT, ["rows", 2 * WIDTH])
    return graph(folder / name / "model.onnx", nodes, inputs, {answer: picture}, weights)


def vae_decoder(folder: Path) -> Component:
    """Three colours from four channels, each latent a square of 4 x 4 pixels."""
    nodes = [
        ("Conv", ["latent_sample", "colours"], ["small"], {}),
        ("Resize", ["small", "", "scales"], ["sample"], {"mode": "nearest"}),
    ]
    weights = {"colours": random(3, CHANNELS, 1, 1, seed=9), "scales": np.array([1, 1, 4, 4], np.float32)}
    latent = {"latent_sample": (TensorProto.FLOAT, ["rows", CHANNELS, "height", "width"])}
    picture = {"sample": (TensorProto.FLOAT, ["rows", 3, "high", "wide"])}
    return graph(folder / "vae_decoder" / "model.onnx", nodes, latent, picture, weights)


def vocabulary() -> dict[str, int]:
    letters = "!abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>", START, END]
    return {word: index for index, word in enumerate(words)}


def tokenizer(folder: Path, pad: str = END) -> None:
    """A CLIP tokenizer as Optimum leaves it: vocab.json and merges.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n", encoding="utf-8")
    settings = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad, "model_max_length": TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def bundle(folder: Path, family: str = "sd3", *, bare: bool = False, tables=(), **options) -> Path:
    """Writes a whole bundle; `bare`: without bundle.json but with configurations, as Optimum does it.

    `options` are of `backbone`, and `size` (16 pixels; None: any), `random_weights`.
    """
    sd3 = family == "sd3"
    size, random_weights = options.pop("size", 16), options.pop("random_weights", False)
    components = {}
    for index, suffix in enumerate(("", "_2") if sd3 else ("",)):
        tokenizer(folder / f"tokenizer{suffix}", pad="!" if suffix else END)
        name = f"text_encoder{suffix}"
        components[name] = text_encoder(folder, name, sd3, seed=index)
    components["transformer" if sd3 else "unet"] = backbone(folder, family, **options)
    components["vae_decoder"] = vae_decoder(folder)
    for name, table in tables:
        table.save(folder / name)
    facts = Facts(
        family=family,
        name=f"tiny-{family}",
        source=Source("nobody/tiny", random_weights=random_weights),
        prediction="flow" if sd3 else "epsilon",
        schedule=SD3_SCHEDULE if sd3 else SD15_SCHEDULE,
        latent=Latent(CHANNELS, 4, 2 if sd3 else 1, 1.5 if sd3 else 0.18215, 0.06 if sd3 else 0.0, 1 if sd3 else 2),
        text=Text(TOKENS, T5_TOKENS, JOINT) if sd3 else Text(TOKENS),
        defaults=Defaults(size, size, 4.0, 3),
        components=components,
        tables=tuple(name for name, _ in tables),
        exported_by={"by": "hand"},
    )
    configurations(folder, facts) if bare else write_facts(folder, dataclasses.replace(facts, files=others(folder)))
    return folder


def others(folder: Path) -> tuple[Stored, ...]:
    """What a bundle records beside its graphs, as the exporter finds it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".onnx")
    return tuple(
        Stored(path.relative_to(folder).as_posix(), path.stat().st_size, sha256(path))
        for path in found
        if path.parent.name != "tables" and path.name != "bundle.json"
    )


def configurations(folder: Path, facts: Facts) -> None:
    """What `runtime.bundle.describe` reads where there is no bundle.json."""
    sd3 = facts.family == "sd3"
    kind = "StableDiffusion3Pipeline" if sd3 else "StableDiffusionPipeline"
    net = {"in_channels": CHANNELS, "sample_size": 4, "block_out_channels": [1, 2]}
    net |= {"patch_size": 2, "joint_attention_dim": JOINT} if sd3 else {}
    content = {
        "model_index.json": {"_class_name": kind},
        "scheduler/scheduler_config.json": dict(facts.schedule),
        f"{'transformer' if sd3 else 'unet'}/config.json": net,
        "vae_decoder/config.json": {
            "block_out_channels": [1, 2, 3],
            "scaling_factor": facts.latent.scaling,
            "shift_factor": facts.latent.shift,
        },
    }
    for name, value in content.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")


def change(folder: Path, **fields) -> None:
    """Rewrites a bundle.json with other facts."""
    from runtime.facts import read_facts

    write_facts(folder, dataclasses.replace(read_facts(folder / "bundle.json"), **fields))
