"""Multiply-accumulates of graphs of one or two nodes, against what can be counted by hand."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.macs import count
from runtime.bundle import Bundle
from runtime.pipeline import find

ROWS = "rows"


def save(tmp_path: Path, nodes, inputs, outputs=None, weights=None) -> Path:
    """Nodes (domain, op, inputs, outputs, attributes), each named by its first output; inputs: name -> shape."""
    made = [helper.make_node(op, i, o, name=o[0], domain=domain, **a) for domain, op, i, o, a in nodes]
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    last = {nodes[-1][3][0]: None} if outputs is None else outputs
    made_by = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in last.items()]
    held = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in (weights or {}).items()]
    graph = helper.make_graph(made, "g", given, made_by, initializer=held)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


ONE_NODE = {
    "convolution": ("", "Conv", [(ROWS, 4, 8, 8)], [(6, 4, 3, 3)], {"pads": [1] * 4}, 8 * 8 * 6 * 4 * 9),
    "strided": ("", "Conv", [(ROWS, 4, 8, 8)], [(6, 4, 2, 2)], {"strides": [2, 2]}, 4 * 4 * 6 * 4 * 4),
    "grouped": ("", "Conv", [(ROWS, 4, 8, 8)], [(6, 2, 1, 1)], {"group": 2}, 8 * 8 * 6 * 2),
    "transposed": ("", "ConvTranspose", [(ROWS, 4, 8, 8)], [(4, 6, 2, 2)], {"strides": [2, 2]}, 8 * 8 * 4 * 6 * 4),
    "product": ("", "MatMul", [(ROWS, 5, 7)], [(7, 3)], {}, 5 * 7 * 3),
    "gemm": ("", "Gemm", [(ROWS, 7)], [(3, 7)], {"transB": 1}, 7 * 3),
    "gemm of columns": ("", "Gemm", [(7, ROWS)], [(7, 3)], {"transA": 1}, 7 * 3),
    "attention, 4-D": ("", "Attention", [(ROWS, 2, 5, 8), (ROWS, 2, 9, 8), (ROWS, 2, 9, 4)], [], {}, 2 * 5 * 9 * 12),
    "attention, 3-D": (
        "", "Attention", [(ROWS, 5, 32), (ROWS, 9, 16), (ROWS, 9, 16)], [],
        {"q_num_heads": 4, "kv_num_heads": 2}, 4 * 5 * 9 * 16,
    ),
    "multi-head": (
        "com.microsoft", "MultiHeadAttention", [(ROWS, 5, 16), (ROWS, 9, 16), (ROWS, 9, 16)], [],
        {"num_heads": 2}, 2 * 5 * 9 * 16,
    ),
    "multi-head, of heads": (
        "com.microsoft", "MultiHeadAttention", [(ROWS, 5, 16), (ROWS, 2, 9, 8), (ROWS, 2, 9, 8)], [],
        {"num_heads": 2}, 2 * 5 * 9 * 16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE_NODE)
def test_a_node_counts_what_one_row_costs(tmp_path: Path, case: str):
    domain, op, operands, weights, attributes, macs = ONE_NODE[case]
    inputs = {f"x{i}": shape for i, shape in enumerate(operands)}
    held = {f"w{i}": shape for i, shape in enumerate(weights)}
    path = save(tmp_path, [(domain, op, [*inputs, *held], ["y"], attributes)], inputs, weights=held)
    assert count(path, ROWS) == {"y": macs}


def test_packed_weights_count_by_their_columns(tmp_path: Path):
    node = ("com.microsoft", "MatMulNBits", ["x", "w", "s"], ["y"], {"K": 64, "N": 10, "bits": 4, "block_size": 32})
    path = save(tmp_path, [node], {"x": (ROWS, 5, 64), "w": (10, 2, 16), "s": (20,)})
    assert count(path, ROWS) == {"y": 5 * 64 * 10}


def test_rows_folded_into_another_axis_are_counted_once(tmp_path: Path):
    nodes = [
        ("", "Reshape", ["x", "shape"], ["flat"], {}),
        ("", "MatMul", ["flat", "w"], ["y"], {}),
        ("", "Relu", ["y"], ["z"], {}),
    ]
    path = save(tmp_path, nodes, {"x": (ROWS, 8, 7)}, weights={"w": (7, 3)})
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 7]), "shape"))
    model.graph.value_info.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, [f"8*{ROWS}", 7]))
    onnx.save(model, path)
    assert count(path, ROWS) == {"y": 8 * 7 * 3}  # Relu has none


def test_a_static_graph_is_counted_for_one_of_its_rows(tmp_path: Path):
    path = save(tmp_path, [("", "MatMul", ["x", "w"], ["y"], {})], {"x": (6, 5, 7)}, weights={"w": (7, 3)})
    assert count(path, ROWS, rows=6) == {"y": 5 * 7 * 3}


def test_what_cannot_be_counted_is_named(tmp_path: Path):
    product = ("", "MatMul", ["x", "w"], ["y"], {})
    with pytest.raises(ValueError, match=r"y has the shape .*cannot be counted"):
        count(save(tmp_path, [product], {"x": (ROWS, "tokens", 7)}, weights={"w": (7, 3)}), ROWS)
    packed = ("com.microsoft", "MultiHeadAttention", ["x"], ["y"], {"num_heads": 2})
    with pytest.raises(ValueError, match="y: packed query"):
        count(save(tmp_path, [packed], {"x": (ROWS, 5, 2, 3, 8)}), ROWS)
    twice = [product, ("", "MatMul", ["y", "v"], ["z"], {})]
    path = save(tmp_path, twice, {"x": (ROWS, 5, 7)}, weights={"w": (7, 3), "v": (3, 3)})
    model = onnx.load(path)
    model.graph.node[1].name = model.graph.node[0].name
    onnx.save(model, path)
    with pytest.raises(ValueError, match="two MatMul nodes are named 'y'"):
        count(path, ROWS)


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae_decoder"])
def test_the_shipped_graphs_count_as_their_bundle_says(component: str):
    bundle = Bundle.open(find("shapes-sd3"))
    assert count(bundle.graph(component), ROWS) == bundle.facts.components[component].macs
