"""An ONNX graph as the lint sees it, made from its file alone: the weights of external data are never read.

Knows no device and no rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import defs, inliner, shape_inference

_LATEST = 2**31 - 1  # that onnx takes for the version of an operator set
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

    Raises ValueError where it is malformed, and whatever onnx does where the file is no graph (DecodeError of protobuf,
    onnx.checker.ValidationError, ...).
    """
    model = onnx.load(path, load_external_data=False)
    if not model.opset_import:
        raise ValueError("it names no operator set")
    _check(model)
    if model.functions:
        model = inliner.inline_local_functions(model)
        _check(model)
    model = shape_inference.infer_shapes(model, data_prop=True)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    values = {value.name: _value(value) for value in _known(model.graph) if value.type.HasField("tensor_type")}
    values |= {name: Value(tensor.data_type, tuple(tensor.dims)) for name, tensor in weights.items()}
    nodes, constants = _fold(model.graph.node, values, set(weights))
    return Graph(
        path,
        _opsets(model.opset_import),
        tuple(value.name for value in model.graph.input if value.name not in weights),
        tuple(value.name for value in model.graph.output),
        weights,
        values,
        tuple(nodes),
        frozenset(constants),
    )


def _opsets(entries: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {domain(entry): entry.version for entry in entries}


def _check(model: onnx.ModelProto) -> None:
    """ValueError for what the rest of this package, and onnx itself, relies on without looking."""
    opsets = _opsets(model.opset_import)
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            _check_dtype(value.name, value.type.tensor_type.elem_type)
        for tensor in graph.initializer:
            _check_weight(tensor)
        for node in graph.node:
            _check_node(node, opsets)
    for function in model.functions:
        for node in function.node:
            _check_node(node, _opsets(function.opset_import))


def _check_text(*names: str | bytes) -> None:
    if not all(isinstance(name, str) for name in names):  # protobuf gives bytes for what is no UTF-8
        raise ValueError("it holds a name that is no text")


def _check_dtype(name: str, number: int) -> None:
    if number not in onnx.TensorProto.DataType.values():
        raise ValueError(f"{name} is of type {number}, which is none")


def _check_weight(tensor: onnx.TensorProto) -> None:
    _check_dtype(tensor.name, tensor.data_type)
    if min(tensor.dims, default=0) < 0:
        raise ValueError(f"the weight {tensor.name} has a size below 0")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        location, offset, length = external(tensor)
        _check_text(location)
        if min(offset, length) < 0 or not location or "\0" in location:
            raise ValueError(f"the place of the weight {tensor.name} in external data is none")


def external(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    """Where the external data of a weight are: file, offset and length in bytes; ValueError for what is no number."""
    given = {entry.key: entry.value for entry in tensor.external_data}
    return given.get("location", ""), int(given.get("offset", 0)), int(given.get("length", 0))


def _check_node(node: onnx.NodeProto, opsets: Mapping[str, int]) -> None:
    """A node of a type that onnx knows has as many inputs and outputs as that takes, and the attributes it needs."""
    _check_text(node.op_type, node.domain, node.name, *node.input, *node.output)
    version = min(opsets.get(domain(node), 0), _LATEST)
    if version < 1 and not domain(node):
        raise ValueError(f"{node.op_type} {node.name} is of an operator set that the graph does not name")
    if version < 1 or not defs.has(node.op_type, version, domain(node)):
        return
    schema = defs.get_schema(node.op_type, version, domain(node))
    for what, tensors, least, most in (
        ("inputs", node.input, schema.min_input, schema.max_input),
        ("outputs", node.output, schema.min_output, schema.max_output),
    ):
        if not least <= len(tensors) <= most:
            raise ValueError(f"{node.op_type} {node.name} has {len(tensors)} {what}")
    kinds = {attribute.name: attribute.type for attribute in node.attribute if not attribute.ref_attr_name}
    given = {attribute.name for attribute in node.attribute}
    for name, attribute in schema.attributes.items():
        if (attribute.required and name not in given) or kinds.get(name, attribute.type.value) != attribute.type.value:
            raise ValueError(f"{node.op_type} {node.name} has no right {name}")


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the bodies in it."""
    yield graph
    for node in graph.node:
        for body in _bodies(node):
            yield from _graphs(body)


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _known(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    """What is declared or inferred of the tensors of a graph and of the bodies in it."""
    for one in _graphs(graph):
        yield from (*one.input, *one.output, *one.value_info)


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
        sized = node.op_type == "Shape" and not domain(node) and values.get(node.input[0], Value(0, None)).static
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
