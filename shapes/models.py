"""The architectures of the two checkpoints, and the tokenizer both share. Knows nothing of training.

Both are ordinary diffusers models, only small: what runs on them runs on Stable Diffusion 3 and 1.5.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .captions import scenes

TEXT_TOKENS = 24  # CLIP tokens of a prompt; the longest caption of the world takes 16
T5_TOKENS = 8  # the zero vectors that stand for an absent T5; `max_sequence_length` in diffusers
LATENT_CHANNELS = 8
LATENT_SIZE = 16  # 64 pixels / VAE factor 4
START, END = "<|startoftext|>", "<|endoftext|>"


def vae() -> AutoencoderKL:
    """Factor 4, 8 channels. No attention, so that it trains on crops and decodes any size."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=192,
        caption_projection_dim=128,
        pooled_projection_dim=160,
        pos_embed_max_size=LATENT_SIZE // 2,
    )


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 128),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=128,
        norm_num_groups=16,
    )


def text_config(hidden: int, layers: int, act: str, vocab_size: int, end: int, pad: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        projection_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=TEXT_TOKENS,
        hidden_act=act,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=pad,
        attention_dropout=0.0,
    )


def sd3_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """As in SD3 a narrow encoder and a wider one; 64 + 96 = 160 is padded with zeros to the joint width of 192."""
    end = tokenizer.eos_token_id
    return (
        CLIPTextModelWithProjection(text_config(64, 2, "quick_gelu", len(tokenizer), end, end)),
        CLIPTextModelWithProjection(text_config(96, 2, "gelu", len(tokenizer), end, end)),
    )


def sd15_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    end = tokenizer.eos_token_id
    return CLIPTextModel(text_config(128, 2, "quick_gelu", len(tokenizer), end, end))


def write_tokenizer(folder: Path) -> None:
    """Learns CLIP's byte-pair encoding on the world's captions and writes the files of a CLIP tokenizer folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2048, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator((scene.caption for scene in scenes()), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    words = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges), encoding="utf-8"
    )
    special: dict[str, Any] = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TEXT_TOKENS,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
