"""Compiled models kept and taken again, by providers that really compile. Skipped where their package is not.

pip install onnxruntime onnxruntime-qnn onnx pytest    (or onnxruntime-openvino, in an environment of its own)
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from runtime import shelf
from runtime.bundle import Bundle
from runtime.errors import ProviderError
from runtime.facts import Tensor, read_facts, write_facts
from runtime.ort import installed
from runtime.session import Session
from tests.runtime import tiny_bundle

FLOAT, ROWS = onnx.TensorProto.FLOAT, (2, 4)
FEEDS = {"sample": np.linspace(-1, 1, 4 * 8 * 16).reshape(4, 8, 16)}
qnn = pytest.mark.skipif(not installed(["onnxruntime-qnn"]), reason="needs onnxruntime-qnn beside onnxruntime")
openvino = pytest.mark.skipif(not installed(["onnxruntime-openvino"]), reason="needs onnxruntime-openvino")


@pytest.fixture
def bundle(tmp_path):
    """A backbone of two products, one static graph per row count."""
    folder = tiny_bundle.bundle(tmp_path / "bundle", "sd15")
    nodes = [
        ("MatMul", ["sample", "a"], ["hidden"], {"name": "first"}),
        ("Relu", ["hidden"], ["active"], {"name": "relu"}),
        ("MatMul", ["active", "b"], ["out_sample"], {"name": "second"}),
    ]
    weights = {name: tiny_bundle.random(16, 16, seed=seed) for seed, name in enumerate("ab")}
    graphs = [
        tiny_bundle.graph(
            folder / "unet" / name, nodes, *[{tensor: (FLOAT, [rows, 8, 16])} for tensor in TENSORS], weights
        )
        for rows, name in zip(ROWS, ("model.onnx", "model_rows4.onnx"), strict=True)
    ]
    tensors = [(Tensor(name, "float32", ("rows", 8, 16)),) for name in TENSORS]
    unet = dataclasses.replace(
        graphs[0],
        files=tuple(file for graph in graphs for file in graph.files),
        inputs=tensors[0],
        outputs=tensors[1],
        rows=ROWS,
        macs={"first": 2048, "second": 2048},
    )
    facts = read_facts(folder / "bundle.json")
    write_facts(folder, dataclasses.replace(facts, components={**facts.components, "unet": unet}))
    return Bundle.open(folder)


TENSORS = ("sample", "out_sample")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tables" / "compiled"


def run(bundle, provider, **options):
    session = Session(bundle, "unet", provider=provider, fallback="never", **options)
    return session(**FEEDS)["out_sample"], session


@qnn
def test_qnn_takes_its_context_again(bundle, home, caplog):
    first, session = run(bundle, "qnn")
    (folder,) = shelf.whole(home)
    entry = shelf.read(folder)
    assert entry.rows == 4
    assert sorted(entry.files) == ["model.onnx", "model_qnn.bin"]
    assert {line.split()[1] for line in entry.nodes} == {"QNNExecutionProvider"}
    assert {node.op_type for node in onnx.load(folder / "model.onnx").graph.node} == {"EPContext"}

    second, again = run(bundle, "qnn")
    assert np.array_equal(first, second)
    assert again.compile_seconds == 0 < session.compile_seconds
    assert again.assignment == session.assignment  # of the graph's own nodes, by their compute
    assert again.assignment.by_compute
    Session(bundle, "unet", provider="qnn").load()  # its first graph
    assert sorted(shelf.read(folder).rows for folder in shelf.whole(home)) == [2, 4]
    assert not caplog.messages


@qnn
@pytest.mark.parametrize("at", [0.0, 0.5])  # of a header QNN ends the process, of weights it takes anything
def test_qnn_is_not_given_a_damaged_context(at, bundle, home, caplog):
    first, _ = run(bundle, "qnn")
    binary = shelf.whole(home)[0] / "model_qnn.bin"
    content = bytearray(binary.read_bytes())
    begin = int(len(content) * at)
    content[begin : begin + 100] = bytes(255 - byte for byte in content[begin : begin + 100])
    binary.write_bytes(content)
    second, session = run(bundle, "qnn")
    assert np.array_equal(first, second)
    assert session.compile_seconds > 0
    assert "has a changed model_qnn.bin; it is removed and compiled anew" in caplog.text


@qnn
def test_a_context_that_qnn_refuses_is_made_anew(bundle, home, caplog):
    """Whole as far as its key tells, as one of another driver may be."""
    first, _ = run(bundle, "qnn")
    (folder,) = shelf.whole(home)
    (folder / "model_qnn.bin").write_bytes(b"")
    shelf.write(folder, dataclasses.replace(shelf.read(folder), files=shelf.files(folder)))
    second, _ = run(bundle, "qnn")
    assert np.array_equal(first, second)
    assert "does not load (" in caplog.text
    assert shelf.look(folder, "context").bytes > 1000


@qnn
def test_what_qnn_leaves_to_the_cpu_is_kept_with_it(bundle, home):
    """An Einsum that QNN has not, between two products, with its weights."""
    nodes = [
        ("MatMul", ["sample", "a"], ["hidden"], {"name": "first"}),
        ("Einsum", ["hidden", "b"], ["wide"], {"name": "sum", "equation": "abc,cd->abd"}),
        ("MatMul", ["wide", "c"], ["out_sample"], {"name": "second"}),
    ]
    weights = {name: tiny_bundle.random(*shape) for name, shape in (("a", (16, 16)), ("b", (16, 64)), ("c", (64, 16)))}
    tensors = [{name: (FLOAT, [4, 8, 16])} for name in TENSORS]
    tiny_bundle.graph(bundle.folder / "unet" / "model_rows4.onnx", nodes, *tensors, weights)
    runs = []
    for _ in range(2):
        session = Session(bundle, "unet", provider="qnn", fallback="allowed")
        runs.append((session(**FEEDS)["out_sample"], session))
    assert np.array_equal(runs[0][0], runs[1][0])
    assert runs[0][1].compile_seconds > runs[1][1].compile_seconds == 0
    assert runs[0][1].assignment == runs[1][1].assignment
    assert runs[1][1].assignment.nodes["CPUExecutionProvider"] > 0
    assert sorted(shelf.read(shelf.whole(home)[0]).files) == ["model.onnx", "model.onnx_data", "model_qnn.bin"]
    with pytest.raises(ProviderError, match="Einsum 0 %"):
        Session(bundle, "unet", provider="qnn", fallback="never", rows=4).load()
    assert len(shelf.whole(home)) == 1


@qnn
def test_qnn_compiles_anew_for_another_device(bundle, home, caplog):
    run(bundle, "qnn")
    run(bundle, "qnn", provider_options={"soc_model": "69", "htp_arch": "79"})
    told = "unet for QNN (rows 4) is compiled anew: options.soc_model 60 -> 69, options.htp_arch 73 -> 79"
    assert caplog.messages == [told]
    assert len(shelf.whole(home)) == 2


@qnn
def test_processes_at_once_keep_one_whole_model(bundle, home):
    line = "import sys; from runtime.session import Session, Bundle; "
    line += "Session(Bundle.open(sys.argv[1]), 'unet', provider='qnn', rows=4).load()"
    root, env = Path(__file__).parents[2], {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", line, str(bundle.folder)]
    processes = [subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 0
    (folder,) = home.iterdir()
    shelf.look(folder, "context")
    assert run(bundle, "qnn")[1].compile_seconds == 0


@openvino
def test_openvino_keeps_its_own_blobs(bundle, home, caplog):
    chosen = {"device_type": "AUTO:CPU"}
    first, session = run(bundle, "openvino", provider_options=chosen)
    (folder,) = shelf.whole(home)
    (name,) = shelf.read(folder).files
    assert name.endswith(".blob")
    before = (folder / name).stat().st_mtime_ns
    second, again = run(bundle, "openvino", provider_options=chosen)
    assert np.array_equal(first, second)
    wrote = (folder / name).stat().st_mtime_ns != before  # 1.24 reads none of the CPU's: it compiles again
    assert (again.compile_seconds > 0) == wrote
    assert ["compiled it again" in line for line in caplog.messages] == [True] * wrote
    assert session.compile_seconds > 0
    caplog.clear()
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    third, _ = run(bundle, "openvino", provider_options=chosen)
    assert np.array_equal(first, third)
    assert "it is removed and compiled anew" in caplog.text
    shelf.look(folder, "option")


@openvino
def test_openvino_on_the_cpu_keeps_nothing(bundle, home):
    assert run(bundle, "openvino")[1].compile_seconds == 0
    assert not home.exists()
