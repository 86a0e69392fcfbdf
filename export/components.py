"""The parts of a pipeline as graphs: for each its contract and, beside it, the torch module that fulfils it.

Precisions: `fp32`; `fp16` and `bf16` (weights and arithmetic); `fp16-weights`, `int8-weights` and `int4-weights` (so
stored, arithmetic in fp32, or, of products with the latter two, in 8 bits); `int8` and `w8a16` (weights in 8 bits,
activations in 8 or 16, calibrated). Only the backbone, which runs at every step, has all of them; what runs once a
picture computes in fp32: a VAE draws black pictures in fp16 and T5's late blocks overflow it. The last four are made of
the graphs of another precision, see `TRACED`. Inputs and outputs are float32 at every precision.
Knows nothing of files, processes or ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel, T5EncoderModel

from runtime.facts import TINY_DECODER, Facts, Tensor

from .checkpoint import part_of, read_config

ROWS = "rows"  # name of the dynamic axis
_MODELS: dict[str, type[Any]] = {
    "unet": UNet2DConditionModel,
    "transformer": SD3Transformer2DModel,
    "vae_decoder": AutoencoderKL,
    "vae_encoder": AutoencoderKL,
    TINY_DECODER: AutoencoderTiny,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
TRACED = {"int8": "fp32", "w8a16": "fp32", "int8-weights": "fp16-weights", "int4-weights": "fp16-weights"}
WEIGHT_BITS = {"int8-weights": 8, "int4-weights": 4}
BLOCK = {"int8-weights": 128, "int4-weights": 32}  # weights per scale
_ARITHMETIC = {"fp16": torch.float16, "bf16": torch.bfloat16}  # elsewhere fp32
# Largest error against torch in fp32 on the same (rounded) weights, relative to the output's largest magnitude. Those
# of quantised graphs are two times what the shapes models show and more. A bf16 graph is tried computing in fp32.
TOLERANCE = {
    "fp32": 1e-4,
    "fp16-weights": 1e-4,
    "fp16": 5e-3,
    "bf16": 1e-4,
    "int8-weights": 0.05,
    "int4-weights": 0.3,
    "int8": 0.5,
    "w8a16": 0.1,
}
# No trained T5 was at hand: a small random one, which feels every rounding, shows 0.03 and 0.5.
_T5_TOLERANCE = TOLERANCE | {"int8-weights": 0.1, "int4-weights": 0.8}


@dataclass(frozen=True)
class Contract:
    """What a component's graph takes and gives. Every first axis is `rows`, dynamic unless `fixed`."""

    component: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tolerance: Mapping[str, float] = field(default_factory=lambda: dict(TOLERANCE))  # per precision
    vocabulary: int = 0  # text encoders: number of tokens
    end: int = 0  # text encoders: the token that ends a prompt
    zeros: int = 0  # backbones: text tokens at the end that are zero vectors

    def samples(self, rows: int, seed: int = 0) -> tuple[np.ndarray, ...]:
        """One array per input: normal noise, timesteps that differ from row to row, prompts of differing length."""
        random = np.random.default_rng([seed, rows])
        return tuple(self._sample(tensor, rows, random) for tensor in self.inputs)

    def fixed(self, rows: int) -> Contract:
        """The contract of a graph of so many rows and no others."""
        inputs, outputs = (
            tuple(replace(tensor, shape=(rows, *tensor.shape[1:])) for tensor in tensors)
            for tensors in (self.inputs, self.outputs)
        )
        return replace(self, inputs=inputs, outputs=outputs)

    def _sample(self, tensor: Tensor, rows: int, random: np.random.Generator) -> np.ndarray:
        shape = (rows, *tensor.shape[1:])
        if tensor.name == "timestep":
            return np.linspace(901.25, 31.5, rows, dtype=np.float32)
        if tensor.name == "input_ids":
            tokens = random.integers(3, self.vocabulary - 1, shape)
            lengths = random.integers(2, shape[1], (rows, 1))
            return np.where(np.arange(shape[1]) < lengths, tokens, self.end).astype(np.int64)
        sample = random.standard_normal(shape).astype(np.float32)
        if tensor.name == "encoder_hidden_states" and self.zeros:
            sample[:, -self.zeros :] = 0
        return sample


