"""The peak of live activations of graphs of a few nodes, against what can be counted by hand."""

import pytest
from onnx import TensorProto, helper

from export.activations import peak
from tests.export.test_macs import ROWS, save


def chain(*ops: tuple) -> list[tuple]:
    """Nodes (op, inputs, output[, attributes]) of ONNX's own domain."""
    return [("", op, list(ins), [out], *(rest or [{}])) for op, ins, out, *rest in ops]


CASES = {
    # a product needs its operand and its result at once; the graph's input is the caller's
    "chain": (chain(("MatMul", "xw", "a"), ("MatMul", "aw", "b"), ("MatMul", "bw", "c")), 2),
    # an element-wise operator that reads a tensor for the last time writes over it
    "in place": (chain(("MatMul", "xw", "a"), ("Relu", "a", "b"), ("Tanh", "b", "c"), ("Sqrt", "c", "d")), 1),
    "not in place: read again": (chain(("MatMul", "xw", "a"), ("Relu", "a", "b"), ("Add", "ab", "c")), 2),
    # a skip connection lives until it is added
    "skip": (chain(("MatMul", "xw", "a"), ("MatMul", "aw", "b"), ("MatMul", "bw", "c"), ("Add", "ac", "d")), 3),
    # a view is the tensor itself, and keeps it
    "view": (chain(("MatMul", "xw", "a"), ("Identity", "a", "b"), ("MatMul", "bw", "c"), ("Add", "ac", "d")), 2),
    # what is made of weights alone is a weight
    "folded": (chain(("Tanh", "w", "v"), ("MatMul", "xv", "a")), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_counted_while_they_live(tmp_path, case: str):
    nodes, kilobytes = CASES[case]
    path = save(tmp_path, nodes, {"x": (ROWS, 16, 16)}, weights={"w": (16, 16)})
    assert peak(path, ROWS) == 1024 * kilobytes


def test_an_output_lives_to_the_end(tmp_path):
    nodes = chain(("MatMul", "xw", "a"), ("MatMul", "aw", "b"), ("MatMul", "bw", "c"))
    outputs = {"a": None, "c": None}
    assert peak(save(tmp_path, nodes, {"x": (ROWS, 16, 16)}, outputs, {"w": (16, 16)}), ROWS) == 1024 * 3


def test_a_static_graph_is_counted_for_one_of_its_rows(tmp_path):
    nodes = chain(("MatMul", "xw", "a"), ("MatMul", "aw", "b"))
    assert peak(save(tmp_path, nodes, {"x": (6, 16, 16)}, weights={"w": (16, 16)}), ROWS, rows=6) == 2048


def test_attention_needs_its_scores_or_its_heads(tmp_path):
    operands = dict.fromkeys("qkv", (ROWS, 32, 8))  # 1024 bytes each
    plain = ("", "Attention", list("qkv"), ["y"], {"q_num_heads": 2, "kv_num_heads": 2})
    assert peak(save(tmp_path, [plain], operands), ROWS) == 1024 + 2 * 32 * 32 * 4
    fused = ("com.microsoft", "MultiHeadAttention", list("qkv"), ["y"], {"num_heads": 2})
    path = save(tmp_path, [fused], operands, {"y": (ROWS, 32, 8)})
    assert peak(path, ROWS) == 1024 + 3 * 1024


def test_a_tensor_of_unknown_shape_counts_nothing(tmp_path):
    import onnx

    path = save(tmp_path, [("other", "Any", ["x"], ["y"], {}), *chain(("Relu", "y", "z"))], {"x": (ROWS, 16, 16)})
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("other", 1))
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    onnx.save(model, path)
    assert peak(path, ROWS) == 0
