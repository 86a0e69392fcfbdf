"""Graphs written anew, with the same results, where a target's provider gets them wrong, or is faster or leaner with
other nodes: small passes, as data.

Knows nothing of torch or of Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants_ir

from .macs import ORT


def sum_over_rows(model: ir.Model) -> None:
    """x + p -> x - (-p), where x is (..., rows, n, c) and p, such as a position embedding, (n, c) or (..., 1, n, c).

    Both are the same number, bit for bit. QNN's HTP joins such an Add with the LayerNormalization behind it, and then,
    from n = 16 and c = 32 on, adds p to the first row alone and nothing, or what is not its own, to the others
    (onnxruntime-qnn 2.7, x86 emulator, at every optimisation level and for every chip tried). It leaves Sub alone.

    Not touched: one row; p with rows of its own, or the same for all n. QNN gets these right.
    """
    for node in list(model.graph):
        if (node.op_type, node.domain) != ("Add", ""):
            continue
        for x, p in (node.inputs, node.inputs[::-1]):
            if x is None or p is None or not shared_by_rows(sizes(x), sizes(p)):
                continue
            negated = ir.Value(name=f"{node.outputs[0].name}_negative", type=p.type, shape=p.shape)
            negative = ir.node("Neg", [p], outputs=[negated], name=f"{node.name}_negative")
            difference = ir.node("Sub", [x, negated], name=node.name)
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], [negative, difference], node.outputs, difference.outputs
            )
            break


def sizes(value: ir.Value) -> tuple[int | None, ...]:
    """Of a tensor's axes, None where unknown; () where its rank is."""
    return tuple(n if isinstance(n, int) else None for n in value.shape or ())


def shared_by_rows(x: tuple[int | None, ...], p: tuple[int | None, ...]) -> bool:
    """Whether all rows of x (..., rows, n, c) get the same p, (n, c) or (..., 1, n, c), n > 1."""
    return x[-3:-2] not in ((), (1,)) and x[-2] != 1 and p[-2:] == x[-2:] and p[-3:-2] in ((), (1,))


_HEADS_FIRST = (0, 2, 1, 3)


def multi_head_attention(model: ir.Model) -> None:
    """Attention -> com.microsoft.MultiHeadAttention, which never holds all scores: at 4096 tokens 16 MB, not 528.

    The new node takes (rows, tokens, heads x width), so the reshapes and transposes around the old one go, too: those
    of queries, keys and values, also behind a Concat of two sorts of tokens, and those of the result.

    Not touched: attention with a mask, softcap, a past or grouped heads; operands that were not made so.
    """
    for node in list(model.graph):
        if (node.op_type, node.domain) != ("Attention", "") or not _plain_attention(node):
            continue
        joined = _joined_heads(node.outputs[0])
        operands = [_TokensFirst(value) for value in node.inputs[:3]]
        if joined is None or not all(one.found for one in operands):
            continue
        heads = node.inputs[0].shape[1]
        attributes = {"num_heads": heads}
        if "scale" in node.attributes:
            attributes["scale"] = node.attributes["scale"].as_float()
        new = ir.node("MultiHeadAttention", [one.make(model.graph, node) for one in operands], attributes, domain=ORT)
        new.name = node.name
        _replace(model, joined.producer(), [new])
        model.opset_imports[ORT] = 1
    _clear(model)


def _plain_attention(node: ir.Node) -> bool:
    """Whether all it has is query, key, value and a scale."""
    scale = node.attributes.get("scale")
    plain = {"qk_matmul_output_mode", "softcap", "is_causal", "q_num_heads", "kv_num_heads", "softmax_precision"}
    odd = [name for name, value in node.attributes.items() if name != "scale" and (name not in plain or value.value)]
    query, key, *_ = node.inputs
    return not (
        odd
        or (scale is not None and not scale.as_float())  # which the other node takes for none
        or any(node.inputs[3:])
        or any(value.uses() for value in node.outputs[1:])
        or len(query.shape or ()) != 4
        or query.shape[1] != key.shape[1]
    )


def _joined_heads(value: ir.Value) -> ir.Value | None:
    """(rows, tokens, heads x width) of a result (rows, heads, tokens, width), if that is all that is made of it."""
    for kind in ("Transpose", "Reshape"):
        users = [use.node for use in value.uses()]
        if len(users) != 1 or users[0].op_type != kind or value.is_graph_output():
            return None
        if kind == "Transpose" and tuple(users[0].attributes["perm"].as_ints()) != _HEADS_FIRST:
            return None
        given, value = value, users[0].outputs[0]
    return value if _joins(value, given) else None


