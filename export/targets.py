"""What a bundle must be for the device it is made for: a table of facts, one row per target.

Dynamic targets get one graph that takes any number of rows; static ones a graph per row count, every size in it a
number. Sources: the providers' own documentation (November 2026). Drawn with so far: cpu, and qnn's graphs on the CPU;
on Qualcomm's x86 emulator they compile whole, but rows after the first of a small SD3 transformer came out wrong. On
the other devices nothing was run. Knows nothing of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.facts import BACKBONE

from . import ExportError

_ATTENTION = frozenset({"Attention"})
_SHAPES = frozenset({"Shape", "Size", "NonZero", "If", "Loop", "Scan"})  # sizes that only the run knows
_VAE = ("vae_decoder", "vae_encoder")


@dataclass(frozen=True)
class Target:
    """What the graphs of a bundle must be. The first of `opsets` and of `dtypes` is taken where nothing is asked."""

    opsets: tuple[int, ...]  # that its provider reads
    dtypes: tuple[str, ...]  # of the backbone: fp32 | fp16
    split: Literal["any", "batch", "calls"]  # any: dynamic rows; static: 2 and 2 K rows, or 2 alone and K calls
    denied: frozenset[str] = frozenset()  # operators that must not be in a graph
    vae: str = "fp16-weights"  # precision of the VAE at fp16; always computes in fp32

    @property
    def static(self) -> bool:
        return self.split != "any"


def _npu(opsets: tuple[int, ...], dtypes: tuple[str, ...], split: Literal["batch", "calls"]) -> Target:
    return Target(opsets, dtypes, split, _ATTENTION | _SHAPES, "fp32")


# Opset 23 has Attention, so that one node is one attention; ONNX Runtime's CPU kernels have it since 1.23.
TARGETS = {
    "cpu": Target((23, 18, 20, 21), ("fp32", "fp16"), "any"),
    "cuda": Target((23, 18, 20, 21), ("fp16", "fp32"), "any"),
    "directml": Target((20, 18, 21), ("fp16", "fp32"), "any", denied=_ATTENTION),  # reads up to opset 21
    "webgpu": Target((20, 18, 21), ("fp32", "fp16"), "any", denied=_ATTENTION),  # fp16 needs shader-f16
    "vitisai": _npu((18, 20, 21), ("fp32",), "calls"),  # compiles fp32 graphs to bf16
    "qnn": _npu((20, 18, 21), ("fp16", "fp32"), "batch"),
    "openvino": _npu((20, 18, 21), ("fp32", "fp16"), "batch"),  # static for its NPU
    "coreml": _npu((18, 20, 21), ("fp16", "fp32"), "batch"),
}


def choose(name: str, dtype: str | None, opset: int | None) -> tuple[str, int]:
    """Precision and opset for a target; ExportError for those that it cannot have."""
    target = TARGETS[name]
    dtype, opset = dtype or target.dtypes[0], opset or target.opsets[0]
    if dtype not in target.dtypes:
        raise ExportError(f"--dtype {dtype}: --target {name} takes {', '.join(target.dtypes)}; leave the option out")
    if opset not in target.opsets:
        raise ExportError(
            f"--opset {opset}: --target {name} takes {', '.join(map(str, sorted(target.opsets)))}; leave the option out"
        )
    return dtype, opset


def backbone_rows(name: str, directions: int | None, rows: Sequence[int] | None) -> tuple[int, ...]:
    """Row counts of the backbone's graphs, the first graph's first: 2 if it is among them; () for dynamic rows.

    Raises
    ------
    ExportError
        For `--rows` or `-k` where they would change nothing, or a row count that is none.
    """
    target = TARGETS[name]
    if directions is not None and directions < 1:
        raise ExportError(f"-k {directions}: at least one direction is needed")
    if rows is not None and directions is not None:
        raise ExportError("--rows and -k: both say how many rows the graphs have; give one of them")
    if rows is not None and not target.static:
        raise ExportError(f"--rows: the graphs for --target {name} take any number of rows; leave it out")
    if directions is not None and target.split == "calls":
        raise ExportError(
            f"-k {directions}: --target {name} gets a graph of 2 rows, on which any K runs as calls in turn; "
            "leave -k out, or give --rows"
        )
    if wrong := [one for one in rows or () if one < 1]:
        raise ExportError(f"--rows {wrong[0]}: a graph has at least one row")
    if not target.static:
        return ()
    if rows is None:
        rows = (2,) if target.split == "calls" else (2, 2 * (directions or 2))
    return tuple(sorted(set(rows), key=lambda one: (one != 2, one)))


def component_rows(component: str, backbone: tuple[int, ...]) -> tuple[int, ...]:
    """Row counts of a component's graphs: encoders and the VAE, which run once a picture, get one of a single row."""
    return backbone if component in BACKBONE.values() or not backbone else (1,)


def precision(component: str, dtype: str, name: str) -> str:
    """The precision of a component in a bundle of a dtype, fp32 or fp16, for a target."""
    if component in _VAE and dtype == "fp16":
        return TARGETS[name].vae
    if component == "text_encoder_3" or (dtype == "fp16" and component not in BACKBONE.values()):
        return "fp16-weights"
    return dtype
