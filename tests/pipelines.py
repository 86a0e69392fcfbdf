"""Small random pipelines of both families, as diffusers folders. Sizes are odd on purpose: no two widths are alike."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from shapes.captions import scenes
from shapes.models import write_tokenizer

SD15_SIZE = (72, 104)  # height, width in pixels
SD3_SIZE = (80, 112)


def tiny_sd15(folder: Path) -> Path:
    """Writes a small StableDiffusionPipeline, factor 4, with VAE attention and quantisation convolutions."""
    torch.manual_seed(15)
    tokenizer = _tokenizer(folder)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 12, 20),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=72,
        ),
        text_encoder=CLIPTextModel(_clip(tokenizer, hidden=40, heads=5, act="quick_gelu")),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=SD15_SIZE[0] // 4,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(12, 28),
            cross_attention_dim=40,
            norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipeline, folder)


def tiny_sd3(folder: Path, t5: bool = False) -> Path:
    """Writes a small StableDiffusion3Pipeline, factor 4, with VAE attention; `t5`: with a third text encoder."""
    torch.manual_seed(3)
    tokenizer = _tokenizer(folder)
    pieces = _t5_tokenizer() if t5 else None
    pipeline = StableDiffusion3Pipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 20),
            layers_per_block=1,
            latent_channels=6,
            norm_num_groups=4,
            sample_size=80,
            scaling_factor=1.5,
            shift_factor=0.06,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModelWithProjection(_clip(tokenizer, hidden=24, heads=3, act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_clip(tokenizer, hidden=40, heads=5, act="gelu")),
        text_encoder_3=T5EncoderModel(_t5(len(pieces))) if pieces else None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=pieces,
        transformer=SD3Transformer2DModel(
            sample_size=SD3_SIZE[0] // 4,
            patch_size=2,
            in_channels=6,
            out_channels=6,
            num_layers=2,
            attention_head_dim=12,
            num_attention_heads=4,
            joint_attention_dim=72,
            caption_projection_dim=48,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return _save(pipeline, folder)


def _tokenizer(folder: Path) -> CLIPTokenizer:
    write_tokenizer(folder / "tokenizer")
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def _t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer as T5's: pieces that begin with their space, an end token, no start token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=[*special.values()], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator((scene.caption for scene in scenes()), trainer)
    end = ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=512, **special)


def _clip(tokenizer: CLIPTokenizer, hidden: int, heads: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        projection_dim=hidden,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5(vocabulary: int) -> T5Config:
    return T5Config(
        vocab_size=vocabulary, d_model=72, d_ff=96, d_kv=12, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )


def _save(pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline, folder: Path) -> Path:
    """Draws weights large enough that every input is felt in the output, and writes the folder."""
    generator = torch.Generator().manual_seed(0)
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    bound = (3 / parameter[0].numel()) ** 0.5
                    parameter.data.uniform_(-bound, bound, generator=generator)
    pipeline.save_pretrained(folder)
    return folder
