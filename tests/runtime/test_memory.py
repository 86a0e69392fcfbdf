"""What a drawing holds in memory: at full speed and with --low-memory, predicted and measured."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_bundle
from onnx import TensorProto

from export.activations import peak
from runtime import __main__ as cli
from runtime.bundle import Bundle, sha256
from runtime.errors import ProviderError
from runtime.facts import Stored, read_facts, write_facts
from runtime.footprint import predict
from runtime.memory import peak_rss_bytes
from runtime.pipeline import Pipeline
from runtime.session import Session

WIDTH, HIDDEN, LAYERS, SIDE = 256, 8192, 6, 16  # of the heavy network: 101 MB of products, 19 of convolutions


def test_a_child_does_not_start_with_its_parents_maximum():
    before = peak_rss_bytes()
    assert np.ones(40_000_000).sum() == 40_000_000  # 320 MB
    assert peak_rss_bytes() > max(before, 320e6)
    code = "from runtime.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert 1e6 < int(done.stdout) < 320e6


@pytest.fixture(scope="module")
def heavy(tmp_path_factory) -> Path:
    """A bundle whose network is convolutions, then products over the pixels as tokens; it looks at its sample alone."""
    folder = tiny_bundle.bundle(tmp_path_factory.mktemp("heavy") / "b", "sd15", size=4 * SIDE)
    kernels = {"in": (WIDTH, 4), **{f"c{i}": (WIDTH, WIDTH) for i in range(8)}, "out": (4, WIDTH)}
    weights = {
        name: tiny_bundle.random(*shape, 3, 3, seed=seed) / 24 for seed, (name, shape) in enumerate(kernels.items())
    }
    weights |= {f"up{i}": tiny_bundle.random(WIDTH, HIDDEN, seed=i) / 8 for i in range(LAYERS)}
    weights |= {f"down{i}": tiny_bundle.random(HIDDEN, WIDTH, seed=i) / 45 for i in range(LAYERS)}
    weights |= {"flat": np.array([0, WIDTH, -1]), "square": np.array([0, WIDTH, SIDE, SIDE])}
    steps = [("Conv", name, {"pads": [1] * 4}) for name in list(kernels)[:-1]]
    steps += [("Reshape", "flat", {}), ("Transpose", "", {"perm": [0, 2, 1]})]
    for i in range(LAYERS):
        steps += [("MatMul", f"up{i}", {}), ("Tanh", "", {}), ("MatMul", f"down{i}", {})]
    steps += [("Transpose", "", {"perm": [0, 2, 1]}), ("Reshape", "square", {}), ("Conv", "out", {"pads": [1] * 4})]
    names = ["sample", *(f"x{i}" for i in range(1, len(steps))), "out_sample"]
    nodes = [
        (op, [names[i], *filter(None, [weight])], [names[i + 1]], attributes)
        for i, (op, weight, attributes) in enumerate(steps)
    ]
    picture = (TensorProto.FLOAT, ["rows", 4, SIDE, SIDE])
    states = (TensorProto.FLOAT, ["rows", tiny_bundle.TOKENS, tiny_bundle.WIDTH])
    inputs = {"sample": picture, "timestep": (TensorProto.FLOAT, ["rows"]), "encoder_hidden_states": states}
    path = folder / "unet" / "model.onnx"
    unet = tiny_bundle.graph(path, nodes, inputs, {"out_sample": picture}, weights)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.onnx_data", size_threshold=1024)
    files = [(f"unet/{file.name}", file.stat().st_size, sha256(file)) for file in sorted(path.parent.iterdir())]
    facts = read_facts(folder / "bundle.json")
    parts = dict(facts.components) | {"unet": dataclasses.replace(unet, files=tuple(Stored(*file) for file in files))}
    takes = {name: peak(folder / part.graph, "rows") for name, part in parts.items()}
    counted = {name: dataclasses.replace(part, activation_bytes=takes[name]) for name, part in parts.items()}
    write_facts(folder, dataclasses.replace(facts, components=counted))
    return folder


def drawn(folder: Path, *options: str) -> dict:
    """What `generate --json` tells of a picture drawn in a process of its own, one step of K = 2: four rows."""
    command = [sys.executable, "-m", "runtime", "generate", "red", "--model", str(folder), "--steps", "1", "-k", "2"]
    command += ["--solver", "epd", "-s", "1", "-o", str(folder.parent / f"{len(options)}.png"), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("options", [[], ["--low-memory"]])
def test_the_prediction_is_within_a_quarter_of_what_is_measured(heavy, options):
    told = drawn(heavy, *options)
    assert told["peak_rss_bytes"] > 120e6
    assert told["predicted_rss_bytes"] == pytest.approx(told["peak_rss_bytes"], rel=0.25)


ANONYMOUS = """
import sys
import numpy as np
from runtime.bundle import Bundle
from runtime.session import Session

def anonymous():
    lines = open("/proc/self/status", encoding="utf-8").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

