"""Qualcomm's NPU, on its x86 emulator: every row of a request comes out right, and so do pictures.

Skipped where onnxruntime-qnn is not. EPD_TEST_BUNDLE is a bundle exported with `--target qnn` (see `.ci/run`); without
it only the small graphs are run.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image

from runtime.__main__ import main
from runtime.bundle import Bundle
from runtime.ort import add_provider, onnxruntime
from runtime.providers import PROVIDERS
from runtime.session import Session
from tests.export.lint_graphs import QNN_ROWS

pytest.importorskip("onnxruntime_qnn", reason="needs onnxruntime-qnn beside onnxruntime")

RIGHT = [name for name, (_, rule) in QNN_ROWS.items() if rule is None]
WRONG = [name for name, (_, rule) in QNN_ROWS.items() if rule == "shared-rows" and name != "factor"]
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


def errors(got, wanted):
    """Root mean square error of every row, relative to the row."""
    axes = tuple(range(1, wanted.ndim))
    return np.sqrt(((got - wanted) ** 2).mean(axes) / (wanted**2).mean(axes))


def error_of(name, rewritten=False):
    """Of the worst row of a small graph, as it is or rewritten."""
    model = QNN_ROWS[name][0]()
    shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    wanted = run(model, "cpu", feeds)
    if rewritten:
        from export import rewrites  # beside QNN alone: with it, an environment that lacks onnxscript must fail

        model = rewrites.ir.to_proto(rewrites.rewrite(rewrites.ir.from_proto(model), "qnn"))
    return errors(run(model, "qnn", feeds), wanted).max()


@pytest.mark.parametrize("name", RIGHT)
def test_every_row_is_right_where_the_lint_has_nothing_to_tell(name):
    assert error_of(name) < 0.01


@pytest.mark.parametrize("name", WRONG)
def test_every_row_is_right_once_the_graph_is_rewritten(name):
    assert error_of(name, rewritten=True) < 0.01


@pytest.mark.slow
def test_what_is_rewritten_comes_out_wrong_as_it_is():
    """Else a newer release has mended it. In a process of its own: what it reads is not always its own memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            found = pool.submit(error_of, WRONG[0]).result()
        except BrokenProcessPool:
            found = np.inf
    assert found > 0.1


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
