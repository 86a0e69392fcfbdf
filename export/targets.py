"""What a bundle must be for the device it is made for: a table of facts, one row per target.

Dynamic targets get one graph that takes any number of rows; static ones a graph per row count, every size in it a
number. What operators a target has not is in `export.lint`, which the exporter asks. Sources: the providers' own
documentation (November 2026). Drawn with so far: cpu, openvino on its device CPU, webgpu on a software Vulkan device,
qnn on Qualcomm's x86 emulator (whose fault with position embeddings `rewrites` goes around). On the other devices
nothing was run. Knows nothing of torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.facts import BACKBONE, TINY_DECODER

from . import ExportError

_VAE = ("vae_decoder", "vae_encoder", TINY_DECODER)
DTYPES = ("fp32", "fp16", "bf16", "int8", "w8a16", "int8-weights", "int4-weights")  # see export.components
CALIBRATED: Mapping[str, Literal["uint8", "uint16"]] = {"int8": "uint8", "w8a16": "uint16"}  # activations
_BITS = DTYPES[-2:]  # MatMulNBits: CPU, CUDA and WebGPU have kernels for both; DirectML for 4 bits, the NPUs for none
_BF16_OPSET = 22
_T5 = {"fp16": "fp16-weights", "int8": "int8-weights", "int4": "int4-weights"}  # --t5 -> precision


@dataclass(frozen=True)
class Target:
    """What the graphs of a bundle must be. The first of `opsets` and of `dtypes` is taken where nothing is asked."""

    opsets: tuple[int, ...]  # that its provider reads
    dtypes: tuple[str, ...]  # of the backbone, see `DTYPES`
    split: Literal["any", "batch", "calls"]  # any: dynamic rows; static: 2 and 2 K rows, or 2 alone and K calls
    vae: str = "fp16-weights"  # precision of the VAE wherever the backbone's is not fp32; always computes in fp32

    @property
    def static(self) -> bool:
        return self.split != "any"


def _npu(opsets: tuple[int, ...], dtypes: tuple[str, ...], split: Literal["batch", "calls"]) -> Target:
    return Target(opsets, dtypes, split, "fp32")


# Opset 23 has Attention, so that one node is one attention; ONNX Runtime's CPU kernels have it since 1.23.
TARGETS = {
    "cpu": Target((23, 18, 20, 21), ("fp32", "fp16", "int8", *_BITS), "any"),
    "cuda": Target((23, 18, 20, 21), ("fp16", "fp32", "bf16", *_BITS), "any"),
    "directml": Target((18,), ("fp16", "fp32", "int4-weights"), "any"),  # no Gelu, which our graphs have from 20 on
    "webgpu": Target((20, 18, 21), ("fp32", "fp16", *_BITS), "any"),  # fp16 needs shader-f16
    "vitisai": _npu((17, 18, 20), ("fp32", "int8", "w8a16"), "calls"),  # fp32 is compiled to bf16; AMD advises 17
    "qnn": _npu((20, 18, 21), ("fp16", "fp32", "int8", "w8a16"), "batch"),
    "openvino": _npu((20, 18, 21), ("fp32", "fp16", "int8"), "batch"),  # static for its NPU
    "coreml": _npu((18, 20, 21), ("fp16", "fp32"), "batch"),
}


def choose(name: str, dtype: str | None, opset: int | None, t5: str = "none") -> tuple[str, int]:
    """Precision and opset for a target; ExportError for those, and a `--t5`, that it cannot have."""
    target = TARGETS[name]
    dtype, opset = dtype or target.dtypes[0], opset or target.opsets[0]
    if dtype not in target.dtypes:
        raise ExportError(f"--dtype {dtype}: --target {name} takes {', '.join(target.dtypes)}; leave the option out")
    if opset not in target.opsets:
        raise ExportError(
            f"--opset {opset}: --target {name} takes {', '.join(map(str, sorted(target.opsets)))}; leave the option out"
        )
    if dtype == "bf16" and opset < _BF16_OPSET:
        raise ExportError(f"--opset {opset}: CUDA's convolutions take bf16 from opset {_BF16_OPSET} on; leave it out")
    if t5 in ("int8", "int4") and _T5[t5] not in target.dtypes:
        raise ExportError(f"--t5 {t5}: --target {name} has no kernels for such weights; give --t5 fp16")
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


def precision(component: str, dtype: str, name: str, t5: str = "fp16") -> str:
    """The precision of a component in a bundle of a dtype, with a T5 of its own, for a target."""
    if component == "text_encoder_3":
        return _T5[t5]
    if dtype == "fp32" or component in BACKBONE.values():
        return dtype
    return TARGETS[name].vae if component in _VAE else "fp16-weights"
