"""ONNX graphs: traced from a torch module, saved over one data file.

Knows nothing of Stable Diffusion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from runtime.facts import Tensor

from . import ExportError
from .opset import FROM, lower

DATA = "model.onnx_data"  # the external data file, beside the graph
INLINE = 1024  # bytes: smaller tensors stay in the graph
_PIECE = 1 << 22  # bytes read at a time


def trace(
    module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor], samples: Sequence[np.ndarray], opset: int
) -> ir.Model:
    """Traces a module with torch's dynamo exporter. A string in a declared shape becomes a dynamic axis of that name.

    `samples` need at least 2 entries on a dynamic axis, for dynamo takes 1 for a constant.
    """
    axes = {name: torch.export.Dim(name) for tensor in inputs for name in tensor.shape if isinstance(name, str)}
    shapes = tuple({i: axes[n] for i, n in enumerate(tensor.shape) if isinstance(n, str)} for tensor in inputs)
    program = torch.onnx.export(
        module,
        tuple(torch.from_numpy(sample) for sample in samples),
        input_names=[tensor.name for tensor in inputs],
        output_names=[tensor.name for tensor in outputs],
        dynamic_shapes=(shapes,) if axes else None,
        opset_version=max(opset, FROM),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    _forget_origin(program.model)
    if opset < FROM:
        lower(program.model)
    return program.model


def _forget_origin(model: ir.Model) -> None:
    """Removes what the exporter notes of each node: stack traces, with the paths of this machine, above all."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def save(model: ir.Model, path: Path) -> None:
    """Writes a graph and, beside it, its weights in one file."""
    ir.save(model, path, external_data=DATA, size_threshold_bytes=INLINE)


def save_sharing(model: ir.Model, path: Path, other: Path) -> None:
    """Writes a graph that takes from the data file of `other`, in the same folder, every weight both hold alike.

    Alike in content: two traces of one module may number the weights they transpose differently.
    """
    initializers = ir.load(other).graph.initializers.values()
    stored = {
        _content(v.const_value): v.const_value for v in initializers if isinstance(v.const_value, ir.ExternalTensor)
    }
    for value in model.graph.initializers.values():
        if have := stored.get(_content(value.const_value)):
            value.const_value = ir.ExternalTensor(
                have.location,
                have.offset,
                have.length,
                have.dtype,
                shape=have.shape,
                name=value.name,
                base_dir=have.base_dir,
            )
    ir.save(model, path)


def _content(tensor: ir.TensorProtocol) -> tuple[str, tuple[int, ...], bytes]:
    """What tells a tensor from others. Stored ones are read and not mapped: mapped, they would stay in memory."""
    if isinstance(tensor, ir.ExternalTensor):
        digest, left = hashlib.sha256(), tensor.nbytes
        with Path(tensor.path).open("rb") as file:
            file.seek(tensor.offset or 0)
            while left:
                if not (piece := file.read(min(left, _PIECE))):
                    raise ExportError(f"{tensor.path}: is cut off; export again")
                digest.update(piece)
                left -= len(piece)
        return str(tensor.dtype.numpy()), tuple(tensor.shape.numpy()), digest.digest()
    array = np.ascontiguousarray(tensor.numpy())
    return str(array.dtype), array.shape, hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()  # bf16, too


def declared(model: ir.Model) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs, as the graph declares them."""

    def tensor(value: Any) -> Tensor:
        shape = tuple(n if isinstance(n, int) else str(n.value) for n in value.shape)
        return Tensor(value.name, value.dtype.numpy().name, shape)

    return tuple(map(tensor, model.graph.inputs)), tuple(map(tensor, model.graph.outputs))
