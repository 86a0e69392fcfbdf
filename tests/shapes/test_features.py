"""The classifier whose features Frechet distances are of: what it knows, and that both its forms agree."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from benchmarks.bootstrap import Bootstrap
from shapes.captions import HELD_OUT_PAIRS, held_out_scenes
from shapes.features import CHOICES, FILE, WIDTH, features, labels, told
from shapes.render import render
from shapes.train_features import Classifier, main


@pytest.fixture(scope="module")
def pictures():
    scenes = held_out_scenes(96, 5)
    return scenes, np.stack([np.asarray(render(scene, 50_000 + i)) for i, scene in enumerate(scenes)]) / 255


def test_it_reads_pictures_that_it_was_not_trained_on(pictures):
    scenes, drawn = pictures
    read = told(features(drawn))
    right = np.array([[CHOICES[name][labels(scene)[i]] for i, name in enumerate(CHOICES)] for scene in scenes])
    assert (right == np.array([read[name] for name in CHOICES]).T).mean() > 0.98
    assert any((thing.colour, thing.shape) in HELD_OUT_PAIRS for scene in scenes for thing in scene.things)
    with safe_open(FILE, "numpy") as opened:
        assert min(json.loads(opened.metadata()["held out"]).values()) > 0.97
    assert FILE.stat().st_size < 200_000


def test_numpy_is_torch(pictures):
    _, drawn = pictures
    model = Classifier().eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in load_file(FILE).items()})
    with torch.no_grad():
        same = model.features(torch.from_numpy(drawn[:9]).permute(0, 3, 1, 2).float() * 2 - 1).numpy()
    found = features(drawn[:9])
    assert found.shape == (9, WIDTH)
    np.testing.assert_allclose(found, same, rtol=1e-4, atol=1e-4 * abs(same).max())


def test_frechet_distances_grow_with_damage(pictures):
    """New renderings of the same captions are near; noise, blur, one shape for all, and other captions are not."""
    scenes, drawn = pictures
    again = np.stack([np.asarray(render(scene, 90_000 + i)) for i, scene in enumerate(scenes)]) / 255
    rng = np.random.default_rng(0)
    blurred = sum(np.roll(again, (i, j), (1, 2)) for i in range(-2, 3) for j in range(-2, 3)) / 25
    draw, real = Bootstrap(96, draws=2), features(drawn)

    def distance(shown):
        return draw.frechet(features(shown), real).value

    near = distance(again)
    noisy = [distance(np.clip(again + s * rng.standard_normal(again.shape), 0, 1)) for s in (0.1, 0.3)]
    assert near < noisy[0] < noisy[1]
    assert distance(blurred) > 2 * near
    assert distance(np.repeat(again[:1], 96, 0)) > 10 * near


def test_other_pictures_are_refused():
    with pytest.raises(ValueError, match=r"64 x 64 pictures in colour, got shape \(1, 32, 32, 3\)"):
        features(np.zeros((1, 32, 32, 3)))


@pytest.mark.slow
def test_the_recipe_runs(tmp_path, capsys):
    file = tmp_path / "classifier.safetensors"
    main(["--steps", "2", "--pictures", "8", "--held-out", "8", "-o", str(file)])
    assert {name: value.shape for name, value in load_file(file).items()} == {
        name: value.shape for name, value in load_file(FILE).items()
    }
    assert set(json.loads(capsys.readouterr().out)) == set(CHOICES)
