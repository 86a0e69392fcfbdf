"""int8 for the CPU: linear layers whose activations are rounded row by row, convolutions with calibrated ranges.

Linear layers become MatMulNBits of 8 bits (see `weights`), which needs no calibration. Convolutions become QDQ: u8
activations with one scale of a tensor, from the least and largest values that calibration saw, s8 weights with a scale
for each output channel. Nothing is scaled by what a batch happens to hold, so that a row gives the same numbers alone
and among others. All else, such as attention and norms, stays in float. Knows nothing of Stable Diffusion.
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
from .weights import pack

BITS, BLOCK = 8, 128  # of linear layers
LEAST_DB = 25.0  # signal to rounding noise of a convolution's activations, below which it stays in float


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
        Of the convolutions, signal to noise in dB of their worse activation; those below `LEAST_DB`, and the graph's
        edges, which are not in here, stay in float.
    """
    spared = kept(skeleton(graph))
    model = ir.load(graph)
    layers = {
        node: (weight, node.inputs[0].name, node.outputs[0].name)
        for node in model.graph
        if node.op_type == "Conv"
        and node.name not in spared
        and (weight := ir.convenience.get_const_tensor(node.inputs[1])) is not None
    }
    seen = calibrate(graph, feeds, [name for _, *names in layers.values() for name in names])
    noise = {}
    for node, (weight, *names) in layers.items():
        before, after = (seen[name] for name in names)
        noise[node.name] = min(signal_to_noise(before), signal_to_noise(after))
        if noise[node.name] >= LEAST_DB:
            _convolution(model.graph, node, weight.numpy(), before, after)
    pack(model, BITS, BLOCK, spared)
    with tempfile.TemporaryDirectory(prefix=".int8-", dir=graph.parent) as scratch:
        save(model, Path(scratch) / graph.name)
        del model, layers
        gc.collect()  # Windows renames no file that is still mapped
        for written in sorted(Path(scratch).iterdir()):
            os.replace(written, graph.parent / written.name)
    return noise


def signal_to_noise(seen: Range) -> float:
    """In dB, of a tensor rounded to 8 bits, were its values spread evenly within a step."""
    return float(10 * np.log10(12 * max(seen.square, 1e-30) / _scale(seen)[0] ** 2))


def _scale(seen: Range) -> tuple[float, int]:
    """Size of 255 steps from the least to the largest value, 0 among them; the step that is 0."""
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    scale = max(high - low, 1e-12) / 255
    return scale, round(-low / scale)


def _convolution(graph: ir.Graph, node: ir.Node, weight: np.ndarray, before: Range, after: Range) -> None:
    """Puts QDQ nodes before and behind a convolution: on its input, weights, bias and output."""
    name, made, users = node.name, node.outputs[0], list(node.outputs[0].uses())
    scales = (np.maximum(np.abs(weight).reshape(len(weight), -1).max(1), 1e-12) / 127).astype(np.float32)
    each = scales.reshape(-1, *[1] * (weight.ndim - 1))
    stored = _dequantised(graph, f"{name}_weight", np.rint(weight / each).astype(np.int8), scales)
    taken = _rounded(graph, f"{name}_input", node.inputs[0], before)
    graph.insert_before(node, [*taken, stored])
    node.replace_input_with(0, taken[-1].outputs[0])
    node.replace_input_with(1, stored.outputs[0])
    bias = ir.convenience.get_const_tensor(node.inputs[2]) if node.inputs[2:] else None
    if bias is not None:
        steps = (_scale(before)[0] * scales.astype(np.float64)).astype(np.float32)
        whole = np.clip(np.rint(bias.numpy() / steps.astype(np.float64)), -(2**31), 2**31 - 1).astype(np.int32)
        stored = _dequantised(graph, f"{name}_bias", whole, steps)
        graph.insert_before(node, stored)
        node.replace_input_with(2, stored.outputs[0])
    given = _rounded(graph, f"{name}_output", made, after)
    graph.insert_after(node, given)
    for user, index in users:
        user.replace_input_with(index, given[-1].outputs[0])


def _rounded(graph: ir.Graph, name: str, value: ir.Value, seen: Range) -> list[ir.Node]:
    """QuantizeLinear to u8 and DequantizeLinear."""
    scale, zero = _scale(seen)
    step = [
        _initializer(graph, f"{name}_scale", np.float32(scale)),
        _initializer(graph, f"{name}_zero", np.uint8(zero)),
    ]
    down = ir.node("QuantizeLinear", [value, *step], name=f"{name}_quantize")
    up = ir.node("DequantizeLinear", [down.outputs[0], *step], name=f"{name}_dequantize")
    up.outputs[0].shape, up.outputs[0].dtype = value.shape, ir.DataType.FLOAT
    return [down, up]


def _dequantised(graph: ir.Graph, name: str, whole: np.ndarray, scales: np.ndarray) -> ir.Node:
    """DequantizeLinear of stored whole numbers, one scale for each entry of the first axis."""
    stored = [_initializer(graph, name, whole), _initializer(graph, f"{name}_scale", scales)]
    return ir.node("DequantizeLinear", stored, {"axis": 0}, name=f"{name}_dequantize")


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value
