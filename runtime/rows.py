"""Requests of any number of rows on graphs that take a fixed number each: which calls, and which rows in each.

Rows do not feel one another, so that a request may be cut anywhere. Rows i and i + n/2 of n stay together as far as the
calls allow: they are the guidance halves of one point. Knows nothing of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .errors import RequestError


def split(rows: int, have: Sequence[int]) -> tuple[int, ...] | None:
    """The fewest calls of row counts among `have` that make up `rows`, larger ones first; None if none do."""
    best: list[tuple[int, ...] | None] = [()]
    for n in range(1, rows + 1):
        ways = [(size, *rest) for size in sorted(have, reverse=True) if (rest := _before(best, n - size)) is not None]
        best.append(min(ways, key=len, default=None))
    return best[rows]


def _before(best: list[tuple[int, ...] | None], rows: int) -> tuple[int, ...] | None:
    return best[rows] if rows >= 0 else None


def few(rows: int, most: int) -> tuple[int, ...]:
    """Calls of `most` rows, and one of those left over."""
    return (most,) * (rows // most) + ((rows % most,) if rows % most else ())


def cut(calls: Sequence[int]) -> list[NDArray[np.intp]]:
    """The rows of each call, (size,) of indices: in order where one call takes all of them."""
    n = sum(calls)
    order = np.arange(n) if n % 2 or len(calls) == 1 else np.arange(n).reshape(2, -1).T.ravel()
    return np.split(order, np.cumsum(calls)[:-1])


def join(answers: Sequence[Mapping[str, NDArray[Any]]], parts: Sequence[NDArray[np.intp]]) -> dict[str, NDArray[Any]]:
    """The answers of the calls that `cut` made, name -> (n, ...), rows in their first order."""
    place = np.argsort(np.concatenate(parts))
    return {name: np.concatenate([answer[name] for answer in answers])[place] for name in answers[0]}


def rows_of(component: str, feeds: Mapping[str, NDArray[Any]]) -> int:
    """Rows that all inputs have; RequestError if they differ."""
    counts = {name: len(value) for name, value in feeds.items()}
    if len(set(counts.values())) != 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise RequestError(f"{component}: its inputs must have as many rows each; got {told}")
    return next(iter(counts.values()))


def calls_of(bundle: Bundle, component: str, rows: int) -> tuple[int, ...]:
    """Row counts of the calls that answer a request; RequestError gives the export line where none can."""
    have = bundle.facts.components[component].rows
    calls = split(rows, have)
    if not calls:
        raise RequestError(
            f"{component}: {rows} rows cannot be made up of this bundle's graphs of {_listed(have)} rows; "
            f"{_other_rows(bundle, rows)}"
        )
    return calls


def in_turn(bundle: Bundle, component: str, calls: Sequence[int]) -> str:
    """What to tell of a request that several calls answer."""
    have = bundle.facts.components[component].rows
    return (
        f"{component}: {sum(calls)} rows run as calls of {' + '.join(map(str, calls))}, for this bundle has graphs of "
        f"{_listed(have)} rows" + ("" if bundle.foreign else f"; for one call {export_line(bundle, sum(calls))}")
    )


def _other_rows(bundle: Bundle, rows: int) -> str:
    return "give a --guidance-scale above 1" if bundle.foreign else export_line(bundle, rows)


def export_line(bundle: Bundle, rows: int) -> str:
    """What to type for a bundle that has a graph of `rows` rows of the backbone too."""
    facts = bundle.facts
    counts = sorted({*facts.components[bundle.backbone].rows, rows})
    return f"`python -m export {facts.source.id} --target {facts.target} --rows {' '.join(map(str, counts))} -o DIR`"


def _listed(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows))
