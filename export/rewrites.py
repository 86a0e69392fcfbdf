"""Graphs written anew, with the same results, where a target's provider gets them wrong: small passes, as data.

Knows nothing of torch or of Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir


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


REWRITES: dict[str, tuple[Callable[[ir.Model], None], ...]] = {"qnn": (sum_over_rows,)}  # target -> its passes


def rewrite(model: ir.Model, target: str) -> ir.Model:
    """The model, changed in place by the passes of a target."""
    for one in REWRITES.get(target, ()):
        one(model)
    return model