session = Session(Bundle.open(sys.argv[1]), "unet", low_memory=sys.argv[2] == "low")
feeds = {"sample": np.ones((1, 4, 16, 16)), "timestep": [1], "encoder_hidden_states": np.ones((1, 8, 6))}
import onnxruntime
before = anonymous()
answer = session(**feeds)["out_sample"]
print(anonymous() - before, float(np.abs(answer).sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell mapped memory from a program's own")
def test_low_memory_leaves_the_weights_in_their_file(heavy):
    found = []
    for how in ("full", "low"):
        command = [sys.executable, "-c", ANONYMOUS, str(heavy), how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found.append([float(word) for word in done.stdout.split()])
    (full, answer), (low, other) = found
    assert full > 110e6
    assert low < 25e6
    assert other == pytest.approx(answer, rel=1e-3)


def test_low_memory_draws_the_same_and_keeps_nothing(bundles, family):
    drawing = {"seed": 3, "output_type": "np", "num_inference_steps": 2}
    full = Pipeline.from_pretrained(bundles[family])
    lean = Pipeline.from_pretrained(bundles[family], low_memory=True)
    expected, got = full("red", **drawing), lean("red", **drawing)
    assert np.abs(got.images - expected.images).max() < 1e-5
    assert any(session.loaded for session in full.sessions.values())
    assert not any(session.loaded for session in lean.sessions.values())
    assert np.array_equal(lean("red", **drawing).images, got.images)
    assert full.profile(full.plan("")).file != lean.profile(lean.plan("")).file


@pytest.mark.parametrize(("rows", "calls"), [(1, 1), (2, 1), (4, 2), (5, 3)])
def test_low_memory_runs_few_rows_at_a_time(bundles, rows, calls):
    bundle, random = Bundle.open(bundles["sd15"]), np.random.default_rng(0)
    feeds = {
        "sample": random.standard_normal((rows, 4, 4, 4)),
        "timestep": np.arange(rows) * 100,
        "encoder_hidden_states": random.standard_normal((rows, 8, tiny_bundle.WIDTH)),
    }
    with Session(bundle, "unet") as full, Session(bundle, "unet", low_memory=True) as lean:
        assert np.abs(lean(**feeds)["out_sample"] - full(**feeds)["out_sample"]).max() < 1e-6
        assert lean.calls == calls


def test_low_memory_takes_one_timestep_for_all_rows(bundles):
    bundle, random = Bundle.open(bundles["sd15"]), np.random.default_rng(0)
    feeds = {
        "sample": random.standard_normal((4, 4, 4, 4)),
        "timestep": np.array([500]),
        "encoder_hidden_states": random.standard_normal((4, 8, tiny_bundle.WIDTH)),
    }
    with Session(bundle, "unet") as full, Session(bundle, "unet", low_memory=True) as lean:
        assert np.abs(lean(**feeds)["out_sample"] - full(**feeds)["out_sample"]).max() < 1e-6
        assert lean.calls == 2


def test_a_graph_with_one_timestep_for_all_rows_runs_whole(bundles):
    lean = Pipeline.from_pretrained(bundles["optimum"], low_memory=True)
    full = Pipeline.from_pretrained(bundles["optimum"])
    expected, got = (pipe("red", seed=1, num_inference_steps=2, output_type="np").images for pipe in (full, lean))
    assert np.abs(got - expected).max() < 1e-5


def test_the_backbone_is_gone_before_the_decoder_comes(bundles, monkeypatch):
    pipe, loaded = Pipeline.from_pretrained(bundles["sd15"], low_memory=True), []
    load = Session._load

    def watched(self):
        loaded.append((self.component, [s.component for s in pipe.sessions.values() if s.loaded]))
        load(self)

    monkeypatch.setattr(Session, "_load", watched)
    pipe("red", seed=1)
    assert loaded == [("text_encoder", []), ("unet", []), ("vae_decoder", [])]


@pytest.mark.parametrize("provider", ["cuda", "openvino", "cpu,webgpu"])
def test_low_memory_is_for_the_cpu(bundles, provider):
    with pytest.raises(ProviderError, match=r"--low-memory .*CPU provider; leave it out, or give --provider cpu"):
        Pipeline.from_pretrained(bundles["sd3"], provider=provider, low_memory=True)
    with pytest.raises(ProviderError, match="--low-memory"):
        Session(Bundle.open(bundles["sd3"]), "vae_decoder", provider="cuda", low_memory=True)


def test_a_bundle_that_does_not_say_is_not_predicted(bundles, capsys):
    pipe = Pipeline.from_pretrained(bundles["sd15"])
    assert pipe.predict(pipe.plan("")) is None
    assert cli.main(["inspect", str(bundles["sd15"])]) == 0
    assert "memory" not in capsys.readouterr().out


def test_rows_and_what_is_held_at_once_are_counted(heavy):
    pipe = Pipeline.from_pretrained(heavy)
    one, two = (pipe.plan("", solver="epd", k=2, num_images_per_prompt=images) for images in (1, 2))
    row = pipe.bundle.facts.components["unet"].activation_bytes
    assert predict(pipe.bundle, two, False, 0) - predict(pipe.bundle, one, False, 0) >= 4 * row
    assert predict(pipe.bundle, two, True, 0) == predict(pipe.bundle, one, True, 0)
    assert predict(pipe.bundle, one, True, 10**6) < predict(pipe.bundle, one, False, 0)


def test_inspect_and_generate_tell_it(heavy, tmp_path, capsys, monkeypatch, caplog):
    assert cli.main(["inspect", str(heavy)]) == 0
    assert "GB with --low-memory (predicted" in capsys.readouterr().out
    assert cli.main(["inspect", str(heavy), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["predicted_rss_bytes"]
    assert told["low_memory"] < told["full_speed"]
    monkeypatch.setattr("runtime.memory.available_bytes", lambda: 10**6)
    draw = ["generate", "red", "--model", str(heavy), "--steps", "1", "-o", str(tmp_path / "a.png")]
    with caplog.at_level(logging.WARNING):
        assert cli.main(draw) == 0
        assert "0.001 GB are available: give --low-memory (about" in caplog.text
        assert "memory: predicted" in capsys.readouterr().err
        caplog.clear()
        assert cli.main([*draw, "--low-memory"]) == 0
        assert "are available: give fewer images" in caplog.text