def _joins(whole: ir.Value, apart: ir.Value) -> bool:
    """Whether one is (rows, tokens, heads x width) of the other, (rows, tokens, heads, width), sizes known."""
    shapes = [list(value.shape or ())[1:] for value in (whole, apart)]
    if [len(shape) for shape in shapes] != [2, 3] or not all(isinstance(n, int) for n in (*shapes[0], *shapes[1])):
        return False
    return shapes[0] == [shapes[1][0], shapes[1][1] * shapes[1][2]]


class _TokensFirst:
    """What (rows, heads, tokens, width) was reshaped and transposed from, (rows, tokens, heads x width), if it was."""

    def __init__(self, value: ir.Value) -> None:
        self.parts = [_tokens_first(part) for part in _concatenated(value)]
        self.found = None not in self.parts

    def make(self, graph: ir.Graph, before: ir.Node) -> ir.Value:
        """The one tensor; of several parts, joined over their tokens."""
        if len(self.parts) == 1:
            return self.parts[0]
        first = self.parts[0]
        tokens = sum(part.shape[1] for part in self.parts)
        whole = ir.Value(type=first.type, shape=ir.Shape([first.shape[0], tokens, first.shape[2]]))
        graph.insert_before(before, ir.node("Concat", self.parts, {"axis": 1}, outputs=[whole]))
        return whole


def _concatenated(value: ir.Value) -> list[ir.Value]:
    node = value.producer()
    over_tokens = node is not None and node.op_type == "Concat" and node.attributes["axis"].as_int() in (2, -2)
    return list(node.inputs) if over_tokens else [value]


def _tokens_first(value: ir.Value) -> ir.Value | None:
    transpose = value.producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    reshape = transpose.inputs[0].producer()
    if reshape is None or reshape.op_type != "Reshape" or tuple(transpose.attributes["perm"].as_ints()) != _HEADS_FIRST:
        return None
    return reshape.inputs[0] if _joins(reshape.inputs[0], reshape.outputs[0]) else None


def instance_normalization(model: ir.Model) -> None:
    """GroupNormalization -> Reshape, InstanceNormalization, Reshape, Mul, Add, which ONNX Runtime's CPU runs faster.

    ONNX Runtime has no kernel for it and inlines ONNX's function, which takes means of means, and powers.
    """
    for node in list(model.graph):
        if (node.op_type, node.domain) != ("GroupNormalization", "") or model.opset_imports[""] < 21:
            continue
        x, scale, bias = node.inputs
        if x.dtype != ir.DataType.FLOAT or not all(isinstance(n, int) for n in x.shape[1:]):
            continue
        groups, name = node.attributes["num_groups"].as_int(), node.name
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        ones = constant(model.graph, f"{name}_ones", np.ones(groups, np.float32))
        zeros = constant(model.graph, f"{name}_zeros", np.zeros(groups, np.float32))
        grouped = constant(model.graph, f"{name}_grouped", np.array([0, groups, -1]))
        whole = constant(model.graph, f"{name}_whole", np.array([0, *x.shape[1:]]))
        each = constant(model.graph, f"{name}_each", np.array([1, x.shape[1], *[1] * (len(x.shape) - 2)]))
        nodes = [ir.node("Reshape", [x, grouped])]
        nodes.append(ir.node("InstanceNormalization", [nodes[-1].outputs[0], ones, zeros], {"epsilon": epsilon}))
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], whole]))
        for kind, factor in (("Mul", scale), ("Add", bias)):
            nodes.append(ir.node("Reshape", [factor, each]))
            nodes.append(ir.node(kind, [nodes[-2].outputs[0], nodes[-1].outputs[0]]))
        _replace(model, node, nodes)
    _clear(model)


_MOVES = ("Gather", "Neg", "Reshape", "Slice", "Transpose", "Unsqueeze")


def fold(model: ir.Model) -> None:
    """What is only cut or laid out anew of constants becomes a constant: of SD3's 226 MB of positions 6 at 512x512.

    Casts stay: weights that are stored in fp16 would be twice as large.
    """
    most = 2**40  # bytes
    fold_constants_ir(
        model, input_size_limit=most, output_size_limit=most, should_fold=lambda node: node.op_type in _MOVES
    )
    _clear(model)


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer."""
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _replace(model: ir.Model, old: ir.Node, new: list[ir.Node]) -> None:
    """Puts nodes in the place of one; the last of them makes its outputs."""
    ir.convenience.replace_nodes_and_values(model.graph, old, [old], new, old.outputs, new[-1].outputs)


def _clear(model: ir.Model) -> None:
    """Removes nodes that nothing uses any more."""
    RemoveUnusedNodesPass()(model)


REWRITES: dict[str, tuple[Callable[[ir.Model], None], ...]] = {  # target -> its passes
    "cpu": (multi_head_attention, instance_normalization),
    "qnn": (sum_over_rows,),
}


def rewrite(model: ir.Model, target: str) -> ir.Model:
    """The model, changed in place by the passes of a target, then by `fold`."""
    for one in (*REWRITES.get(target, ()), fold):
        one(model)
    return model
