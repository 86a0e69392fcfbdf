"""Rewrites: other nodes, the same numbers; and what they leave alone."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, parser, shape_inference
from onnx.reference import ReferenceEvaluator

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
        assert kinds(after)[0] == "Sub"
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
    assert "Attention" in kinds(rewrite(net(ATTENTION), "cuda"))


ATTENTION = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[2,6,16] q, float[2,5,16] k, float[2,5,16] v, float[2,3,16] q2, float[2,3,16] k2, float[2,3,16] v2)
    => (float[2,9,16] y)
    <int64[4] split = {0, -1, 4, 4}, int64[3] joined = {0, -1, 16}>
{
    q_split = Reshape(q, split)
    q_heads = Transpose<perm = [0, 2, 1, 3]>(q_split)
    k_split = Reshape(k, split)
    k_heads = Transpose<perm = [0, 2, 1, 3]>(k_split)
    v_split = Reshape(v, split)
    v_heads = Transpose<perm = [0, 2, 1, 3]>(v_split)
    q2_split = Reshape(q2, split)
    q2_heads = Transpose<perm = [0, 2, 1, 3]>(q2_split)
    k2_split = Reshape(k2, split)
    k2_heads = Transpose<perm = [0, 2, 1, 3]>(k2_split)
    v2_split = Reshape(v2, split)
    v2_heads = Transpose<perm = [0, 2, 1, 3]>(v2_split)
    q_all = Concat<axis = 2>(q_heads, q2_heads)
    k_all = Concat<axis = 2>(k_heads, k2_heads)
    v_all = Concat<axis = 2>(v_heads, v2_heads)
    attended = Attention<SETTINGS>(OPERANDS)
    turned = Transpose<perm = [0, 2, 1, 3]>(attended)
    y = Reshape(turned, joined)
}
"""  # two sorts of tokens, as SD3 has them, 4 heads of width 4
GROUPS = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[2,12,5,7] x, float[12] scale, float[12] bias) => (float[2,12,5,7] y)
    { y = GroupNormalization<num_groups = 4, epsilon = 0.001>(x, scale, bias) }
"""


def net(text, settings="scale = 0.3", operands="q_all, k_all, v_all"):
    model = parser.parse_model(text.replace("SETTINGS", settings).replace("OPERANDS", operands))
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    return ir.from_proto(shape_inference.infer_shapes(model))


def truth(model):
    """By ONNX's own reference, of the inputs that `answers` gives."""
    rng = np.random.default_rng(1)
    fed = {one.name: rng.standard_normal(list(one.shape)).astype(np.float32) for one in model.graph.inputs}
    return ReferenceEvaluator(ir.to_proto(model)).run(None, fed)


@pytest.mark.parametrize("settings", ["scale = 0.3", "softcap = 0.0", "is_causal = 0, qk_matmul_output_mode = 0"])
def test_attention_of_two_sorts_of_tokens_is_one_node_and_two_sorts_joined(settings):
    before, after = net(ATTENTION, settings), rewrite(net(ATTENTION, settings), "cpu")
    assert kinds(after) == ["Concat", "Concat", "Concat", "MultiHeadAttention"]
    assert [value.name for value in after.graph.outputs] == ["y"]
    onnx.checker.check_model(ir.to_proto(after))
    np.testing.assert_allclose(answers(after)[0], truth(before)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "operands"),
    [
        ("is_causal = 1", "q_all, k_all, v_all"),
        ("softcap = 2.0", "q_all, k_all, v_all"),
        ("scale = 0.0", "q_all, k_all, v_all"),
        ("scale = 0.3", "q_all, k_all, v_all, mask"),
    ],
)
def test_attention_that_the_other_node_does_not_do_is_left_alone(settings, operands):
    text = ATTENTION.replace("float[2,3,16] v2)", "float[2,3,16] v2, float[9,8] mask)")
    before = kinds(net(text, settings, operands))
    assert kinds(rewrite(net(text, settings, operands), "cpu")) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("q_all = Concat<axis = 2>(q_heads, q2_heads)", "q_all = Concat<axis = 2>(q_heads, extra)"),
        ("turned = Transpose<perm = [0, 2, 1, 3]>", "turned = Transpose<perm = [0, 2, 3, 1]>"),
        ("(float[2,9,16] y)", "(float[2,9,16] y, float[2,4,9,4] attended)"),
    ],
)
def test_attention_whose_operands_or_result_are_made_otherwise_is_left_alone(old, new):
    text = ATTENTION.replace(old, new).replace("float[2,3,16] v2)", "float[2,3,16] v2, float[2,4,3,4] extra)")
    assert text.count(new) == 1
    assert "Attention" in kinds(rewrite(net(text), "cpu"))


def test_a_result_that_is_not_joined_by_tokens_is_left_alone():
    text = ATTENTION.replace("(float[2,9,16] y)", "(float[2,18,8] y)").replace(
        "joined = {0, -1, 16}", "joined = {0, -1, 8}"
    )
    assert "Attention" in kinds(rewrite(net(text), "cpu"))


def test_group_norm_is_instance_norm_of_groups():
    before, after = net(GROUPS), rewrite(net(GROUPS), "cpu")
    assert "InstanceNormalization" in kinds(after)
    assert "GroupNormalization" not in kinds(after)
    onnx.checker.check_model(ir.to_proto(after))
    np.testing.assert_allclose(answers(after)[0], truth(before)[0], rtol=1e-5, atol=1e-5)


def test_what_is_cut_of_constants_is_a_constant():
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    net (float[4] x) => (float[4] y)
        <float[8] p = {1, 2, 3, 4, 5, 6, 7, 8}, float16[4] h = {1, 2, 3, 4},
         int64[1] from = {2}, int64[1] to = {6}, int64[1] four = {4}>
    {
        cut = Slice(p, from, to)
        flat = Reshape(cut, four)
        stored = Cast<to = 1>(h)
        sum = Add(x, flat)
        y = Add(sum, stored)
    }
    """
    before = ir.from_proto(parser.parse_model(text))
    after = rewrite(ir.from_proto(parser.parse_model(text)), "cuda")
    assert kinds(after) == ["Cast", "Add", "Add"]
    assert sorted(value.const_value.size for value in after.graph.initializers.values()) == [4, 4]
    np.testing.assert_array_equal(answers(after), answers(before))
