"""Small graphs, each for one thing that Qualcomm's emulator takes or refuses. None has a weight worth naming."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
Shape = Sequence[int | str]
Typed = tuple[str, int, Shape]  # name, type, shape


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Typed],
    outputs: Sequence[Typed],
    weights: dict[str, object] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    """A model of these nodes; com.microsoft is imported too."""
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(*one) for one in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=domains, ir_version=10)


def unary(kind: str, shape: Shape = (1, 4, 8, 8), dtype: int = FLOAT, opset: int = 18) -> onnx.ModelProto:
    return graph(
        [helper.make_node(kind, ["x"], ["y"], name="it")], [("x", dtype, shape)], [("y", dtype, shape)], opset=opset
    )


def cast(source: int, target: int) -> onnx.ModelProto:
    node = helper.make_node("Cast", ["x"], ["y"], to=target)
    return graph([node], [("x", source, (2, 8))], [("y", target, (2, 8))])


def add(dtype: int) -> onnx.ModelProto:
    return graph([helper.make_node("Add", ["x", "x"], ["y"])], [("x", dtype, (2, 8))], [("y", dtype, (2, 8))])


def norm(opset: int) -> onnx.ModelProto:
    """GroupNormalization: a scale for each group at opset 18, for each channel from 21 on."""
    scale = np.ones(2 if opset < 21 else 4, np.float32)
    node = helper.make_node("GroupNormalization", ["x", "s", "s"], ["y"], num_groups=2)
    return graph([node], [("x", FLOAT, (1, 4, 8, 8))], [("y", FLOAT, (1, 4, 8, 8))], {"s": scale}, opset)


def conv(rows: int) -> onnx.ModelProto:
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    weight = {"w": np.ones((6, 4, 3, 3), np.float32)}
    return graph([node], [("x", FLOAT, (rows, 4, 8, 8))], [("y", FLOAT, (rows, 6, 8, 8))], weight)


def attention(domain: str = "", opset: int = 23) -> onnx.ModelProto:
    shape = (1, 8, 16) if domain else (1, 2, 8, 16)
    kind, options = ("MultiHeadAttention", {"num_heads": 2}) if domain else ("Attention", {})
    node = helper.make_node(kind, ["q", "k", "v"], ["y"], domain=domain, **options)
    return graph([node], [(name, FLOAT, shape) for name in "qkv"], [("y", FLOAT, shape)], opset=opset)


def masked() -> onnx.ModelProto:
    """Attention with a mask of booleans."""
    shape = (1, 2, 8, 16)
    inputs = [*((name, FLOAT, shape) for name in "qkv"), ("m", TensorProto.BOOL, (8, 8))]
    node = helper.make_node("Attention", ["q", "k", "v", "m"], ["y"])
    return graph([node], inputs, [("y", FLOAT, shape)], opset=23)


def normed_convolution(stated: bool) -> onnx.ModelProto:
    """Of GroupNormalization ONNX infers no shape: a graph states it, or nobody knows it."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("GroupNormalization", ["c", "s", "s"], ["z"], num_groups=2),
        helper.make_node("Relu", ["z"], ["y"]),
    ]
    weights = {"w": np.ones((4, 4, 3, 3), np.float32), "s": np.ones(4, np.float32)}
    shape = (1, 4, 8, 8)
    model = graph(nodes, [("x", FLOAT, shape)], [("y", FLOAT, shape)], weights, opset=21)
    if stated:
        model.graph.value_info.append(helper.make_tensor_value_info("z", FLOAT, shape))
    return model


