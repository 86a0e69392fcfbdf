"""The driver, `together`, and what the coroutines ask for."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import epd
from tests.epd.oracle import Counting, edm_slope, ode_slope

TIMES = epd.schedule.polynomial(4, 0.1, 10.0, 7)
X = np.random.default_rng(0).normal(size=(2, 4, 3, 3)) * TIMES[0]


def history_table(w=None, place=None, carry=None):
    rng = np.random.default_rng(1)
    n, k = len(TIMES) - 1, 2
    if place is None:
        place = rng.normal(size=(n, k, 3)) * 0.1
        place[:, :, 0] += 1
        place[0, :, 1:] = 0
    return epd.Table(
        times=TIMES,
        r=np.tile([0.4, 0.9], (n, 1)),
        w=np.tile([0.6, 0.3], (n, 1)) if w is None else w,
        scale_time=np.full((n, k), 1.02),
        start="history",
        midpoint="arithmetic",
        weights="free",
        place=place,
        carry=np.full((n, 1), 0.1) if carry is None else carry,
    )


def by_hand(table, x, slope):
    """The general linear method written out with one call per point."""
    past = [slope(epd.Points(x[None], table.times[:1]))[0]]
    for i, (t, t_next) in enumerate(pairwise(table.times)):
        new = []
        for k in range(table.directions):
            t_k = t + table.r[i, k] * (t_next - t)
            x_k = x + (t_k - t) * sum(c * d for c, d in zip(table.place[i, k], past, strict=False))
            new.append(slope(epd.Points(x_k[None], np.array([table.scale_time[i, k] * t_k])))[0])
        scale = table.scale_dir[i] * table.scale_time[i]
        update = sum(w * s * d for w, s, d in zip(table.w[i], scale, new, strict=True))
        update = update + sum(c * d for c, d in zip(table.carry[i], past, strict=False))
        x = x + (t_next - t) * update
        past = [*new, *past]
    return x


def test_history_equals_the_formula_written_out():
    table = history_table()
    counting = Counting(edm_slope)
    *_, last = epd.solve(epd.solvers.epd(table), X, counting)
    np.testing.assert_allclose(last.x, by_hand(table, X, edm_slope), rtol=0, atol=1e-12)
    n, k = table.steps, table.directions
    assert (last.calls, last.evaluations) == (n + 1, n * k + 1)
    assert (
        (table.sequential_calls, table.total_evaluations)
        == (counting.calls, counting.evaluations)
        == (n + 1, n * k + 1)
    )
    *_, torch_last = epd.solve(epd.solvers.epd(table), torch.tensor(X), lambda p: edm_slope(p, torch))
    np.testing.assert_allclose(torch_last.x.numpy(), last.x, rtol=0, atol=1e-11)


def test_history_reaches_the_first_call_through_its_column():
    """At interval i the first call's slope is entry K i of past."""
    place = np.zeros((4, 2, 7))
    for i in range(4):
        place[i, :, 2 * i] = 1
    table = history_table(place=place)
    *_, last = epd.solve(epd.solvers.epd(table), X, edm_slope)
    np.testing.assert_allclose(last.x, by_hand(table, X, edm_slope), rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", ["call", "afs", "history"])
def test_a_point_of_weight_zero_is_not_asked_for(start):
    n = len(TIMES) - 1
    w = np.tile([0.25, 0.0, 0.75], (n, 1))
    r = np.tile([0.2, 0.5, 0.8], (n, 1))
    extra = {"start": start}
    less = dict(extra)
    if start == "history":
        place = np.zeros((n, 3, 3))
        place[0, :, 0] = 1
        place[1:, :, 0], place[1:, :, 2] = -0.5, 1.5
        extra["place"], less["place"] = place, place[:, [0, 2]][:, :, [0, 2]]
    table, smaller = epd.Table(times=TIMES, r=r, w=w, **extra), epd.Table(times=TIMES, r=r[:, ::2], w=w[:, ::2], **less)
    counting = Counting(edm_slope)
    *_, last = epd.solve(epd.solvers.epd(table), X, counting)
    *_, expected = epd.solve(epd.solvers.epd(smaller), X, edm_slope)
    np.testing.assert_array_equal(last.x, expected.x)
    assert table.total_evaluations == counting.evaluations == last.evaluations == smaller.total_evaluations
    assert table.sequential_calls == counting.calls == last.calls


def test_afs_asks_nothing_at_the_first_time():
    table = epd.Table(times=TIMES, r=np.full((4, 1), 0.5), w=np.ones((4, 1)), start="afs")
    counting = Counting(edm_slope)
    *_, last = epd.solve(epd.solvers.epd(table), X, counting)
    assert table.sequential_calls == counting.calls == last.calls == 7
    assert all(times[0] < TIMES[0] for times in counting.times)


def test_the_state_is_float64_whatever_the_network_answers_in():
    def half(points):
        assert points.x.dtype == np.float64
        return edm_slope(points).astype(np.float16)

    for step in epd.solve(epd.solvers.euler(TIMES), X.astype(np.float32), half):
        assert step.x.dtype == np.float64


def test_nan_names_step_and_time():
    def slope(points):
        answer = ode_slope(points)
        if len(answer) == 2 and points.t[1] < 1:
            answer[1, 0, 0] = np.nan
        return answer

    run = epd.solve(epd.solvers.epd(epd.start_table(TIMES, 2)), X, slope)
    t = TIMES[2] ** (1 / 3) * TIMES[3] ** (2 / 3)
    with pytest.raises(FloatingPointError, match=rf"step 2, t = {t:.6g}$"):
        list(run)
    with pytest.raises(FloatingPointError, match="start state"):
        list(epd.solve(epd.solvers.euler(TIMES), X * np.inf, ode_slope))


def test_infinity_in_torch_is_noticed():
    with pytest.raises(FloatingPointError, match="step 0, t = 10"):
        list(epd.solve(epd.solvers.euler(TIMES), torch.tensor(X), lambda p: p.x / 0.0))


def test_an_answer_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 4, 3, 3\) to points of shape \(1, 2, 4, 3, 3\)"):
        list(epd.solve(epd.solvers.euler(TIMES), X, lambda points: points.x[0]))


