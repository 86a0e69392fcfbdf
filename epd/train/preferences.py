"""Learned rewards, from weights that the user has: CLIP score, PickScore, HPSv2 and HPSv2.1, ImageReward.

    clip        a folder of a CLIPModel of transformers (config, tokenizer, safetensors)
    pickscore   the folder of yuvalkirstain/PickScore_v1, which is one
    hpsv2       such a folder, or laion/CLIP-ViT-H-14-laion2B-s32B-b79K's with HPS_v2.1_compressed.pt put into it: the
                published file holds the weights under open_clip's names
    imagereward a folder with ImageReward.pt and the files of the bert-base-uncased tokenizer

Nothing is downloaded, and of a .pt file tensors alone are read. fp32, on the CPU. Pictures are resized and cropped to
what the model sees as CLIP's own code does it (Pillow, bicubic). Knows nothing of solvers or training.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from runtime.errors import RequestError

from .checkpoint import under
from .rewards import Array, Reward, Shot

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's and BLIP's pixels
IMAGEREWARD_MEAN, IMAGEREWARD_STD = 0.16717362830052426, 1.0333394966054072  # its authors' normalisation
IMAGEREWARD_TOKENS = 35

# open_clip's names -> those of transformers' CLIPModel.
_TOWERS = {"visual.": "vision_model.", "": "text_model."}
_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_SINGLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_RESBLOCK = re.compile(r"(visual\.|)transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_IN_PROJECTION = re.compile(r"(visual\.|)transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")

# BLIP's names of its vision transformer -> those of transformers' BlipVisionModel, in this order.
_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an open_clip model under the names of transformers' CLIPModel."""
    found = {ours: state[theirs] for theirs, ours in _SINGLE.items() if theirs in state}
    found |= {ours: state[theirs].T for theirs, ours in _TRANSPOSED.items() if theirs in state}
    for name, value in state.items():
        if parts := _IN_PROJECTION.fullmatch(name):
            tower, layer, kind = parts.groups()
            for which, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{_TOWERS[tower]}encoder.layers.{layer}.self_attn.{which}_proj.{kind}"] = part
        elif (parts := _RESBLOCK.fullmatch(name)) and parts[3] in _LAYERS:
            tower, layer, module, kind = parts.groups()
            found[f"{_TOWERS[tower]}encoder.layers.{layer}.{_LAYERS[module]}.{kind}"] = value
    return {name: value.contiguous() for name, value in found.items()}


def from_blip_vision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of BLIP's vision transformer under the names of transformers' BlipVisionModel."""
    found = {}
    for name, value in state.items():
        for pattern, ours in _VISION:
            name = re.sub(pattern, ours, name)
        found[name] = value
    return found


def clip(folder: Path) -> Reward:
    """Cosine of the embeddings, in [-1, 1] (what is published as CLIP score is 100 or 2.5 times it)."""
    return _Clip(folder, _clip_model(folder), scaled=False)


def pickscore(folder: Path) -> Reward:
    """The cosine times the learned logit scale, as its authors give it: about 20."""
    return _Clip(folder, _clip_model(folder), scaled=True)


def hpsv2(folder: Path) -> Reward:
    """The cosine, as its authors give it: about 0.28."""
    files = sorted(folder.glob("HPS*.pt"))
    if not files:
        return _Clip(folder, _clip_model(folder), scaled=False)
    from transformers import CLIPConfig, CLIPModel

    model = _opened(folder, lambda: CLIPModel(CLIPConfig.from_pretrained(folder, local_files_only=True)))
    state = _tensors(files[-1])
    _fill(model, from_open_clip(state.get("state_dict", state)), files[-1])
    return _Clip(folder, model, scaled=False)


def imagereward(folder: Path) -> Reward:
    """ImageReward's normalised score, about 0 in the mean over pictures that people ranked."""
    return _ImageReward(folder)


LOADERS: Mapping[str, Callable[[Path], Reward]] = {
    "clip": clip,
    "pickscore": pickscore,
    "hpsv2": hpsv2,
    "imagereward": imagereward,
}


