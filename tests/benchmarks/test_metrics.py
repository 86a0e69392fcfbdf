"""What pictures are judged by: distances, captions, features, rewards."""

import math

import numpy as np
import pytest

from benchmarks import metrics
from benchmarks.bench import Attempt, Trajectories
from benchmarks.entrants import entrants, references
from benchmarks.metrics import Judge, Networks, Opened, check_classifier, checked
from runtime.judge import psnr

pytestmark = pytest.mark.usefixtures("cache", "calm")


def test_rewards_are_known_by_their_weights_and_source(tmp_path, monkeypatch):
    """Those in a folder too; without networks the name of what is kept is as it was."""
    assert Networks()._identity() == "[[], []]"
    (tmp_path / "clip" / "deep").mkdir(parents=True)
    weights, source = tmp_path / "clip" / "deep" / "model.bin", tmp_path / "my_own_reward.py"
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for text in ("1", "22"):
        weights.write_text(text)
        found.append(Networks(rewards={"clip": tmp_path / "clip"})._identity())
        source.write_text(f"def good(shot):\n    return {text}\n")
        found.append(Networks(rewards={"my_own_reward.good": None})._identity())
    assert len({*found}) == 4


def test_psnr():
    truth = np.random.default_rng(0).random((2, 4, 4, 3)).astype(np.float32)
    assert psnr(truth, truth + np.float32(0.1)) == pytest.approx([20, 20], abs=1e-4)
    assert psnr(truth, truth).tolist() == [120, 120]


@pytest.mark.parametrize(
    ("values", "message"), [([1.0, math.nan, 0.0], "gave NaN or infinity"), ([1.0], r"gave shape \(1,\)")]
)
def test_a_reward_that_is_none_is_told(values, message):
    with pytest.raises(ValueError, match=f"the reward bad {message}"):
        checked("bad", values, 3)


def test_the_classifier_needs_safetensors(monkeypatch):
    check_classifier()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        check_classifier()


def test_large_pictures_are_judged_few_at_once(bench, monkeypatch):
    """With as little memory as can be: the same figures."""
    (first, _), attempt = references(bench, 60), entrants(bench, [3], [], ["euler"])[0]
    truth, found, told = bench.run(first), bench.run(attempt), Opened(None, None, {"shade": shade}, "")
    whole = Judge(bench, truth, "", None, told).measure(attempt, found)
    decoded = []
    pictures = bench.pictures
    monkeypatch.setattr(bench, "pictures", lambda latents: decoded.append(len(latents)) or pictures(latents))
    monkeypatch.setattr(metrics, "AT_ONCE", 2)
    monkeypatch.setattr(metrics, "KEPT_BYTES", 2 * 16 * 16 * 3 * 4)  # those of the first two
    judge = Judge(bench, truth, "", None, told)
    for _ in range(2):
        parts = judge.measure(attempt, found)
        assert {name: one.figure() for name, one in parts.items()} == {
            name: one.figure() for name, one in whole.items()
        }
    assert decoded == [2, 2, 1, 1, 2, 1, 1]  # its own and the converged ones, of which only the first are kept


def shade(pictures, images):
    """A reward that has to be told which images these are."""
    return pictures.mean((1, 2, 3)) * np.arange(1, 4)[images]


def test_captions_are_judged_by_what_they_say(monkeypatch):
    """Renderings of the captions themselves are right, and near renderings from other seeds; shuffled ones are not."""
    from shapes.captions import held_out_scenes
    from shapes.render import render

    scenes = [scene for scene in held_out_scenes(12, 3) for _ in range(2)]
    drawn = np.stack([np.asarray(render(scene, i), np.float32) / 255 for i, scene in enumerate(scenes)])
    shown = {"right": drawn, "shuffled": drawn[::-1]}

    class Fixed:
        """A bench whose attempts are pictures."""

        prompts, seeds = [scene.caption for scene in scenes], 2

        def pictures(self, latents):
            return latents

        def kept(self, name, make):
            return make()

        def key(self, attempt):
            return ""

    judge = Judge(Fixed(), None, "", scenes, Networks().open([], (64, 64)))
    attempt = Attempt("x", None, (1.0, 0.0), 1.0, 1.0)
    found = {name: judge.measure(attempt, Trajectories(pictures, 1, 1, 1)) for name, pictures in shown.items()}
    assert {name: one["right"].value for name, one in found.items()} == {"right": 1, "shuffled": 0}
    assert found["right"]["frechet"].value == pytest.approx(found["shuffled"]["frechet"].value)  # a set has no order
    assert found["right"]["frechet"].value < 1
    assert (found["shuffled"]["right"] - found["right"]["right"]).figure().clear() is False
    assert judge.frechet_to == "renderings of the same captions"