def test_closing_the_run_closes_the_solver_and_an_error_in_slope_does_too():
    closed = []

    def solver(x):
        try:
            yield epd.State(x, 1.0)
            yield epd.Points(x[None], np.ones(1))
        finally:
            closed.append(True)

    run = epd.solve(solver, X, ode_slope)
    next(run)
    run.close()
    assert closed == [True]

    def broken(points):
        raise RuntimeError("unet")

    with pytest.raises(RuntimeError, match="unet"):
        list(epd.solve(solver, X, broken))
    assert closed == [True, True]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_together_equals_separate(kind):
    tables = [epd.start_table(TIMES, 2), history_table(), epd.start_table(epd.schedule.polynomial(2, 0.1, 10.0), 3)]
    solvers = [*map(epd.solvers.epd, tables), epd.solvers.heun(TIMES), epd.solvers.euler(TIMES)]
    x, slope = (X, edm_slope) if kind == "numpy" else (torch.tensor(X), lambda p: edm_slope(p, torch))
    alone = [list(epd.solve(solver, x, slope)) for solver in solvers]
    steps = list(epd.solve(lambda x: epd.together(*(solver(x) for solver in solvers)), x, slope))
    assert len(steps) == 4
    for i, step in enumerate(steps):
        for j, separate in enumerate(alone):
            expected = separate[min(i, len(separate) - 1)]  # one that has ended keeps its last state
            np.testing.assert_allclose(step.x[j], expected.x, rtol=0, atol=1e-12)
            assert step.t[j] == expected.t
    assert steps[-1].evaluations == sum(separate[-1].evaluations for separate in alone)
    assert steps[-1].calls < sum(separate[-1].calls for separate in alone)
    assert steps[-1].calls >= max(separate[-1].calls for separate in alone)


