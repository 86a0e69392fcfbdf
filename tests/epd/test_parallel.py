"""ParaDiGMS and ParaTAA end where the one-step method ends, in fewer sequential calls, image by image."""

import numpy as np
import pytest
import torch

import epd
from epd.parallel import paradigms, parataa
from epd.solvers import dpm2_step, euler_step, heun_step
from tests.epd.oracle import Counting, edm_slope, flow_slope

N = 16
TIMES = {
    "edm": epd.schedule.polynomial(N, 0.002, 80.0, 7),
    "ddim": epd.schedule.ddim(N),
    "flow": epd.schedule.flow_euler(N),  # ends at 0: a Heun step asks once there
}
SEQUENTIAL = {euler_step: epd.solvers.euler, heun_step: epd.solvers.heun, dpm2_step: epd.solvers.dpm2}
BOTH = [paradigms, parataa]


def start(case, images=2):
    x = np.random.default_rng(3).normal(size=(images, 4, 3, 3)) * TIMES[case][0]
    return x, flow_slope if case == "flow" else edm_slope


def rms(case, step, other):
    """Of the difference, per image, in units of the state's size at that time."""
    size = np.hypot(1 - step.t if case == "flow" else 1, step.t)
    return np.sqrt(np.square(np.asarray(step.x) - other.x).mean(axis=(1, 2, 3))) / size


@pytest.mark.parametrize("build", BOTH)
@pytest.mark.parametrize("case", TIMES)
def test_every_step_agrees_with_the_sequential_method_to_the_tolerance(case, build):
    x, slope = start(case)
    for step, sequential in SEQUENTIAL.items():
        expected = list(epd.solve(sequential(TIMES[case]), x, slope))
        for tolerance in (1e-2, 1e-4):
            steps = list(epd.solve(build(TIMES[case], case == "flow", step=step, tolerance=tolerance), x, slope))
            assert [(s.index, s.t) for s in steps] == [(s.index, s.t) for s in expected]
            worst = max(rms(case, s, e).max() for s, e in zip(steps, expected, strict=True))
            assert 0 < worst <= 3 * tolerance
            assert steps[-1].calls < expected[-1].calls


@pytest.mark.parametrize("build", BOTH)
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("case", TIMES)
def test_tolerance_zero_is_the_sequential_result_in_at_most_n_iterations(case, window, build):
    x, slope = start(case)
    for step, calls in ((euler_step, 1), (heun_step, 2)):
        expected = list(epd.solve(SEQUENTIAL[step](TIMES[case]), x, slope))
        run = build(TIMES[case], case == "flow", step=step, window=window, tolerance=0)
        for mine, e in zip(epd.solve(run, x, slope), expected, strict=True):
            np.testing.assert_allclose(mine.x, e.x, rtol=1e-12, atol=1e-12)
        assert mine.calls <= calls * N
        if window == 1:
            assert (mine.calls, mine.evaluations) == (expected[-1].calls, expected[-1].evaluations)


@pytest.mark.parametrize("build", BOTH)
def test_torch_equals_numpy_and_gradients_pass(build):
    x, slope = start("flow")
    solver = build(TIMES["flow"], True, step=heun_step, window=6)
    leaf = torch.tensor(x, requires_grad=True)
    steps = list(epd.solve(solver, leaf, lambda p: flow_slope(p, torch)))
    for mine, expected in zip(steps, epd.solve(solver, x, slope), strict=True):
        np.testing.assert_allclose(mine.x.detach().numpy(), expected.x, rtol=0, atol=1e-9)
        assert (mine.calls, mine.evaluations) == (expected.calls, expected.evaluations)
    steps[-1].x.sum().backward()
    assert leaf.grad.abs().min() > 0


@pytest.mark.parametrize("case", TIMES)
def test_anderson_needs_fewer_sequential_calls_than_picard(case):
    x, slope = start(case, images=1)
    picard, anderson = (
        list(epd.solve(build(TIMES[case], case == "flow", tolerance=1e-4), x, slope))[-1] for build in BOTH
    )
    assert anderson.calls < picard.calls < N
    assert N < anderson.evaluations < picard.evaluations


def test_a_system_of_lower_order_converges_too_and_differs():
    x, slope = start("ddim", images=1)
    expected = list(epd.solve(epd.solvers.euler(TIMES["ddim"]), x, slope))
    calls = set()
    for order in (1, 4, None):
        steps = list(epd.solve(parataa(TIMES["ddim"], order=order, memory=1), x, slope))
        assert rms("ddim", steps[-1], expected[-1]).max() <= 3e-3
        calls.add(steps[-1].calls)
    assert len(calls) > 1


@pytest.mark.parametrize("build", BOTH)
@pytest.mark.parametrize("window", [None, 5])
def test_the_result_of_an_image_does_not_depend_on_its_batch(window, build):
    """Each image has its own window: among others it takes exactly the iterations it takes alone."""
    x, slope = start("edm", images=4)
    x[0] *= 1e-3  # far from the data's path: converges at another pace
    x[3] *= 20
    solver = build(TIMES["edm"], step=heun_step, window=window, tolerance=1e-2)
    among = list(epd.solve(solver, x, slope))
    alone = [list(epd.solve(solver, x[b : b + 1], slope)) for b in range(len(x))]
    assert len({steps[-1].calls for steps in alone}) > 1, "all alike: nothing is tested"
    for b, steps in enumerate(alone):
        for mine, one in zip(among, steps, strict=True):
            np.testing.assert_array_equal(mine.x[b], one.x[0])
    assert among[-1].calls == max(steps[-1].calls for steps in alone)


@pytest.mark.parametrize("build", BOTH)
def test_counts_and_requests_are_what_the_network_sees(build):
    x, slope = start("flow")
    counting = Counting(slope)
    *_, last = epd.solve(build(TIMES["flow"], True, window=5), x, counting)
    assert (last.calls, last.evaluations) == (counting.calls, counting.evaluations)
    assert {times.shape[1] for times in counting.times} == {2}
    assert counting.times[0].tolist() == [[t, t] for t in TIMES["flow"][:5]]
    assert max(len(times) for times in counting.times) == 5


def test_closing_closes_every_image():
    x, _ = start("flow")
    opened = []

    def step(x, t, t_next):
        try:
            yield from euler_step(x, t, t_next)
        finally:
            opened.append(t)
        return x

    run = paradigms(TIMES["flow"], True, step=step, window=3)(x)
    next(run)
    run.close()
    assert len(opened) == 6


@pytest.mark.parametrize(
    "wrong",
    [{"window": 0}, {"tolerance": -1.0}, {"tolerance": float("nan")}, {"memory": 0}, {"order": 0}],
)
def test_settings_out_of_range_are_refused(wrong):
    build = parataa if wrong.keys() & {"memory", "order"} else paradigms
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*1 or more|tolerance 0 or more"):
        build(TIMES["edm"], **wrong)
