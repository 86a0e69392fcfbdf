"""What every training-free solver keeps: counts, both kinds of array, all grids; and the noisy ones' distributions."""

import inspect

import numpy as np
import pytest
import torch

import epd
from epd.solvers import METHODS
from tests.epd.oracle import S2, Counting, edm_slope, flow_slope, ode_slope

NORMAL = np.random.default_rng(2).normal(size=(2, 4, 3, 3))
GRIDS = {
    "edm": epd.schedule.polynomial(7),
    "edm to 0": np.append(epd.schedule.polynomial(6), 0.0),
    "sd15": epd.schedule.discrete(7),
    "sd15 to 0": np.append(epd.schedule.discrete(6), 0.0),
    "sd3": epd.schedule.flow(7),
    "sd3 to 0": epd.schedule.flow_euler(7),
    "sd3 below 1": epd.schedule.flow(8)[1:],
    "one step": np.array([5.0, 0.0]),
    "sd3 one step": np.array([1.0, 0.0]),
    "sd3 one step above 0": np.array([1.0, 0.5]),
    "twenty steps": epd.schedule.logsnr(20, 0.02, 15.0),
    "sd3 twenty steps": epd.schedule.flow_euler(20),
}


def noise(x):
    """The same numbers for the same state, in x's kind: a hash of nothing but the element's place."""
    values = np.sin(1.0 + 7.0 * np.arange(NORMAL.size)).reshape(NORMAL.shape) * 2**0.5
    return values if isinstance(x, np.ndarray) else x.new_tensor(values)


def run(method, grid, kind="numpy", x=None, slope=None):
    times, flow = GRIDS[grid], grid.startswith("sd3")
    x = NORMAL * (1 if flow else times[0]) if x is None else x
    closed_form = flow_slope if flow else edm_slope
    extra = {"noise": noise} if method.noisy else {}
    if kind == "torch":
        return list(epd.solve(method.build(times, flow, **extra), torch.tensor(x), lambda p: closed_form(p, torch)))
    return list(epd.solve(method.build(times, flow, **extra), x, slope or closed_form))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_on_every_grid_counts_its_calls_and_gives_the_same_in_torch(method, grid):
    times = GRIDS[grid]
    counting = Counting(flow_slope if grid.startswith("sd3") else edm_slope)
    steps = run(method, grid, slope=counting)
    assert [step.t for step in steps] == times[1:].tolist()
    assert (steps[-1].calls, steps[-1].evaluations) == (counting.calls, counting.evaluations)
    if method.calls:
        whole = len(times) - 1 - (times[-1] == 0)
        assert counting.calls == counting.evaluations == method.calls * whole + (times[-1] == 0)
    for mine, step in zip(run(method, grid, "torch"), steps, strict=True):
        assert isinstance(mine.x, torch.Tensor)
        assert mine.x.dtype == torch.float64
        np.testing.assert_allclose(mine.x.numpy(), step.x, rtol=0, atol=1e-10 * np.abs(step.x).max())
        assert (mine.calls, mine.evaluations) == (step.calls, step.evaluations)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_gradients_reach_the_start_state(method):
    x = torch.tensor(NORMAL, requires_grad=True)
    extra = {"noise": noise} if method.noisy else {}
    *_, last = epd.solve(method.build(GRIDS["sd3 to 0"], flow=True, **extra), x, lambda p: flow_slope(p, torch))
    (last.x**2).sum().backward()
    assert x.grad.abs().sum() > 0


def test_the_registry_is_true_to_itself():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.source
        assert set(method.families) <= {"edm", "sd15", "sd3"}
        assert ("noise" in inspect.signature(method.build).parameters) == method.noisy
        assert list(inspect.signature(method.build).parameters)[:2] == ["times", "flow"]
    with pytest.raises(TypeError):
        METHODS["mine"] = METHODS["euler"]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_bad_grid_is_refused(method):
    extra = {"noise": noise} if method.noisy else {}
    with pytest.raises(ValueError, match="strictly decreasing"):
        method.build(GRIDS["edm"][::-1], **extra)


@pytest.mark.parametrize("name", ["dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc_2", "deis_2", "euler_ancestral", "lcm"])
def test_a_sigma_grid_is_no_flow_grid(name):
    extra = {"noise": noise} if METHODS[name].noisy else {}
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 80"):
        METHODS[name].build(GRIDS["edm"], flow=True, **extra)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda times: epd.solvers.ipndm(times, 5), "1, 2, 3, 4, got 5"),
        (lambda times: epd.solvers.unipc(times, 1), "2, 3, got 1"),
        (lambda times: epd.solvers.deis(times, 4), "2, 3, got 4"),
        (lambda times: epd.solvers.dpmpp_2s(times, r=1.0), r"r in \(0, 1\)"),
    ],
)
def test_a_bad_choice_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(GRIDS["edm"])


def spread(method, times, slope, flow, count=None):
    """Variance of the final state from exact start variance, without drawing anything.

    The ODE is linear: every source of noise, the start and each step's, gets an axis of its own (one image each), and
    the variances add.
    """
    n = len(times) - 1
    start = ((1 - times[0]) ** 2 if flow else 1) * S2 + times[0] ** 2
    x = np.zeros((n + 1, 1))
    x[0] = np.sqrt(start)
    drawn = iter(range(1, n + 1))

    def unit(x):
        axis = np.zeros_like(x)
        axis[next(drawn)] = 1
        return axis

    *_, last = epd.solve(method.build(times, flow, noise=unit), x, slope)
    return (last.x**2).sum()


def flow_ode_slope(points):
    t = points.t.reshape(-1, 1, 1)
    return points.x * (t - (1 - t) * S2) / ((1 - t) ** 2 * S2 + t**2)


@pytest.mark.parametrize("flow", [False, True])
def test_ancestral_sampling_is_of_order_one_in_distribution(flow):
    errors = []
    for n in (64, 128, 256):
        times = np.linspace(1.0, 0.1, n + 1) if flow else epd.schedule.polynomial(n, 0.1, 3.0, 2)
        variance = spread(METHODS["euler_ancestral"], times, flow_ode_slope if flow else ode_slope, flow)
        errors.append(abs(variance - ((0.9**2 if flow else 1) * S2 + 0.1**2)))
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, METHODS["euler_ancestral"].order, atol=0.15)


@pytest.mark.parametrize("flow", [False, True])
def test_consistency_sampling_with_an_exact_consistency_function_keeps_the_distribution(flow):
    """f(x, t) = x sqrt(S2 / variance(t)) takes every state to the data; the boundary scalings cost 1e-5 at most."""

    def slope(points):
        t = points.t.reshape(-1, 1, 1)
        return points.x * (1 - np.sqrt(S2 / (((1 - t) ** 2 if flow else 1) * S2 + t**2))) / t

    times = np.array([1.0, 0.7, 0.4, 0.1]) if flow else epd.schedule.discrete(4)[:-1]
    variance = spread(METHODS["lcm"], times, slope, flow)
    assert variance == pytest.approx(((1 - times[-1]) ** 2 if flow else 1) * S2 + times[-1] ** 2, rel=1e-5)


def test_lcm_at_network_time_zero_is_the_state_itself():
    times = [float(epd.schedule.SD15.sigma(0)), 0.0]
    *_, last = epd.solve(METHODS["lcm"].build(times, noise=noise), NORMAL, edm_slope)
    np.testing.assert_allclose(last.x, NORMAL / np.sqrt(1 + times[0] ** 2), rtol=0, atol=1e-12)
