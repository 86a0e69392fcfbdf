"""The same work by this program and by others, in one run: who is how much faster, and what memory it takes.

    python -m benchmarks compare MODEL --against diffusers,optimum,openvino,floor,bundle=FOLDER [--python NAME=PYTHON]

Every turn is a process of its own: it loads, runs once for nothing, then the timed runs. So its peak of memory is its
own, and contenders need not fit into memory together. Turns are taken round by round, and a ratio is one of a round: a
machine that slows down slows both. The work is one call of the backbone (`--work backbone`: inputs drawn from a fixed
seed, the same for all), or whole pictures (`--work picture`: ours by its solver, peers by Euler's method with as many
guided forwards; the rows their backbones saw are counted, so that a step left out is told). Answers are compared where
the weights are the same.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from runtime.errors import RequestError
from runtime.parse import pairs
from runtime.profiles import Timing, timing, usable_cores

from .common import add_outputs, check_outputs, comma_separated, publish
from .compare_process import Others, export, turn_of
from .machine import Machine, machine

if TYPE_CHECKING:
    from .compare_work import Work
    from .peers import Contender, Weights

PROMPT = "a red circle on a white background"
ROWS = 4  # of the backbone's call, if nothing is said
STEPS = 10  # intervals of a picture
ROUNDS = {"backbone": 5, "picture": 2}  # if nothing is said


@dataclass(frozen=True)
class Turn:
    """One process; seconds."""

    round: int  # from 1
    load: float | None  # libraries and weights; None: nothing to load
    first: float | None  # the run before the timed ones
    runs: tuple[float, ...]
    peak_rss_bytes: int | None
    sha256: str | None  # of the last run's answer, float32; None: it gives none


@dataclass(frozen=True)
class Side:
    """A contender and its turns."""

    name: str
    does: str  # where that is not what ours does
    weights: Weights
    precision: str
    threads: int
    versions: Mapping[str, str]
    notes: tuple[str, ...]  # in words, what else must be known
    error: float | None  # largest difference from our answer over its largest magnitude; None: not comparable
    turns: tuple[Turn, ...]

    @property
    def seconds(self) -> Timing:
        return timing([seconds for turn in self.turns for seconds in turn.runs])

    def median(self, what: str) -> float | None:
        """Over the turns, of `load`, `first` or `peak_rss_bytes`; None where a turn has none."""
        values = [getattr(turn, what) for turn in self.turns]
        return None if None in values else median(values)

    def ratio(self, other: Side) -> Timing:
        """Seconds of this one over those of the other, round by round."""
        rounds = zip(self.turns, other.turns, strict=True)
        return timing([median(mine.runs) / median(its.runs) for mine, its in rounds])

    def memory(self, other: Side) -> float | None:
        """Peak of this one over that of the other; None where it is not known of both."""
        mine, its = self.median("peak_rss_bytes"), other.median("peak_rss_bytes")
        return None if mine is None or its is None else mine / its

    def summary(self, ours: Side) -> dict[str, Any]:
        return {
            "load": self.median("load"),
            "first": self.median("first"),
            "seconds": self.seconds._asdict(),
            "ratio": self.ratio(ours)._asdict(),
            "peak_rss_bytes": self.median("peak_rss_bytes"),
            "memory_ratio": self.memory(ours),
        }


@dataclass(frozen=True)
class Comparison:
    """The whole result; `to_json` of it is what --json prints. The first side is ours."""

    model: str
    bundle: str | None  # SHA-256 of bundle.json
    work: str  # backbone | picture
    told: str  # what was done, in words
    random_weights: bool
    rows: int
    threads: int  # that every contender was given
    rounds: int
    runs: int  # in each round
    sides: tuple[Side, ...]
    others: float | None  # share of the processors that other programs took meanwhile
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"summary": {side.name: side.summary(self.sides[0]) for side in self.sides}}


def measure(
    work: Work, contenders: Sequence[Contender], rounds: int, place: Path, tell: Callable[[str], object]
) -> Comparison:
    """Takes the turns, ours first in each round; `place` is for files, `tell` hears of every turn before it begins.

    Raises
    ------
    RequestError
        A contender that crashed or ran out of memory.
    """
    for one in contenders:
        export(one, place)
    here, others = machine(), Others()
    facts: dict[str, dict[str, Any]] = {}
    turns: dict[str, list[Turn]] = {one.name: [] for one in contenders}
    for number in range(1, rounds + 1):
        for index, one in enumerate(contenders):
            job = dict(one.job) | {"output": str(_answer(place, index))}
            tell(f"round {number}, {one.name}")
            facts[one.name] = said = turn_of(one, job, place, f"in round {number}")
            turns[one.name].append(_turn(number, said))
    errors = [_error(work, one, facts[one.name], place, index) for index, one in enumerate(contenders)]
    sides = [_side(one, facts[one.name], turns[one.name], error) for one, error in zip(contenders, errors, strict=True)]
    bundle = work.bundle
    return Comparison(
        model=bundle.facts.name,
        bundle=bundle.fingerprint(),
        work=work.kind,
        told=work.told,
        random_weights=bundle.facts.source.random_weights,
        rows=work.rows,
        threads=work.threads,
        rounds=rounds,
        runs=work.runs,
        sides=tuple(sides),
        others=others.share(),
        machine=here,
    )


def _turn(number: int, said: Mapping[str, Any]) -> Turn:
    optional = [said.get(name) for name in ("load", "first")]
    return Turn(number, *optional, tuple(said["runs"]), said.get("peak_rss_bytes"), said.get("sha256"))


def _side(one: Contender, said: Mapping[str, Any], turns: Sequence[Turn], error: float | None) -> Side:
    notes = list(said.get("notes", ()))
    if said.get("one_time"):
        notes.append("its graph takes one time for all rows: K directions would be K calls")
    if one.forwards is not None and said["guided_forwards"] != one.forwards:
        notes.append(f"ITS BACKBONE SAW {said['guided_forwards']} ROWS A PICTURE where {one.forwards} were asked for")
    if not said.get("finite", True):
        notes.append("its answer is NOT FINITE")
    if len({turn.sha256 for turn in turns}) > 1:
        notes.append("its answer was not the same in every round")
    return Side(
        name=one.name,
        does=one.does,
        weights=one.weights,
        precision=said["precision"],
        threads=said["threads"],
        versions={name: version for name, version in said["versions"].items() if version is not None},
        notes=tuple(notes),
        error=error,
        turns=tuple(turns),
    )


def _answer(place: Path, index: int) -> Path:
    return place / f"answer-{index}.npy"


def _error(work: Work, one: Contender, said: Mapping[str, Any], place: Path, index: int) -> float | None:
    """Of the last answer of the contender of that index against ours, over the rows that were asked the same."""
    import numpy as np

    if one.does or one.weights in ("other", "none"):
        return None
    ours, its = np.load(_answer(place, 0)), np.load(_answer(place, index))
    if ours.shape != its.shape or not np.isfinite(its).all():
        return None
    if said.get("one_time"):
        times = np.load(work.feeds)["timestep"]
        ours, its = ours[times == times[0]], its[times == times[0]]
    return float(np.abs(its - ours).max() / max(np.abs(ours).max(), 1e-12))


def add(commands: Any) -> None:
    """Registers the command with `argparse`'s subparsers."""
    command = commands.add_parser("compare", help="the same work by this program and by others")
    command.set_defaults(run=_run)
    command.add_argument("model", metavar="MODEL", help="a bundle folder, or the name of a shipped one")
    command.add_argument(
        "--against",
        required=True,
        metavar="NAME[=FOLDER],...",
        help="diffusers (torch eager; FOLDER: the checkpoint), optimum (FOLDER: that it exported), openvino (FOLDER: "
        "whose graph), floor (computed), bundle=FOLDER, low-memory (ours with --low-memory)",
    )
    command.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="interpreter of a peer's own environment (default: this one); may be repeated",
    )
    command.add_argument(
        "--work", choices=ROUNDS, default="backbone", help="one call of it (default), or whole pictures"
    )
    command.add_argument("--rows", type=int, metavar="R", help=f"of the call (default {ROWS}: K = 2, guided)")
    command.add_argument("--rounds", type=int, metavar="N", help="2 or more (default 5; of pictures 2)")
    command.add_argument("--runs", type=int, default=1, metavar="N", help="timed, of each in each round (default 1)")
    command.add_argument("--threads", type=int, metavar="T", help="of every contender (default: one per core)")
    command.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of diffusers and openvino (default fp32)"
    )
    command.add_argument("--steps", type=int, metavar="N", help=f"pictures: intervals of ours (default {STEPS})")
    command.add_argument("-k", type=int, metavar="K", help="pictures: directions of the start table (default 2)")
    command.add_argument("--table", metavar="FILE|NAME", help="pictures: draw ours with this table")
    command.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"pictures: default {PROMPT}")
    add_outputs(command)


