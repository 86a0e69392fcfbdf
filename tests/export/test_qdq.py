"""Static QDQ quantisation: the same numbers for a row alone and among others, one int8 copy of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from export import ExportError, calibrate, graph, qdq
from runtime.bundle import Bundle

CHANNELS, SIDE, WIDTH = 8, 6, 32


NET = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[ROWS,8,6,6] sample, float[ROWS] timestep) => (float[ROWS,8,6,6] out) {
    column = Unsqueeze(timestep, one)
    angle = Mul(column, frequencies)
    sine = Sin(angle)
    cosine = Cos(angle)
    waves = Concat<axis = 1>(sine, cosine)
    hidden = Gemm(waves, time_1, time_1_bias)
    gate = Sigmoid(hidden)
    silu = Mul(hidden, gate)
    time = Gemm(silu, time_2, time_2_bias)
    time_row = Unsqueeze(time, one)
    seen = Conv<pads = [1, 1, 1, 1]>(sample, conv, conv_bias)
    flat = Reshape(seen, flat_shape)
    tokens = Transpose<perm = [0, 2, 1]>(flat)
    x = Add(tokens, time_row)
    normed = LayerNormalization(x, ones)
    q = MatMul(normed, weight_q)
    k = MatMul(normed, weight_k)
    v = MatMul(normed, weight_v)
    k_turned = Transpose<perm = [0, 2, 1]>(k)
    scores = MatMul(q, k_turned)
    shares = Softmax<axis = -1>(scores)
    attended = MatMul(shares, v)
    y = Add(x, attended)
    inner = MatMul(y, weight_inner)
    active = Gelu(inner)
    outer = MatMul(active, weight_outer)
    z = Add(y, outer)
    last = MatMul(z, weight_last)
    turned = Transpose<perm = [0, 2, 1]>(last)
    out = Reshape(turned, out_shape)
}
"""  # one of everything that a backbone is made of
WEIGHTS = {
    "frequencies": (8,),
    "time_1": (16, WIDTH),
    "time_1_bias": (WIDTH,),
    "time_2": (WIDTH, WIDTH),
    "time_2_bias": (WIDTH,),
    "conv": (WIDTH, CHANNELS, 3, 3),
    "conv_bias": (WIDTH,),
    "weight_q": (WIDTH, WIDTH),
    "weight_k": (WIDTH, WIDTH),
    "weight_v": (WIDTH, WIDTH),
    "weight_inner": (WIDTH, 4 * WIDTH),
    "weight_outer": (4 * WIDTH, WIDTH),
    "weight_last": (WIDTH, CHANNELS),
}
PRODUCTS = 5  # with a weight, beside two of the time and the two edges


