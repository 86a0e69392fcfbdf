"""Convergence orders on an ODE with a closed-form solution."""

import numpy as np
import pytest

import epd
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
    "euler": (epd.solvers.euler, 1),
    "heun": (epd.solvers.heun, 2),
    "dpm2": (epd.solvers.dpm2, 2),
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


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2", "epd start table K=2"])
def test_grid_that_ends_at_zero(name):
    times = np.append(epd.schedule.polynomial(80, 0.02, 3.0), 0.0)
    *_, last = epd.solve(SOLVERS[name][0](times), START, ode_slope)
    assert last.t == 0
    np.testing.assert_allclose(last.x, ode_solution(START, times[0], 0.0), rtol=0.1 if name == "euler" else 0.01)
