"""Graphs of opset 18 at opset 17, which AMD advises for its NPU: torch's exporter writes no valid graph below 18, and
`onnx.version_converter` has no way down for Split.

Knows nothing of Stable Diffusion.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx import defs

from . import ExportError

FROM, TO = 18, 17
_RESIZE = {"antialias": 0, "keep_aspect_ratio_policy": "stretch"}  # attributes of 18: what 17 does without them


def lower(model: ir.Model) -> None:
    """Rewrites a graph of opset 18 in place; a node that 17 has otherwise is changed, or refused.

    1. Split into `num_outputs` parts: 17 makes equal parts without it. Refused: parts that are not equal.
    2. Resize: attributes that 17 has not, where they say what 17 does.
    3. ReduceMean and its like: axes, an input, become an attribute. Refused: axes that are computed, or none.
    4. Any other operator that opset 18 changed: refused.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        changed = node.domain == "" and defs.get_schema(node.op_type, FROM).since_version == FROM
        if changed and not (_split(node) or _resize(node) or _reduce(node)):
            raise ExportError(f"{node.op_type} {node.name}: opset {TO} has it not so; give --opset {FROM}")
    model.opset_imports[""] = TO


def _split(node: ir.Node) -> bool:
    """Whether it was a Split that could be lowered, and is."""
    if node.op_type != "Split" or len(node.inputs) != 1 or not _equal(node):
        return False
    del node.attributes["num_outputs"]
    return True


def _resize(node: ir.Node) -> bool:
    if node.op_type != "Resize" or "axes" in node.attributes:
        return False
    if any(_value(node, name) not in (None, same) for name, same in _RESIZE.items()):
        return False
    for name in _RESIZE:
        node.attributes.pop(name, None)
    return True


def _reduce(node: ir.Node) -> bool:
    axes = ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) == 2 and node.inputs[1] else None
    if not node.op_type.startswith("Reduce") or axes is None or not axes.size:
        return False
    node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
    node.attributes.pop("noop_with_empty_axes", None)
    node.resize_inputs(1)
    return True


def _equal(node: ir.Node) -> bool:
    """Whether a Split divides its axis without a rest, of a size that is known."""
    given = node.inputs[0]
    size = given.shape[_value(node, "axis") or 0] if given is not None and given.shape is not None else None
    return isinstance(size, int) and size % _value(node, "num_outputs") == 0


def _value(node: ir.Node, name: str) -> Any:
    return node.attributes[name].value if name in node.attributes else None
