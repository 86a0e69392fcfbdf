"""`python -m runtime plan`, and --budget and --quality of `generate`: which way to draw, and why, in a table.

Knows nothing of how it is chosen: `runtime.planner` does.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .planner import Advice, Candidate

SHOWN = 8  # lines of the table
_UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0}
# Options that a planned drawing has not: what is chosen, and what the figures and the costs are of.
_OURS = ("solver", "table", "steps", "calls", "k", "guidance_interval", "guidance_scale", "width", "height")
log = logging.getLogger(__name__)


def seconds(text: str) -> float:
    """Of 20s, 500ms, 2min or a bare number of seconds."""
    unit = next((unit for unit in ("ms", "min", "s") if text.endswith(unit)), "")
    try:
        found = float(text.removesuffix(unit)) * _UNITS.get(unit, 1.0)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give it as in 20s, 500ms or 2min")
    return found


def decibels(text: str) -> float:
    """A PSNR; "best" for the best there is."""
    try:
        found = math.inf if text == "best" else float(text)
    except ValueError:
        found = math.nan
    if math.isnan(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no PSNR in dB; give a number, or nothing for the best there is")
    return found


def add_commands(commands: Any) -> None:
    """`plan`, for the command line of this package."""
    command = commands.add_parser("plan", help="choose solver, table, steps and way for a time or a quality")
    command.set_defaults(run=_plan)
    command.add_argument(
        "models", nargs="*", metavar="MODEL", help="a bundle, or several of one model to choose the precision, too"
    )
    add_options(command, required=True)
    command.add_argument("--num-images", type=int, default=1, metavar="B", help="images of the prompt (default 1)")
    command.add_argument(
        "--provider", default="cpu", metavar="NAME", help="ONNX Runtime execution provider (default cpu)"
    )
    command.add_argument("--provider-option", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")
    command.add_argument("--json", action="store_true", help="print one object on stdout")


def add_options(command: argparse.ArgumentParser, required: bool = False) -> None:
    """--budget and --quality."""
    either = command.add_mutually_exclusive_group(required=required)
    either.add_argument(
        "--budget",
        type=seconds,
        metavar="TIME",
        help="the best that takes so long here at most, once loaded: 20s, 500ms",
    )
    either.add_argument(
        "--quality", type=decibels, nargs="?", const=math.inf, metavar="DB",
        help="the quickest of so many dB (PSNR to converged pictures); no number: the best there is",
    )  # fmt: skip


def apply(pipe: Pipeline, options: argparse.Namespace) -> tuple[dict[str, Any], Candidate | None]:
    """What --budget or --quality of `generate` makes of a drawing: arguments of `Pipeline.plan`, and the choice.

    The pipeline takes the way that was chosen. Nothing, where neither was asked for.
    """
    from .errors import RequestError

    if options.budget is None and options.quality is None:
        return {}, None
    typed = [name for name in _OURS if getattr(options, name) is not None]
    if typed or options.directions is not None or options.from_metadata is not None:
        what = (typed or ["directions" if options.directions else "from_metadata"])[0]
        dashes = "-" if len(what) == 1 else "--"
        raise RequestError(
            "--budget and --quality choose for themselves, for the bundle's own size and guidance; "
            f"leave {dashes}{what.replace('_', '-')} out"
        )
    advice = _advice([pipe], options, options.num_images or 1)
    for note in advice.notes:
        log.warning("%s", note)
    chosen = advice.chosen
    log.warning("planned: %s", _words(chosen))
    pipe.directions = chosen.way if chosen.k > 1 else None
    return chosen.asked, chosen


def _plan(options: argparse.Namespace) -> None:
    from .__main__ import _provider_options
    from .errors import RequestError
    from .pipeline import DEFAULT, Pipeline

    if options.num_images < 1:
        raise RequestError(f"--num-images must be 1 or more, got {options.num_images}")
    pipes = [
        Pipeline.from_pretrained(model, provider=options.provider, provider_options=_provider_options(options))
        for model in options.models or [DEFAULT]
    ]
    advice = _advice(pipes, options, options.num_images)
    if options.json:
        shown = [asdict(one) for one in table(advice, options.budget)]
        print(json.dumps({"chosen": asdict(advice.chosen), "candidates": shown, "notes": advice.notes}))
    else:
        print(describe(advice, options.budget))


def _advice(pipes: Sequence[Pipeline], options: argparse.Namespace, images: int) -> Advice:
    from .planner import advise

    wanted = None if options.quality is None or math.isinf(options.quality) else options.quality
    return advise(pipes, options.budget, wanted, images)


def table(advice: Advice, budget: float | None) -> list[Candidate]:
    """The choice, the best of each other solver or table that is no slower, and one that more time would buy."""
    chosen = advice.chosen
    limit = chosen.seconds if budget is None else budget
    best: dict[tuple[Any, ...], Candidate] = {}
    for one in sorted(advice.candidates, key=lambda one: (-one.psnr_db, one.seconds)):
        if one.seconds <= limit:
            best.setdefault((one.model, one.name, one.k, one.guidance_interval), one)
    others = [one for one in best.values() if one != chosen]
    better = [one for one in advice.candidates if one.seconds > limit and one.psnr_db > chosen.psnr_db]
    more = sorted(better, key=lambda one: one.seconds)[:1]
    return [*more, chosen, *others[: SHOWN - 1 - len(more)]]


def describe(advice: Advice, budget: float | None) -> str:
    """The choice in words, the candidates in a table, and what is not known."""
    head = (
        "",
        "solver or table",
        "steps",
        "K",
        "way",
        "guided at",
        "precision",
        "calls",
        "evaluations",
        "seconds",
        "dB",
    )
    lines = [head]
    for one in table(advice, budget):
        interval = "all" if one.guidance_interval is None else "{:g} to {:g}".format(*one.guidance_interval)
        mark = "*" if one == advice.chosen else ">" if budget is not None and one.seconds > budget else ""
        about = "" if one.basis == "measured" else "~"
        way = one.way if one.k > 1 else ""
        work = (
            str(one.sequential_calls),
            str(one.total_evaluations),
            f"{one.seconds:.3g}",
            f"{about}{one.psnr_db:.1f}",
        )
        lines.append((mark, one.name, str(one.steps), str(one.k), way, interval, one.precision, *work))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    told = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    marks = ["*: chosen; >: over the budget; ~: not measured but read off neighbours, or as its fit told"]
    notes = [f"- {note}" for note in advice.notes]
    return "\n".join([_words(advice.chosen), "", *told, "", *marks, *notes])


def _words(one: Candidate) -> str:
    way = f", K = {one.k} as {one.way}" if one.k > 1 else ""
    return (
        f"{one.name}, {one.steps} steps{way}: {one.sequential_calls} sequential calls, "
        f"{one.seconds:.3g} s predicted once loaded, {one.psnr_db:.1f} dB"
    )