class _Clip:
    def __init__(self, folder: Path, model: Any, scaled: bool) -> None:
        from transformers import CLIPTokenizer

        self._model, self._scaled = model.eval().requires_grad_(False), scaled
        self._tokenizer = _opened(folder, lambda: CLIPTokenizer.from_pretrained(folder, local_files_only=True))
        self._tokens = model.config.text_config.max_position_embeddings
        self._side = model.config.vision_config.image_size

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def __call__(self, shot: Shot) -> Array:
        told = self._tokenizer(
            [shot.prompt], padding="max_length", truncation=True, max_length=self._tokens, return_tensors="pt"
        )
        out = self._model(pixel_values=seen(shot.pictures, self._side), **told)
        cosine = nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        scale = self._model.logit_scale.exp() if self._scaled else 1.0
        return np.asarray((scale * cosine).numpy(), np.float64)


class _ImageReward:
    def __init__(self, folder: Path) -> None:
        from transformers import BertTokenizer, BlipConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        file = folder / "ImageReward.pt"
        state = _tensors(file)
        if (folder / "config.json").is_file():
            config = _opened(folder, lambda: BlipConfig.from_pretrained(folder, local_files_only=True))
        else:
            config = BlipConfig(
                vision_config={
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 16,
                    "image_size": 224,
                    "layer_norm_eps": 1e-6,
                },
                text_config={"encoder_hidden_size": 1024, "vocab_size": 30524},
            )
        width = config.text_config.hidden_size
        self._tokenizer = _opened(folder, lambda: BertTokenizer.from_pretrained(folder, local_files_only=True))
        self._side = config.vision_config.image_size
        self._vision = BlipVisionModel(config.vision_config)
        self._text = BlipTextModel(config.text_config, add_pooling_layer=False)
        self._head = nn.Sequential(  # no activations between: as published
            *(nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64)),
            *(nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
        )
        _fill(self._vision, from_blip_vision(under(state, "blip.visual_encoder.")), file)
        _fill(self._text, under(state, "blip.text_encoder."), file)
        _fill(self._head, under(state, "mlp.layers."), file)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def __call__(self, shot: Shot) -> Array:
        told = self._tokenizer(
            [shot.prompt] * len(shot.pictures),
            padding="max_length",
            truncation=True,
            max_length=IMAGEREWARD_TOKENS,
            return_tensors="pt",
        )
        image = self._vision(seen(shot.pictures, self._side)).last_hidden_state
        text = self._text(told.input_ids, attention_mask=told.attention_mask, encoder_hidden_states=image)
        found = self._head(text.last_hidden_state[:, 0])[:, 0]
        return np.asarray((found.numpy() - IMAGEREWARD_MEAN) / IMAGEREWARD_STD, np.float64)


def seen(pictures: NDArray[np.float32], side: int) -> Tensor:
    """Pictures (G, H, W, 3) in [0, 1] as the models see them: (G, 3, side, side), normalised.

    The shorter side is resized to `side`, the middle cut out.
    """
    found = []
    for picture in pictures:
        image = Image.fromarray(np.rint(picture * 255).astype(np.uint8))
        width, height = image.size
        scale = side / min(width, height)
        image = image.resize((max(side, int(width * scale)), max(side, int(height * scale))), Image.Resampling.BICUBIC)
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        found.append(np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255)
    normal = (np.stack(found) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(normal.transpose(0, 3, 1, 2).copy())


def _clip_model(folder: Path) -> Any:
    from transformers import CLIPModel

    return _opened(folder, lambda: CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True))


def _opened(folder: Path, load: Callable[[], Any]) -> Any:
    """What transformers loads from a folder; RequestError in one line where it does not."""
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; give that of the reward's weights")
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        told = " ".join(str(error).split())
        raise RequestError(f"{folder}: not the files of this reward ({told:.150})") from None


def _tensors(file: Path) -> dict[str, Any]:
    """A .pt file's tensors; nothing in it is executed."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    except FileNotFoundError:
        raise RequestError(f"{file}: no such file; put the published weights there") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RequestError(f"{file}: no tensors can be read ({' '.join(str(error).split()):.100})") from None


def _fill(model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Loads weights, all of the model's; names it has not (position ids, other heads) are left out."""
    wanted = model.state_dict()
    missing = sorted(name for name in wanted if name not in state and not name.endswith("position_ids"))
    wrong = sorted(name for name in wanted if name in state and state[name].shape != wanted[name].shape)
    if missing or wrong:
        told = f"it lacks {missing[0]}" if missing else f"{wrong[0]} has another shape"
        raise RequestError(f"{file}: weights of another model: {told}")
    model.load_state_dict({name: value for name, value in state.items() if name in wanted}, strict=False)
    model.float().eval().requires_grad_(False)
