"""Intervals by theory: known quantiles, and how often they hold the true mean."""

import numpy as np
import pytest

from runtime.interval import independent, interval, student


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (30, 2.04227), (63, 1.99834)]
)
def test_quantiles_of_students_distribution(freedom, quantile):
    assert student(0.975, freedom) == pytest.approx(quantile, abs=1e-4)
    assert student(0.025, freedom) == pytest.approx(-quantile, abs=1e-4)


@pytest.mark.parametrize("n", [3, 10])
def test_19_of_20_intervals_hold_the_mean(n):
    samples = np.random.default_rng(0).normal(3.0, 2.0, (2000, n))
    quantile = student(0.975, n - 1)
    half = quantile * samples.std(1, ddof=1) / np.sqrt(n)
    found = interval(samples[0])
    assert (found.mean, found.half) == pytest.approx((samples[0].mean(), half[0]))
    assert found.low < found.mean < found.high
    assert (abs(samples.mean(1) - 3.0) <= half).mean() == pytest.approx(0.95, abs=0.015)


def test_pairing_removes_what_both_have():
    noise = np.random.default_rng(1).normal(0, 5, 40)
    difference = interval((noise + 1.5) - noise)
    assert (difference.mean, difference.half) == pytest.approx((1.5, 0), abs=1e-9)


def test_values_of_one_group_count_once():
    np.testing.assert_allclose(independent([1, 5, 3, 8], ["a", "b", "a", "b"]), [2, 6.5])
    np.testing.assert_allclose(independent([1, 5], ["a", "a"]), [1, 5])  # nothing else to go by


@pytest.mark.parametrize("values", [[], [1.0], [[1.0, 2.0]]])
def test_one_value_has_no_interval(values):
    with pytest.raises(ValueError, match="two values or more"):
        interval(values)
