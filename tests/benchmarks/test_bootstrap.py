"""Intervals by resampling prompts: against theory, and by their coverage."""

import numpy as np
import pytest

from benchmarks import report
from benchmarks.bootstrap import MOST_FEATURES, Bootstrap, Estimate, Figure, frechet
from runtime.interval import interval

TWICE = np.repeat(np.arange(100), 2).tolist()  # two images of each of 100 prompts


def test_a_mean_has_students_interval_where_that_holds():
    values = np.random.default_rng(0).standard_normal(400) * 3 + 7
    found, theory = Bootstrap(400).mean(values).figure(), interval(values)
    assert found.mean == pytest.approx(theory.mean)
    assert (found.low, found.high) == pytest.approx((theory.low, theory.high), abs=0.03)


def test_images_of_one_prompt_are_no_new_evidence():
    """Every value twice: as wide as without; as if independent it would be narrower by the root of two."""
    values = np.random.default_rng(1).standard_normal(100)
    once, twice = Bootstrap(100).mean(values).figure(), Bootstrap(TWICE).mean(np.repeat(values, 2)).figure()
    assert (twice.mean, twice.low, twice.high) == pytest.approx((once.mean, once.low, once.high))
    assert Bootstrap(200).mean(np.repeat(values, 2)).figure().half == pytest.approx(once.half / 2**0.5, rel=0.1)


def test_differences_are_paired():
    rng = np.random.default_rng(2)
    shared, noise = 10 * rng.standard_normal(200), 0.1 * rng.standard_normal(200)
    draw = Bootstrap(200)
    one, other = draw.mean(shared + 0.05 + noise), draw.mean(shared)
    assert one.figure().half > 1
    assert (one - other).figure().half == pytest.approx(1.96 * 0.1 / 200**0.5, rel=0.15)
    assert (one - other).figure().clear() is True
    assert (other - one).figure().clear() is False
    assert (other - one).figure().clear(higher=False) is True
    assert (one - one).figure() == Figure(0, 0, 0)
    assert (one - one).figure().clear() is None


def test_it_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    draw = Bootstrap(60, draws=400)
    found = [draw.mean(rng.standard_normal(60) ** 2).figure() for _ in range(400)]
    assert 0.87 < np.mean([one.low <= 1 <= one.high for one in found]) < 0.97


def gaussian(rng, mean, spread, images):
    return mean + rng.standard_normal((images, 3)) @ np.diag(spread)


def test_frechet_is_that_of_gaussians():
    """Diagonal ones: |m1 - m2|^2 + sum (s1 - s2)^2."""
    rng = np.random.default_rng(4)
    one, other = gaussian(rng, [0, 1, 0], [1, 2, 0.5], 40_000), gaussian(rng, [0, 0, 0], [1, 1, 1.5], 40_000)
    found = Bootstrap(40_000, draws=8).frechet(one, other)
    assert found.value == pytest.approx(1 + 1 + 1, rel=0.03)
    assert Bootstrap(40_000, draws=8).frechet(one, one).value == pytest.approx(0, abs=1e-9)


def test_frechet_of_matrices_that_do_not_commute():
    """Against the square root of the product by its eigenvalues."""
    rng = np.random.default_rng(5)
    one, other = (a @ a.T for a in rng.standard_normal((2, 5, 5)))
    root = np.sqrt(np.linalg.eigvals(one @ other).real).sum()
    zero = np.zeros((1, 5))
    assert frechet((zero, one[None]), (zero, other[None]))[0] == pytest.approx(np.trace(one + other) - 2 * root)


def test_frechet_intervals_undo_the_bias_of_resampling():
    """A resample is farther from anything than the sample: the interval's ends are turned about the figure."""
    rng = np.random.default_rng(6)
    one, other = gaussian(rng, [0, 1, 0], [1, 2, 0.5], 200), gaussian(rng, [0, 0, 0], [1, 1, 1.5], 200)
    found = Bootstrap(TWICE, draws=500).frechet(one, other)
    assert found.draws.mean() > found.value
    figure = found.figure()
    assert figure.high - figure.mean < figure.mean - figure.low
    pairs = [
        (gaussian(rng, [0, 1, 0], [1, 2, 0.5], 200), gaussian(rng, [0, 0, 0], [1, 1, 1.5], 200)) for _ in range(80)
    ]
    every = [Bootstrap(TWICE, draws=200).frechet(*pair).figure() for pair in pairs]
    assert np.mean([one.low <= 3 <= one.high for one in every]) > 0.85
    by_hand = Bootstrap(TWICE, draws=1)
    chosen = np.repeat(np.arange(100), np.rint(by_hand._shares[0] * 100).astype(int))
    rows = (chosen[:, None] * 2 + [0, 1]).ravel()
    again = Bootstrap(TWICE, draws=1).frechet(one[rows], other[rows]).value
    assert by_hand.frechet(one, other).draws[0] == pytest.approx(again)


def test_many_features_are_not_resampled():
    features = np.random.default_rng(7).standard_normal((4, MOST_FEATURES + 1))
    found = Bootstrap(4).frechet(features, features + 1)
    assert found.value == pytest.approx(MOST_FEATURES + 1)
    assert (found - Estimate(1.0, np.zeros(3))).figure() == Figure(found.value - 1, None, None)
    assert found.figure().half is None


def test_images_of_one_prompt_are_drawn_together_wherever_they_stand():
    rng = np.random.default_rng(8)
    values, order = np.repeat(rng.standard_normal(100), 2), rng.permutation(200)
    beside, apart = Bootstrap(TWICE).mean(values), Bootstrap([TWICE[i] for i in order]).mean(values[order])
    assert apart.figure().half == pytest.approx(beside.figure().half, rel=0.05)
    assert apart.value == pytest.approx(beside.value)
    features = rng.standard_normal((200, 3))
    assert np.ptp(Bootstrap([0] * 200, draws=3).frechet(features, features + 1).draws) == pytest.approx(0, abs=1e-9)
    uneven = Bootstrap(["a", "b", "a"], draws=50).mean(np.array([0.0, 3.0, 0.0]))
    assert uneven.value == 1
    assert {round(float(draw), 9) for draw in uneven.draws} == {0.0, 1.0, 3.0}  # a a; a b, of three images; b b


def test_many_features_of_many_prompts_need_no_products(monkeypatch):
    monkeypatch.setattr(Bootstrap, "_moments", None)
    features = np.random.default_rng(9).standard_normal((6, MOST_FEATURES + 1))
    assert Bootstrap(6).frechet(features, features + 1).value == pytest.approx(MOST_FEATURES + 1)


def test_a_frechet_distance_is_told_with_its_own_interval():
    """Of few images the bias is larger than the interval is wide, and the figure lies outside."""
    one, other = np.random.default_rng(10).standard_normal((2, 64, 32))
    figure = Bootstrap(64, draws=300).frechet(one, other).figure()
    assert figure.high < figure.mean
    told = f"{figure.mean:.3f} ({figure.low:.3f} to {figure.high:.3f})"
    assert report._value("frechet", figure) == told
    assert report._value("frechet", figure, "+").startswith(f"+{figure.mean:.3f} (")
    assert report._value("lpips", figure) == f"{figure.mean:.4f} ± {figure.half:.4f}"
