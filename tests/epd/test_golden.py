"""The coroutines against trajectories computed with the EPD authors' released code, in numpy and in torch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import epd
from tests.epd.oracle import Counting, edm_slope, flow_slope, golden

GOLDEN = golden()
CASES = list(GOLDEN)
TABLES = [case for case in CASES if "sampler" not in case and not case.startswith("ipndm")]


def table(facts, data, **changes):
    numbers = {key: data[key] for key in ("times", "r", "w", "scale_dir", "scale_time") if key in data}
    start = "afs" if facts.get("afs") else "call"
    return epd.Table(**{**numbers, "start": start, "order": facts.get("max_order", 1), **changes})


def solver(case, facts, data):
    if case == "heun_sampler":
        return epd.solvers.heun(data["times"])
    if case == "dpm_sampler_2":
        return epd.solvers.dpm2(data["times"])
    if case.startswith("ipndm"):
        return epd.solvers.ipndm(data["times"], order=int(case.removeprefix("ipndm")))
    return epd.solvers.epd(table(facts, data))


def setting(case):
    facts, data = GOLDEN[case]
    flow = facts["network"].startswith("flow")
    return (
        solver(case, facts, data),
        data["latents"] * (1 if flow else data["times"][0]),
        flow_slope if flow else edm_slope,
    )


@pytest.mark.parametrize("case", CASES)
def test_trajectory_in_numpy_and_in_torch(case):
    run, x, slope = setting(case)
    trajectory = GOLDEN[case][1]["trajectory"]
    np.testing.assert_allclose(x, trajectory[0], rtol=0, atol=1e-12)
    counting = Counting(slope)
    steps = list(epd.solve(run, x, counting))
    assert [step.index for step in steps] == list(range(len(trajectory) - 1))
    assert [step.t for step in steps] == GOLDEN[case][1]["times"][1:].tolist()
    for step, expected in zip(steps, trajectory[1:], strict=True):
        np.testing.assert_allclose(step.x, expected, rtol=0, atol=1e-9)
    assert (steps[-1].calls, steps[-1].evaluations) == (counting.calls, counting.evaluations)

    for mine, step in zip(epd.solve(run, torch.tensor(x), lambda p: slope(p, torch)), steps, strict=True):
        assert isinstance(mine.x, torch.Tensor)
        assert mine.x.dtype == torch.float64
        np.testing.assert_allclose(mine.x.numpy(), step.x, rtol=0, atol=1e-10)
        assert (mine.calls, mine.evaluations) == (step.calls, step.evaluations)


@pytest.mark.parametrize("case", TABLES)
def test_counts_of_the_table_are_those_the_network_sees(case):
    run, x, slope = setting(case)
    counting = Counting(slope)
    list(epd.solve(run, x, counting))
    numbers = table(*GOLDEN[case])
    assert (numbers.sequential_calls, numbers.total_evaluations) == (counting.calls, counting.evaluations)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("edm", "flow"))])
def test_grid_is_the_one_the_authors_used(case):
    facts, data = GOLDEN[case]
    n = len(data["times"]) - 1
    grid = {
        "polynomial": lambda: epd.schedule.polynomial(n, 0.002, 80.0, 7),
        "time_uniform": lambda: epd.schedule.time_uniform(n, 0.002, 80.0),
        "logsnr": lambda: epd.schedule.logsnr(n, 0.002, 80.0),
        "flowmatch": lambda: epd.schedule.flow(n, facts.get("shift", 0)),
    }[facts["schedule"]]()
    np.testing.assert_allclose(grid, data["times"], rtol=1e-6 if case.startswith("flow") else 1e-9)


def test_gradients_flow_through_the_state_and_through_every_number_of_the_table():
    facts, data = GOLDEN["edm_k2"]
    fixed = table(facts, data)
    names = ("r", "w", "scale_dir", "scale_time")
    wanted = {name: torch.tensor(np.array(getattr(fixed, name)), requires_grad=True) for name in names}
    rest = {name: getattr(fixed, name) for name in ("times", "start", "order", "midpoint", "place", "carry")}
    x = torch.tensor(data["latents"] * data["times"][0], requires_grad=True)

    def loss(numbers, x):
        solver = epd.solvers.epd(SimpleNamespace(**numbers, **rest))
        *_, last = epd.solve(solver, x, lambda p: edm_slope(p, torch))
        return (last.x**2).sum()

    loss(wanted, x).backward()
    eps = 1e-6
    for name in names:
        for sign_at in ((0, 0), (2, 1)):
            shifted = []
            for sign in (1, -1):
                moved = {key: value.detach().clone() for key, value in wanted.items()}
                moved[name][sign_at] += sign * eps
                shifted.append(loss(moved, x.detach()).item())
            assert wanted[name].grad[sign_at].item() == pytest.approx((shifted[0] - shifted[1]) / (2 * eps), rel=1e-4)
    assert x.grad.abs().min() > 0