def net(rows: int | None) -> ir.Model:
    """The graph of a row count, None: of any, as another trace would write it: what it makes has names of its own."""
    model = onnx.parser.parse_model(NET.replace("ROWS", "rows" if rows is None else str(rows)))
    random = np.random.default_rng(0)
    values = {name: random.standard_normal(shape) / np.prod(shape[1:]) ** 0.5 for name, shape in WEIGHTS.items()}
    constants = {name: value.astype(np.float32) for name, value in values.items()}
    constants |= {"ones": np.ones(WIDTH, np.float32), "one": np.array([1])}
    constants |= {"flat_shape": np.array([rows or 0, WIDTH, -1])}
    constants |= {"out_shape": np.array([rows or 0, CHANNELS, SIDE, SIDE])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    renamed = {name: f"{name}.{rows}" for node in model.graph.node for name in node.output if name != "out"}
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    return ir.from_proto(model)


def feeds(rows: int, count: int, seed: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [
        {
            "sample": random.standard_normal((rows, CHANNELS, SIDE, SIDE)).astype(np.float32),
            "timestep": random.uniform(0, 1000, rows).astype(np.float32),
        }
        for _ in range(count)
    ]


def written(folder: Path, *rows: int | None) -> list[Path]:
    """Graphs of these row counts over one data file, as the exporter writes them."""
    paths = [folder / ("model.onnx" if n == rows[0] else f"model_rows{n}.onnx") for n in rows]
    graph.save(net(rows[0]), paths[0])
    for n, path in zip(rows[1:], paths[1:], strict=True):
        graph.save_sharing(net(n), path, paths[0])
    return paths


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> list[Path]:
    """fp32 graphs of 2 and of 6 rows."""
    return written(tmp_path_factory.mktemp("plain"), 2, 6)


@pytest.fixture(scope="module")
def quantised(plain, tmp_path_factory) -> Callable[[str], list[Path]]:
    """The same graphs, quantised at uint8 or uint16."""
    made: dict[str, list[Path]] = {}
    for activations in ("uint8", "uint16"):
        made[activations] = copied(plain, tmp_path_factory.mktemp(activations))
        qdq.quantise(made[activations], feeds(2, 24, 1), activations=activations)
    return made.__getitem__


def copied(paths: list[Path], folder: Path) -> list[Path]:
    for file in paths[0].parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return [folder / path.name for path in paths]


def run(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options).run(None, feed)[0]


@pytest.mark.parametrize("activations", ["uint8", "uint16"])
def test_two_rows_alone_are_those_among_six(quantised, activations):
    two, six = quantised(activations)
    (feed,) = feeds(6, 1, 2)
    whole = run(six, feed)
    for place in range(0, 6, 2):
        part = {name: value[place : place + 2] for name, value in feed.items()}
        np.testing.assert_array_equal(run(two, part), whole[place : place + 2])


def test_more_bits_are_closer_to_fp32(plain, quantised):
    (feed,) = feeds(6, 1, 2)
    truth = run(plain[1], feed)
    error = {
        name: np.sqrt(np.square(run(quantised(name)[1], feed) - truth).mean() / np.square(truth).mean())
        for name in ("uint8", "uint16")
    }
    assert error["uint16"] < 0.02 < error["uint8"] < 0.1  # weights of 8 bits alone, then activations too


def test_every_row_count_has_the_same_scales_and_the_same_weights(plain, quantised):
    paths = quantised("uint8")
    models = [onnx.load(path, load_external_data=False) for path in paths]
    kinds = [[node.op_type for node in model.graph.node] for model in models]
    assert kinds[0] == kinds[1]
    assert kinds[0].count("QuantizeLinear") > 12
    loaded = [onnx.load(path) for path in paths]
    values = [{t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer} for model in loaded]
    for one, other in zip(*(model.graph.node for model in loaded), strict=True):
        if one.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for place in (1, 2):
                np.testing.assert_array_equal(values[0][one.input[place]], values[1][other.input[place]])
    places = [
        {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "offset"}
        for model in models
    ]
    assert places[1]
    assert places[1] <= places[0]
    sizes = [paths_[0].with_name("model.onnx_data").stat().st_size for paths_ in (plain, paths)]
    assert sizes[1] < 0.45 * sizes[0]  # the small convolution is float
    assert {file.name for file in paths[0].parent.iterdir()} == {"model.onnx", "model_rows6.onnx", "model.onnx_data"}


def test_products_are_of_int8_weights_but_for_the_time_and_the_edges(quantised):
    model = onnx.load(quantised("uint8")[0], load_external_data=False)
    maker = {name: node for node in model.graph.node for name in node.output}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    scales = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    int8, plain = 0, 0
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            weight = maker.get(node.input[1])
            if weight is None:
                plain += 1
            elif weight.input[0] in types:
                assert types[weight.input[0]] == onnx.TensorProto.INT8
                assert len(scales[weight.input[1]]) == 1  # one a channel
                int8 += 1
    assert (int8, plain) == (PRODUCTS, 4)
    assert all(maker[node.input[0]].op_type != "DequantizeLinear" for node in maker.values() if node.op_type == "Sin")


def test_ranges_are_those_of_the_tensors_themselves(plain):
    given = feeds(2, 5, 3)
    found = qdq.calibrate(plain[0], given)
    sample = np.stack([feed["sample"] for feed in given])
    np.testing.assert_allclose(found["sample"], (sample.min(), sample.max(), np.square(sample).mean()), rtol=1e-6)
    answers = [run(plain[0], feed) for feed in given]
    wanted = np.min(answers), np.max(answers), np.square(answers).mean()
    np.testing.assert_allclose(found["out"], wanted, rtol=1e-5)
    assert qdq.calibrate(plain[0], given, ["out"]) == {"out": found["out"]}


def test_what_is_kept_by_name_or_operator_stays_in_float(plain, tmp_path):
    paths = copied(plain, tmp_path)
    first = onnx.load(paths[0], load_external_data=False)
    (inner,) = (node.name for node in first.graph.node if "weight_inner" in node.input)
    qdq.quantise(paths, feeds(2, 2, 1), activations="uint8", keep=[inner, "Softmax"])
    for path in paths:
        model = onnx.load(path, load_external_data=False)
        assert any("weight_inner" in node.input for node in model.graph.node)
        assert not any("weight_outer" in node.input for node in model.graph.node)
        quantised = {name for node in model.graph.node if node.op_type == "QuantizeLinear" for name in node.input[:1]}
        assert not quantised & {name for node in model.graph.node if node.op_type == "Softmax" for name in node.input}
    (feed,) = feeds(2, 1, 4)
    assert np.isfinite(run(paths[0], feed)).all()


def test_other_nodes_are_refused_and_nothing_is_changed(plain, tmp_path):
    paths = copied(plain, tmp_path)
    other = onnx.load(paths[1], load_external_data=False)
    next(node for node in other.graph.node if node.op_type == "Gelu").op_type = "Sigmoid"
    onnx.save(other, paths[1])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ExportError, match=r"model_rows6\.onnx: has other nodes"):
        qdq.quantise(paths, feeds(2, 2, 1), activations="uint8")
    with pytest.raises(ExportError, match=r"model\.onnx: has no node or operator node_none to keep in float"):
        qdq.quantise(paths[:1], feeds(2, 2, 1), activations="uint8", keep=["node_none", "MatMul"])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("wanted", [1, 7, 12, 25, 40])
def test_calls_are_kept_evenly_and_others_of_every_trajectory(wanted):
    count, seen = 25, set()
    for number in range(40):
        places = calibrate._spread(count, wanted, number)
        assert len(places) == min(count, wanted)
        assert 0 <= places[0] <= places[-1] < count
        assert np.diff(places).max(initial=0) <= -(-count // wanted)
        seen |= set(places)
    assert seen == set(range(count))


@pytest.mark.parametrize("sparing", [False, True])
@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_calls_are_recorded_at_all_noise_levels(family, tiny_bundles, sparing):
    prompts = ["a red circle", "a blue square on a white background", "a ring"]
    calls = calibrate.record(tiny_bundles[family], prompts=prompts, count=20, sparing=sparing)
    part = Bundle.open(tiny_bundles[family])
    inputs = part.facts.components[part.backbone].inputs
    assert len(calls) == 20
    for call in calls:
        assert {name: (value.dtype.name, value.shape) for name, value in call.items()} == {
            tensor.name: (tensor.dtype, (2, *tensor.shape[1:])) for tensor in inputs
        }
        assert call["timestep"][0] == call["timestep"][1]  # the guidance halves of one point
    times = np.sort([call["timestep"][0] for call in calls])
    assert times[0] < 250
    assert times[-1] > 850
    assert np.diff(times).max() < (300 if sparing else 250)
    latent = np.stack([call[inputs[0].name] for call in calls])
    assert len(np.unique(latent[:, 0, 0, 0, 0])) == 20
    again = calibrate.record(tiny_bundles[family], prompts=prompts, count=20, sparing=sparing)
    assert all(np.array_equal(one[name], other[name]) for one, other in zip(calls, again, strict=True) for name in one)
