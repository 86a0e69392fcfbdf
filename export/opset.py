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
_SAME = {  # operator -> attributes of 18 that go, with the value at which 17 does the same
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": "stretch"},
}


def lower(model: ir.Model) -> None:
    """Rewrites a graph of opset 18 in place; a node that 17 has otherwise is changed, or refused.

    1. Split into `num_outputs` parts: 17 makes equal parts without it. Refused: parts that are not equal.
    2. Resize: attributes that 17 has not, where they say what 17 does.
    3. Any other operator that opset 18 changed: refused.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == "" and defs.get_schema(node.op_type, FROM).since_version == FROM:
            _lower(node)
    model.opset_imports[""] = TO


def _lower(node: ir.Node) -> None:
    known = _SAME.get(node.op_type, {})
    if node.op_type == "Split" and len(node.inputs) == 1 and _equal(node):
        del node.attributes["num_outputs"]
    elif (
        known
        and all(_value(node, name) in (None, same) for name, same in known.items())
        and "axes" not in node.attributes
    ):
        for name in known:
            node.attributes.pop(name, None)
    else:
        raise ExportError(f"{node.op_type} {node.name}: opset {TO} has it not so; give --opset {FROM}")


def _equal(node: ir.Node) -> bool:
    """Whether a Split divides its axis without a rest, of a size that is known."""
    given = node.inputs[0]
    size = given.shape[_value(node, "axis") or 0] if given is not None and given.shape is not None else None
    return isinstance(size, int) and size % _value(node, "num_outputs") == 0


def _value(node: ir.Node, name: str) -> Any:
    return node.attributes[name].value if name in node.attributes else None
