"""The published architectures as data, so that a machine can be measured without downloading their weights.

Sources: the configuration files beside the weights, as their model cards publish them,
https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5 and
https://huggingface.co/stabilityai/stable-diffusion-3-medium-diffusers (its T5, of 4.8 billion parameters, is left out).
"""

from __future__ import annotations

import json
from itertools import islice, product
from pathlib import Path
from typing import Any

_START, _END = "<|startoftext|>", "<|endoftext|>"
_VOCABULARY = 49408  # tokens of CLIP
_TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "do_lower_case": True,
    "add_prefix_space": False,
    "errors": "replace",
    "bos_token": _START,
    "eos_token": _END,
    "pad_token": _END,
    "unk_token": _END,
}
_CLIP = {
    "model_type": "clip_text_model",
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_CLIP_L = _CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
_CLIP_G = _CLIP | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "layers_per_block": 2,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 32,
}
_DIFFUSERS, _TRANSFORMERS = "diffusers", "transformers"

CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "scheduler": [_DIFFUSERS, "PNDMScheduler"],
            "text_encoder": [_TRANSFORMERS, "CLIPTextModel"],
            "tokenizer": [_TRANSFORMERS, "CLIPTokenizer"],
            "unet": [_DIFFUSERS, "UNet2DConditionModel"],
            "vae": [_DIFFUSERS, "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "PNDMScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "trained_betas": None,
            "clip_sample": False,
        },
        "tokenizer/tokenizer_config.json": _TOKENIZER,
        "text_encoder/config.json": _CLIP_L | {"architectures": ["CLIPTextModel"]},
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "block_out_channels": [320, 640, 1280, 1280],
            "layers_per_block": 2,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
            "act_fn": "silu",
            "center_input_sample": False,
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "mid_block_scale_factor": 1,
        },
        "vae/config.json": _VAE | {"latent_channels": 4, "sample_size": 512, "scaling_factor": 0.18215},
    },
    "sd3-medium": {
        "model_index.json": {
            "_class_name": "StableDiffusion3Pipeline",
            "scheduler": [_DIFFUSERS, "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": [_TRANSFORMERS, "CLIPTextModelWithProjection"],
            "text_encoder_2": [_TRANSFORMERS, "CLIPTextModelWithProjection"],
            "text_encoder_3": [None, None],
            "tokenizer": [_TRANSFORMERS, "CLIPTokenizer"],
            "tokenizer_2": [_TRANSFORMERS, "CLIPTokenizer"],
            "tokenizer_3": [None, None],
            "transformer": [_DIFFUSERS, "SD3Transformer2DModel"],
            "vae": [_DIFFUSERS, "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
        "tokenizer/tokenizer_config.json": _TOKENIZER,
        "tokenizer_2/tokenizer_config.json": _TOKENIZER | {"pad_token": "!"},
        "text_encoder/config.json": _CLIP_L | {"architectures": ["CLIPTextModelWithProjection"]},
        "text_encoder_2/config.json": _CLIP_G | {"architectures": ["CLIPTextModelWithProjection"]},
        "transformer/config.json": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        "vae/config.json": _VAE
        | {
            "latent_channels": 16,
            "sample_size": 1024,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    },
}

_TINY = {
    "_class_name": "AutoencoderTiny",
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "relu",
    "encoder_block_out_channels": [64] * 4,
    "decoder_block_out_channels": [64] * 4,
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "upsampling_scaling_factor": 2,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
TINY = {"taesd": _TINY | {"latent_channels": 4}, "taesd3": _TINY | {"latent_channels": 16}}


def write_tiny(name: str, folder: Path) -> None:
    """Writes the configuration of a tiny VAE, https://huggingface.co/madebyollin/taesd3 and its like."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TINY[name], indent=2) + "\n", encoding="utf-8")


def write(name: str, folder: Path) -> None:
    """Writes the checkpoint folder of an architecture, without weights, its tokenizers with a made-up vocabulary."""
    for file, content in CONFIGURATIONS[name].items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if path.name == "tokenizer_config.json":
            _write_vocabulary(path.parent)


def _write_vocabulary(folder: Path) -> None:
    """CLIP's bytes and number of tokens, but arbitrary merges: the first pairs of bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    singles = letters + [letter + "</w>" for letter in letters]
    pairs = list(islice(product(letters, letters), _VOCABULARY - len(singles) - 2))
    words = [*singles, *map("".join, pairs), _START, _END]
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in pairs)
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
