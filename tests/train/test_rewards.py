"""Rewards on pictures whose worth is known."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import nn
from torch.nn import functional

from epd.train import preferences
from epd.train.rewards import Shot, load, mix, psnr, shapes, sharpness
from runtime.errors import RequestError
from shapes.captions import parse, training_scenes
from shapes.models import write_tokenizer
from shapes.render import render

SCENES = training_scenes(10, 3)


def pixels(picture):
    return np.asarray(picture, np.float32) / 255


def shot(prompt, *pictures):
    return Shot(prompt, np.stack([pixels(p) for p in pictures]), lambda: pixels(pictures[0]))


def test_a_right_picture_is_worth_more_than_a_wrong_one_and_a_sharp_one_more_than_a_blurred():
    scene = parse("a large red circle in the centre on a white background")
    right = render(scene, 1)
    wrong = render(parse("a large blue circle in the centre on a white background"), 1)
    found = shapes(shot(scene.caption, right, right.filter(ImageFilter.GaussianBlur(1)), wrong))
    assert 1.9 < found[0] <= 2
    assert found[1] < found[0] - 0.1
    assert found[0] - found[2] == pytest.approx(1 / 5, abs=0.02)  # one of five attributes


def test_rendered_pictures_have_a_sharpness_near_1_and_contrast_does_not_change_it():
    pictures = np.stack([pixels(render(scene, i)) for i, scene in enumerate(SCENES)])
    found = sharpness(pictures)
    assert 0.95 < found.mean() <= 1
    np.testing.assert_allclose(sharpness(0.3 + 0.4 * pictures), found, atol=1e-5)
    blurred = [pixels(render(s, i).filter(ImageFilter.GaussianBlur(1))) for i, s in enumerate(SCENES)]
    assert (sharpness(np.stack(blurred)) < found - 0.2).all()
    assert sharpness(np.full((1, 64, 64, 3), 0.5, np.float32)) == 0  # nothing drawn


def test_psnr_is_in_units_of_ten_decibels():
    one = Image.new("RGB", (8, 8), (100, 100, 100))
    other = Image.new("RGB", (8, 8), (151, 151, 151))  # 0.2 away
    np.testing.assert_allclose(psnr(shot("x", one, other)), [12.0, np.log10(25)], rtol=1e-5)


def test_a_mix_is_read_and_refused():
    assert mix("shapes") == {"shapes": 1.0}
    assert mix("shapes:1, psnr:0.2") == {"shapes": 1.0, "psnr": 0.2}
    for text in ("", "shapes:", "shapes:x", "shapes:nan", "shapes,shapes", ",shapes"):
        if text == "shapes:":
            assert mix(text) == {"shapes": 1.0}
            continue
        with pytest.raises(RequestError, match="--reward"):
            mix(text)


def test_the_parts_of_a_mix_are_told_apart():
    parts = load("shapes:1,psnr:0.2", {})
    picture = render(SCENES[0], 0)
    both = shot(SCENES[0].caption, picture, picture.filter(ImageFilter.GaussianBlur(1)))
    found = parts(both)
    assert found.shape == (2, 2)
    assert parts.weights == (1.0, 0.2)
    assert found[0, 1] == 12
    np.testing.assert_array_equal(found[:, 0], shapes(both))


def test_prompts_that_are_no_captions_are_refused():
    with pytest.raises(RequestError, match="not a caption of this world: 'a dog'"):
        load("shapes", {}).check([SCENES[0].caption, "a dog"], (64, 64))
    load("psnr", {}).check(["a dog"], (8, 8))


# ---------------------------------------------------------------- learned rewards, from small random weights


class Block(nn.Module):
    """A layer of open_clip's transformers, under its names."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenClip(nn.Module):
    """open_clip's model in small, as its paper describes it, with its names of the weights."""

    def __init__(self, words, width=16, tokens=24, side=32, patch=8):
        super().__init__()
        grid = (side // patch) ** 2
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(width))
        self.visual.positional_embedding = nn.Parameter(torch.randn(grid + 1, width))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.visual.transformer = nn.ModuleDict({"resblocks": nn.ModuleList([Block(width, 2), Block(width, 2)])})
        self.visual.proj = nn.Parameter(torch.randn(width, 12))
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList([Block(width, 2), Block(width, 2)])})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, 12))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, 0.5, 0.3)

    def forward(self, image, ids, end):
        x = self.visual.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1) + self.visual.positional_embedding
        x = self.visual.ln_pre(x)
        for block in self.visual.transformer["resblocks"]:
            x = block(x)
        image = functional.normalize(self.visual.ln_post(x[:, 0]) @ self.visual.proj, dim=-1)
        mask = torch.full((ids.shape[1], ids.shape[1]), -math.inf).triu(1)
        y = self.token_embedding(ids) + self.positional_embedding
        for block in self.transformer["resblocks"]:
            y = block(y, mask)
        last = (ids == end).int().argmax(1)
        text = functional.normalize(self.ln_final(y)[torch.arange(len(y)), last] @ self.text_projection, dim=-1)
        return (image * text).sum(-1)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIPModel in small, with a tokenizer of its own."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder)
    words = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    common |= {"hidden_act": "gelu", "projection_dim": 12}
    text = {"vocab_size": words, "max_position_embeddings": 24, "eos_token_id": words - 1, "bos_token_id": words - 2}
    config = CLIPConfig(
        text_config=common | text,
        vision_config=common | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return folder


def three():
    return shot(SCENES[0].caption, *(render(scene, i) for i, scene in enumerate(SCENES[:3])))


def test_clip_and_pickscore_are_the_cosine_of_the_models_embeddings(clip_folder):
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(clip_folder).eval()
    ids = CLIPTokenizer.from_pretrained(clip_folder)(three().prompt, return_tensors="pt").input_ids  # not padded
    with torch.inference_mode():
        out = model(input_ids=ids, pixel_values=preferences.seen(three().pictures, 32))
    expected = (out.image_embeds @ out.text_embeds.T)[:, 0].numpy()
    found = load("clip:1,pickscore:0.1", {"clip": clip_folder, "pickscore": clip_folder})(three())
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(found[:, 1], expected * math.exp(2.6592), rtol=1e-4)
    assert len(set(found[:, 0])) == 3


def test_the_published_hps_weights_under_open_clips_names_are_that_model(clip_folder, tmp_path):
    from transformers import CLIPTokenizer

    folder = shutil.copytree(clip_folder, tmp_path / "hps")
    words = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    torch.manual_seed(1)
    model = OpenClip(words).eval()
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, folder / "HPS_v2.1_compressed.pt")
    ids = CLIPTokenizer.from_pretrained(folder)(
        three().prompt, padding="max_length", max_length=24, return_tensors="pt"
    ).input_ids
    with torch.inference_mode():
        expected = model(preferences.seen(three().pictures, 32), ids, words - 1).numpy()
    found = load("hpsv2", {"hpsv2": folder})(three())[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = load("hpsv2", {"hpsv2": clip_folder})(three())[:, 0]  # a folder in transformers' own layout
    np.testing.assert_array_equal(plain, load("clip", {"clip": clip_folder})(three())[:, 0])


class Vit(nn.Module):
    """BLIP's vision transformer in small, under its names."""

    def __init__(self, width=16, side=32, patch=8, layers=2):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width, 1e-6),
                    "attn": nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}),
                    "norm2": nn.LayerNorm(width, 1e-6),
                    "mlp": nn.ModuleDict({"fc1": nn.Linear(width, 32), "fc2": nn.Linear(32, width)}),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, image):
        x = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            q, k, v = (
                part.unflatten(-1, (2, -1)).transpose(1, 2)
                for part in block["attn"]["qkv"](block["norm1"](x)).chunk(3, -1)
            )
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block["attn"]["proj"](y)
            x = x + block["mlp"]["fc2"](functional.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return self.norm(x)


@pytest.fixture
def imagereward_folder(tmp_path):
    """Random weights of ImageReward in small, in the published file's layout; with the parts it was made of."""
    from transformers import BlipConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(s.caption for s in SCENES).split()))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    text = {"hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 48}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
    config = BlipConfig(text_config=text, vision_config=vision)
    config.save_pretrained(tmp_path)
    torch.manual_seed(2)
    vit, bert = Vit().eval(), BlipTextModel(config.text_config, add_pooling_layer=False).eval()
    sizes = (20, 1024, 128, 64, 16, 1)
    head = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    state = {f"blip.visual_encoder.{name}": value for name, value in vit.state_dict().items()}
    state |= {f"blip.text_encoder.{name}": value for name, value in bert.state_dict().items()}
    for place, linear in zip((0, 2, 4, 6, 7), head, strict=True):
        state |= {f"mlp.layers.{place}.{name}": 3 * value for name, value in linear.state_dict().items()}
    state["blip.text_proj.weight"] = torch.zeros(2)  # of the published file, too, and not used
    torch.save(state, tmp_path / "ImageReward.pt")
    return tmp_path, vit, bert, head


def test_imagereward_is_the_published_model(imagereward_folder):
    from transformers import BertTokenizer

    folder, vit, bert, head = imagereward_folder
    told = BertTokenizer.from_pretrained(folder)([three().prompt] * 3, return_tensors="pt")  # not padded
    with torch.inference_mode():
        image = vit(preferences.seen(three().pictures, 32))
        x = bert(told.input_ids, attention_mask=told.attention_mask, encoder_hidden_states=image).last_hidden_state
        x = x[:, 0]
        for linear in head:
            x = x @ (3 * linear.weight.T) + 3 * linear.bias
    expected = (x[:, 0].numpy() - 0.16717362830052426) / 1.0333394966054072
    found = load("imagereward", {"imagereward": folder})(three())[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert len(set(found)) == 3


def test_pictures_are_seen_as_clips_own_code_sees_them():
    wide = np.zeros((1, 40, 80, 3), np.float32)
    wide[:, :, 20:60] = 1  # its middle
    found = preferences.seen(wide, 20)
    assert found.shape == (1, 3, 20, 20)
    white = (1 - np.float32(preferences.MEAN)) / np.float32(preferences.STD)
    np.testing.assert_allclose(found[0, :, :, 5:15], np.broadcast_to(white[:, None, None], (3, 20, 10)), atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "imagereward"])
def test_weights_that_are_not_there_or_damaged_are_told_in_one_line(tmp_path, name, clip_folder):
    def told(path):
        with pytest.raises(RequestError) as error:
            load(name, {name: path})
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    told(tmp_path / "nowhere")
    told(tmp_path)
    if name == "hpsv2":
        folder = shutil.copytree(clip_folder, tmp_path / "other")
        for content in ({"state_dict": {}}, {"state_dict": OpenClip(10).state_dict()}):
            torch.save(content, folder / "HPS_v2.pt")
            told(folder)
        (folder / "HPS_v2.pt").write_bytes(b"nothing")
        told(folder)


def test_a_pt_file_that_would_execute_something_is_refused(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "evil")
    torch.save({"state_dict": {}, "more": Path("x")}, folder / "HPS_v2.pt")  # a pickled object that is no tensor
    with pytest.raises(RequestError, match="no tensors can be read"):
        load("hpsv2", {"hpsv2": folder})
