"""Tiles that cover and add up; a decoder that looks at single latents gives the same picture from any of them."""

import logging
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import pytest
import tiny_bundle
from onnx import helper

from runtime.bundle import sha256
from runtime.facts import Stored, read_facts
from runtime.pipeline import Pipeline
from runtime.tiling import OVERLAP, decode, starts, tile_of, weights

SIZES = [(8, 8), (9, 8), (16, 8), (23, 8), (64, 32), (128, 64), (17, 5), (5, 2)]


@pytest.mark.parametrize(("size", "tile"), SIZES)
def test_tiles_cover_an_axis_and_overlap(size, tile):
    begin = starts(size, tile)
    assert begin[0] == 0
    assert begin[-1] + tile == size
    assert all(one + tile - other >= int(OVERLAP * tile) for one, other in pairwise(begin))
    assert len(begin) == 1 or (len(begin) - 2) * max(1, int(tile * (1 - OVERLAP))) + tile < size  # no fewer would do


@pytest.mark.parametrize(("size", "tile"), SIZES)
def test_shares_of_a_pixel_add_up_to_one_and_change_by_small_steps(size, tile):
    begin, factor = starts(size, tile), 4
    share, whole = weights(begin, tile, factor), np.zeros(size * factor)
    for row, start in zip(share, begin, strict=True):
        whole[start * factor :][: tile * factor] += row
    assert np.allclose(whole, 1)
    assert share.min() >= 0
    if len(begin) == 2:  # a straight line
        falling = share[0][begin[1] * factor :]
        assert np.allclose(falling, 1 - (np.arange(len(falling)) + 0.5) / len(falling))


def nearest(x):
    """(1, C, h, w) to (1, C, 4 h, 4 w)."""
    return x.repeat(4, 2).repeat(4, 3).astype(np.float32)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 23), (16, 8)])
def test_a_decoder_of_single_latents_needs_no_neighbours(height, width):
    x, seen = np.random.default_rng(0).standard_normal((1, 3, height, width)), []

    def run(part):
        seen.append(part.shape)
        return nearest(part)

    picture = decode(run, x, (8, 8))
    assert picture.dtype == np.float32
    assert set(seen) == {(1, 3, 8, 8)}
    assert np.abs(picture - nearest(x)).max() < 1e-6


def test_a_decoder_that_depends_on_its_tile_leaves_no_seam():
    """Tiles are shifted by their means: a hard edge would jump by the difference, the blend goes gradually."""
    x = np.linspace(0, 1, 32)[None, None, None].repeat(32, 2)
    picture = decode(lambda part: nearest(part + 5 * part.mean()), x, (16, 16))
    jump = np.abs(np.diff(picture, axis=3)).max()
    hard = 5 * (x[..., 8:24].mean() - x[..., :16].mean())
    assert hard > 1
    assert jump < hard / 10


@pytest.mark.parametrize(
    ("declared", "tile"),
    [
        (("rows", 4, 8, 8), (8, 8)),
        (("rows", 4, 16, 24), (16, 24)),
        (("rows", 4, "height", "width"), (16, 24)),
        (("rows", 4, 32, 24), (16, 24)),  # for larger pictures: refused by the session
        (("rows", 8, 8), (16, 24)),
    ],
)
def test_which_tile_a_decoder_takes(declared, tile):
    assert tile_of(declared, (1, 4, 16, 24)) == tile


def test_a_smaller_decoder_draws_the_picture_in_tiles_and_says_so(bundles, tmp_path, family, caplog):
    folder = tiny_bundle.bundle(tmp_path / "b", family, size=48)
    whole = Pipeline.from_pretrained(folder)("red", seed=1, output_type="np").images
    path = folder / "vae_decoder" / "model.onnx"
    model = onnx.load(path)
    for dimension in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_value = 8  # latents: 32 pixels
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("sample", 1, ["rows", 3, 32, 32]))
    onnx.save(model, path)
    parts = dict(read_facts(folder / "bundle.json").components)
    stored = Stored("vae_decoder/model.onnx", path.stat().st_size, sha256(path))
    tiny_bundle.change(folder, components=parts | {"vae_decoder": replace(parts["vae_decoder"], files=(stored,))})
    pipe = Pipeline.from_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        tiled = [pipe("red", seed=1, output_type="np").images for _ in range(2)]
    assert caplog.text.count("vae_decoder: is for 32x32 pixels, the picture is decoded in 2 x 2 tiles") == 1
    assert np.abs(tiled[0] - whole).max() < 1e-6
    assert np.array_equal(*tiled)