def contract(component: str, folder: Path, facts: Facts, height: int, width: int) -> Contract:
    """The contract of a component of the checkpoint in `folder` for pictures of height x width pixels."""
    latent = (ROWS, facts.latent.channels, height // facts.latent.factor, width // facts.latent.factor)
    config = read_config(folder, component)
    if component.startswith("text_encoder"):
        return _text_contract(component, config, facts)
    timestep = _float("timestep", ROWS)
    tokens = facts.text.clip_tokens + facts.text.t5_tokens
    if component == "unet":
        states = _float("encoder_hidden_states", ROWS, tokens, config["cross_attention_dim"])
        return Contract(component, (_float("sample", *latent), timestep, states), (_float("out_sample", *latent),))
    if component == "transformer":
        states = _float("encoder_hidden_states", ROWS, tokens, config["joint_attention_dim"])
        pooled = _float("pooled_projections", ROWS, config["pooled_projection_dim"])
        inputs = (_float("hidden_states", *latent), states, pooled, timestep)
        return Contract(component, inputs, (_float("out_hidden_states", *latent),))
    picture = (ROWS, config["out_channels"], height, width)
    if component in ("vae_decoder", TINY_DECODER):
        return Contract(component, (_float("latent_sample", *latent),), (_float("sample", *picture),))
    moments = (ROWS, 2 * facts.latent.channels, *latent[2:])
    return Contract(component, (_float("sample", *picture),), (_float("latent_parameters", *moments),))


def _text_contract(component: str, config: Mapping[str, Any], facts: Facts) -> Contract:
    """Outputs in Optimum's order, since diffusers takes the first: the projection of CLIP where there is one."""
    if component == "text_encoder_3":
        ids = Tensor("input_ids", "int64", (ROWS, facts.text.t5_tokens))
        states = _float("last_hidden_state", ROWS, facts.text.t5_tokens, config["d_model"])
        return Contract(component, (ids,), (states,), _T5_TOLERANCE, vocabulary=config["vocab_size"], end=1)
    width, tokens = config["hidden_size"], facts.text.clip_tokens
    first = (_float("last_hidden_state", ROWS, tokens, width), _float("pooler_output", ROWS, width))
    if facts.family == "sd3":
        first = (
            _float("text_embeds", ROWS, config["projection_dim"]),
            _float("last_hidden_state", ROWS, tokens, width),
        )
    hidden = (_float(f"hidden_states.{i}", ROWS, tokens, width) for i in range(config["num_hidden_layers"] + 1))
    # Old configurations say 2 and mean the last token: there transformers looks for the largest one.
    end = config["vocab_size"] - 1 if config.get("eos_token_id", 2) == 2 else config["eos_token_id"]
    ids = Tensor("input_ids", "int64", (ROWS, tokens))
    return Contract(component, (ids,), (*first, *hidden), vocabulary=config["vocab_size"], end=end)


def _float(name: str, *shape: int | str) -> Tensor:
    return Tensor(name, "float32", shape)


def module(component: str, folder: Path, facts: Facts, at: str, variant: str | None, random: bool) -> nn.Module:
    """The torch module of a component at a precision, weights loaded from the checkpoint, or drawn if `random`.

    Raises
    ------
    OSError, ValueError, RuntimeError
        As diffusers and transformers raise them, where weights are missing, damaged or of another shape.
    """
    at = TRACED.get(at, at)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(at, torch.float16)
    kind, part = _kind(component, facts), folder / part_of(component)
    model = _draw(kind, part, dtype) if random else _load(kind, part, dtype, variant)
    model.eval().requires_grad_(False)
    return AtPrecision(_WRAPPERS.get(component, Clip)(model), at)


def count_parameters(component: str, folder: Path, facts: Facts) -> int:
    """Number of weights of a component, from its configuration alone."""
    with torch.device("meta"):
        model = _create(_kind(component, facts), folder / part_of(component))
    wrapped = _WRAPPERS.get(component, Clip)(model)
    return sum(parameter.numel() for parameter in wrapped.parameters())


def _kind(component: str, facts: Facts) -> type[Any]:
    return CLIPTextModel if component == "text_encoder" and facts.family == "sd15" else _MODELS[component]


def _create(kind: type[Any], folder: Path) -> nn.Module:
    if issubclass(kind, PreTrainedModel):
        return kind(kind.config_class.from_pretrained(folder))
    model: nn.Module = kind.from_config(kind.load_config(folder))
    return model


def _load(kind: type[Any], folder: Path, dtype: torch.dtype, variant: str | None) -> nn.Module:
    keyword = "dtype" if issubclass(kind, PreTrainedModel) else "torch_dtype"
    loaded: nn.Module
    loaded, told = kind.from_pretrained(
        folder,
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **{keyword: dtype},
    )
    # Both libraries draw absent weights at random and go on.
    if absent := [name for name in told["missing_keys"] if not name.endswith("position_ids")]:
        raise ValueError(f"{len(absent)} weights are missing, such as {min(absent)}")
    return loaded


def _draw(kind: type[Any], folder: Path, dtype: torch.dtype) -> nn.Module:
    """The architecture with weights of variance 1 / fan-in, so that signals neither die out nor explode.

    Built in `dtype` at once: the peak is one copy of the weights. Drawn from a fixed seed, the same in every process.
    """
    torch.manual_seed(0)  # biases keep what their layers drew
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = _create(kind, folder).to(dtype)
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            bound = (3 / parameter[0].numel()) ** 0.5
            parameter.data.uniform_(-bound, bound, generator=generator)
    return model


class AtPrecision(nn.Module):
    """Float32 in and out around a module that computes at its precision. Timesteps are never rounded."""

    def __init__(self, model: nn.Module, at: str) -> None:
        super().__init__()
        self.model, self.at = model, at

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if dtype := _ARITHMETIC.get(self.at):
            inputs = tuple(x.to(dtype) if x.is_floating_point() and x.ndim > 1 else x for x in inputs)
        if self.at == "fp16-weights":
            weights = {name: value.float() for name, value in _floats(self.model).items()}
            outputs = torch.func.functional_call(self.model, weights, inputs)
        else:
            outputs = self.model(*inputs)
        return tuple(output.float() for output in outputs)

    def reference(self) -> AtPrecision:
        """The same weights, computing in fp32."""
        return AtPrecision(self.model.float(), "fp32")


def _floats(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: value for name, value in tensors.items() if value.is_floating_point()}


class Unet(nn.Module):
    """sample (rows, C, h, w), timestep (rows,), encoder_hidden_states (rows, tokens, width) -> epsilon."""

    def __init__(self, model: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = model

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.unet(sample, timestep, states, return_dict=False)[0],)


class Transformer(nn.Module):
    """hidden_states (rows, C, h, w), encoder_hidden_states, pooled_projections, timestep (rows,) -> velocity."""

    def __init__(self, model: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = model

    def forward(
        self, sample: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor]:
        return (self.transformer(sample, states, pooled, timestep, return_dict=False)[0],)


class Clip(nn.Module):
    """input_ids (rows, tokens) -> the first two outputs, in Optimum's order, then all hidden states."""

    def __init__(self, model: CLIPTextModel | CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.clip, self.projects = model, isinstance(model, CLIPTextModelWithProjection)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.clip(input_ids, output_hidden_states=True, return_dict=True)
        first = (
            (out.text_embeds, out.last_hidden_state) if self.projects else (out.last_hidden_state, out.pooler_output)
        )
        return (*first, *out.hidden_states)


class T5(nn.Module):
    """input_ids (rows, tokens) -> last_hidden_state. Without a mask, as diffusers calls it."""

    def __init__(self, model: T5EncoderModel) -> None:
        super().__init__()
        self.t5 = model

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.t5(input_ids, return_dict=True).last_hidden_state,)


class Decoder(nn.Module):
    """latent_sample (rows, C, h, w), already unscaled -> sample (rows, 3, H, W) in about [-1, 1]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv or nn.Identity()
        self.decoder = vae.decoder

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.decoder(self.post_quant_conv(latent)),)


class TinyDecoder(nn.Module):
    """latent_sample (rows, C, h, w), as the backbone has them -> sample (rows, 3, H, W) in about [-1, 1]."""

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.decoder, self.scaling, self.shift = vae.decoder, vae.config.scaling_factor, vae.config.shift_factor

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.decoder(latent / self.scaling + self.shift),)


class Encoder(nn.Module):
    """sample (rows, 3, H, W) in [-1, 1] -> latent_parameters (rows, 2 C, h, w): mean and log variance."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv or nn.Identity()

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.quant_conv(self.encoder(sample)),)


_WRAPPERS: dict[str, type[nn.Module]] = {
    "unet": Unet,
    "transformer": Transformer,
    "vae_decoder": Decoder,
    "vae_encoder": Encoder,
    TINY_DECODER: TinyDecoder,
    "text_encoder_3": T5,
}
