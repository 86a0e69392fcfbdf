"""Static quantisation of a component's graphs, for NPUs: int8 weights, activations of 8 or 16 bits, as QDQ nodes.

Ranges are fixed by calibration. Nothing is scaled by what a batch happens to hold, so that a row gives the same
numbers alone and among others. They are plain minima and maxima: on shapes-sd3 percentiles of 99.99 and means gave
the same error to 3 %. ONNX Runtime's quantiser writes the nodes; here is what it is told. Knows nothing of Stable
Diffusion.
"""

from __future__ import annotations

import gc
import logging
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor
from onnxruntime.quantization import CalibrationMethod, QuantType, StaticQuantConfig
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata

from . import ExportError
from .graph import save, save_sharing

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_TYPES = {"uint8": QuantType.QUInt8, "uint16": QuantType.QUInt16}
_WEIGHTS: dict[str, dict[str, Any]] = {  # what the library would do otherwise
    "LayerNormalization": {"quant_type": QuantType.QUInt8},  # QNN takes no int8 there
    "MatMul": {"quant_type": QuantType.QInt8, "symmetric": True, "axis": 1},
}


class Range(NamedTuple):
    """What calibration saw of a tensor."""

    low: float
    high: float
    square: float  # mean of squares


def quantise(
    graphs: Sequence[Path],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    activations: Literal["uint8", "uint16"],
    keep: Collection[str] = (),
) -> None:
    """Replaces fp32 graphs of one component, which share one data file, by QDQ graphs over a new one.

    Parameters
    ----------
    graphs : sequence of Path
        One folder's: `model.onnx`, whose data file the others use, then those of other row counts: traces of the same
        module, which have the same nodes in the same order. They get the scales of the first and its int8 weights.
    feeds : sequence of mapping
        Inputs of the first graph: its ranges are the least and the largest values that these bring about.
    activations : "uint8" | "uint16"
        Asymmetric. Weights are int8, symmetric, one scale per output channel; biases of Conv and Gemm int32.
    keep : collection of str
        Nodes of the first graph that stay in float, or operators, beside those of `kept`.

    Raises
    ------
    ExportError
        Graphs that differ by more than their rows; a node to keep that there is not. The files are then as they were:
        they are replaced at the end, one after the other, so that nobody may read the folder meanwhile.
    """
    first, folder = graphs[0], graphs[0].parent
    with tempfile.TemporaryDirectory(prefix=".qdq-", dir=folder) as scratch, _quiet():
        plain = skeleton(first)
        known = {word for node in plain.graph.node for word in (node.name, node.op_type)}
        if strangers := sorted(set(keep) - known):
            raise ExportError(f"{first}: has no node or operator {strangers[0]} to keep in float; leave it out")
        ranges = calibrate(first, feeds)
        for path in graphs:
            model = skeleton(path)
            same = _counterparts(plain, model, path)
            found = {same.get(name, name): bounds for name, bounds in ranges.items()}
            spared = kept(model) | {same.get(name, name) for name in keep}
            config = _configuration(model, activations, spared)
            whole = _stand_in(model, path, spared)
            made = _fill(ir.from_proto(_quantised(model, config, found)), whole)
            written = Path(scratch) / path.name
            if path == first:
                save(made, written)
            else:
                save_sharing(made, written, Path(scratch) / first.name)
            del made, whole  # whose weights lie in the file that is replaced
        gc.collect()  # Windows renames no file that is still mapped
        for written in sorted(Path(scratch).iterdir()):
            os.replace(written, folder / written.name)


def kept(model: onnx.ModelProto) -> set[str]:
    """Nodes that stay in float, a hundredth of the compute: the network of the time, and the graph's two edges."""
    return _time(model) | _edges(model)


