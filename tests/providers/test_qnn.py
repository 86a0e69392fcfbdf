"""Qualcomm's NPU, on its x86 emulator: every row of a request comes out right, and so do pictures.

Skipped where onnxruntime-qnn is not. EPD_TEST_BUNDLE is a bundle exported with `--target qnn` (see `.ci/run`); without
it only the small graphs are run.
"""

import json
import os

import numpy as np
import onnx
import pytest
from PIL import Image

from export.lint import lint
from runtime.__main__ import main
from runtime.bundle import Bundle
from runtime.ort import add_provider, onnxruntime
from runtime.providers import PROVIDERS
from runtime.session import Session
from tests.export.lint_graphs import QNN_ROWS

pytest.importorskip("onnxruntime_qnn", reason="needs onnxruntime-qnn beside onnxruntime")
rewrites = pytest.importorskip("export.rewrites", reason="needs onnx-ir")

BUNDLE = os.environ.get("EPD_TEST_BUNDLE")
PROMPT = "a large red circle at the top left on a navy background"
needs_bundle = pytest.mark.skipif(not BUNDLE, reason="needs EPD_TEST_BUNDLE")


def run(model, provider, feeds):
    """The first output of a small graph."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if provider != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        add_provider(ort, options, PROVIDERS[provider], {})
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)[0]


def noise(model):
    shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
    return {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}


def errors(got, wanted):
    """Root mean square error of every row, relative to the row."""
    axes = tuple(range(1, wanted.ndim))
    return np.sqrt(((got - wanted) ** 2).mean(axes) / (wanted**2).mean(axes))


@pytest.mark.parametrize("name", QNN_ROWS)
def test_the_lint_tells_of_graphs_whose_later_rows_come_out_wrong(name, tmp_path):
    build, right = QNN_ROWS[name]
    model = build()
    onnx.save(model, tmp_path / "model.onnx")
    found = {one.rule for one in lint([tmp_path / "model.onnx"], "qnn")}
    feeds = noise(model)
    wrong = errors(run(model, "qnn", feeds), run(model, "cpu", feeds))
    assert (wrong.max() < 0.01) == right, "another release: see export.rewrites and the lint's rule shared-rows"
    assert found == (set() if right else {"shared-rows"})


@pytest.mark.parametrize("name", [name for name, (_, right) in QNN_ROWS.items() if not right and name != "factor"])
def test_rewritten_they_are_right(name, tmp_path):
    model = QNN_ROWS[name][0]()
    rewritten = rewrites.ir.to_proto(rewrites.rewrite(rewrites.ir.from_proto(model), "qnn"))
    onnx.save(rewritten, tmp_path / "model.onnx")
    feeds = noise(model)
    assert errors(run(rewritten, "qnn", feeds), run(model, "cpu", feeds)).max() < 0.01
    assert not list(lint([tmp_path / "model.onnx"], "qnn"))


@needs_bundle
def test_every_row_of_a_request_is_right_and_on_the_device():
    """Of four rows in one call, and of the same in pairs."""
    bundle = Bundle.open(BUNDLE)
    rng = np.random.default_rng(0)
    shapes = {one.name: one.shape[1:] for one in bundle.facts.components[bundle.backbone].inputs}
    feeds = {name: rng.standard_normal((4, *shape)) for name, shape in shapes.items()}
    feeds["timestep"] = np.array([900.0, 500.0, 250.0, 20.0])
    with Session(bundle, bundle.backbone) as session:
        wanted = next(iter(session(**feeds).values()))
    with Session(bundle, bundle.backbone, provider="qnn", fallback="never") as session:
        whole = next(iter(session(**feeds).values()))
        halves = [session(**{name: value[half] for name, value in feeds.items()}) for half in (slice(2), slice(2, 4))]
        assert not session.assignment.fallbacks
        assert session.assignment.share == 1
    pairs = np.concatenate([next(iter(half.values())) for half in halves])
    assert errors(whole, wanted).max() < 0.02
    assert errors(pairs, wanted).max() < 0.02


@needs_bundle
def test_two_directions_draw_the_picture_that_the_cpu_draws_strictly(capsys, tmp_path):
    pictures = []
    for provider in ("cpu", "qnn"):
        file = tmp_path / f"{provider}.png"
        asked = ["--model", BUNDLE, "--provider", provider, "--calls", "6", "-s", "3", "-o", str(file)]
        assert main(["generate", PROMPT, "--json", "--strict", *asked]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["provider"]["nodes"].keys() == {PROVIDERS[provider].ort}
        assert told["provider"]["fallbacks"] == []
        assert told["total_evaluations"] > told["sequential_calls"]
        pictures.append(np.asarray(Image.open(file), np.float64))
    error = ((pictures[0] - pictures[1]) ** 2).mean()
    assert error < 255**2 / 10**3.5, "PSNR under 35 dB"
