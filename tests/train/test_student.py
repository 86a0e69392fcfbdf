"""The student against numpy and finite differences, on closed-form networks, in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import epd
from epd.catalogue import SHIPPED
from epd.solvers import epd as solver_of
from epd.table import start_table
from epd.train.student import Student
from tests.epd.oracle import edm_slope, flow_slope

B = 3
EDM = epd.schedule.polynomial(3, 0.05, 8.0)
FLOW = (1.0, 0.7, 0.3, 0.0)
SLOPES = {"edm": edm_slope, "flow": flow_slope}


def history(times, k=2, j=3, q=4, weights="free"):
    """A table from history with coefficients of no particular kind."""
    n, dice = len(times) - 1, np.random.default_rng(7)
    place, carry = 0.3 * dice.standard_normal((n, k, j)), 0.2 * dice.standard_normal((n, q))
    for i in range(n):
        place[i, :, 1 + k * i :] = 0
        carry[i, 1 + k * i :] = 0
    r = np.tile([0.5, 1.0][:k], (n, 1))
    r[-1, -1] = 0.9
    w = np.tile([0.6, 0.4][:k], (n, 1))
    return epd.Table(
        times=times, r=r, w=w, start="history", midpoint="arithmetic", weights=weights, place=place, carry=carry
    )


TABLES = {
    "call": (start_table(EDM, 2), "edm"),
    "afs": (replace(start_table(EDM, 2), start="afs"), "edm"),
    "plugin": (replace(start_table(EDM, 3), order=3), "edm"),
    "arithmetic": (start_table(FLOW, 2), "flow"),
    "free": (replace(start_table(FLOW, 2), weights="free"), "flow"),
    "history": (history(FLOW), "flow"),
    "history, simplex": (history(EDM, weights="simplex"), "edm"),
    "history, a point dropped": (None, "flow"),
}
_dropped = history(FLOW)
TABLES["history, a point dropped"] = (
    replace(
        _dropped,
        w=np.array([[1.0, 0.0], [0.6, 0.4], [0.6, 0.4]]),
        place=np.where(np.arange(3) == 1, [[[1.0]], [[0.0]], [[1.0]]], 1.0) * _dropped.place,
        carry=np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 0]]) * _dropped.carry,
    ),
    "flow",
)


def starts(first):
    return first * np.random.default_rng(1).standard_normal((B, 4, 2, 2))


def slope_of(name):
    return lambda points: SLOPES[name](points, torch)


def moved(student, scale=0.3):
    """Every parameter away from where it begins."""
    dice = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in student.raw.values():
            value.copy_(scale * torch.randn(value.shape, generator=dice, dtype=torch.float64))
    return student


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("shapes-*.json")), ids=lambda file: file.stem)
def test_numpy_and_torch_agree_on_a_shipped_table(file):
    table = epd.Table.load(file)
    network = {"sd3": "flow", "sd15": "edm"}[table.family]
    x = starts(table.times[0])
    *_, ours = epd.solve(solver_of(table), x, SLOPES[network])
    with torch.no_grad():
        run = epd.solve(solver_of(Student(table, frozen=())()), torch.from_numpy(x), slope_of(network))
        *_, theirs = run
    assert np.abs(theirs.x.numpy() - ours.x).max() <= 1e-6 * np.abs(ours.x).max()


@pytest.mark.parametrize("name", TABLES)
def test_it_begins_as_its_table_and_numpy_agrees_when_it_has_moved(name):
    table, slope = TABLES[name]
    student = Student(table, frozen=())
    for field in ("times", "r", "w", "scale_dir", "scale_time", "place", "carry"):
        if (there := getattr(table, field)) is not None:
            np.testing.assert_allclose(getattr(student.table(), field), there, rtol=1e-12, atol=1e-15)
    x = starts(table.times[0])
    student.orthogonal(torch.tensor(x), slope_of(slope))
    moved(student)
    with torch.no_grad():
        ours = [step.x.numpy() for step in epd.solve(solver_of(student()), torch.tensor(x), slope_of(slope))]
    theirs = [step.x for step in epd.solve(solver_of(student.table()), x, SLOPES[slope])]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert np.abs(ours[-1] - [*epd.solve(solver_of(table), x, SLOPES[slope])][-1].x).max() > 1e-3


def test_no_time_is_asked_above_the_first_one():
    student = Student(TABLES["arithmetic"][0], frozen=(), bound=0.9)
    with torch.no_grad():
        student.raw["scale_time"].fill_(5.0)
    table = student.table()
    asked = table.scale_time * epd.table.point_times(
        "arithmetic", table.times[:-1, None], table.times[1:, None], table.r
    )
    assert asked[0] == pytest.approx(1.0)
    assert asked.max() == pytest.approx(1.0)
    assert table.scale_time.max() == pytest.approx(1.9, abs=1e-3)


@pytest.mark.parametrize("name", TABLES)
def test_gradients_are_those_of_finite_differences(name):
    table, slope = TABLES[name]
    student = moved(Student(table, frozen=()), 0.1)
    x = torch.tensor(starts(table.times[0]))
    student.orthogonal(x, slope_of(slope))
    names = list(student.raw)

    def error(*values):
        for key, value in zip(names, values, strict=True):
            student.raw[key] = value
        *_, last = epd.solve(solver_of(student()), x, slope_of(slope))
        return last.x.square().sum()

    values = [torch.nn.Parameter(student.raw[key].detach().clone()) for key in names]
    assert torch.autograd.gradcheck(error, values, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=name != "call")