def _time(model: onnx.ModelProto) -> set[str]:
    """What depends on nothing but an input of one number a row, up to the second product.

    Sine and cosine of numbers up to 1000 bear no steps of 4, and every layer hangs on what is made of them.
    """
    scalars = {value.name for value in model.graph.input if len(value.type.tensor_type.shape.dim) == 1}
    depth = dict.fromkeys(scalars, 0)  # tensor that depends on them alone -> products on the way to it
    weights = {tensor.name for tensor in model.graph.initializer}
    found = set()
    for node in model.graph.node:
        made = [name for name in node.input if name and name not in weights]
        if made and all(name in depth for name in made):
            products = max(depth[name] for name in made) + (node.op_type in _PRODUCTS)
            if products <= 2:
                found.add(node.name)
                depth |= dict.fromkeys(node.output, products)
    return found


def _edges(model: onnx.ModelProto) -> set[str]:
    """The products that read the latents, and what makes the output from the last product on.

    In 8 bits both add an error of their own to every step, which no later layer takes back.
    """
    latents = {value.name for value in model.graph.input if len(value.type.tensor_type.shape.dim) == 4}
    maker = {name: node for node in model.graph.node for name in node.output}
    found = {node.name for node in model.graph.node if node.op_type in _PRODUCTS and node.input[0] in latents}
    for output in model.graph.output:
        node = maker[output.name]
        while node.op_type not in _PRODUCTS and any(name in maker for name in node.input):
            found.add(node.name)
            node = next(maker[name] for name in node.input if name in maker)
        found.add(node.name)
    return found


def calibrate(
    graph: Path, feeds: Sequence[Mapping[str, np.ndarray]], tensors: Collection[str] | None = None
) -> dict[str, Range]:
    """What the float tensors of a graph, or some of them, hold over all feeds.

    Reduced inside the graph, call by call: no activation outlives its use.
    """
    model = skeleton(graph)
    names = list(dict.fromkeys(_floats(model) if tensors is None else tensors))
    if not names:
        return {}
    for name in names:
        model.graph.node.append(helper.make_node("Mul", [name, name], [f"{name}/square"]))
        for reduce, value in (("ReduceMin", name), ("ReduceMax", name), ("ReduceMean", f"{name}/square")):
            output = f"{value}/{reduce}"
            model.graph.node.append(helper.make_node(reduce, [value], [output], keepdims=0))
            model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    wanted = [value.name for value in model.graph.output][-3 * len(names) :]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    beside = graph.with_name(f".{graph.stem}.ranges.onnx")  # for its data is found by its place
    try:
        onnx.save(model, beside)
        session = onnxruntime.InferenceSession(beside, options, providers=["CPUExecutionProvider"])
    finally:
        beside.unlink(missing_ok=True)
    seen = np.asarray([session.run(wanted, dict(feed)) for feed in feeds], np.float64)
    seen = seen.reshape(len(feeds), len(names), 3)  # (feeds, tensors, least, largest and mean square)
    found = zip(seen[..., 0].min(0), seen[..., 1].max(0), seen[..., 2].mean(0), strict=True)
    return {name: Range(*map(float, values)) for name, values in zip(names, found, strict=True)}


