"""Which solver table draws, whether it can, and where it is used for something else than it was made for.

Knows nothing of sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

import epd
from epd import catalogue

from .bundle import Bundle
from .errors import RequestError
from .facts import Facts
from .grid import largest, own_grid, published_grid

_BEYOND = 1.01  # times the largest trained sigma: where a table may start at most, SD1.5
_FLOW = ("sd3", "flux")  # families whose state is (1 - t) x0 + t n; that of all others is x0 + t n


def load_table(file: Path) -> epd.Table:
    """A solver table; RequestError if the file cannot be read or breaks a rule."""
    try:
        return epd.Table.load(file)
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror}; give a table file made by this program") from None
    except ValueError as error:
        raise RequestError(str(error)) from None


def find_table(table: str | Path) -> Path:
    """A file of this path, else the published or shipped table of this name; RequestError if there is neither."""
    if Path(table).exists():
        return Path(table)
    try:
        return catalogue.find(str(table))
    except ValueError as error:
        raise RequestError(str(error)) from None


def best_table(bundle: Bundle, calls: int) -> Path:
    """Of the bundle's tables with at most `calls` sequential calls the best one.

    That is the one with the highest held-out PSNR; of tables without such a figure, which come last, the one of the
    most calls. Ties go to fewer total evaluations.

    Raises
    ------
    RequestError
        The bundle has no such table.
    """
    facts = bundle.facts
    if not facts.tables:
        raise RequestError(f"{facts.name} has no tables for --calls; give --table, or --solver with --steps")
    tables = {path: load_table(bundle.folder / path) for path in facts.tables}
    fitting = [path for path, table in tables.items() if table.sequential_calls <= calls]
    if not fitting:
        have = sorted({table.sequential_calls for table in tables.values()})
        raise RequestError(
            f"{facts.name} has no table of at most {calls} sequential calls (it has: {', '.join(map(str, have))}); "
            f"give --calls {have[0]}, or --solver with --steps"
        )
    return bundle.folder / max(fitting, key=lambda path: _rank(tables[path]))


def _rank(table: epd.Table) -> tuple[bool, float, int]:
    psnr = table.held_out_psnr
    return psnr is not None, table.sequential_calls if psnr is None else psnr, -table.total_evaluations


def check_table(facts: Facts, table: epd.Table, what: str, steps: int | None) -> None:
    """RequestError, beginning with `what`, where a table cannot draw with this model or in this number of steps."""
    flow = facts.family == "sd3"
    if table.family is not None and (table.family in _FLOW) != flow:
        raise RequestError(
            f"{what} is for the family {_printable(table.family)}, {facts.name} is {facts.family}; give another table"
        )
    if table.times[0] > largest(facts) * (1 if flow else _BEYOND):
        raise RequestError(
            f"{what} starts at sigma {table.times[0]:g}, {facts.name} at most at {largest(facts):.4g}; "
            "give another table"
        )
    if flow and table.start == "afs":
        raise RequestError(f"{what} starts analytically (afs), a flow-matching model cannot; give another table")
    if steps not in (None, table.steps):
        raise RequestError(
            f"{what} has {table.steps} steps, asked for were {steps}; leave --steps out, give another table, "
            "or a solver that takes any number: --solver euler"
        )


def differences(
    facts: Facts, table: epd.Table, guidance: float, interval: tuple[float, float] | None, size: tuple[int, int]
) -> list[str]:
    """What a table was made for that is otherwise here, as far as it says; `size` is (height, width) in pixels.

    A grid is compared with the two that belong to the checkpoint, and only where the table is another model's: one made
    for this model may well have found a better grid.
    """
    ours = {_short(name) for name in (facts.name, facts.source.id)}
    own_model = table.model is not None and _short(table.model) in ours
    t5 = "text_encoder_3" in facts.components
    grids = _own_grids(facts, table.steps)
    usual = own_model or any(np.allclose(table.times, grid, rtol=1e-3, atol=1e-4) for grid in grids)
    fitted = (table.provenance or {}).get("guidance_scales")
    scales = fitted if isinstance(fitted, list) and fitted else [table.guidance]
    compared = [  # what it says, what is here, whether they agree
        (f"family {table.family}", facts.family, table.family in (None, facts.family)),
        (f"model {table.model}", facts.name, table.model is None or own_model),
        (f"grid {table.grid}, {_span(table.times)}", _span(grids[0]), table.grid is None or usual),
        (f"guidance {', '.join(map(str, scales))}", f"{guidance:g}", None in scales or guidance in scales),
        ("guidance everywhere", f"in {list(interval or ())}", None in scales or interval is None),
        (f"size {_by(table.size)}", _by(size), table.size in (None, size)),
        ("T5" if table.t5 else "no T5", "with it" if t5 else "without it", table.t5 in (None, t5)),
    ]
    return [_printable(f"{made} (here {here})") for made, here, agree in compared if not agree]


def _printable(text: str) -> str:
    """What a table says of itself, unable to command a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _short(name: str) -> str:
    """A model's name without its owner or folder."""
    return name.rstrip("/").rpartition("/")[2].lower()


def _by(size: tuple[int, int] | None) -> str:
    return f"{size[1]}x{size[0]}" if size else ""


def _span(times: Sequence[float] | epd.schedule.Floats) -> str:
    return f"{times[0]:.4g} to {times[-1]:.4g}"


def _own_grids(facts: Facts, steps: int) -> list[tuple[float, ...]]:
    """Its scheduler's, where that is supported, and the published tables' form of it."""
    grids = [published_grid(facts, steps)]
    with suppress(RequestError):
        grids.insert(0, own_grid(facts, steps))
    return grids
