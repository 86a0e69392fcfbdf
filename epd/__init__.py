"""Solver maths of the EPD family: tables, time grids, solvers as coroutines, and the driver. numpy only."""

from . import parallel, schedule, solvers
from .solve import Points, State, Step, solve, together
from .table import Table, start_table

__all__ = [
    "Points",
    "State",
    "Step",
    "Table",
    "parallel",
    "schedule",
    "solve",
    "solvers",
    "start_table",
    "together",
]
