"""Distillation on closed-form networks: what can be reached, resumed, stopped and dropped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import epd
from epd.fit import Design, decibels, fit, teach
from epd.solvers import euler, heun
from epd.table import start_table
from epd.train.learning import Learning, Recipe, loss, score, without, without_idle
from epd.train.student import Student
from epd.train.teacher import Lesson
from tests.epd.oracle import edm_slope, flow_slope, ode_slope, ode_solution


def lesson(slope, fine, seed, count=8):
    """Images of a closed-form network, compared as they are."""
    x = fine[0] * np.random.default_rng(seed).standard_normal((count, 4, 2, 2))
    on_arrays = ode_slope if slope is torch_ode else lambda points: slope(points, np)
    on_tensors = slope if slope is torch_ode else lambda points: slope(points, torch)
    return Lesson(lambda images: on_tensors, teach(on_arrays, x, fine), lambda x, sigma: x)


def torch_ode(points):
    t = points.t.reshape(-1, *(1,) * (points.x.ndim - 1))
    return points.x * t / (0.15 + t * t)


FLOW = epd.schedule.shifted(60, 2.0)
EDM = epd.schedule.polynomial(80, 0.02, 8.0)


@pytest.fixture(scope="module")
def flow():
    return lesson(flow_slope, FLOW, 0), lesson(flow_slope, FLOW, 1)


@pytest.fixture(scope="module")
def fitted(flow):
    """A rough table from history: one of the first designs, little memory."""
    times = tuple(epd.schedule.shifted(3, 2.0))
    design = Design(times, ((0.5, 1.0), (0.5, 1.0), (0.5, 0.9)), place=2, carry=1)
    return fit(design, lambda points: flow_slope(points, np), flow[0].teacher)[0]


def test_one_direction_finds_the_position_that_solves_a_linear_network_exactly(tmp_path):
    """Midpoint methods of one step: x(t_next) is met for one r, whatever x, as all entries shrink alike."""
    fine = epd.schedule.polynomial(100, 0.2, 2.0)
    learn, held = lesson(torch_ode, fine, 0, 4), lesson(torch_ode, fine, 1, 4)
    table = start_table([2.0, 0.2], 1)
    recipe = Recipe(steps=60, rate=0.02, frozen=("times", "scale_dir", "scale_time"), every=60, batch=2)
    found = Learning(recipe, table, learn, held, tmp_path / "checkpoint").run()

    def missed(r):
        t_k = 0.2**r * 2.0 ** (1 - r)
        d = 2.0 / (0.15 + 4)
        return 1 - 1.8 * (1 + (t_k - 2) * d) * t_k / (0.15 + t_k**2) - ode_solution(1.0, 2.0, 0.2)

    low, high = 0.3, 0.7
    assert missed(low) * missed(high) < 0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if missed(low) * missed(middle) > 0 else (low, middle)
    assert found.r[0, 0] == pytest.approx(low, abs=1e-3)
    assert score(found, held).mean() > score(table, held).mean() + 20


@pytest.mark.parametrize("kind", ["state", "unrolled", "image"])
def test_it_comes_closer_than_its_start_and_than_training_free_solvers_of_as_many_calls(flow, fitted, tmp_path, kind):
    learn, held = flow
    start = start_table(fitted.times, 2) if kind == "state" else fitted  # which is fitted state by state
    recipe = Recipe(loss=kind, steps=30, rate=0.1, linear_rate=0.02, every=15, batch=4)
    judge = lesson(flow_slope, FLOW, 2)
    table = Learning(recipe, start, learn, held, tmp_path / "checkpoint").run()
    ours = score(table, judge).mean()
    assert ours > score(start, judge).mean() + 2
    x, truth = judge.teacher.x[0], judge.teacher.x[-1]
    for solver in (euler(epd.schedule.shifted(4, 2.0)), heun(epd.schedule.shifted(2, 2.0))):
        *_, last = epd.solve(solver, x, lambda points: flow_slope(points, np))
        assert decibels(last.x, truth).mean() < -10 * np.log10(np.square(truth).mean()) + ours  # of the error alone


def test_a_start_by_calls_learns_too_and_its_grid(tmp_path):
    learn, held = lesson(edm_slope, EDM, 0), lesson(edm_slope, EDM, 1)
    table = replace(start_table(epd.schedule.polynomial(3, 0.02, 8.0), 2), order=2)
    still = Learning(Recipe(steps=30, every=15, batch=4, rate=0.1), table, learn, held, tmp_path / "a").run()
    moved = Learning(Recipe(steps=30, every=15, batch=4, rate=0.1, frozen=()), table, learn, held, tmp_path / "b").run()
    before, after, further = (score(one, held).mean() for one in (table, still, moved))
    assert after > before + 3
    assert further > after + 1
    assert (still.times == table.times).all()
    assert (moved.times[[0, -1]] == table.times[[0, -1]]).all()
    assert not np.allclose(moved.times, table.times)
    assert (abs(still.scale_time - 1) < 0.3).all()


class Stopped:
    """Ctrl-C at the end of a step."""

    def __init__(self, after):
        self.left = after

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("rates", [{}, {"rate": 3.0, "linear_rate": 3.0}])  # so high that it goes back to the best
def test_an_interrupted_run_goes_on_with_the_same_numbers(flow, fitted, tmp_path, rates):
    recipe = Recipe(steps=4, every=2, batch=2, drop=30.0, **rates)
    whole = Learning(recipe, fitted, *flow, tmp_path / "whole")
    expected = whole.run()
    assert expected.total_evaluations < fitted.total_evaluations
    for after in (1, 3, 2, 100):
        part = Learning(recipe, fitted, *flow, tmp_path / "part", ticked=Stopped(after))
        try:
            found = part.run()
        except KeyboardInterrupt:
            continue
    assert found.to_json() == expected.to_json()
    assert [list(look) for look in part.progress.looks] == [list(look) for look in whole.progress.looks]
    again = Learning(recipe, fitted, *flow, tmp_path / "part", ticked=lambda: pytest.fail("it was over"))
    assert again.run().to_json() == expected.to_json()


def test_what_it_goes_back_to_is_the_best_of_before_the_interruption(flow, fitted, tmp_path):
    recipe = Recipe(steps=16, every=1, patience=9, rate=0.5, linear_rate=0.05)
    whole = Learning(recipe, fitted, *flow, tmp_path / "whole")
    expected, looks = whole.run(), [decibels for _, _, decibels in whole.progress.looks]
    better = [decibels > max(looks[:i]) for i, decibels in enumerate(looks) if i]
    stop = better.index(True) + 1
    assert False in better[stop:-1]  # a worse one follows, and learning goes on from the best
    with pytest.raises(KeyboardInterrupt):
        Learning(recipe, fitted, *flow, tmp_path / "part", ticked=Stopped(stop)).run()
    assert Learning(recipe, fitted, *flow, tmp_path / "part").run().to_json() == expected.to_json()


def test_a_checkpoint_of_another_version_is_told_and_begun_anew(flow, fitted, tmp_path, monkeypatch):
    recipe, told = Recipe(steps=2, every=1), []
    monkeypatch.setattr("epd.train.learning._FORMAT", 1)
    expected = Learning(recipe, fitted, *flow, tmp_path / "a").run()
    monkeypatch.undo()
    assert Learning(recipe, fitted, *flow, tmp_path / "a", told.append).run().to_json() == expected.to_json()
    assert "another version; begun anew" in told[0]


def test_a_damaged_checkpoint_is_told_and_begun_anew(flow, fitted, tmp_path):
    recipe, told = Recipe(steps=2, every=1), []
    expected = Learning(recipe, fitted, *flow, tmp_path / "a").run()
    file = tmp_path / "b"
    file.write_bytes((tmp_path / "a").read_bytes()[:-100])
    assert Learning(recipe, fitted, *flow, file, told.append).run().to_json() == expected.to_json()
    assert "damaged" in told[0]


def test_it_ends_when_it_gets_no_better_and_gives_the_best(flow, fitted, tmp_path):
    recipe = Recipe(steps=1000, every=1, patience=3, rate=5.0, linear_rate=5.0)
    learning = Learning(recipe, fitted, *flow, tmp_path / "checkpoint")
    assert learning.run().to_json() == fitted.to_json()
    assert [step for _, step, _ in learning.progress.looks] == [0, 1, 2, 3]


def test_after_a_look_that_found_nothing_better_it_goes_on_from_the_best_with_lower_rates(flow, fitted, tmp_path):
    """Rates far too high, which become low enough in time: it ends better than it began."""
    recipe, ticks = Recipe(steps=60, every=1, patience=30, rate=2.0, linear_rate=0.5), []
    learning = Learning(recipe, fitted, *flow, tmp_path / "checkpoint", ticked=lambda: ticks.append(rates()))

    def rates():
        return [group["lr"] for group in learning._adam.param_groups]

    begun = learning.progress.best_db
    best = learning.run()
    found = [decibels for _, _, decibels in learning.progress.looks]
    assert found[1] < begun < learning.progress.best_db
    assert learning.progress.backs == sum(later < max(found[:i]) + 0.01 for i, later in enumerate(found) if i)
    assert max(ticks[-1]) < 1e-3 * max(max(each) for each in ticks)
    np.testing.assert_allclose(learning._best["student.raw.place"], learning._student.raw["place"].detach())
    assert best.to_json() != fitted.to_json()


def test_where_it_diverges_the_best_table_so_far_is_given(flow, fitted, tmp_path):
    learn, held = flow
    calls, told = [], []

    def breaking(points):
        calls.append(1)
        slopes = flow_slope(points, torch)
        return slopes * float("inf") if len(calls) > 8 else slopes  # 4 requests a run: in the second step

    broken = replace(learn, slope=lambda images: breaking)
    learning = Learning(Recipe(steps=9, every=1), fitted, broken, held, tmp_path / "checkpoint", told.append)
    assert learning.run().to_json() == learning.progress.best.to_json()
    assert "not finite" in told[-1]
    assert "best table so far" in told[-1]


def test_numbers_that_no_table_can_have_end_it_with_the_best_table(flow, fitted, tmp_path, monkeypatch):
    told = []
    learning = Learning(Recipe(steps=9, every=1), fitted, *flow, tmp_path / "checkpoint", told.append)
    monkeypatch.setattr(Student, "table", lambda self: replace(fitted, times=fitted.times[::-1]))
    assert learning.run().to_json() == learning.progress.best.to_json()
    assert "strictly decreasing" in told[-1]


def test_a_dropped_direction_is_given_by_its_neighbour(fitted):
    table = without(fitted, 1, 0)
    assert table.w[1].tolist() == [0.0, fitted.w[1].sum()]
    assert table.total_evaluations == fitted.total_evaluations - 1
    np.testing.assert_allclose(table.place[2].sum(-1), fitted.place[2].sum(-1))
    np.testing.assert_allclose(table.carry[2].sum(-1), fitted.carry[2].sum(-1) * (fitted.carry.shape[1] > 1))


def test_only_idle_directions_are_dropped():
    table = replace(start_table((3.0, 2.0, 1.0), 2), w=np.array([[0.5, 0.5], [0.999, 0.001]]))

    def moved(one):  # what is lost grows with the weight that changes hands
        return -50 * abs(one.w - table.w).sum()

    assert without_idle(table, moved, 0.05).w.tolist() == table.w.tolist()
    assert without_idle(table, moved, 0.2).w.tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert np.count_nonzero(without_idle(table, moved, 1e3).w, axis=1).tolist() == [1, 1]


def test_errors_are_compared_in_decibels(flow, fitted):
    learn, _ = flow
    numbers = Student(fitted)()
    *_, last = epd.solve(epd.solvers.epd(fitted), learn.teacher.x[0], lambda points: flow_slope(points, np))
    expected = decibels(last.x, learn.teacher.x[-1]).mean()
    for kind in ("unrolled", "image"):
        assert -float(loss(kind, numbers, learn, range(8)).detach()) == pytest.approx(expected, abs=0.1)
    power = 10 * np.log10(np.square(learn.teacher.x[-1]).mean((1, 2, 3))).mean()
    np.testing.assert_allclose(score(fitted, learn).mean(), expected - power, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": "l1"}, "loss must be one of state, unrolled, image"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"rate": float("nan")}, r"learning rates must be in \(0, 10\)"),
        ({"drop": -1.0}, "0 dB or more"),
        ({"loss": "state", "frozen": ()}, "times are learned by the last state or picture"),
        ({"frozen": ("times", "x")}, "cannot freeze x; choose from r, w"),
        ({"bound": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_a_recipe_that_cannot_be(flow, fitted, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        Learning(replace(Recipe(), **change), fitted, *flow, tmp_path / "checkpoint")
