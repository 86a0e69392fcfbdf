"""An ONNX graph as the lint sees it, made from its file alone: the weights of external data are never read.

Knows no device and no rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import inliner, shape_inference

_RANDOM = ("Random", "Bernoulli", "Multinomial")


@dataclass(frozen=True)
class Value:
    """A tensor's type: onnx.TensorProto's number (0: unknown) and its shape, a string where an axis is dynamic."""

    dtype: int
    shape: tuple[int | str, ...] | None  # None: unknown

    @property
    def static(self) -> bool:
        return self.shape is not None and all(isinstance(size, int) for size in self.shape)


@dataclass(frozen=True)
class Graph:
    """A graph as rules see it: what ONNX Runtime computes once, when it loads the graph, counts as constants."""

    path: Path
    opsets: Mapping[str, int]  # domain ("" is ONNX's own) -> version
    inputs: tuple[str, ...]  # without the weights that old graphs list too
    outputs: tuple[str, ...]
    weights: Mapping[str, onnx.TensorProto]
    values: Mapping[str, Value]
    nodes: tuple[onnx.NodeProto, ...]  # those left when constants are folded; bodies of control flow included
    constants: frozenset[str]


def read(path: Path) -> Graph:
    """Reads a graph without its external data, with the shapes ONNX infers.

    Raises whatever onnx does where the file is no graph (DecodeError of protobuf, onnx.checker.ValidationError, ...).
    """
    model = onnx.load(path, load_external_data=False)
    if model.functions:
        model = inliner.inline_local_functions(model)
    model = shape_inference.infer_shapes(model, data_prop=True)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    values = {value.name: _value(value) for value in _known(model.graph) if value.type.HasField("tensor_type")}
    values |= {name: Value(tensor.data_type, tuple(tensor.dims)) for name, tensor in weights.items()}
    nodes, constants = _fold(model.graph.node, values, set(weights))
    return Graph(
        path,
        {domain(entry): entry.version for entry in model.opset_import},
        tuple(value.name for value in model.graph.input if value.name not in weights),
        tuple(value.name for value in model.graph.output),
        weights,
        values,
        tuple(nodes),
        frozenset(constants),
    )


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _known(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    """What is declared or inferred of the tensors of a graph and of the bodies in it."""
    yield from (*graph.input, *graph.output, *graph.value_info)
    for node in graph.node:
        for body in _bodies(node):
            yield from _known(body)


def _value(info: onnx.ValueInfoProto) -> Value:
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return Value(tensor.elem_type, None)
    sizes = (axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?" for axis in tensor.shape.dim)
    return Value(tensor.elem_type, tuple(sizes))


def _fold(
    nodes: Iterable[onnx.NodeProto], values: Mapping[str, Value], constants: set[str]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that depend on an input, bodies included, and the names of all that does not."""
    left = []
    for node in nodes:
        bodies = _bodies(node)
        sized = node.op_type == "Shape" and values.get(node.input[0], Value(0, None)).static
        fixed = all(not name or name in constants for name in node.input) and not node.op_type.startswith(_RANDOM)
        if not bodies and (fixed or sized):
            constants |= set(node.output)
            continue
        left.append(node)
        for body in bodies:
            inner, found = _fold(body.node, values, constants | {tensor.name for tensor in body.initializer})
            left += inner
            constants |= found
    return left, constants


def domain(named: onnx.NodeProto | onnx.OperatorSetIdProto) -> str:
    """Domain of a node or an operator set; empty for ONNX's own, which has two names."""
    return "" if named.domain == "ai.onnx" else named.domain
