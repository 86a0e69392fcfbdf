"""Equal text tokens computed once: Stable Diffusion 3 without T5 has 256 of them.

Its text stream knows no positions, so that tokens which are equal at first are equal in every layer: the zero vectors
that stand for T5's. One of them, whose score in every attention is raised by ln n, weighs what n of them weigh:

    n exp(q k) = exp(q k + ln n)

The numbers are the same but for rounding (2e-7 in fp32, 1e-5 with weights in fp16), the work is not: at 512x512 1102
tokens a row in place of 1357. The ln n is put into the weights. Each head gets a 65th number, 1 in every query and ln n
in the keys of that one token, so that the graph has no mask, which would cost attention its fast kernel. Knows nothing
of ONNX.
"""

from __future__ import annotations

import math

import torch
from torch import nn

_QUERIES, _KEYS, _VALUES = ("to_q", "add_q_proj"), ("to_k", "add_k_proj"), ("to_v", "add_v_proj")
_OUT = ("to_add_out",)


class Merged(nn.Module):
    """A `components.Transformer`, changed in place: its `count` text tokens from `first` on must be equal.

    NaN in rows where they are not. Not for heads that are normalised, as in SD 3.5: a number more would change that.
    """

    def __init__(self, transformer: nn.Module, first: int, count: int) -> None:
        super().__init__()
        self.transformer, self.first = transformer, first
        for block in transformer.transformer.transformer_blocks:
            _widen(block.attn, first, math.log(count))

    def forward(
        self, sample: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor]:
        (answer,) = self.transformer(sample, states[:, : self.first + 1], pooled, timestep)
        spread = (states[:, self.first :] - states[:, self.first : self.first + 1]).abs().amax((1, 2))
        wrong = torch.where(spread == 0, 0.0, float("nan"))  # NaN is not 0, either.to(answer.dtype)
        return (answer + wrong[:, None, None, None],)


class _Keys(nn.Module):
    """A linear layer whose bias differs from token to token."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight) + self.bias


def _widen(attention: nn.Module, last: int, raised: float) -> None:
    """Gives each head one number more; `last`: the text token whose scores are raised, behind which there is none."""
    heads = attention.heads
    width = attention.to_q.out_features // heads
    scale = math.sqrt((width + 1) / width)  # scores are divided by the root of a head's width
    for name in _QUERIES:
        _rows(getattr(attention, name), heads, 1.0, scale)
    for name in (*_KEYS, *_VALUES):
        _rows(getattr(attention, name), heads, 0.0)
    keys = attention.add_k_proj
    bias = keys.bias.repeat(last + 1, 1)
    bias[last, width :: width + 1] = raised * math.sqrt(width + 1)
    attention.add_k_proj = _Keys(keys.weight.data, bias)
    for out in (attention.to_out[0], *(getattr(attention, name, None) for name in _OUT)):
        if out is not None:
            weight = out.weight.data.unflatten(1, (heads, width))
            out.weight = nn.Parameter(nn.functional.pad(weight, (0, 1)).flatten(1), False)
            out.in_features = heads * (width + 1)


def _rows(linear: nn.Linear, heads: int, constant: float, scale: float = 1.0) -> None:
    """Gives a projection `scale` and, behind each head's outputs, one that is `constant`."""
    weight = (linear.weight.data * scale).unflatten(0, (heads, -1))
    bias = (linear.bias.data * scale).unflatten(0, (heads, -1))
    linear.weight = nn.Parameter(nn.functional.pad(weight, (0, 0, 0, 1)).flatten(0, 1), False)
    linear.bias = nn.Parameter(nn.functional.pad(bias, (0, 1), value=constant).flatten(), False)
    linear.out_features = len(linear.bias)
