"""An optimiser's state as named tensors, and back: what a checkpoint of safetensors can hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def state_of(optimiser: torch.optim.Optimizer, head: str) -> dict[str, Tensor]:
    """Tensors named HEAD.INDEX.NAME, of every parameter that has been stepped."""
    states = optimiser.state_dict()["state"].items()
    return {f"{head}.{index}.{name}": value for index, state in states for name, value in state.items()}


def restore(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], head: str) -> None:
    """Takes up what `state_of` gave, which may have been before the first step."""
    states: dict[int, dict[str, Tensor]] = {}
    for path, value in under(tensors, f"{head}.").items():
        index, name = path.split(".")
        states.setdefault(int(index), {})[name] = value.clone()  # which the optimiser changes in place
    optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})


def under(tensors: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    """Those whose names begin with `head`, under the rest of their names."""
    return {name.removeprefix(head): value for name, value in tensors.items() if name.startswith(head)}
