"""Makes the tables that ship for our own checkpoints, with the commands that users have; a stopped run goes on.

    python -m shapes.tables sd3 --work build/tables           fits and distils all of them (three hours on a core)
    python -m shapes.tables sd3 --work build/tables --ship    ranks them, and puts them where they ship

Captions and start noise of three uses are kept apart: `LEARN` is for fitting and distilling, whose commands divide it
once more; `VALIDATE` ranks the tables that are made; the results page draws held-out captions.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from epd.catalogue import SHIPPED
from epd.table import Table, write_whole
from runtime.__main__ import carried_out
from runtime.bundle import TABLES, Bundle, best_first
from runtime.errors import RequestError
from runtime.facts import write_facts
from runtime.figures import digest
from runtime.pipeline import BUILT_IN

from .captions import training_scenes

CALLS = (10, 6, 8, 4, 20)
LEARN, VALIDATE = (256, 31), (128, 32)  # captions, and the seed they are made by
SETS = ("learn", "validate")
VALIDATION_NOISE = 8_000_000  # seed of the first start noise
TEACHER_CALLS = 160
TRAJECTORIES = {"fit": 64, "distill": 64}
CANDIDATES = {4: 60, 6: 60, 8: 60, 10: 60, 20: 20}  # designs tried by a fit, by sequential calls
STEPS = {4: 150, 6: 150, 8: 150, 10: 120, 20: 50}  # of the optimiser, by sequential calls


@dataclass(frozen=True)
class Cell:
    """One table: how its points are placed, how many, and in how many sequential calls."""

    start: str  # history | call
    directions: int
    calls: int

    def name(self, family: str, kind: str) -> str:
        """Its name among the shipped ones; kind: fitted | distilled."""
        requests = "-two-requests" if self.start == "call" else ""
        return f"shapes-{family}-{kind}{requests}-k{self.directions}-calls{self.calls}"


FITTED = [Cell("history", k, calls) for calls in CALLS for k in (2, 1, 3)]
TWO_REQUESTS = [Cell("call", 2, calls) for calls in CALLS]
CELLS = [(cell, "fitted") for cell in FITTED]
CELLS += [(cell, "distilled") for cell in FITTED + TWO_REQUESTS]
CELLS.sort(key=lambda made: made[0].calls == CALLS[-1])  # which take the longest, and gain the least


def command(family: str, cell: Cell, kind: str, work: Path) -> list[str]:
    """What makes a table, after `python -m`."""

    def file(kind: str) -> str:
        return str(work / f"{cell.name(family, kind)}.json")

    bundle, learn = str(work / f"shapes-{family}"), ["--prompts", str(work / "learn.txt"), "-o", file(kind)]
    if kind == "fitted":
        made = ["runtime", "fit", bundle, "--calls", str(cell.calls), "-k", str(cell.directions)]
        made += ["--candidates", str(CANDIDATES[cell.calls])]
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
    check_recipe(work)
    write_captions(work)
    bundle = work / f"shapes-{family}"
    if not bundle.exists():
        _run(["export", bundle.name, "-o", str(bundle)])
    for cell, kind in CELLS:
        if not (work / f"{cell.name(family, kind)}.json").exists():
            _run(command(family, cell, kind, work))


def check_recipe(work: Path) -> None:
    """RequestError where the folder's tables were made by another recipe, or by none that is known.

    In a folder without tables it is written.
    """
    recipe = {"learn": LEARN, "teacher calls": TEACHER_CALLS, "trajectories": TRAJECTORIES}
    text, file = json.dumps(recipe | {"candidates": CANDIDATES, "steps": STEPS}, indent=1), work / "recipe.json"
    if file.exists() or any(work.glob("shapes-*-calls*.json")):
        known = file.read_text(encoding="utf-8") if file.exists() else ""
    else:
        write_whole(file, (known := text).encode())
    if known != text:
        raise RequestError(f"{work}: its tables were made by another recipe, {file.name} there; give another --work")


def write_captions(work: Path) -> None:
    """learn.txt and validate.txt, which share no caption."""
    learn, validate = ([scene.caption for scene in training_scenes(*which)] for which in (LEARN, VALIDATE))
    for name, lines in zip(SETS, (learn, [line for line in validate if line not in set(learn)]), strict=True):
        (work / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def ship(family: str, work: Path) -> None:
    """Validates the tables of a family together, and puts them where they ship, in place of those that are no closer.

    Raises
    ------
    RequestError
        Some of them are not there.
    """
    files = [work / f"{cell.name(family, kind)}.json" for cell, kind in CELLS]
    if missing := [file.name for file in files if not file.is_file()]:
        raise RequestError(f"{work}: {len(missing)} tables are missing, {missing[0]} first; make them without --ship")
    check_recipe(work)
    known = {file.name: Table.load(file) for file in SHIPPED.glob(f"shapes-{family}-*.json")}
    tables = closer(_validated(family, work, files), known)
    tables = {name: table for name, table in tables.items() if better_than_fitted(name, tables)}
    for name, table in tables.items():
        table.save(SHIPPED / name)
    for old in SHIPPED.glob(f"shapes-{family}-*.json"):
        if old.name not in tables:
            old.unlink()
    if (BUILT_IN / f"shapes-{family}").exists():
        _refresh(BUILT_IN / f"shapes-{family}", tables)


def _validated(family: str, work: Path, files: Sequence[Path]) -> dict[str, Table]:
    """The tables by name, each telling how close its pictures came, and how close the model's own solver's."""
    bundle = work / f"shapes-{family}"
    defaults = Bundle.open(bundle).facts.defaults
    asked = ["benchmarks", "quality", str(bundle), "--prompts", str(work / "validate.txt"), "--most-work", "0"]
    asked += ["--count", str(VALIDATE[0]), "--seed", str(VALIDATION_NOISE), "--work", str(work / "quality"), "--json"]
    asked += ["--solvers", defaults.solver, "--calls", str(defaults.steps), "--table", *map(str, files)]
    result = json.loads(_run(asked, stdout=subprocess.PIPE))
    rows = {(row["solver"], row["steps"]): row for row in result["rows"] if row["kind"] == "solver"}
    own = rows[defaults.solver, defaults.steps]["figures"]["psnr_db"]["mean"]
    found = {row["table"]: row["figures"]["psnr_db"]["mean"] for row in result["rows"] if row["table"] is not None}
    told = {"images": result["prompts"], "own_solver": f"{defaults.solver}, {defaults.steps} steps"}
    told |= {"own_solver_db": round(own, 2)}
    return {
        file.name: replace(table, provenance={**(table.provenance or {}), "quality": {"psnr_db": decibels, **told}})
        for file in files
        for table in [Table.load(file)]
        for decibels in [round(found[digest(table)], 2)]
    }


def better_than_fitted(name: str, tables: Mapping[str, Table]) -> bool:
    """False for a distilled table that is no closer than the fitted one of as many calls and directions."""
    table, start = tables[name], tables.get(name.replace("-distilled-", "-fitted-"))
    if start is None or start is table:
        return True
    return (table.held_out_psnr or 0.0) > (start.held_out_psnr or 0.0)


def closer(made: Mapping[str, Table], known: Mapping[str, Table]) -> dict[str, Table]:
    """The tables made; for each the known one of its name, where that was closer on the same pictures."""
    told = {name: dict((known[name].provenance or {}).get("quality", {})) for name in made.keys() & known.keys()}
    found = dict(made)
    for name, theirs in told.items():
        ours = dict((made[name].provenance or {})["quality"])
        if theirs.pop("psnr_db", -math.inf) > ours.pop("psnr_db") and theirs == ours:
            found[name] = known[name]
    return found


def _refresh(folder: Path, tables: Mapping[str, Table]) -> None:
    """Gives a bundle these tables, and no others."""
    for name, table in tables.items():
        table.save(folder / TABLES / name)
    paths = best_first({f"{TABLES}/{name}": table for name, table in tables.items()})
    write_facts(folder, replace(Bundle.open(folder).facts, tables=paths))
    for old in (folder / TABLES).glob("*.json"):
        if old.name not in tables:
            old.unlink()


def _run(arguments: list[str], **streams: Any) -> str:
    print(f"python -m {' '.join(arguments)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", *arguments], check=False, text=True, **streams)
    if done.returncode:
        raise RequestError(
            f"`python -m {arguments[0]}` ended with {done.returncode}; the same command goes on from here"
        )
    return str(done.stdout)


def main(arguments: list[str] | None = None) -> int:
    """0; 2 for what cannot be (one line on stderr), 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m shapes.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=("sd3", "sd15"))
    parser.add_argument("--work", type=Path, default=Path("build/tables"), help="everything is made and kept here")
    parser.add_argument("--ship", action="store_true", help="rank what is there, and put it where it ships")
    parser.set_defaults(run=lambda options: (ship if options.ship else make)(options.family, options.work))
    return carried_out(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
