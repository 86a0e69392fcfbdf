"""Memory of an ONNX graph's activations: the most bytes that its tensors hold at once while it runs, for one row.

By liveness: a tensor lives from the node that makes it to the last that reads it, nodes in the order of the graph. A
view takes nothing, an element-wise operator writes over an operand that nobody reads again, as ONNX Runtime's planner
has it on the CPU; kernels that need room beside their results are in a table. Not known: how an allocator rounds, what
ONNX Runtime fuses or lays out anew, and tensors whose shape no inference finds, which count nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .macs import ORT, shaped

_VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_IN_PLACE = {
    "Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Log", "Mul", "Neg", "Pow", "Reciprocal", "Relu",
    "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh", "Where",
}  # fmt: skip


def peak(graph: Path, axis: str, rows: int = 1) -> int:
    """Bytes of activations that live at once, at most, for one row; without inputs, outputs counted.

    Parameters
    ----------
    graph : Path
        An ONNX file. Its weights are not read.
    axis : str
        The dynamic axis, taken as one row.
    rows : int
        Of a graph whose row count is fixed: how many rows its sizes stand for.
    """
    model = shaped(graph, axis)
    nodes = list(model.graph)
    constant = set(model.graph.initializers.values())
    for node in nodes:  # what is computed of weights alone is folded into them
        if all(value is None or value in constant for value in node.inputs):
            constant.update(node.outputs)
    homes = _homes(nodes)
    reads = Counter(homes[value] for node in nodes for value in node.inputs if value in homes)
    reads.update(homes[value] for value in model.graph.outputs if value in homes)  # never released
    live: dict[Any, int] = {}
    most = 0
    for node in nodes:
        if constant.issuperset(node.outputs):
            continue
        dying = [value for value in {homes[v] for v in node.inputs if v in homes} if _last(reads, node, homes, value)]
        made = {value: _bytes(value) for value in node.outputs if homes[value] is value}
        written_over = _written_over(node, dying, live, made)
        live |= made
        most = max(most, sum(live.values()) - written_over + _workspace(node))
        for value in node.inputs:
            if value in homes:
                reads[homes[value]] -= 1
        for value in dying:
            live.pop(value, None)
    return most // rows


def _homes(nodes: list[Any]) -> dict[Any, Any]:
    """Value -> the one whose memory it lies in: its own but for views."""
    homes: dict[Any, Any] = {}
    for node in nodes:
        for value in node.outputs:
            source = node.inputs[0] if node.inputs else None
            homes[value] = homes.get(source, value) if node.op_type in _VIEWS and not node.domain else value
    return homes


def _last(reads: Counter[Any], node: Any, homes: dict[Any, Any], value: Any) -> bool:
    """Whether nothing after the node reads a value, or a view of it."""
    return reads[value] == sum(homes.get(one) is value for one in node.inputs)


def _written_over(node: Any, dying: list[Any], live: dict[Any, int], made: dict[Any, int]) -> int:
    """Bytes of an operand in whose place the node writes its result."""
    if node.domain or node.op_type not in _IN_PLACE:
        return 0
    size = sum(made.values())
    return size if any(live.get(value) == size for value in dying) else 0


def _bytes(value: Any) -> int:
    if value.shape is None or value.dtype is None or not all(isinstance(size, int) for size in value.shape):
        return 0
    return math.ceil(math.prod(value.shape) * value.dtype.itemsize)


def _attention(node: Any) -> int:
    """The scores: (rows, heads, L, S) of a query (rows, heads, L, D) or (rows, L, heads D)."""
    query, key = (list(value.shape) for value in node.inputs[:2])
    heads = query[1] if len(query) == 4 else node.attributes["q_num_heads"].as_int()
    return int(query[0] * heads * query[-2] * key[-2] * node.inputs[0].dtype.itemsize)


def _multi_head_attention(node: Any) -> int:
    """Query, key and value laid out by heads; scores are done in blocks."""
    return sum(map(_bytes, filter(None, node.inputs[:3])))


_WORKSPACE: dict[tuple[str, str], Callable[[Any], int]] = {
    ("", "Attention"): _attention,
    (ORT, "MultiHeadAttention"): _multi_head_attention,
}


def _workspace(node: Any) -> int:
    rule = _WORKSPACE.get((node.domain, node.op_type))
    return rule(node) if rule else 0