def test_together_over_one_step_methods_returns_their_states_and_passes_gradients():
    x = torch.tensor(X, requires_grad=True)
    steps = [epd.solvers.heun_step(x, t, t_next) for t, t_next in pairwise(TIMES.tolist())]
    group = epd.together(*steps)
    answer, requests = None, []
    while True:
        try:
            points = group.send(answer)
        except StopIteration as end:
            states = end.value
            break
        requests.append(points)
        answer = edm_slope(points, torch)
    assert [tuple(points.x.shape[:1]) for points in requests] == [(4,), (4,)]
    assert requests[0].t.tolist() == TIMES[:-1].tolist()
    for state, (t, t_next) in zip(states, pairwise(TIMES.tolist()), strict=True):
        *_, alone = epd.solve(epd.solvers.heun([t, t_next]), x, lambda p: edm_slope(p, torch))
        np.testing.assert_allclose(state.detach().numpy(), alone.x.detach().numpy(), rtol=0, atol=1e-12)
    sum(state.sum() for state in states).backward()
    assert x.grad.abs().min() > 0


def test_together_mixes_times_per_point_and_per_image():
    def ask(x, t):
        answer = yield epd.Points(x, t)
        return answer

    per_image = np.array([[3.0, 4.0]])
    group = epd.together(ask(X[None], per_image), ask(X[None], np.array([2.0])))
    points = group.send(None)
    np.testing.assert_array_equal(points.t, [[3.0, 4.0], [2.0, 2.0]])
    with pytest.raises(StopIteration) as end:
        group.send(edm_slope(points))
    alone = edm_slope(epd.Points(X[None], per_image))
    np.testing.assert_array_equal(end.value.value[0], alone)


def test_together_refuses_states_of_different_shapes():
    group = epd.together(epd.solvers.euler_step(X, 2.0, 1.0), epd.solvers.euler_step(X[:1], 2.0, 1.0))
    with pytest.raises(ValueError, match="one shape"):
        group.send(None)


def test_closing_together_closes_all():
    runs = [epd.solvers.euler(TIMES)(X), epd.solvers.heun(TIMES)(X)]
    group = epd.together(*runs)
    next(group)
    group.close()
    assert all(run.gi_frame is None for run in runs)


@pytest.mark.parametrize("r", [0.0, 1.0, 1.5])
def test_dpm2_refuses_a_midpoint_outside(r):
    with pytest.raises(ValueError, match="r in"):
        epd.solvers.dpm2(TIMES, r)


@pytest.mark.parametrize("build", [epd.solvers.euler, epd.solvers.heun, epd.solvers.dpm2])
def test_solvers_refuse_a_rising_grid(build):
    with pytest.raises(ValueError, match="strictly decreasing"):
        build(TIMES[::-1])


def test_the_denoised_estimate_is_of_the_last_point_asked_for():
    """Of a slope (x - D) / t with a D that is known, also where points have a time for each image."""

    def target(t):
        return 0.3 + 0.1 * t

    def slope(points):
        t = points.t.reshape(points.t.shape + (1,) * (points.x.ndim - points.t.ndim))
        return (points.x - target(t)) / t

    x = np.random.default_rng(0).standard_normal((2, 3))
    for step, t in zip(epd.solve(epd.solvers.euler([4.0, 2.0, 1.0, 0.0]), x, slope), (4.0, 2.0, 1.0), strict=True):
        np.testing.assert_allclose(step.denoised, target(t), atol=1e-12)
    np.testing.assert_allclose(step.x, step.denoised, atol=1e-12)

    def two(x):
        yield epd.Points(np.stack([x, x]), np.array([[4.0, 4.0], [3.0, 2.0]]))
        yield epd.State(x, 2.0)

    *_, step = epd.solve(two, x, slope)
    np.testing.assert_allclose(step.denoised, np.broadcast_to(target(np.array([[3.0], [2.0]])), (2, 3)), atol=1e-12)
    assert epd.Step(-1, 1.0, x, 0, 0).denoised is x
