"""int8 for the CPU: few bits for layers and convolutions, one row's numbers unmoved by others'."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from export import graph, int8
from export.qdq import Range

CHANNELS, SIDE, WIDTH = 32, 8, 64
NET = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[rows,4,8,8] sample, float[rows] timestep) => (float[rows,4,8,8] out) {
    column = Unsqueeze(timestep, one)
    time = Gemm(column, time_1, time_1_bias)
    first = Conv<pads = [1, 1, 1, 1]>(sample, conv_in, conv_in_bias)
    active = Relu(first)
    second = Conv<pads = [1, 1, 1, 1]>(active, conv_a, conv_a_bias)
    third = Conv(second, conv_b)
    spiked = Mul(active, spikes)
    fourth = Conv(spiked, conv_c)
    tokens = Reshape(second, flat_shape)
    mixed = MatMul(tokens, weight_mixed)
    mixed_back = Reshape(mixed, back_shape)
    calm = Add(third, mixed_back)
    joined = Add(calm, fourth)
    flat = Reshape(spiked, flat_shape)
    inner = MatMul(flat, weight_inner)
    outer = Gemm<transB = 1>(inner, weight_outer, weight_outer_bias)
    back = Reshape(outer, back_shape)
    total = Add(joined, back)
    out = Conv<pads = [1, 1, 1, 1]>(total, conv_out)
}
"""  # spikes: one entry that makes its range useless
WEIGHTS = {
    "time_1": (1, CHANNELS),
    "time_1_bias": (CHANNELS,),
    "conv_in": (CHANNELS, 4, 3, 3),
    "conv_in_bias": (CHANNELS,),
    "conv_a": (CHANNELS, CHANNELS, 3, 3),
    "conv_a_bias": (CHANNELS,),
    "conv_b": (CHANNELS, CHANNELS, 1, 1),
    "conv_c": (CHANNELS, CHANNELS, 1, 1),
    "weight_mixed": (SIDE * SIDE, SIDE * SIDE),
    "weight_inner": (SIDE * SIDE, WIDTH),
    "weight_outer": (SIDE * SIDE, WIDTH),
    "weight_outer_bias": (SIDE * SIDE,),
    "conv_out": (4, CHANNELS, 3, 3),
}


@pytest.fixture
def plain(tmp_path):
    model = onnx.parser.parse_model(NET)
    random = np.random.default_rng(0)
    values = {name: random.standard_normal(shape) / np.prod(shape[1:]) ** 0.5 for name, shape in WEIGHTS.items()}
    constants = {name: value.astype(np.float32) for name, value in values.items()}
    spikes = np.full((CHANNELS, SIDE, SIDE), 1e-3, np.float32)
    spikes[3, 0, 0] = 100
    constants |= {"one": np.array([1]), "spikes": spikes}
    constants |= {"flat_shape": np.array([-1, SIDE * SIDE]), "back_shape": np.array([-1, CHANNELS, SIDE, SIDE])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    graph.save(ir.from_proto(onnx.shape_inference.infer_shapes(model)), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def feed(rows: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "sample": random.standard_normal((rows, 4, SIDE, SIDE)).astype(np.float32),
        "timestep": random.uniform(0, 1000, rows).astype(np.float32),
    }


def session(path, optimised=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_convolutions_and_layers_in_8_bits_but_for_edges_and_what_bears_it_least(plain, tmp_path):
    truth = session(plain).run(None, feed(6, 9))[0]
    before = plain.with_name("model.onnx_data").stat().st_size
    noise = int8.quantise(plain, [feed(2, seed) for seed in range(8)])
    coarse = {"node_fourth", "node_inner"}
    assert set(noise) == {"node_second", "node_third", "node_mixed"} | coarse
    assert {name for name, decibels in noise.items() if decibels < int8.LEAST_DB} == coarse, noise
    kinds = Counter(node.op_type for node in onnx.load(plain, load_external_data=False).graph.node)
    assert (kinds["Conv"], kinds["MatMulNBits"], kinds["MatMul"], kinds["QuantizeLinear"]) == (5, 2, 1, 4)
    run = session(plain, tmp_path / "optimised.onnx")
    fused = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert (fused["QLinearConv"], fused["MatMulIntegerToFloat"]) == (2, 1)
    whole = run.run(None, feed(6, 9))[0]
    error = np.sqrt(np.square(whole - truth).mean() / np.square(truth).mean())
    assert 1e-4 < error < 0.02
    assert plain.with_name("model.onnx_data").stat().st_size < 0.6 * before  # the edges are much of it
    for place in range(0, 6, 2):
        part = {name: value[place : place + 2] for name, value in feed(6, 9).items()}
        np.testing.assert_array_equal(run.run(None, part)[0], whole[place : place + 2])
    assert {path.name for path in plain.parent.iterdir()} == {"model.onnx", "model.onnx_data", "optimised.onnx"}


def test_a_bias_over_weights_of_nothing_is_kept(tmp_path):
    weight, bias = np.zeros((4, 4, 1, 1), np.float32), np.array([3, -2, 0, 1], np.float32)
    weight[3] = 0.5
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> net (float[rows,4,2,2] x) => (float[rows,4,2,2] y)'
        "{ a = Conv(x, first) b = Conv(a, weight, bias) y = Conv(b, first) }"
    )
    values = {"first": np.eye(4, dtype=np.float32)[..., None, None], "weight": weight, "bias": bias}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in values.items())
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    path = tmp_path / "model.onnx"
    graph.save(ir.from_proto(onnx.shape_inference.infer_shapes(model)), path)
    fed = {"x": np.random.default_rng(0).uniform(0, 1, (2, 4, 2, 2)).astype(np.float32)}
    truth = session(path).run(None, fed)[0]
    assert set(int8.quantise(path, [fed])) == {"node_b"}
    np.testing.assert_allclose(session(path).run(None, fed)[0], truth, atol=0.03)


def test_a_graph_of_edges_alone_stays_as_it_is(tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> net (float[rows,4,2,2] x) => (float[rows,4,2,2] y){ y = Conv(x, w) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "w"))
    model.graph.node[0].name = "only"
    graph.save(ir.from_proto(model), tmp_path / "model.onnx")
    assert int8.quantise(tmp_path / "model.onnx", [{"x": np.ones((1, 4, 2, 2), np.float32)}]) == {}


def test_noise_of_rounding_is_what_theory_says():
    random = np.random.default_rng(0)
    values = random.uniform(-1, 1, 100_000)
    seen = Range(-1.0, 1.0, float(np.square(values).mean()))
    step = 2 / 255
    error = np.round(values / step) * step - values
    assert int8.signal_to_noise(seen) == pytest.approx(10 * np.log10(seen.square / np.square(error).mean()), abs=0.1)
    assert int8.signal_to_noise(seen) == pytest.approx(20 * np.log10(255), abs=0.1)
