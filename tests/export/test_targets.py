"""Bundles for targets: graphs per row count over one data file, what a target denies, options that mean nothing."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export import ExportError, worker
from export.__main__ import main
from export.lint import TARGETS as RULES
from export.lint import lint
from export.targets import TARGETS, backbone_rows, choose, component_rows, precision
from export.worker import Job
from runtime.bundle import Bundle
from runtime.pipeline import Pipeline
from tests.compare import psnr
from tests.conftest import SIZES
from tests.export import lint_graphs as small


def job(checkpoint: Path, folder: Path, **changes: object) -> Job:
    given = {
        "task": "export",
        "component": "transformer",
        "checkpoint": str(checkpoint),
        "source": str(checkpoint),
        "folder": str(folder),
        "result": "",
        "precision": "fp32",
        "height": 64,
        "width": 80,
        "directions": 2,
        "opset": 20,
        "t5_tokens": 8,
        "target": "qnn",
        "rows": [2, 4],  # as JSON gives it
    }
    return Job(**given | changes)


@pytest.fixture(scope="module")
def graphs(tiny_checkpoints, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a backbone of 2 and 4 rows, and what its worker found."""
    folder = tmp_path_factory.mktemp("transformer")
    told = job(tiny_checkpoints["sd3"], folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its exporter
        found = worker.export(told)
    return folder, found | worker.parity(told)


def test_a_graph_per_row_count_over_one_data_file(graphs):
    folder, found = graphs
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx_data", "model_rows4.onnx"}
    places = []
    for rows, name in ((2, "model.onnx"), (4, "model_rows4.onnx")):
        model = onnx.load(folder / name, load_external_data=False)
        values = (*model.graph.input, *model.graph.output)
        shapes = [[size.dim_value for size in value.type.tensor_type.shape.dim] for value in values]
        assert all(shape[0] == rows and all(shape) for shape in shapes)
        assert not list(lint([folder / name], "qnn"))
        external = [one for one in model.graph.initializer if one.external_data]
        places.append(Counter(str(one.external_data[1].value) for one in external))
        inside = sum(len(one.raw_data) for one in model.graph.initializer if not one.external_data)
        assert inside < (folder / "model.onnx_data").stat().st_size / 20
    assert places[1]
    assert set(places[1]) <= set(places[0])
    assert found["rows"] == (2, 4)
    assert found["error"] <= found["tolerance"]
    assert found["inputs"][0]["shape"][0] == "rows"


def test_the_graph_of_four_rows_is_that_of_two_twice(graphs):
    folder, found = graphs
    two, four = (onnxruntime.InferenceSession(folder / name) for name in ("model.onnx", "model_rows4.onnx"))
    random = np.random.default_rng(0)
    fed = {
        tensor["name"]: random.standard_normal((4, *tensor["shape"][1:])).astype(np.float32)
        for tensor in found["inputs"]
    }
    (whole,) = four.run(None, fed)
    halves = [
        two.run(None, {name: value[half] for name, value in fed.items()})[0] for half in np.split(np.arange(4), 2)
    ]
    np.testing.assert_allclose(np.concatenate(halves), whole, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize(
    ("target", "build"), [("qnn", small.loop), ("qnn", small.nonzero), ("webgpu", small.attention)]
)
def test_what_the_target_cannot_run_is_named(target, build, tmp_path):
    onnx.save(build(), tmp_path / "model.onnx")
    kind = build().graph.node[0].op_type
    with pytest.raises(ExportError, match=rf"transformer: --target {target} cannot run its graph: {kind} "):
        worker._check_operators(job(Path(), tmp_path, target=target, rows=()))
    worker._check_operators(job(Path(), tmp_path, target="cpu", rows=()))


def test_every_target_that_lint_knows_can_be_exported_for():
    assert set(RULES) <= set(TARGETS)
    for name, rules in RULES.items():
        for rule in rules:
            if rule.id == "opset":
                assert all(rule.limit[0] <= opset <= rule.limit[1] for opset in TARGETS[name].opsets)


@pytest.mark.parametrize(
    ("name", "directions", "rows", "made"),
    [
        ("cpu", 3, None, ()),
        ("qnn", None, None, (2, 4)),
        ("qnn", 1, None, (2,)),
        ("qnn", 3, None, (2, 6)),
        ("qnn", None, [4, 1, 2, 4], (2, 1, 4)),
        ("qnn", None, [4, 1], (1, 4)),
        ("vitisai", None, None, (2,)),
        ("vitisai", None, [1, 2], (2, 1)),
    ],
)
def test_rows_of_the_graphs(name, directions, rows, made):
    assert backbone_rows(name, directions, rows) == made


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--rows", "2"], "--rows: the graphs for --target cpu take any number of rows; leave it out"),
        (["--target", "webgpu", "--rows", "2"], "--rows: the graphs for --target webgpu"),
        (["--target", "qnn", "--rows", "2", "-k", "2"], "--rows and -k: both say"),
        (["--target", "qnn", "--rows", "0", "2"], "--rows 0: a graph has at least one row"),
        (["--target", "qnn", "-k", "0"], "-k 0: at least one direction is needed"),
        (["--target", "vitisai", "-k", "2"], "-k 2: --target vitisai gets a graph of 2 rows"),
        (["--target", "vitisai", "--dtype", "fp16"], "--dtype fp16: --target vitisai takes fp32"),
        (["--target", "qnn", "--opset", "23"], "--opset 23: --target qnn takes 18, 20, 21"),
        (["--target", "qnn", "--rows", "2", "--components", "vae_decoder"], "--rows: of the backbone"),
    ],
)
def test_options_that_mean_nothing_for_a_target(words, line, tiny_checkpoints, tmp_path, capsys):
    assert main([str(tiny_checkpoints["sd15"]), "-o", str(tmp_path / "bundle"), *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith(f"export: {line}")
    assert not (tmp_path / "bundle").exists()


def test_a_cpu_calibrates_what_has_convolutions():
    assert precision("unet", "int8", "cpu") == precision("transformer", "int8", "cpu") == "int8"


@pytest.mark.slow
def test_a_bundle_for_qnn_draws_what_the_dynamic_one_draws(tiny_checkpoints, tiny_bundles, tmp_path, capsys):
    """Graphs of 2 and 4 rows, T5's and VAE's of one; three directions run as calls of 4 and 2 rows."""
    height, width = map(str, SIZES["sd15"])
    command = [str(tiny_checkpoints["sd15"]), "-o", str(tmp_path / "qnn"), "--height", height, "--width", width]
    assert main([*command, "--target", "qnn", "--dtype", "fp32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["target"] == "qnn"
    bundle = Bundle.open(tmp_path / "qnn")
    bundle.verify()
    assert bundle.facts.target == "qnn"
    assert {name: part.rows for name, part in bundle.facts.components.items()} == {
        "text_encoder": (1,),
        "unet": (2, 4),
        "vae_decoder": (1,),
        "vae_encoder": (1,),
    }
    dynamic = Bundle.open(tiny_bundles["sd15"])
    assert sum(bundle.facts.components["unet"].macs.values()) > 0.9 * sum(
        dynamic.facts.components["unet"].macs.values()
    )
    pictures = [
        Pipeline(one)("a red circle", seed=1, k=3, solver="epd", num_inference_steps=3, output_type="np").images
        for one in (dynamic, bundle)
    ]
    assert psnr(*pictures) > 60


@pytest.mark.slow
@pytest.mark.parametrize("target", RULES)
def test_lint_passes_what_is_exported_for_a_target(target, tiny_checkpoints, tmp_path):
    """Each kind of component, as `python -m export --target` makes it; advice is no finding."""
    dtype, opset = choose(target, None, None)
    rows = backbone_rows(target, None, None)
    components = {"transformer": "sd3", "text_encoder_2": "sd3", "unet": "sd15", "vae_decoder": "sd15"}
    for component, family in components.items():
        height, width = SIZES[family]
        told = job(
            tiny_checkpoints[family],
            tmp_path / component,
            component=component,
            precision=precision(component, dtype, target),
            height=height,
            width=width,
            opset=opset,
            target=target,
            rows=component_rows(component, rows)[:1],
        )
        (tmp_path / component).mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of its exporter
            worker.export(told)
    findings = [one for one in lint(sorted(tmp_path.glob("*/model*.onnx")), target) if not one.advice]
    assert not findings