def _run(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from runtime.bundle import Bundle
    from runtime.pipeline import find

    from . import compare_report
    from .peers import against, ours

    check_outputs(options)
    rounds = ROUNDS[options.work] if options.rounds is None else options.rounds
    given = [one for one in (options.runs, options.threads, options.rows) if one is not None]
    if rounds < 2 or min(given) < 1:
        raise RequestError("--rounds must be 2 or more, --runs, --threads and --rows 1 or more")
    bundle = Bundle.open(find(options.model))
    if bundle.foreign:
        raise RequestError(
            f"{options.model}: a foreign folder; give a bundle of `python -m export`, and it as optimum=FOLDER"
        )
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        place = Path(folder)
        work = _work(options, bundle, place)
        asked = [text.strip() for text in options.against.split(",")]
        contenders = [*ours(work), *against(work, asked, _pythons(options.python))]
        with tqdm(total=rounds * len(contenders), unit="turn", disable=None, leave=False) as bar:  # on a terminal

            def tell(text: str) -> None:
                bar.set_description(text, refresh=False)
                bar.update(1)

            result = measure(work, contenders, rounds, place, tell)
    publish(options, result, compare_report, comma_separated(compare_report.rows(result)))


def _work(options: argparse.Namespace, bundle: Any, place: Path) -> Work:
    from runtime.plan import DIRECTIONS
    from runtime.tables import find_table

    from .compare_work import backbone_work, picture_work

    cores = min(machine().cores or os.cpu_count() or 1, usable_cores() or 1)
    shared = {"dtype": options.dtype, "runs": options.runs, "threads": options.threads or cores}
    shared |= {"threads_given": options.threads is not None}
    given = [name for name in ("steps", "k", "table") if getattr(options, name) is not None]
    if options.work == "picture":
        if options.rows is not None:
            raise RequestError("--rows is for --work backbone; leave it out")
        asked: dict[str, Any] = {"solver": "epd", "num_inference_steps": STEPS, "k": DIRECTIONS}
        if options.table is not None:
            asked = {"table": str(find_table(options.table).absolute())}
        said = {"num_inference_steps": options.steps, "k": options.k}
        asked |= {name: value for name, value in said.items() if value is not None}
        return picture_work(bundle, options.prompt, asked, **shared)
    if given:
        raise RequestError(f"--{given[0]} is for --work picture; leave it out")
    return backbone_work(bundle, ROWS if options.rows is None else options.rows, place, **shared)


def _pythons(texts: Sequence[str]) -> dict[str, str]:
    found = pairs("--python", texts)
    if empty := [name for name, python in found.items() if not python]:
        raise RequestError(f"--python {empty[0]}=: no interpreter; give its path")
    return found
