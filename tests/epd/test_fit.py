"""Fitting where the answer is known: linear ODEs, quadrature, and the golden networks against converged solutions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import epd
from epd.fit import MARGIN, Design, Trajectories, decibels, fit, search, teach
from tests.epd.oracle import Counting, edm_slope, flow_slope, ode_slope, ode_solution

MODES = np.array([[-1.3], [0.7]])  # of a linear ODE dx/dt = MODES x


def linear(points):
    return points.x * MODES


def exact(times, x):
    """Trajectories of `linear`, from the solution itself."""
    states = np.stack([x * np.exp(MODES * (t - times[0])) for t in times])
    return Trajectories(np.asarray(times), states, states * MODES)


def quadrature(points):
    """dx/dt a cubic in t, another one in every entry of x: the entry's own coefficients do not change with x."""
    powers = points.t[:, None, None] ** np.arange(4)  # (P, 1, 4)
    coefficients = np.random.default_rng(5).standard_normal((40, 4))
    return np.broadcast_to((powers @ coefficients.T)[..., None], points.x.shape)


def starts(seed, count, shape=(2, 1)):
    return np.random.default_rng(seed).standard_normal((count, *shape))


def test_two_modes_are_solved_exactly_by_two_slopes():
    """A new slope and a carried one span both modes: the fit is exact for every start, whatever the steps."""
    times = (1.0, 0.6, 0.15)
    design = Design(times, ((0.5,), (0.8,)), place=1, carry=1, ridge=0.0)
    fine = np.linspace(1, 0.15, 400)
    table, _ = fit(design, linear, exact(fine, starts(0, 8)))
    x = starts(1, 5)
    *_, last = epd.solve(epd.solvers.epd(table), x, linear)
    np.testing.assert_allclose(last.x, x * np.exp(MODES * (0.15 - 1)), rtol=1e-7)


def test_it_finds_the_weights_of_interpolatory_quadrature():
    """Slopes that depend on t alone: the weights must integrate every cubic through the points at hand."""
    times, r = (1.0, 0.7, 0.3), ((0.2, 0.5, 1.0), (0.2, 0.5, 1.0))
    design = Design(times, r, place=1, carry=1, ridge=0.0)
    fine = np.linspace(1, 0.3, 4001)
    x = np.zeros((1, 40, 1))
    d = np.stack([quadrature(epd.Points(x[None], np.array([t])))[0] for t in fine])
    states = np.concatenate([x[None], np.cumsum((d[1:] + d[:-1]) / 2 * np.diff(fine)[:, None, None, None], axis=0)])
    table, _ = fit(design, quadrature, Trajectories(fine, states, d))
    for i, first in ((0, 1.0), (1, 1.0)):  # the carried slope: that at the very first time, then the last new one
        t, t_next = times[i : i + 2]
        nodes = np.append(
            t + np.array(r[i]) * (t_next - t), first if i == 0 else times[0] + 0.2 * (times[1] - times[0])
        )
        moments = [(t_next**p - t**p) / p for p in (1, 2, 3, 4)]
        weights = np.linalg.solve(np.vander(nodes, increasing=True).T, moments) / (t_next - t)
        np.testing.assert_allclose(np.append(table.w[i], table.carry[i]), weights, atol=2e-4)


def test_converged_trajectories_are_right_between_their_times():
    x = starts(2, 3, (2, 3))
    times = np.append(epd.schedule.polynomial(120, 0.01, 3.0, 3), 0.0)
    found = teach(ode_slope, x, times)
    for t in (3.0, 2.9, 1.234, 0.3, 0.06, 0.004, 0.0):
        np.testing.assert_allclose(found.at(t), ode_solution(x, 3.0, t), rtol=2e-3)
    short = teach(ode_slope, x, times[:-1])
    np.testing.assert_allclose(short.at(0.06), ode_solution(x, 3.0, 0.06), rtol=2e-3)
    assert found.x.dtype == found.d.dtype == np.float32


@pytest.mark.parametrize(("slope", "first"), [(flow_slope, 1.0), (edm_slope, 20.0)], ids=["flow", "edm"])
def test_it_is_closer_than_training_free_solvers_on_images_it_has_not_seen(slope, first):
    calls, learned = 6, 8
    dice = np.random.default_rng(3)
    x = first * dice.standard_normal((16, 4, 3, 3))
    if first == 1.0:
        fine, grid = epd.schedule.shifted(150, 2.0), epd.schedule.shifted(calls - 1, 2.0)
    else:
        fine, grid = epd.schedule.polynomial(150, 0.02, first), epd.schedule.polynomial(calls - 1, 0.02, first)
    teacher = teach(slope, x, fine)
    rows = [(0.5, 1.0)] * (calls - 2) + [(0.5, 0.9)]
    counting = Counting(slope)
    table, ends = fit(Design(tuple(grid), tuple(rows)), counting, teacher, learned)
    assert counting.calls == table.sequential_calls == calls
    assert counting.evaluations == table.total_evaluations == 2 * calls - 1
    *_, last = epd.solve(epd.solvers.epd(table), x, slope)
    np.testing.assert_allclose(last.x, ends, atol=1e-5)
    ours = decibels(last.x, teacher.x[-1])[learned:].mean()
    for solver in (epd.solvers.euler, epd.solvers.ipndm, epd.solvers.deis):
        times = epd.schedule.shifted(calls, 2.0) if first == 1.0 else epd.schedule.polynomial(calls, 0.02, first)
        *_, other = epd.solve(solver(times), x, slope)
        assert ours > decibels(other.x, teacher.x[-1])[learned:].mean() + 3


