"""The closed world: captions parse back, pictures are deterministic, the checker tells right from wrong."""

import numpy as np
import pytest

from shapes.captions import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    held_out_scenes,
    parse,
    scenes,
    training_scenes,
    vary_one,
)
from shapes.check import accepts, check, look
from shapes.render import render


def test_the_world_is_as_large_as_promised():
    assert len(SHAPES) >= 6
    assert len(COLOURS) >= 8
    assert len(BACKGROUNDS) >= 4
    captions = {scene.caption for scene in scenes()}
    assert len(captions) == sum(1 for _ in scenes()) == 1920 + 18048


def test_every_caption_parses_back():
    assert all(parse(scene.caption) == scene for scene in scenes())


def test_a_sentence_outside_the_grammar_is_refused_with_an_example():
    with pytest.raises(ValueError, match=r"a cat on a mat.*one is 'a small red circle"):
        parse("a cat on a mat")


def test_training_never_meets_held_out_scenes_or_pairs():
    seen = training_scenes(24_576, 0)
    held_out = held_out_scenes(500, 1)
    assert not {scene.caption for scene in seen} & {scene.caption for scene in held_out}
    assert not {(thing.colour, thing.shape) for scene in seen for thing in scene.things} & HELD_OUT_PAIRS
    assert sum(scene.has_held_out_pair for scene in held_out) == 250


def test_a_picture_depends_on_scene_and_seed_alone():
    scene = parse("a large red circle at the top left on a navy background")
    first, again, other = (np.asarray(render(scene, seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_edges_are_antialiased():
    picture = np.asarray(render(parse("a large yellow circle in the centre on a black background"), 0))
    assert len(np.unique(picture[..., 0])) > 10


@pytest.fixture(scope="module")
def rendered():
    drawn = training_scenes(700, 11) + held_out_scenes(300, 12)
    return [(scene, render(scene, 50_000 + seed)) for seed, scene in enumerate(drawn)]


def test_the_checker_accepts_rendered_truth(rendered):
    assert np.mean([accepts(picture, scene) for scene, picture in rendered]) >= 0.995


def test_the_checker_rejects_one_changed_attribute_and_names_it(rendered):
    dice = np.random.default_rng(0)
    fooled = []
    for scene, picture in rendered:
        name, changed = vary_one(scene, dice)
        answers = check(picture, changed)
        fooled.append(all(answers.values()))
        assert fooled[-1] or not answers[name], (name, scene.caption, changed.caption)
    assert np.mean(fooled) <= 0.01


def test_an_empty_picture_shows_only_its_background():
    scene = parse("a small cyan ring in the centre on a grey background")
    picture = render(scene, 0)
    picture.paste(BACKGROUNDS["grey"], (0, 0, 64, 64))
    assert look(picture) == ("grey", [])
    assert [name for name, right in check(picture, scene).items() if right] == ["background"]


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="64 x 64"):
        look(render(next(scenes()), 0).resize((32, 32)))
