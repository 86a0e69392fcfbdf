"""Graphs of opset 18 at 17: the same numbers, or a refusal."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import ExportError
from export.opset import lower


def graph(nodes, size, weights=None, opset=18) -> onnx.ModelProto:
    """Nodes (operator, inputs, outputs, attributes) over `x`; every output that no node takes is one of the graph."""
    taken = {name for _, inputs, _, _ in nodes for name in inputs}
    ends = [name for _, _, outputs, _ in nodes for name in outputs if name not in taken]
    made = [helper.make_node(kind, ins, outs, **attributes) for kind, ins, outs, attributes in nodes]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)]
    answers = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(size)) for name in ends]
    held = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(helper.make_graph(made, "g", given, answers, held), opset_imports=opsets, ir_version=10)


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    found = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    lower(found)
    return ir.to_proto(found)


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


SCALES = {"scales": np.array([1, 1, 2, 2], np.float32)}
RESIZE = {"mode": "nearest", "antialias": 0, "keep_aspect_ratio_policy": "stretch"}
AXES = {"axes": np.array([1], np.int64)}


@pytest.mark.parametrize(
    ("nodes", "size", "weights"),
    [
        ([("Split", ["x"], ["a", "b", "c"], {"axis": 1, "num_outputs": 3})], (2, 6, 1, 1), {}),
        ([("Split", ["x"], ["a", "b"], {"num_outputs": 2}), ("Sin", ["a"], ["c"], {})], (4, 6, 1, 1), {}),
        ([("Resize", ["x", "", "scales"], ["y"], RESIZE)], (1, 2, 3, 3), SCALES),
        ([("ReduceMean", ["x", "axes"], ["y"], {"noop_with_empty_axes": 0})], (1, 2, 3, 3), AXES),
    ],
)
def test_the_same_numbers_at_17(nodes, size, weights):
    model = graph(nodes, size, weights)
    with pytest.raises(onnx.checker.ValidationError, match=r"Unrecognized attribute|has input size 2"):
        onnx.checker.check_model(graph(nodes, size, weights, opset=17))  # what torch writes, where 17 is asked of it
    found = lowered(model)
    onnx.checker.check_model(found, full_check=True)
    assert [one.version for one in found.opset_import] == [17]
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    for one, other in zip(run(model, x), run(found, x), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("nodes", "size", "weights"),
    [
        ([("Split", ["x"], ["a", "b"], {"axis": 1, "num_outputs": 2})], (2, 5, 1, 1), {}),  # parts of 3 and 2
        ([("Split", ["x"], ["a", "b"], {"axis": 1, "num_outputs": 2})], (2, "n", 1, 1), {}),
        ([("Resize", ["x", "", "scales"], ["y"], {"mode": "linear", "antialias": 1})], (1, 2, 3, 3), SCALES),
        ([("ReduceMean", ["x"], ["y"], {"noop_with_empty_axes": 1})], (1, 2, 3, 3), {}),
        ([("Sign", ["x"], ["a"], {}), ("BitwiseNot", ["whole"], ["b"], {})], (1, 2, 3, 3), {"whole": np.array([1])}),
    ],
)
def test_what_17_has_otherwise_is_refused(nodes, size, weights):
    with pytest.raises(ExportError, match=f"{nodes[-1][0]} .*: opset 17 has it not so; give --opset 18"):
        lowered(graph(nodes, size, weights))
