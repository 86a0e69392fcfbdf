"""What a rule can look at in an ONNX graph: each check yields (where, what) for everything that breaks its limit.

Knows no device; the limits are in `rules`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

import onnx
from onnx import helper

from .graph import Graph, Value, domain, external

_CONTROL = frozenset({"If", "Loop", "Scan", "SequenceMap"})

Found = Iterator[tuple[str, str]]


def opset(graph: Graph, limit: tuple[int, int]) -> Found:
    """ONNX's own operators are of a version from limit[0] to limit[1]."""
    version = graph.opsets.get("", 0)
    if not limit[0] <= version <= limit[1]:
        yield "", f"opset {version}, where {limit[0]} to {limit[1]} are taken"


def static(graph: Graph, limit: None = None) -> Found:
    """Every size is a number: tells of inputs that have none, and of nodes that make what has none from what has."""
    for name in graph.inputs:
        if name in graph.values and not graph.values[name].static:
            yield name, f"input of shape {_shape(graph.values[name])}"
    for node in graph.nodes:
        sources = [graph.values.get(name) for name in node.input if name]
        if domain(node) or not all(value and value.static for value in sources):
            continue  # of other domains' operators ONNX infers nothing
        for name in filter(None, node.output):
            value = graph.values.get(name, Value(0, None))
            if value.shape is None:
                yield _name(node), f"{node.op_type} gives {name}, whose shape is neither stated nor inferred"
            elif not value.static:
                yield _name(node), f"{node.op_type} gives the shape {_shape(value)}, which only the data decides"


def control_flow(graph: Graph, limit: Collection[str]) -> Found:
    """No node whose body runs or not, or how often, by the data."""
    for node in graph.nodes:
        if node.op_type in limit:
            yield _name(node), f"{node.op_type} decides at run time what is computed"


def operators(graph: Graph, limit: Mapping[str, Collection[str]]) -> Found:
    """Every node is of a domain and a type that limit names."""
    for node in graph.nodes:
        if node.op_type not in limit.get(domain(node), ()) and node.op_type not in _CONTROL:
            yield _name(node), f"{_type(node)} is none of its operators"


def denied(graph: Graph, limit: Collection[str]) -> Found:
    """No node is of a type (with its domain and a colon, if it is not ONNX's own) that limit names."""
    for node in graph.nodes:
        if _type(node) in limit:
            yield _name(node), f"{_type(node)} does not run there"


def feeds(graph: Graph, limit: Mapping[str, Collection[str]]) -> Found:
    """What a node of a type in limit gives goes to nodes of the types named with it alone: a pattern known as one."""
    for node in graph.nodes:
        if node.op_type in limit:
            next_ones = {other.op_type for other in graph.nodes if set(node.output) & set(other.input)}
            if not next_ones or not next_ones <= set(limit[node.op_type]):
                yield _name(node), f"{node.op_type} outside of the pattern it is known in"


def rank(graph: Graph, limit: int) -> Found:
    """No tensor has more axes than limit."""
    for where, name, value in _touched(graph):
        if value.shape is not None and len(value.shape) > limit:
            yield where, _axes(name, value, limit)


def rank_but_shuffles(graph: Graph, limit: tuple[int, Mapping[tuple[str, tuple[int, ...]], int]]) -> Found:
    """No tensor has more axes than limit[0], save where a node permutes axes between two Reshapes and nothing else.

    limit[1] gives for a type of node and its permutation the most rows that are then taken.
    """
    made = {name: node for node in graph.nodes for name in node.output}
    readers = defaultdict(list)
    for node in graph.nodes:
        for name in node.input:
            readers[name].append(node)
    excused = set()
    for node in graph.nodes:
        most = limit[1].get((node.op_type, _permutation(node)), 0)
        if not most or not node.input or not node.output:
            continue
        source, target = node.input[0], node.output[0]
        ends = [_type(other) for other in (made.get(source), *readers[target]) if other is not None]
        between = ends == ["Reshape"] * 2 and len(readers[source]) == 1 and target not in graph.outputs
        shape = graph.values.get(source, Value(0, None)).shape
        if between and shape and isinstance(shape[0], int) and shape[0] <= most:
            excused |= {source, target}
    for where, name, value in _touched(graph):
        if value.shape is not None and len(value.shape) > limit[0] and name not in excused:
            yield where, _axes(name, value, limit[0])