def skeleton(path: Path) -> onnx.ModelProto:
    """A graph without its data, the type of every tensor told."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    add_infer_metadata(model)  # else the quantiser would write it to disk and infer them again
    return model


def _floats(model: onnx.ModelProto) -> list[str]:
    """The float tensors that a run makes or is given."""
    made = {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    floats = (value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT)
    return [name for name in dict.fromkeys(floats) if name in made]


def _counterparts(first: onnx.ModelProto, model: onnx.ModelProto, path: Path) -> dict[str, str]:
    """Nodes and what they make: name in the first graph -> name in another one."""
    if [node.op_type for node in first.graph.node] != [node.op_type for node in model.graph.node]:
        raise ExportError(f"{path}: has other nodes than the graph it shares its weights with; export both again")
    same = {}
    for one, other in zip(first.graph.node, model.graph.node, strict=True):
        same |= {one.name: other.name} | dict(zip(one.output, other.output, strict=True))
    return same


def _configuration(model: onnx.ModelProto, activations: str, spared: Collection[str]) -> StaticQuantConfig:
    """What the quantiser is told, of a skeleton; `spared`: nodes and operators that get no QDQ nodes."""
    nodes = [node.name for node in model.graph.node if node.name in spared or node.op_type in spared]
    weights = {tensor.name for tensor in model.graph.initializer}
    told = {
        node.input[1]: [_WEIGHTS[node.op_type]]
        for node in model.graph.node
        if node.op_type in _WEIGHTS and node.input[1] in weights and node.name not in nodes
    }
    return get_qnn_qdq_config(
        model,
        None,
        activation_type=_TYPES[activations],
        weight_type=QuantType.QInt8,
        per_channel=True,
        nodes_to_exclude=nodes,
        init_overrides=told,
    )


def _quantised(model: onnx.ModelProto, config: StaticQuantConfig, ranges: Mapping[str, Range]) -> onnx.ModelProto:
    """The graph with QDQ nodes."""
    bounds = {
        name: TensorData(lowest=np.float32(seen.low), highest=np.float32(seen.high)) for name, seen in ranges.items()
    }
    return QDQQuantizer(
        model,
        config.per_channel,
        config.reduce_range,
        config.weight_type,
        config.activation_type,
        TensorsData(CalibrationMethod.MinMax, bounds),
        config.nodes_to_quantize or [],
        config.nodes_to_exclude or [],
        config.op_types_to_quantize,
        config.extra_options,
    ).quantize_model()


def _stand_in(model: onnx.ModelProto, path: Path, spared: Collection[str]) -> dict[str, tuple[ir.TensorProtocol, int]]:
    """Gives a skeleton its data, but of each weight that will be quantised only the ends of every output channel.

    The quantiser, which holds several copies of what it is given, takes scales from these. Gives the weights in whole,
    in their file, and the axis of their output channels.
    """
    stored = ir.load(path).graph.initializers
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    whole = {}
    for tensor in model.graph.initializer:
        axes = {_channels(node, tensor, spared) for node in readers.get(tensor.name, ())}
        axis = axes.pop() if len(axes) == 1 else None
        if axis is None:
            if tensor.data_location == TensorProto.EXTERNAL:
                load_external_data_for_tensor(tensor, str(path.parent))
            continue
        weight = stored[tensor.name].const_value
        assert weight is not None
        values = np.moveaxis(weight.numpy(), axis, 0).reshape(weight.shape[axis], -1)
        ends = np.stack([values.min(1), values.max(1)], 1).reshape(-1, 2, *[1] * (len(weight.shape) - 2))
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(np.moveaxis(ends, 0, axis)), tensor.name))
        whole[tensor.name] = (weight, axis)
    return whole


def _channels(node: onnx.NodeProto, tensor: onnx.TensorProto, spared: Collection[str]) -> int | None:
    """The axis of the output channels of a weight that a node multiplies with; None if it is no weight, or spared."""
    if node.op_type not in _PRODUCTS or {node.name, node.op_type} & set(spared) or node.input[1] != tensor.name:
        return None
    if tensor.data_location != TensorProto.EXTERNAL or list(node.input).count(tensor.name) != 1:
        return None
    if node.op_type == "Gemm":
        return 0 if any(one.name == "transB" and one.i for one in node.attribute) else 1
    return {"Conv": 0, "MatMul": 1}[node.op_type] if len(tensor.dims) > 1 else None


def _fill(model: ir.Model, whole: Mapping[str, tuple[ir.TensorProtocol, int]]) -> ir.Model:
    """Puts the weights, quantised when they are written, in the places of their ends."""
    constants = model.graph.initializers
    for name, (weight, axis) in whole.items():
        value, scale = constants[f"{name}_quantized"], constants[f"{name}_scale"].const_value
        assert scale is not None
        others = [i for i in range(len(weight.shape)) if i != axis]

        rounded = partial(_rounded, weight, np.expand_dims(scale.numpy(), others))
        value.const_value = ir.LazyTensor(rounded, dtype=ir.DataType.INT8, shape=weight.shape, name=value.name)
        value.shape = weight.shape
    return model


def _rounded(weight: ir.TensorProtocol, steps: np.ndarray) -> ir.Tensor:
    return ir.tensor(np.clip(np.rint(weight.numpy() / steps), -128, 127).astype(np.int8))


@contextmanager
def _quiet() -> Any:
    """Without the quantiser's remarks, which it makes to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
