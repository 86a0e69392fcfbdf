"""Weights of linear layers in 8 or 4 bits (ONNX Runtime's MatMulNBits); bf16 graphs that CUDA, or any kernel, can run.

A weight is cut into blocks along the axis that is summed over, each with a scale and a zero point of its own. At
accuracy level 4 the kernel rounds the other operand to 8 bits, too, per block of a row: what one row holds is not felt
in another. ONNX Runtime's quantiser packs the blocks; here is what becomes of the graph. Knows nothing of Stable
Diffusion.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

from .graph import save, save_sharing
from .rewrites import constant

DOMAIN = "com.microsoft"
ACCURACY = 4  # the kernel's level: both operands in 8 bits
_NOT_BF16 = ("ConvTranspose", "GroupNormalization", "InstanceNormalization", "Resize")  # for want of CUDA's kernels
_DTYPES = ("to", "dtype", "softmax_precision")  # attributes that name one
LEAST = 32  # numbers summed over: below it a block would be mostly padding


def quantise(graphs: Sequence[Path], bits: int, block: int) -> None:
    """Replaces graphs by such whose MatMul and Gemm over constant weights are MatMulNBits, and their one data file.

    Parameters
    ----------
    graphs : sequence of Path
        One folder's: `model.onnx`, whose data file the others use, then the others.
    bits : 4 | 8
    block : int
        Numbers per scale, a power of 2 from 16 on.
    """
    first, folder = graphs[0], graphs[0].parent
    with tempfile.TemporaryDirectory(prefix=".weights-", dir=folder) as scratch:
        for path in graphs:
            model = ir.load(path)
            pack(model, bits, block)
            written = Path(scratch) / path.name
            if path == first:
                save(model, written)
            else:
                save_sharing(model, written, Path(scratch) / first.name)
            del model  # whose weights lie in the file that is replaced
        for written in sorted(Path(scratch).iterdir()):
            os.replace(written, folder / written.name)


def pack(model: ir.Model, bits: int, block: int, spared: Collection[str] = ()) -> None:
    """Makes linear layers MatMulNBits, in place, but for the nodes that are `spared`."""
    packer = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=block, bits=bits))
    for node in list(model.graph):
        if node.name not in spared and (weight := _weight(node)) is not None:
            _replace(model.graph, node, weight, packer)
    model.opset_imports[DOMAIN] = 1
    RemoveUnusedNodesPass()(model)


def _weight(node: ir.Node) -> np.ndarray | None:
    """The constant (K, N) that a node multiplies with; None where it is no such product."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    if settings.get("transA", 0) or any(settings.get(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return None
    weight = _constant(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return None
    weight = weight.T if settings.get("transB", 0) else weight
    return np.ascontiguousarray(weight, np.float32) if len(weight) >= LEAST else None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The content of an initializer, cast and transposed on the way or not; None for other values."""
    assert value is not None
    node = value.producer()
    if node is None:
        return None if value.const_value is None else value.const_value.numpy()
    if node.op_type not in ("Cast", "Transpose"):
        return None
    content = _constant(node.inputs[0])
    if content is None or node.op_type == "Cast":
        return content
    return content.transpose(node.attributes["perm"].as_ints() if "perm" in node.attributes else None)


def _replace(graph: ir.Graph, node: ir.Node, weight: np.ndarray, packer: DefaultWeightOnlyQuantizer) -> None:
    """Puts MatMulNBits, of the same name, in a node's place, and behind it the Add of a Gemm."""
    packed, scales, zeros = packer.qbits_block_quant(weight)
    made = node.outputs[0]
    parts = []
    for part, array in (("packed", packed), ("scales", scales), ("zeros", zeros)):
        parts.append(constant(graph, f"{made.name}_{part}", array))
    settings = {
        "K": weight.shape[0],
        "N": weight.shape[1],
        "bits": packer.config.bits,
        "block_size": packer.config.block_size,
        "accuracy_level": ACCURACY,
    }
    product = ir.node("MatMulNBits", [node.inputs[0], *parts], settings, domain=DOMAIN, name=node.name)
    nodes, last = [product], product
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        product.outputs[0].name = f"{made.name}_product"
        product.outputs[0].shape, product.outputs[0].dtype = made.shape, made.dtype
        last = ir.node("Add", [product.outputs[0], node.inputs[2]], name=f"{node.name}_bias")
        nodes.append(last)
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [made], [last.outputs[0]])


def admit_bf16(model: ir.Model) -> None:
    """Puts casts to fp32 and back around operators that ONNX does not define for bf16, or CUDA has no kernels for."""
    opset = model.opset_imports[""]
    for node in list(model.graph):
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
        taken = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
        for index, value in enumerate(node.inputs):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            if value is not None and _refused(node, value, taken.get(formal.type_str)):
                cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{node.name}_input_{index}_cast")
                model.graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
        for index, value in enumerate(node.outputs):
            if _refused(node, value, taken.get(schema.outputs[min(index, len(schema.outputs) - 1)].type_str)):
                cast = ir.node("Cast", [value], {"to": ir.DataType.BFLOAT16}, name=f"{node.name}_output_{index}_cast")
                cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, value.dtype
                ir.convenience.replace_all_uses_with(value, cast.outputs[0])
                cast.replace_input_with(0, value)
                model.graph.insert_after(node, cast)
                value.dtype = ir.DataType.FLOAT


def _refused(node: ir.Node, value: ir.Value, taken: Sequence[str] | None) -> bool:
    """Whether a node cannot take or give a value, for it is bf16; `taken` are the types that ONNX defines."""
    if value.dtype != ir.DataType.BFLOAT16:
        return False
    return node.op_type in _NOT_BF16 or (taken is not None and "tensor(bfloat16)" not in taken)


def widen(path: Path, target: Path) -> None:
    """Writes a bf16 graph as one that computes in fp32 over the same rounded weights, with a data file of its own.

    For machines without kernels for bf16, such as ONNX Runtime's CPU.
    """
    model = ir.load(path)
    for value in model.graph.initializers.values():
        _widen(value)
        if value.const_value is not None and value.const_value.dtype == ir.DataType.BFLOAT16:
            value.const_value = _in_float(value.const_value)
    for node in model.graph:
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.BFLOAT16:
                node.attributes.add(ir.AttrTensor(attribute.name, _in_float(attribute.value)))
            elif attribute.name in _DTYPES and attribute.value == ir.DataType.BFLOAT16:
                node.attributes.add(ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT)))
        for value in node.outputs:
            _widen(value)
    ir.save(model, target, external_data=f"{target.name}_data")


def _widen(value: ir.Value) -> None:
    if value.dtype == ir.DataType.BFLOAT16:
        value.dtype = ir.DataType.FLOAT


def _in_float(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