def _permutation(node: onnx.NodeProto) -> tuple[int, ...]:
    """Where a Transpose or an Einsum of one input takes its axes from; () for any other node."""
    options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if _type(node) == "Transpose":
        return tuple(options.get("perm", ()))
    if _type(node) != "Einsum":
        return ()
    source, _, target = options.get("equation", b"").decode(errors="replace").replace(" ", "").partition("->")
    return tuple(map(source.index, target)) if sorted(source) == sorted(target) else ()


def _axes(name: str, value: Value, limit: int) -> str:
    return f"{name} has {len(value.shape or ())} axes, {_shape(value)}, where {limit} are taken"


def node_rank(graph: Graph, limit: Mapping[str, int]) -> Found:
    """The first input of a node has no more axes than limit gives for its type."""
    for node in graph.nodes:
        shape = graph.values[node.input[0]].shape if node.input and node.input[0] in graph.values else None
        if shape is not None and len(shape) > limit.get(node.op_type, len(shape)):
            yield _name(node), f"{node.op_type} of {len(shape)} axes, where {limit[node.op_type]} are taken"


def dtypes(graph: Graph, limit: Mapping[str, Collection[str]]) -> Found:
    """What a node takes from others and gives is of a type in limit[""], or in the limit of its own type."""
    for node in graph.nodes:
        taken = {*limit[""], *limit.get(node.op_type, ())}
        for name in (*node.input, *node.output):
            value = graph.values.get(name)
            kind = onnx.TensorProto.DataType.Name(value.dtype).lower() if value and value.dtype else ""
            if kind and name not in graph.constants and kind not in taken:
                yield _name(node), f"{node.op_type} of {name}, which is {kind}"


def input_dtypes(graph: Graph, limit: Mapping[tuple[str, int], Collection[str]]) -> Found:
    """No input of a node is of a type that limit names for its type and position."""
    for node in graph.nodes:
        for index, name in enumerate(node.input):
            kind = onnx.TensorProto.DataType.Name(graph.values.get(name, Value(0, None)).dtype).lower()
            if kind in limit.get((node.op_type, index), ()):
                yield _name(node), f"{node.op_type} of {name}, its input {index}, which is {kind}"


def output_casts(graph: Graph, limit: Collection[tuple[str, str]]) -> Found:
    """No output of the graph is a Cast from a type to another that limit names together."""
    for node in graph.nodes:
        if _type(node) == "Cast" and node.input and {*node.output} & {*graph.outputs}:
            values = [graph.values.get(name, Value(0, None)) for name in (node.input[0], node.output[0])]
            kinds = tuple(onnx.TensorProto.DataType.Name(value.dtype).lower() for value in values)
            if kinds in limit:
                yield _name(node), f"Cast of {kinds[0]} to {kinds[1]} as an output of the graph"


def since(graph: Graph, limit: Mapping[str, int]) -> Found:
    """Nodes of the types in limit are of its opset or a later one."""
    version = graph.opsets.get("", 0)
    for node in graph.nodes:
        if not domain(node) and version < limit.get(node.op_type, 0):
            yield _name(node), f"{node.op_type} of opset {version}, where {limit[node.op_type]} or later is taken"


def constant_inputs(graph: Graph, limit: Mapping[str, Collection[int]]) -> Found:
    """Inputs that limit names, by type of node and position, are constants."""
    for node in graph.nodes:
        for index in limit.get(node.op_type, ()):
            if index < len(node.input) and node.input[index] not in graph.constants | {""}:
                yield _name(node), f"{node.op_type} takes {node.input[index]}, its input {index}, from another node"


def axis(graph: Graph, limit: int) -> Found:
    """No axis of a graph's input is longer than limit."""
    for name in graph.inputs:
        value = graph.values.get(name)
        if value and value.shape and any(isinstance(size, int) and size > limit for size in value.shape):
            yield name, f"input of shape {_shape(value)}, an axis above {limit}"


