"""Bundle to picture, with numpy and ONNX Runtime; never imports torch, transformers or diffusers.

`Pipeline` and `Bundle` are loaded when first asked for, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle
    from .pipeline import Pipeline

__all__ = ["Bundle", "Pipeline"]
_HOMES = {"Bundle": ".bundle", "Pipeline": ".pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