def unpatchify(rows: int, einsum: bool = False) -> onnx.ModelProto:
    """Tokens to pixels, over a tensor of 6 axes."""
    move = (
        helper.make_node("Einsum", ["a"], ["b"], equation="nhwpqc->nchpwq")
        if einsum
        else helper.make_node("Transpose", ["a"], ["b"], perm=[0, 5, 1, 3, 2, 4])
    )
    nodes = [helper.make_node("Reshape", ["x", "s"], ["a"]), move, helper.make_node("Reshape", ["b", "t"], ["y"])]
    sizes = {"s": np.array([rows, 8, 8, 2, 2, 4]), "t": np.array([rows, 4, 16, 16])}
    return graph(nodes, [("x", FLOAT, (rows, 64, 16))], [("y", FLOAT, (rows, 4, 16, 16))], sizes)


def shared_shuffle(kind: str) -> onnx.ModelProto:
    """Tokens to pixels, which a node of that kind reads before the second Reshape, too."""
    model = unpatchify(1)
    model.graph.node.insert(2, helper.make_node(kind, ["b", "t"][: 1 + (kind == "Reshape")], ["z"]))
    shape = (1, 4, 16, 16) if kind == "Reshape" else (1, 4, 8, 2, 8, 2)
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, shape))
    return model


def gather(dtype: int) -> onnx.ModelProto:
    node = helper.make_node("Gather", ["w", "x"], ["y"])
    weight = {"w": np.ones((32, 16), np.float32)}
    return graph([node], [("x", dtype, (2, 8))], [("y", FLOAT, (2, 8, 16))], weight)