def tensor_bytes(graph: Graph, limit: int) -> Found:
    """No weight and no activation takes more bytes than limit; a dynamic axis counts as 1."""
    for where, name, value in _touched(graph):
        if value.dtype and value.shape is not None and value.dtype != onnx.TensorProto.STRING:
            sizes = [size for size in value.shape if isinstance(size, int)]
            size = math.prod(sizes) * helper.tensor_dtype_to_np_dtype(value.dtype).itemsize
            if size > limit:
                yield where, f"{name} takes {size / 2**30:.1f} GiB, where {limit / 2**30:.1f} are taken"


def rows(graph: Graph, limit: int) -> Found:
    """The first axis of every input is limit at most, or dynamic."""
    for name in graph.inputs:
        value = graph.values.get(name)
        if value and value.shape and isinstance(value.shape[0], int) and value.shape[0] > limit:
            yield name, f"input of {value.shape[0]} rows, where {limit} is advised"


def outputs(graph: Graph, limit: int) -> Found:
    """The graph has no more outputs than limit."""
    if len(graph.outputs) > limit:
        yield "", f"{len(graph.outputs)} outputs"


def file_bytes(graph: Graph, limit: int) -> Found:
    """The .onnx file itself, without external data, is not larger than limit."""
    size = graph.path.stat().st_size
    if size > limit:
        yield "", f"{size / 2**30:.1f} GiB in the graph's own file"


def external_data(graph: Graph, limit: None = None) -> Found:
    """External data are real files inside the graph's folder, long enough for what the graph takes from them."""
    folder = graph.path.parent
    told = set()
    for name, tensor in graph.weights.items():
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location, offset, length = external(tensor)
        wrong = _location(folder, location)
        if not wrong and offset + length > (folder / location).stat().st_size:
            wrong = f"{location} ends before the weight does"
        if wrong and wrong not in told:
            told.add(wrong)
            yield name, wrong


def _location(folder: Path, location: str) -> str:
    """What is wrong with a place of external data; empty if nothing."""
    pure = PurePosixPath(location)
    if pure.is_absolute() or ".." in pure.parts or "\\" in location or ":" in location:
        return f"{location} leads out of the folder"
    file = folder / location
    if file.is_symlink() or not file.resolve().is_relative_to(folder.resolve()):
        return f"{location} is a link"
    return "" if file.is_file() else f"{location} is missing"


def _touched(graph: Graph) -> Iterator[tuple[str, str, Value]]:
    """Each tensor that a node left takes or makes, once, with the name of the first such node."""
    told = set()
    for node in graph.nodes:
        for name in (*node.input, *node.output):
            if name in graph.values and name not in told:
                told.add(name)
                yield _name(node), name, graph.values[name]


def _type(node: onnx.NodeProto) -> str:
    return f"{node.domain}:{node.op_type}" if domain(node) else node.op_type


def _name(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type} -> {', '.join(node.output)}"


def _shape(value: Value) -> str:
    return "unknown" if value.shape is None else f"[{', '.join(map(str, value.shape))}]"


def shared_by_rows(graph: Graph, limit: tuple[Collection[str], Collection[str]]) -> Found:
    """No node of a type in limit[0] joins (..., rows, n, c) and (n, c) or (..., 1, n, c) for one of a type in limit[1].

    That one takes it at once, or through further nodes of types in limit[0].
    """
    joining, normalizing = limit
    wanted: set[str] = set()
    for node in reversed(graph.nodes):
        if node.op_type in normalizing:
            wanted.add(node.input[0])
        elif node.op_type in joining and node.output[0] in wanted:
            wanted.update(node.input)
            shapes = [graph.values.get(name, Value(0, None)).shape or () for name in node.input]
            for x, p in (shapes, shapes[::-1]):
                if x[-3:-2] not in ((), (1,)) and x[-2] != 1 and p[-2:] == x[-2:] and p[-3:-2] in ((), (1,)):
                    yield _name(node), f"{node.op_type} of {list(x)} and {list(p)}, one for all rows, normalized then"