def test_the_same_order_gives_the_same_table():
    x, grid = starts(4, 4, (2, 3)), epd.schedule.polynomial(3, 0.1, 3.0)
    design = Design(tuple(grid), ((0.5, 1.0),) * 3)
    tables = [fit(design, ode_slope, teach(ode_slope, x, epd.schedule.polynomial(60, 0.1, 3.0)))[0] for _ in "ab"]
    assert tables[0].to_json() == tables[1].to_json()
    assert epd.Table.from_json(tables[0].to_json()).to_json() == tables[0].to_json()


def test_collinear_slopes_are_no_trouble():
    """One mode: every slope is a multiple of every other."""
    x, grid = starts(4, 4, (2, 3)), epd.schedule.polynomial(3, 0.1, 3.0)
    teacher = teach(ode_slope, x, epd.schedule.polynomial(200, 0.1, 3.0))
    for ridge in (0.0, 1e-9):
        _, ends = fit(Design(tuple(grid), ((0.5, 1.0),) * 3, 3, 3, ridge), ode_slope, teacher)
        assert decibels(ends, teacher.x[-1]).min() > 60


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"times": (2.0, 1.0, 0.1)}, "the grid runs from 2 to 0.1, the teacher's from 3 to 0.1"),
        ({"times": (3.0, 1.0, 0.2)}, "from 3 to 0.2"),
        ({"times": (3.0, 4.0, 0.1)}, "strictly decreasing"),
    ],
)
def test_a_design_that_cannot_be(change, words):
    x = starts(4, 2, (2, 3))
    teacher = teach(ode_slope, x, epd.schedule.polynomial(20, 0.1, 3.0))
    design = Design((3.0, 1.0, 0.1), ((0.5,), (0.5,)))
    with pytest.raises(ValueError, match=words):
        fit(replace(design, **change), ode_slope, teacher)


@pytest.mark.parametrize(
    "change",
    [{"place": 0}, {"carry": -1}, {"ridge": -1.0}, {"ridge": float("nan")}]
    + [{"r": r} for r in ((), ((0.5,), (0.5, 1.0)), ((0.5,), (1.5,)), ((0.0,), (0.5,)), ((), ()))],
)
def test_a_design_checks_itself(change):
    with pytest.raises(ValueError, match=r"needs place|one row for each|rows of one length"):
        replace(Design((3.0, 1.0, 0.1), ((0.5,), (0.5,))), **change)


def test_a_slope_that_is_not_finite_is_named():
    teacher = teach(ode_slope, starts(4, 2, (2, 3)), epd.schedule.polynomial(20, 0.1, 3.0))
    with pytest.raises(FloatingPointError, match=r"times \[3.0\] is not finite"):
        fit(Design((3.0, 0.1), ((0.5,),)), lambda points: points.x * np.nan, teacher)


def test_search_climbs_and_keeps_to_its_budget():
    asked = []

    def score(design):
        asked.append(design)
        return -abs(design.place - 5) - 0.1 * abs(design.carry - 3)

    def moves(design):
        for step in (1, -1):
            yield replace(design, place=max(1, design.place + step))
            yield replace(design, carry=max(0, design.carry + step))

    begin = Design((1.0, 0.5), ((0.5,),), place=1, carry=0)
    found = list(search(score, [replace(begin, place=2), begin], moves, 40))
    assert (found[-1][0].place, found[-1][0].carry, found[-1][1]) == (5, 3, 0)
    assert [value for _, value in found] == sorted(value for _, value in found)
    assert len(asked) == len(set(asked)) <= 40
    asked.clear()
    assert list(search(score, [begin, replace(begin, place=2)], moves, 1)) == [(begin, score(begin))]
    assert len(asked) == 2  # one of them is this test's own


def test_search_takes_no_gain_below_its_margin_and_repeats_what_helped():
    begin = Design((1.0, 0.5), ((0.5,),), place=1, carry=0)
    asked = []

    def score(design):
        asked.append(design)
        return 1.0 * min(design.place, 4) + 0.5 * MARGIN * design.carry

    def moves(design):
        yield replace(design, carry=design.carry + 1)  # a gain that is none
        yield replace(design, place=design.place + 1)

    found = list(search(score, [begin], moves, 40))
    assert found[-1][0] == replace(begin, place=4)
    asked = [(design.place, design.carry) for design in asked]
    assert asked == [(1, 0), (1, 1), (2, 0), (3, 0), (4, 0), (5, 0), (4, 1)]
