"""Makes the tables that ship for our own checkpoints, with the commands that users have; a stopped run goes on.

    python -m shapes.tables sd3 --work build/tables           fits, distils and tunes all of them (hours)
    python -m shapes.tables sd3 --work build/tables --ship    ranks them, and puts them where they ship

Three sets of captions, none of which is in another or in the results page: `LEARN` is for fitting and distilling, whose
commands divide it once more; `VALIDATE` ranks the tables that are made; the results page draws held-out captions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from epd.catalogue import SHIPPED
from epd.table import Table
from runtime.bundle import TABLES, Bundle
from runtime.facts import write_facts
from runtime.figures import digest
from runtime.pipeline import BUILT_IN

from .captions import training_scenes

CALLS = (6, 10, 4, 8, 20)
LEARN, VALIDATE = (256, 31), (128, 32)  # captions, and the seed they are made by
SETS = ("learn", "validate")
VALIDATION_NOISE = 8_000_000  # seed of the first start noise
TEACHER_CALLS = 160
TRAJECTORIES = {"fit": 32, "distill": 64}
CANDIDATES = 20  # designs tried by a fit
STEPS = {4: 150, 6: 150, 8: 150, 10: 120, 20: 50}  # of the optimiser, by sequential calls
TUNED = (6, 10)  # sequential calls of the tables that are tuned to the shapes reward
ITERATIONS = 60  # of that


@dataclass(frozen=True)
class Cell:
    """One table: how its points are placed, how many, and in how many sequential calls."""

    start: str  # history | call
    directions: int
    calls: int

    def name(self, family: str, kind: str) -> str:
        """Its name among the shipped ones; kind: fitted | distilled | rdpo."""
        requests = "-two-requests" if self.start == "call" else ""
        return f"shapes-{family}-{kind}{requests}-k{self.directions}-calls{self.calls}"


FITTED = [Cell("history", k, calls) for calls in CALLS for k in (2, 1, 3)]
TWO_REQUESTS = [Cell("call", 2, calls) for calls in CALLS]
CELLS = [(cell, "fitted") for cell in FITTED]
CELLS += [(cell, "distilled") for cell in FITTED + TWO_REQUESTS]
CELLS += [(Cell("history", 2, calls), "rdpo") for calls in TUNED]


def command(family: str, cell: Cell, kind: str, work: Path) -> list[str]:
    """What makes a table, after `python -m`."""

    def file(kind: str) -> str:
        return str(work / f"{cell.name(family, kind)}.json")

    bundle, learn = str(work / f"shapes-{family}"), ["--prompts", str(work / "learn.txt"), "-o", file(kind)]
    if kind == "fitted":
        made = ["runtime", "fit", bundle, "--calls", str(cell.calls), "-k", str(cell.directions)]
        made += ["--candidates", str(CANDIDATES)]
    elif kind == "rdpo":
        made = ["epd.train", "rdpo", bundle, "--table", file("distilled"), "--reward", "shapes", "--scales", "0.02"]
        return [*made, "--iterations", str(ITERATIONS), *learn]
    else:
        made = ["epd.train", "distill", f"shapes-{family}", "--steps", str(STEPS[cell.calls])]
        if cell.start == "history":
            made += ["--from-table", file("fitted")]
        else:
            made += ["--start", "call", "-n", str(cell.calls // 2), "-k", str(cell.directions), "--weights", "free"]
            made += ["--midpoint", "arithmetic", "--learn-grid"]
    stage = {"fitted": "fit", "distilled": "distill"}[kind]
    made += ["--trajectories", str(TRAJECTORIES[stage]), "--teacher-calls", str(TEACHER_CALLS)]
    return [*made, "--work", str(work / stage), *learn]


def make(family: str, work: Path) -> None:
    """All tables that are not there yet, one after the other."""
    work.mkdir(parents=True, exist_ok=True)
    write_captions(work)
    bundle = work / f"shapes-{family}"
    if not bundle.exists():
        _run(["export", bundle.name, "-o", str(bundle)])
    for cell, kind in CELLS:
        if not (work / f"{cell.name(family, kind)}.json").exists():
            _run(command(family, cell, kind, work))


def write_captions(work: Path) -> None:
    """learn.txt and validate.txt, which share no caption."""
    learn, validate = ([scene.caption for scene in training_scenes(*which)] for which in (LEARN, VALIDATE))
    for name, lines in zip(SETS, (learn, [line for line in validate if line not in set(learn)]), strict=True):
        (work / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def ship(family: str, work: Path) -> None:
    """Validates the tables of a family together, and puts them where they ship, in place of those that do."""
    files = [work / f"{cell.name(family, kind)}.json" for cell, kind in CELLS]
    tables = {file.name: Table.load(file) for file in files if file.exists()}
    defaults = Bundle.open(work / f"shapes-{family}").facts.defaults
    asked = ["benchmarks", "quality", str(work / f"shapes-{family}"), "--prompts", str(work / "validate.txt")]
    asked += ["--count", str(VALIDATE[0]), "--seed", str(VALIDATION_NOISE), "--solvers", defaults.solver]
    asked += ["--calls", str(defaults.steps), "--most-work", "0", "--json", "--work", str(work / "quality")]
    result = json.loads(_run([*asked, "--table", *(str(work / name) for name in tables)], stdout=subprocess.PIPE))
    found = {row["table"]: row["figures"]["psnr_db"]["mean"] for row in result["rows"] if row["table"] is not None}
    own = max(row["figures"]["psnr_db"]["mean"] for row in result["rows"] if row["steps"] == defaults.steps)
    for old in SHIPPED.glob(f"shapes-{family}-*.json"):
        old.unlink()
    for name, table in tables.items():
        quality: dict[str, Any] = {"psnr_db": round(found[digest(table)], 2), "images": result["prompts"]}
        quality |= {"own_solver": f"{defaults.solver}, {defaults.steps} steps", "own_solver_db": round(own, 2)}
        replace(table, provenance={**(table.provenance or {}), "quality": quality}).save(SHIPPED / name)
    if (BUILT_IN / f"shapes-{family}").exists():
        _refresh(BUILT_IN / f"shapes-{family}", list(tables))


def _refresh(folder: Path, names: Sequence[str]) -> None:
    """Gives a bundle the shipped tables of these names, and no others."""
    write_facts(folder, replace(Bundle.open(folder).facts, tables=()))
    for old in (folder / TABLES).glob("*.json"):
        old.unlink()
    for name in names:
        Bundle.open(folder).install(Table.load(SHIPPED / name), name)


def _run(arguments: list[str], **streams: Any) -> str:
    print(f"python -m {' '.join(arguments)}", file=sys.stderr, flush=True)
    return str(subprocess.run([sys.executable, "-m", *arguments], check=True, text=True, **streams).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m shapes.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=("sd3", "sd15"))
    parser.add_argument("--work", type=Path, default=Path("build/tables"), help="everything is made and kept here")
    parser.add_argument("--ship", action="store_true", help="rank what is there, and put it where it ships")
    options = parser.parse_args()
    (ship if options.ship else make)(options.family, options.work)


if __name__ == "__main__":
    main()
