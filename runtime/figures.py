"""How good a model's pictures are with each solver: the figures that `benchmarks quality --figures` writes, read.

They lie in a bundle as `quality.json`, or are shipped by the model's name in `epd/tables/quality`. Knows nothing of how
they were measured.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import epd
from epd.catalogue import SHIPPED
from epd.table import write_whole

from .bundle import Bundle
from .errors import BundleError
from .parse import load_json, parse

FORMAT = 1
FILE = "quality.json"
_AKIN = {"sd3": "shapes-sd3", "sd15": "shapes-sd15"}  # whose figures stand in for those of a model that has none


@dataclass(frozen=True)
class Figure:
    """One solver in a number of steps."""

    solver: str  # of epd.solvers.METHODS, or epd
    steps: int
    psnr_db: float  # to converged pictures of full precision, mean over the images
    half_db: float  # of its 95 % interval
    k: int | None = None  # of an untrained start table
    table: str | None = None  # `digest` of a table
    guidance_interval: tuple[float, ...] | None = None  # (lo, hi) sigma


@dataclass(frozen=True)
class Figures:
    """Those of one model."""

    source: str  # `Source.id` of its bundle
    family: str
    precision: str  # of the backbone they were measured with
    guidance: float
    prompts: int  # held out
    images: int
    rows: tuple[Figure, ...]

    def save(self, file: Path) -> None:
        """Written whole, one row a line; OSError names it if it cannot be."""
        content = {"format": FORMAT} | asdict(self)
        rows = ",\n  ".join(
            json.dumps({k: v for k, v in row.items() if v is not None}, allow_nan=False) for row in content.pop("rows")
        )
        head = json.dumps(content, indent=1, allow_nan=False).removesuffix("\n}")
        write_whole(file, f'{head},\n "rows": [\n  {rows}\n ]\n}}\n'.encode())


def read(file: Path) -> Figures:
    """BundleError names the field that is wrong."""
    content = load_json(file)
    if content.pop("format", None) != FORMAT:
        raise BundleError(
            f"{file}: not figures of format {FORMAT}; make them with `python -m benchmarks quality --figures`"
        )
    found: Figures = parse(Figures, content, file)
    for row in found.rows:
        interval = row.guidance_interval
        if row.steps < 1 or not math.isfinite(row.psnr_db) or (interval is not None and len(interval) != 2):
            raise BundleError(f"{file}: the row of {row.solver} in {row.steps} steps is damaged; measure again")
    return found


def of_bundle(bundle: Bundle) -> tuple[Figures, str]:
    """The figures to plan a bundle with, and what has to be said of them; empty where they are its own.

    Its own, else those shipped for its model, else, as an assumption, those of the small model of its family.

    Raises
    ------
    BundleError
        A damaged file.
    """
    facts = bundle.facts
    own = bundle.folder / FILE
    if own.is_file():
        found = read(own)
        if found.family != facts.family:
            raise BundleError(f"{own}: figures of {found.source}, the bundle is of {facts.family}; measure it anew")
        other = f"quality was measured at guidance {found.guidance:g}, the bundle draws at {facts.defaults.guidance:g}"
        return found, "" if found.guidance == facts.defaults.guidance else other
    shipped = {file.stem: file for file in (SHIPPED / "quality").glob("*.json")}
    precision = facts.components[bundle.backbone].precision
    measure = f"`python -m benchmarks quality {bundle.folder} --figures {own}`"
    if facts.source.id in shipped:
        found = read(shipped[facts.source.id])
        if found.precision == precision:
            return found, ""
        lost = "and its own loss of precision added" if facts.picture is not None else "as if nothing were lost"
        return (
            found,
            f"quality of {precision}: not measured, taken from {found.precision} {lost}; {measure} measures it",
        )
    akin = read(shipped[_AKIN[facts.family]])
    return (
        akin,
        f"quality of {facts.source.id}: not measured, ASSUMED to rank as on {akin.source}; {measure} measures it",
    )


def digest(table: epd.Table) -> str:
    """Of a table's numbers, whatever is told of where they came from."""
    numbers = {name: value for name, value in table.to_json().items() if name != "provenance"}
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]
