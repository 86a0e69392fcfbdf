"""Rewrites: other nodes, the same numbers bit for bit; and what they leave alone."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper

from export.rewrites import rewrite
from tests.export.lint_graphs import FLOAT, graph

X = (2, 8, 16)


def shared(shape, x=X, kind="Add", turned=False, weight=True):
    """x + p, then LayerNormalization; p is a weight, or an input."""
    nodes = [
        helper.make_node(kind, ["p", "x"] if turned else ["x", "p"], ["a"], name="sum"),
        helper.make_node("LayerNormalization", ["a", "s"], ["y"], name="norm"),
    ]
    weights = {"s": np.ones(x[-1], np.float32)}
    inputs = [("x", FLOAT, x)]
    if weight:
        weights["p"] = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    else:
        inputs.append(("p", FLOAT, shape))
    return graph(nodes, inputs, [("y", FLOAT, x)], weights, opset=20)


def kinds(model):
    return [node.op_type for node in model.graph]


def answers(model):
    """The outputs for normal noise, of the nodes as they stand."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    rng = np.random.default_rng(0)
    feeds = {one.name: rng.standard_normal(one.shape).astype(np.float32) for one in session.get_inputs()}
    return session.run(None, feeds)


@pytest.mark.parametrize(
    "model",
    [
        shared((1, 8, 16)),
        shared((8, 16)),
        shared((1, 8, 16), turned=True),
        shared((1, 8, 16), weight=False),
        shared((1, 8, 16), x=(4, 8, 16)),
    ],
    ids=["1, n, c", "n, c", "first operand", "no weight", "4 rows"],
)
def test_what_all_rows_share_is_subtracted_and_not_added_for_qnn(model):
    before = ir.from_proto(model)
    after = rewrite(ir.from_proto(model), "qnn")
    assert kinds(after) == ["Neg", "Sub", "LayerNormalization"]
    for one, other in zip(answers(before), answers(after), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_sum_may_be_an_output_and_keeps_its_name():
    model = shared((1, 8, 16))
    model.graph.output.append(helper.make_tensor_value_info("a", FLOAT, X))
    after = rewrite(ir.from_proto(model), "qnn")
    assert [value.name for value in after.graph.outputs] == ["y", "a"]
    for one, other in zip(answers(ir.from_proto(model)), answers(after), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "model",
    [
        shared((16,)),
        shared((1, 1, 16)),
        shared((2, 1, 16)),
        shared((2, 8, 16)),
        shared((1, 8, 16), x=(1, 8, 16)),
        shared((8, 16), x=(8, 16)),
        shared((1, 4, 8, 16), x=(2, 4, 8, 16)),
        shared((1, 8, 16), kind="Sub"),
    ],
    ids=["bias", "1, 1, c", "rows, 1, c", "rows, n, c", "1 row", "2 axes", "4 axes", "Sub"],
)
def test_what_qnn_gets_right_is_left_alone(model):
    before = kinds(ir.from_proto(model))
    assert kinds(rewrite(ir.from_proto(model), "qnn")) == before


def test_other_targets_keep_their_nodes():
    assert kinds(rewrite(ir.from_proto(shared((1, 8, 16))), "cpu")) == ["Add", "LayerNormalization"]
