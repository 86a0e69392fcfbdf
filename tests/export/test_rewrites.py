"""Rewrites: other nodes, the same numbers bit for bit; and what they leave alone."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper

from export.rewrites import rewrite
from tests.export.lint_graphs import FLOAT, QNN_ROWS, embedded

WRONG = [name for name, (_, rule) in QNN_ROWS.items() if rule == "shared-rows" and name != "factor"]


def kinds(model):
    return [node.op_type for node in model.graph]


def answers(model):
    """The outputs for normal noise, of the nodes as they stand."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    rng = np.random.default_rng(1)
    return session.run(
        None, {one.name: rng.standard_normal(one.shape).astype(np.float32) for one in session.get_inputs()}
    )


def test_what_all_rows_share_is_subtracted_and_not_added_for_qnn():
    for name in WRONG:
        model = QNN_ROWS[name][0]()
        after = rewrite(ir.from_proto(model), "qnn")
        assert kinds(after)[:2] == ["Neg", "Sub"]
        np.testing.assert_array_equal(answers(after), answers(ir.from_proto(model)))


def test_a_sum_of_two_inputs_that_is_an_output_too():
    model = embedded((1, 16, 32))
    del model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info("p", FLOAT, (1, 16, 32)))
    model.graph.output.append(helper.make_tensor_value_info("a", FLOAT, (2, 16, 32)))
    after = rewrite(ir.from_proto(model), "qnn")
    assert kinds(after) == ["Neg", "Sub", "LayerNormalization"]
    assert [value.name for value in after.graph.outputs] == ["y", "a"]
    for one, other in zip(answers(after), answers(ir.from_proto(model)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", [name for name in QNN_ROWS if name not in WRONG])
def test_what_qnn_gets_right_is_left_alone(name):
    before = ir.from_proto(QNN_ROWS[name][0]())
    assert kinds(rewrite(before, "qnn")) == kinds(ir.from_proto(QNN_ROWS[name][0]()))


def test_other_targets_keep_their_nodes():
    assert kinds(rewrite(ir.from_proto(embedded((1, 16, 32))), "cpu")) == ["Add", "LayerNormalization"]
