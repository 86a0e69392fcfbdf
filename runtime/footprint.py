"""Peak memory of a drawing on the CPU, predicted from what a bundle's facts say: weights, and activations of each row.

    process + max over encoding, denoising, decoding of (weights held then + rows * activations)

Weights are in memory once: ONNX Runtime gives back each tensor that it has laid out anew, and what is mapped counts
where it was read. Full speed keeps the backbone, and the room its calls took, while it decodes. Not known: what other
providers keep on their devices, and the caller's own session options.
"""

from __future__ import annotations

from .bundle import Bundle
from .facts import Component
from .plan import Plan
from .rows import calls_of
from .session import LEAN_ROWS

_RUNTIME = 40_000_000  # bytes of ONNX Runtime itself
_ROOM = 1.4  # what an allocator takes for activations over their bytes; 1.3 to 1.5 were seen, SD 1.5 at full size
_HALVES = ("fp16", "bf16")  # precisions that the CPU computes in fp32
_WIDENED = (*_HALVES, "fp16-weights")  # precisions whose weights it keeps in fp32


def predict(bundle: Bundle, plan: Plan, low_memory: bool, process: int) -> int | None:
    """Bytes resident at most while a plan is drawn; None for a bundle that does not say what its activations take.

    Parameters
    ----------
    low_memory
        With weights mapped, few rows a call, and every session released once its work is done.
    process
        Bytes of the process before anything is loaded.
    """
    parts = bundle.facts.components
    encoders = [name for name in parts if name.startswith("text_encoder")]
    if any(parts[name].activation_bytes is None for name in (*encoders, bundle.backbone, "vae_decoder")):
        return None
    halves = 2 if plan.guided else 1
    rows = plan.points * len(plan.seeds) * halves
    if fixed := parts[bundle.backbone].rows:
        rows = max(calls_of(bundle, bundle.backbone, rows))
    rows = min(rows, LEAN_ROWS) if low_memory and not fixed else rows
    encode = max(_held(parts[name], halves) for name in encoders)
    denoise = _held(parts[bundle.backbone], rows)
    decode = _held(parts["vae_decoder"], 1)
    phases = (encode, denoise, decode if low_memory else denoise + decode)
    return process + _RUNTIME + max(phases)


def _held(component: Component, rows: int) -> int:
    weights = sum(stored.bytes for stored in component.files)
    activations = rows * (component.activation_bytes or 0) * (2 if component.precision in _HALVES else 1)
    return weights * (2 if component.precision in _WIDENED else 1) + int(_ROOM * activations)
