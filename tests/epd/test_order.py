"""Convergence orders on an ODE with a closed-form solution."""

import argparse

import numpy as np
import pytest

import epd
from benchmarks import orders
from tests.epd.oracle import ode_slope, ode_solution

START = np.linspace(-1, 1, 6).reshape(1, 2, 3)
COUNTS = (16, 32, 64, 128)


def history(times, midpoint="arithmetic"):
    """Midpoint placed by the slope before: second order at one call a step."""
    n = len(times) - 1
    return epd.Table(
        times=times,
        r=np.full((n, 1), 0.5),
        w=np.ones((n, 1)),
        start="history",
        midpoint=midpoint,
        place=np.ones((n, 1, 1)),
    )


def adams_bashforth(times):
    """Adams-Bashforth-2 predicts the end; the trapezium of the slope there and the carried one (PEC mode)."""
    n = len(times) - 1
    place = np.tile([1.5, -0.5], (n, 1, 1))
    place[0] = [1.0, 0.0]
    return epd.Table(
        times=times,
        r=np.ones((n, 1)),
        w=np.full((n, 1), 0.5),
        start="history",
        midpoint="arithmetic",
        weights="free",
        place=place,
        carry=np.full((n, 1), 0.5),
    )


SOLVERS = {
    "dpm2 r 0.3": (lambda times: epd.solvers.dpm2(times, 0.3), 2),
    "epd start table K=1": (lambda times: epd.solvers.epd(epd.start_table(times, 1)), 2),
    "epd start table K=2": (lambda times: epd.solvers.epd(epd.start_table(times, 2)), 2),
    "epd generic": (lambda times: epd.solvers.epd(skewed(times)), 1),
    "history midpoint": (lambda times: epd.solvers.epd(history(times)), 2),
    "history geometric": (lambda times: epd.solvers.epd(history(times, "geometric")), 2),
    "history with carry": (lambda times: epd.solvers.epd(adams_bashforth(times)), 2),
}


def skewed(times):
    n = len(times) - 1
    return epd.Table(times=times, r=np.tile([0.2, 0.6], (n, 1)), w=np.tile([0.5, 0.5], (n, 1)))


@pytest.mark.parametrize("name", SOLVERS)
def test_order(name):
    build, order = SOLVERS[name]
    errors = []
    for n in COUNTS:
        times = epd.schedule.polynomial(n, 0.2, 3.0, 2)
        *_, last = epd.solve(build(times), START, ode_slope)
        errors.append(np.abs(last.x - ode_solution(START, times[0], times[-1])).max())
    slope = -np.polyfit(np.log(COUNTS[1:]), np.log(errors[1:]), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


METHODS = {method.name: (method.build, method.order) for method in orders.deterministic()}


def full_unipc(order):
    return lambda times, flow: epd.solvers.unipc(times, order, flow, lower_order_final=False)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("name", [*METHODS, "unipc_2, full order at the end"])
def test_every_training_free_solver_shows_its_declared_order(name, flow):
    build, declared = METHODS[name] if name in METHODS else (full_unipc(2), 3)
    counts = (64, 128, 256)
    found = [orders.error(build, orders.grid(n, flow), flow) for n in counts]
    assert orders.order(found, counts) == pytest.approx(declared, abs=0.15)


@pytest.mark.parametrize("flow", [False, True])
def test_unipc_3_with_full_order_at_the_end_is_of_order_three_at_least(flow):
    """Its step is of order 4, its start of 3; how soon the start shows depends on the ODE."""
    counts = (64, 128, 256)
    found = {q: [orders.error(full_unipc(q), orders.grid(n, flow), flow) for n in counts] for q in (2, 3)}
    assert orders.order(found[3], counts) > 2.85
    assert np.less(found[3], np.divide(found[2], 4)).all()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "euler"])
def test_from_pure_noise_in_flow_the_order_holds_up_to_a_logarithm(name):
    """Near t = 1 steps in lambda do not get shorter with more of them: N^-2 log N for the methods in lambda."""
    build, declared = METHODS[name]
    counts = (64, 128, 256)
    found = [orders.error(build, np.linspace(1.0, 0.1, n + 1), True) for n in counts]
    assert declared - 0.3 < orders.order(found, counts) < declared + 0.15


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_grid_that_ends_at_zero(name, flow):
    times = np.append(epd.schedule.flow(300) if flow else epd.schedule.polynomial(300, 0.002, 3.0), 0.0)
    assert orders.error(METHODS[name][0], times, flow) < (0.01 if METHODS[name][1] == 1 else 0.001)


def test_the_command_prints_every_method_and_draws_it(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(orders, "errors", lambda method, flow: [n**-method.order for n in orders.COUNTS])
    parser = argparse.ArgumentParser()
    orders.add(parser.add_subparsers())
    options = parser.parse_args(["orders", "--plot", str(tmp_path / "orders.png")])
    options.run(options)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all(float(line.split()[1]) == float(line.split()[2]) == float(line.split()[3]) for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["orders.png"]
    assert (tmp_path / "orders.png").read_bytes().startswith(b"\x89PNG")
