"""int8 for the CPU: convolutions and linear layers with calibrated ranges, or rounded row by row.

Convolutions and products with weights become QDQ: u8 activations with one scale of a tensor, from the least and largest
values that calibration saw, s8 weights with a scale for each output channel. Where such an activation would be rounded
too coarsely, a convolution stays in float, and a linear layer becomes MatMulNBits of 8 bits (see `weights`), which
rounds each block of a row by itself: slower, and closer. Nothing is scaled by what a batch happens to hold, so that a
row gives the same numbers alone and among others. All else, such as attention and norms, stays in float. Knows nothing
of Stable Diffusion.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from .graph import save
from .qdq import Range, calibrate, kept, skeleton
from .rewrites import constant
from .weights import pack

BITS, BLOCK = 8, 128  # of MatMulNBits
LEAST_DB = 25.0  # signal to noise that rounding a calibrated activation must leave


def quantise(graph: Path, feeds: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Replaces an fp32 graph of any number of rows, and its data file, by int8 ones.

    Parameters
    ----------
    graph : Path
    feeds : sequence of mapping
        Inputs, of which the ranges are taken.

    Returns
    -------
    dict
        Of convolutions and linear layers, signal to noise in dB of the worse of their rounded activations. The graph's
        edges and the network of the time, which are not in here, stay in float.
    """
    with tempfile.TemporaryDirectory(prefix=".int8-", dir=graph.parent) as scratch:
        noise = _write(graph, feeds, Path(scratch) / graph.name)
        gc.collect()  # Windows renames no file that is still mapped
        for written in sorted(Path(scratch).iterdir()):
            os.replace(written, graph.parent / written.name)
    return noise


def _write(graph: Path, feeds: Sequence[Mapping[str, np.ndarray]], target: Path) -> dict[str, float]:
    """Writes the int8 graph of one in fp32; what `quantise` gives."""
    spared = kept(skeleton(graph))
    model = ir.load(graph)
    layers = {
        node: (weight, _rounds(node))
        for node in model.graph
        if node.name not in spared and (weight := _weight(node)) is not None
    }
    seen = calibrate(graph, feeds, [name for _, names in layers.values() for name in names])
    noise: dict[str, float] = {}
    rounded: dict[ir.Value, ir.Value] = {}  # what several nodes read is rounded once
    for node, (weight, names) in layers.items():
        ranges = [seen[name] for name in names]
        noise[node.name] = min(map(signal_to_noise, ranges))
        if noise[node.name] >= LEAST_DB:
            _quantise_node(model.graph, node, weight.numpy(), ranges, rounded)
    pack(model, BITS, BLOCK, spared)
    save(model, target)
    return noise


def signal_to_noise(seen: Range) -> float:
    """In dB, of a tensor rounded to 8 bits, were its values spread evenly within a step."""
    return float(10 * np.log10(12 * max(seen.square, 1e-30) / _scale(seen)[0] ** 2))


def _scale(seen: Range) -> tuple[float, int]:
    """Size of 255 steps from the least to the largest value, 0 among them; the step that is 0."""
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    scale = max(high - low, 1e-12) / 255
    return scale, round(-low / scale)


def _weight(node: ir.Node) -> ir.TensorProtocol | None:
    """The constant weight of a convolution or of a product (K, N)."""
    if node.domain or node.op_type not in ("Conv", "MatMul"):
        return None
    weight = ir.convenience.get_const_tensor(node.inputs[1])
    return None if weight is None or (node.op_type == "MatMul" and len(weight.shape) != 2) else weight


def _rounds(node: ir.Node) -> list[str]:
    """The activations that quantising a node rounds: a product's result stays in float."""
    return [node.inputs[0].name, node.outputs[0].name][: 2 if node.op_type == "Conv" else 1]


def _quantise_node(
    graph: ir.Graph, node: ir.Node, weight: np.ndarray, ranges: Sequence[Range], rounded: dict[ir.Value, ir.Value]
) -> None:
    """Puts QDQ nodes before and, with a second range, behind a convolution or a product."""
    name, made, users = node.name, node.outputs[0], list(node.outputs[0].uses())
    axis = 0 if node.op_type == "Conv" else 1  # of the output channels
    others = tuple(i for i in range(weight.ndim) if i != axis)
    bias = ir.convenience.get_const_tensor(node.inputs[2]) if node.inputs[2:] else None
    step = _scale(ranges[0])[0]
    largest = np.maximum(np.abs(weight).max(others), 1e-12) / 127
    if bias is not None:  # in 32 bits, of steps that are the input's times the weights'
        largest = np.maximum(largest, np.abs(bias.numpy()) / (2**30 * step))
    scales = largest.astype(np.float32)
    whole = np.rint(weight / np.expand_dims(scales, others)).astype(np.int8)
    stored = _dequantised(graph, f"{name}_weight", whole, scales, axis)
    graph.insert_before(node, stored)
    if (read := node.inputs[0]) not in rounded:
        taken = _rounded(graph, f"{name}_input", read, ranges[0])
        graph.insert_before(node, taken)
        rounded[read] = taken[-1].outputs[0]
    node.replace_input_with(0, rounded[read])
    node.replace_input_with(1, stored.outputs[0])
    if bias is not None:
        steps = (step * scales.astype(np.float64)).astype(np.float32)
        whole = np.rint(bias.numpy() / steps.astype(np.float64)).astype(np.int32)
        stored = _dequantised(graph, f"{name}_bias", whole, steps, 0)
        graph.insert_before(node, stored)
        node.replace_input_with(2, stored.outputs[0])
    for behind in ranges[1:]:
        given = _rounded(graph, f"{name}_output", made, behind)
        graph.insert_after(node, given)
        for user, index in users:
            user.replace_input_with(index, given[-1].outputs[0])
        rounded[given[-1].outputs[0]] = given[-1].outputs[0]


def _rounded(graph: ir.Graph, name: str, value: ir.Value, seen: Range) -> list[ir.Node]:
    """QuantizeLinear to u8 and DequantizeLinear."""
    scale, zero = _scale(seen)
    step = [
        constant(graph, f"{name}_scale", np.array(scale, np.float32)),
        constant(graph, f"{name}_zero", np.array(zero, np.uint8)),
    ]
    down = ir.node("QuantizeLinear", [value, *step], name=f"{name}_quantize")
    up = ir.node("DequantizeLinear", [down.outputs[0], *step], name=f"{name}_dequantize")
    up.outputs[0].shape, up.outputs[0].dtype = value.shape, ir.DataType.FLOAT
    return [down, up]


def _dequantised(graph: ir.Graph, name: str, whole: np.ndarray, scales: np.ndarray, axis: int) -> ir.Node:
    """DequantizeLinear of stored whole numbers, one scale for each entry of an axis."""
    stored = [constant(graph, name, whole), constant(graph, f"{name}_scale", scales)]
    return ir.node("DequantizeLinear", stored, {"axis": axis}, name=f"{name}_dequantize")
