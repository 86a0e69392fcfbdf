"""What a graph's inputs and outputs are, and arrays made to fit them.

Knows nothing of sessions, bundles or providers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import NotFiniteError, RequestError
from .facts import Tensor

_TYPES = {  # ONNX Runtime's type names -> numpy's
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}
_WHOLE = 1e-4  # how far a float may be from the whole number an integer input takes


def declared(arguments: Iterable[Any]) -> tuple[Tensor, ...]:
    """The inputs or outputs of an onnxruntime.InferenceSession; a size that it leaves open has a name."""
    return tuple(
        Tensor(
            argument.name,
            _TYPES.get(argument.type, argument.type),
            tuple(size if isinstance(size, int) else str(size or "any") for size in argument.shape),
        )
        for argument in arguments
    )


def fit(component: str, tensor: Tensor, value: NDArray[Any]) -> NDArray[Any]:
    """The array in the type that the tensor has, contiguous; itself where it is that already.

    Raises
    ------
    RequestError
        Another rank or fixed size; what is no number; what is not whole, for an integer input.
    NotFiniteError
        A number beyond what the type holds.
    """
    fixed = all(isinstance(want, str) or want == have for want, have in zip(tensor.shape, value.shape, strict=False))
    dtype = np.dtype(tensor.dtype)
    whole = dtype.kind == "f" or value.dtype.kind in "iu" or bool((abs(value - np.rint(value)) <= _WHOLE).all())
    if len(tensor.shape) != value.ndim or not fixed or value.dtype.kind not in "fiu" or not whole:
        shape = ", ".join(map(str, tensor.shape))
        what = f"{value.dtype} {list(value.shape)}" + ("" if whole else " that is not whole")
        raise RequestError(f"{component}: input {tensor.name} must be {tensor.dtype} [{shape}]; got {what}")
    if value.dtype == dtype and value.flags.c_contiguous:
        return value
    if dtype.kind in "iu" and value.dtype.kind == "f":
        value = np.rint(value)
    try:
        with np.errstate(over="raise"):
            return np.ascontiguousarray(value, dtype).reshape(value.shape)  # ascontiguousarray makes scalars 1-D
    except FloatingPointError:
        raise NotFiniteError(
            f"{component}: input {tensor.name} is beyond what {tensor.dtype} holds; give a smaller guidance scale"
        ) from None


def not_finite(names: Sequence[str], values: Sequence[NDArray[Any]]) -> str:
    """The name of the first array with NaN or infinity in it; empty if there is none."""
    pairs = zip(names, values, strict=True)
    return next((name for name, value in pairs if value.dtype.kind == "f" and not np.isfinite(value).all()), "")