def arange() -> onnx.ModelProto:
    """Range and Cast of constants, which are computed when the graph is loaded."""
    nodes = [
        helper.make_node("Range", ["a", "b", "c"], ["r"]),
        helper.make_node("Cast", ["r"], ["f"], to=FLOAT),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    ends = {"a": np.array(0), "b": np.array(8), "c": np.array(1)}
    return graph(nodes, [("x", FLOAT, (2, 8))], [("y", FLOAT, (2, 8))], ends)


def reshape_as() -> onnx.ModelProto:
    """Shape of a tensor whose sizes are known."""
    nodes = [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Reshape", ["z", "s"], ["y"])]
    return graph(nodes, [("x", FLOAT, (4, 4)), ("z", FLOAT, (2, 8))], [("y", FLOAT, (4, 4))])


def nonzero() -> onnx.ModelProto:
    node = helper.make_node("NonZero", ["x"], ["y"])
    return graph([node], [("x", FLOAT, (2, 8))], [("y", TensorProto.INT64, (2, "found"))])


def matmul() -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    weight = {"w": np.ones((16, 4), np.float32)}
    return graph([node], [("x", FLOAT, (2, 8, 16))], [("y", FLOAT, (2, 8, 4))], weight)


def layer_norm() -> onnx.ModelProto:
    node = helper.make_node("LayerNormalization", ["x", "s"], ["y"])
    weight = {"s": np.ones(16, np.float32)}
    return graph([node], [("x", FLOAT, (2, 8, 16))], [("y", FLOAT, (2, 8, 16))], weight)


def loop() -> onnx.ModelProto:
    flag, value = ("c", TensorProto.BOOL, ()), ("v", FLOAT, (2, 8))
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Relu", ["v"], ["u"])],
        "body",
        [helper.make_tensor_value_info(*one) for one in (("i", TensorProto.INT64, ()), flag, value)],
        [helper.make_tensor_value_info(*one) for one in (("d", TensorProto.BOOL, ()), ("u", FLOAT, (2, 8)))],
    )
    node = helper.make_node("Loop", ["m", "", "x"], ["y"], body=body, name="it")
    return graph([node], [("m", TensorProto.INT64, ()), ("x", FLOAT, (2, 8))], [("y", FLOAT, (2, 8))])


def branch() -> onnx.ModelProto:
    def body(kind: str) -> onnx.GraphProto:
        node = helper.make_node(kind, ["x"], [kind])
        return helper.make_graph([node], kind, [], [helper.make_tensor_value_info(kind, FLOAT, (2, 8))])

    node = helper.make_node("If", ["c"], ["y"], then_branch=body("Relu"), else_branch=body("Neg"))
    return graph([node], [("c", TensorProto.BOOL, ()), ("x", FLOAT, (2, 8))], [("y", FLOAT, (2, 8))])


def noise() -> onnx.ModelProto:
    """A node without inputs, which no constant folding may touch."""
    nodes = [
        helper.make_node("RandomNormal", [], ["r"], shape=[2, 8]),
        helper.make_node("Add", ["x", "r"], ["y"]),
    ]
    return graph(nodes, [("x", FLOAT, (2, 8))], [("y", FLOAT, (2, 8))])


def gelu() -> onnx.ModelProto:
    """Gelu as exporters write it before opset 20."""
    nodes = [
        helper.make_node("Div", ["x", "root"], ["a"]),
        helper.make_node("Erf", ["a"], ["b"]),
        helper.make_node("Add", ["b", "one"], ["c"]),
        helper.make_node("Mul", ["x", "c"], ["d"]),
        helper.make_node("Mul", ["d", "half"], ["y"]),
    ]
    weights = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    return graph(nodes, [("x", FLOAT, (2, 8))], [("y", FLOAT, (2, 8))], weights)


def quantized() -> onnx.ModelProto:
    """A convolution between QuantizeLinear and DequantizeLinear, 8 bits."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"]),
        helper.make_node("Conv", ["d", "v"], ["c"], pads=[1] * 4),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["p"]),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"]),
    ]
    weights = {"w": np.ones((6, 4, 3, 3), np.uint8), "s": np.float32(0.1), "z": np.uint8(128)}
    return graph(nodes, [("x", FLOAT, (1, 4, 8, 8))], [("y", FLOAT, (1, 6, 8, 8))], weights)


def embedded(
    shape: Shape,
    x: Shape = (2, 16, 32),
    kind: str = "Add",
    norm: str = "LayerNormalization",
    residual: bool = False,
    turned: bool = False,
) -> onnx.ModelProto:
    """Tokens x and what they share, such as position embeddings, a weight of that shape; then normalized."""
    weights = {"p": np.random.default_rng(0).standard_normal(shape), "s": np.ones(x[-1])}
    nodes = [
        helper.make_node(kind, ["p", "x"] if turned else ["x", "p"], ["a"], name="it"),
        *([helper.make_node("Add", ["a", "x"], ["b"])] if residual else []),
        helper.make_node(norm, ["b" if residual else "a", "s"], ["y"], axis=-1),
    ]
    floats = {name: weight.astype(np.float32) for name, weight in weights.items()}
    opset = 23 if norm == "RMSNormalization" else 20
    return graph(nodes, [("x", FLOAT, x)], [("y", FLOAT, x)], floats, opset)


# What the emulator did with each: the rule that must tell, or None where it ran on it whole.
QNN: dict[str, tuple[Callable[[], onnx.ModelProto], str | None]] = {
    "relu": (lambda: unary("Relu"), None),
    "one number": (lambda: unary("Relu", ()), None),
    "5 axes": (lambda: unary("Relu", (1, 1, 1, 1, 8)), None),
    "4 rows": (lambda: conv(4), None),
    "fp16": (lambda: unary("Relu", dtype=TensorProto.FLOAT16), None),
    "opset 11": (lambda: unary("Relu", opset=11), None),
    "opset 24": (lambda: unary("Relu", opset=24), None),
    "matmul": (matmul, None),
    "layer norm": (layer_norm, None),
    "group norm of opset 21": (lambda: norm(21), None),
    "attention of opset 23": (attention, None),
    "gelu of opset 20": (lambda: unary("Gelu", opset=20), None),
    "gelu written out": (gelu, None),
    "int64 indices": (lambda: gather(TensorProto.INT64), None),
    "int64 arithmetic": (lambda: add(TensorProto.INT64), None),
    "constants computed at load": (arange, None),
    "sizes computed at load": (reshape_as, None),
    "6 axes in a Transpose, 1 row": (lambda: unpatchify(1), None),
    "6 axes in an Einsum, 2 rows": (lambda: unpatchify(2, einsum=True), None),
    "uint8 between Q and DQ": (quantized, None),
    "cast of uint8": (lambda: cast(TensorProto.UINT8, FLOAT), None),
    "if": (branch, None),
    "stated shape": (lambda: normed_convolution(stated=True), None),
    "shape never stated": (lambda: normed_convolution(stated=False), "static-shapes"),
    "attention with a boolean mask": (masked, "attention-mask"),
    "dynamic rows": (lambda: unary("Relu", ("rows", 4, 8, 8)), "static-shapes"),
    "sizes from data": (nonzero, "static-shapes"),
    "6 axes": (lambda: unary("Relu", (1, 1, 1, 1, 1, 8)), "rank"),
    "6 axes in a Transpose, 2 rows": (lambda: unpatchify(2), "rank"),
    "6 axes in a Transpose, a Relu beside": (lambda: shared_shuffle("Relu"), "rank"),
    "6 axes in a Transpose, a Reshape beside": (lambda: shared_shuffle("Reshape"), "rank"),
    "double": (lambda: add(TensorProto.DOUBLE), "dtypes"),
    "bfloat16": (lambda: add(TensorProto.BFLOAT16), "dtypes"),
    "int8 arithmetic": (lambda: add(TensorProto.INT8), "dtypes"),
    "cast of uint16": (lambda: cast(TensorProto.UINT16, FLOAT), "dtypes"),
    "int64 out of a cast": (lambda: cast(FLOAT, TensorProto.INT64), "output-casts"),
    "loop": (loop, "control-flow"),
    "group norm of opset 18": (lambda: norm(18), "versions"),
    "erf alone": (lambda: unary("Erf"), "gelu"),
    "sinh": (lambda: unary("Sinh"), "operators"),
    "noise": (noise, "operators"),
    "asin": (lambda: unary("Asin"), "operators"),
    "softsign": (lambda: unary("Softsign"), "operators"),
    "com.microsoft attention": (lambda: attention("com.microsoft", 18), "operators"),
}

# Graphs that the emulator runs whole: the rule that must tell, or None where every row comes out right.
QNN_ROWS: dict[str, tuple[Callable[[], onnx.ModelProto], str | None]] = {
    "[1, n, c]": (lambda: embedded((1, 16, 32)), "shared-rows"),
    "[n, c]": (lambda: embedded((16, 32)), "shared-rows"),
    "first operand": (lambda: embedded((1, 16, 32), turned=True), "shared-rows"),
    "4 rows": (lambda: embedded((1, 64, 128), (4, 64, 128)), "shared-rows"),
    "4 axes": (lambda: embedded((16, 32), (1, 4, 16, 32)), "shared-rows"),
    "4 axes, rows of its own": (lambda: embedded((2, 1, 16, 32), (2, 4, 16, 32)), "shared-rows"),
    "factor": (lambda: embedded((1, 16, 32), kind="Mul"), "shared-rows"),
    "RMSNormalization": (lambda: embedded((32,), norm="RMSNormalization"), "operators"),
    "through a residual": (lambda: embedded((1, 16, 32), residual=True), "shared-rows"),
    "[c]": (lambda: embedded((32,)), None),
    "[1, 1, c]": (lambda: embedded((1, 1, 32)), None),
    "[rows, 1, c]": (lambda: embedded((2, 1, 32)), None),
    "[rows, n, c]": (lambda: embedded((2, 16, 32)), None),
    "1 row": (lambda: embedded((16, 32), (1, 16, 32)), None),
    "2 axes": (lambda: embedded((16, 32), (16, 32)), None),
    "4 axes, heads of its own": (lambda: embedded((1, 4, 16, 32), (2, 4, 16, 32)), None),
    "subtracted": (lambda: embedded((1, 16, 32), kind="Sub"), None),
}
