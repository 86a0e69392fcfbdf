"""Rewards on pictures whose worth is known."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from epd.train.rewards import Shot, load, mix, psnr, shapes, sharpness
from runtime.errors import RequestError
from shapes.captions import parse, training_scenes
from shapes.render import render

SCENES = training_scenes(24, 3)


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
