"""Multiply-accumulates of an ONNX graph, node by node: what a share of its compute is measured in.

Counted are the operators that decide how long a diffusion model takes: convolutions, matrix products, attention, of
ONNX and of ONNX Runtime's own domain. Element-wise work counts nothing. Knows nothing of Stable Diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

ORT = "com.microsoft"


def count(graph: Path, axis: str, rows: int = 1) -> dict[str, int]:
    """Node name -> multiply-accumulates for one row; nodes without any are left out.

    Parameters
    ----------
    graph : Path
        An ONNX file. Its weights are not read.
    axis : str
        The dynamic axis, taken as one row.
    rows : int
        Of a graph whose row count is fixed: how many rows its sizes stand for.

    Raises
    ------
    ValueError
        A shape that is needed is not known, even by inference, or two counted nodes have one name.
    """
    model = shaped(graph, axis)
    counts: dict[str, int] = {}
    for node in model.graph:
        if rule := _COUNT.get((node.domain, node.op_type)):
            if not node.name or node.name in counts:
                raise ValueError(f"two {node.op_type} nodes are named {node.name!r}: give every node a name of its own")
            counts[node.name] = rule(node) // rows
    return {name: macs for name, macs in counts.items() if macs}


def shaped(graph: Path, axis: str) -> ir.Model:
    """A graph with the shapes of its tensors, as far as inference finds them, the dynamic axis taken as one row."""
    model = ir.load(graph)
    _bind(model, axis)
    ShapeInferencePass()(model)
    return model


def _bind(model: ir.Model, axis: str) -> None:
    """Makes the dynamic axis 1 wherever a shape names it, alone or in a product such as `8*rows`."""
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_bound(size, axis) for size in value.shape])


def _bound(size: int | ir.SymbolicDim, axis: str) -> int | None:
    """A size without the axis; None, and so left to inference, where it depends on anything else."""
    factors = str(size).replace(" ", "").strip("()").split("*")
    if all(part == axis or part.isdecimal() for part in factors):
        return math.prod(int(part) for part in factors if part != axis)
    return None


def _shape(value: Any) -> list[int]:
    if value.shape is None or not all(isinstance(size, int) for size in value.shape):
        raise ValueError(f"{value.name} has the shape {value.shape}: its multiply-accumulates cannot be counted")
    return list(value.shape)


def _conv(weight: int) -> Callable[[Any], int]:
    """Every output needs one filter, (channels per group, *kernel); `weight` is its input's index."""
    return lambda node: math.prod(_shape(node.outputs[0]) + _shape(node.inputs[weight])[1:])


def _conv_transpose(node: Any) -> int:
    """Every input is spread over one filter, (output channels per group, *kernel)."""
    return math.prod(_shape(node.inputs[0]) + _shape(node.inputs[1])[1:])


def _matmul(node: Any) -> int:
    """Every output is a product over the last axis of the first operand (the one before it, if `transA`)."""
    transposed = "transA" in node.attributes and node.attributes["transA"].as_int()
    return math.prod(_shape(node.outputs[0])) * _shape(node.inputs[0])[-2 if transposed else -1]


def _matmul_nbits(node: Any) -> int:
    """Packed weights have no shape of their own: N columns, as many products as the first operand has numbers."""
    return math.prod(_shape(node.inputs[0])) * int(node.attributes["N"].as_int())


def _attention(node: Any) -> int:
    """Two products, scores and their sum over values, without masks.

    Query (rows, heads, L, D) or (rows, L, heads D), key and value alike with S for L.
    """
    query, key, value = (_shape(tensor) for tensor in node.inputs[:3])
    if len(query) == 3:
        heads, shared = (node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads"))
        return query[0] * query[1] * key[1] * (query[2] + value[2] * heads // shared)
    return query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])


def _multi_head_attention(node: Any) -> int:
    """The same of (rows, L, heads D); key and value may be (rows, heads, S, D). Packed forms are refused."""
    if len(node.inputs) < 3 or node.inputs[1] is None or node.inputs[2] is None:
        raise ValueError(f"{node.name}: packed query, key and value; give it three tensors")
    query, key, value = (_shape(tensor) for tensor in node.inputs[:3])
    if len(query) != 3:
        raise ValueError(f"{node.name}: its query has {len(query)} axes, (rows, tokens, width) are counted")
    width = value[2] if len(value) == 3 else value[1] * value[3]
    return query[0] * query[1] * key[1 if len(key) == 3 else 2] * (query[2] + width)


_COUNT: dict[tuple[str, str], Callable[[Any], int]] = {
    ("", "Attention"): _attention,
    ("", "Conv"): _conv(1),
    ("", "ConvInteger"): _conv(1),
    ("", "ConvTranspose"): _conv_transpose,
    ("", "Gemm"): _matmul,
    ("", "MatMul"): _matmul,
    ("", "MatMulInteger"): _matmul,
    ("", "QLinearConv"): _conv(3),
    ("", "QLinearMatMul"): _matmul,
    (ORT, "DynamicQuantizeMatMul"): _matmul,
    (ORT, "FusedMatMul"): _matmul,
    (ORT, "MatMulIntegerToFloat"): _matmul,
    (ORT, "MatMulNBits"): _matmul_nbits,
    (ORT, "MultiHeadAttention"): _multi_head_attention,
}
