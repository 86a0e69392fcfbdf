"""What each choice in fitting a table is worth, one changed at a time, and where a fitted table may be taken.

    python -m benchmarks fitting MODEL [--calls 6] [-k 2] [--to BUNDLE ..] [--guidance-scale 2 3 4]

Every table is fitted by `epd.fit` to the same trajectories, and judged by PSNR of decoded pictures to converged ones,
of prompts and start noise that nothing was fitted to or chosen by. Differences are to the base design, or to the table
that was fitted where it draws; paired, with 95 % intervals.

--to: other bundles of the model, at another size or precision; a table is fitted on each and drawn with on all. The
converged latents of a bundle of the same size are MODEL's: a table fitted on one of lower precision makes up for some
of what that loses. --guidance-scale: the same between guidance scales, and one table for all of them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bootstrap import Bootstrap, Figure
from .common import add_outputs, check_outputs, comma_separated, plain, publish, save, table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    import epd
    from epd.fit import Design
    from runtime.facts import Facts
    from runtime.fit import Fitting

PLACES = (0.25, 0.5, 0.75, 1.0)  # of points, in all combinations
FACTORS = (0.5, 0.75, 1.5, 2.0)  # of the grid's shift
PLACING, CARRIED = (1, 2, 3, 6, 8), (0, 1, 2, 8, 12)  # slopes
RIDGES = (1e-8, 1e-6, 1e-5, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Row:
    """One fitted table, judged."""

    choice: str  # what is changed; fitted on: where the table comes from
    value: str
    drawn_on: str
    psnr_db: Figure | None  # None: a state was not finite
    over_db: Figure | None  # paired: to the base design, or to the table fitted where it is drawn with


@dataclass(frozen=True)
class Result:
    """The whole result; `to_json` of it is what --json prints."""

    model: str
    calls: int
    directions: int
    guidance: float
    trajectories: int  # learned from
    images: int  # judged by
    base: str
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Case:
    """One bundle at one guidance scale: tables are fitted here, and judged."""

    def __init__(self, label: str, fitting: Fitting) -> None:
        self.label, self.pipe, self._fitting = label, fitting.pipe, fitting

    @cached_property
    def _learn(self) -> tuple[Any, Any]:
        return self._fitting.lesson("learn")

    @cached_property
    def _held(self) -> tuple[Any, Any, float, Any]:
        """Slopes, trajectories, what their ends are divided by to be latents, and the pictures of these."""
        from runtime.judge import end_scale

        slope, teacher = self._fitting.lesson("choose", "judge")
        end = end_scale(self.pipe.bundle.facts, float(teacher.times[-1]))
        return slope, teacher, end, self.pipe.decode(teacher.x[-1] / end)

    @property
    def images(self) -> int:
        """Judged by."""
        return len(self._held[3])

    def table(self, design: Design, count: int | None = None) -> epd.Table | None:
        """Fitted to the first `count` trajectories, or all; None: a slope was not finite."""
        from epd.fit import fit

        try:
            return fit(design, *self._learn, count)[0]
        except FloatingPointError:
            return None

    def psnr(self, made: epd.Table | None) -> NDArray[np.float64] | None:
        """Of every judged picture, dB; None: there is no table, or a slope was not finite."""
        import epd
        from runtime.judge import psnr

        slope, teacher, end, aim = self._held
        if made is None:
            return None
        try:
            *_, last = epd.solve(epd.solvers.epd(made), teacher.x[0].astype(float), slope)
        except FloatingPointError:
            return None
        return psnr(self.pipe.decode(last.x / end), aim)


def designs(facts: Facts, base: Design) -> Iterator[tuple[str, str, Design]]:
    """What is changed, to what, and the design that has it so."""
    from runtime.designs import SHIFTS
    from runtime.judge import curve

    for places in combinations(PLACES, base.directions):
        rows = [places] * len(base.r)
        if base.times[-1] == 0:  # where no slope is asked for
            rows[-1] = tuple(min(place, max(base.r[-1])) for place in places)
        yield "points at", " ".join(f"{place:g}" for place in places), replace(base, r=tuple(rows))
    for factor in FACTORS:
        shift = SHIFTS[facts.family][0] * factor
        yield "shift of the grid", f"{shift:g}", replace(base, times=curve(facts, len(base.r), shift))
    for count in PLACING:
        yield "slopes that place a point", str(count), replace(base, place=count)
    for count in CARRIED:
        yield "slopes carried into the update", str(count), replace(base, carry=count)
    for ridge in RIDGES:
        yield "ridge", f"{ridge:.0e}", replace(base, ridge=ridge)


def ablate(
    case: Case, base: Design, trajectories: int, progress: Callable[[str], None] = lambda name: None
) -> Iterator[Row]:
    """One choice changed at a time: points, grid, memory, ridge, trajectories learned from."""
    ours = case.psnr(case.table(base))
    yield _row("base", "", case.label, ours, ours)
    for choice, value, design in designs(case.pipe.bundle.facts, base):
        if design != base:
            yield _row(choice, value, case.label, case.psnr(case.table(design)), ours)
            progress(f"{choice} {value}")
    for count in takewhile(lambda count: count < trajectories, (2**i for i in range(64))):
        yield _row("trajectories", str(count), case.label, case.psnr(case.table(base, count)), ours)
        progress(f"trajectories {count}")


def transfer(sources: Sequence[Case], targets: Sequence[Case], base: Design) -> Iterator[Row]:
    """Every table drawn with everywhere; differences are to the table fitted there. Labels are all different."""
    made = {source.label: source.table(base) for source in sources}
    for target in targets:
        own = target.psnr(made[target.label])
        for label, one in made.items():
            found = own if label == target.label else target.psnr(one)
            yield _row("fitted on", label, target.label, found, own)


def _row(choice: str, value: str, drawn_on: str, found: Any, other: Any) -> Row:
    if found is None:
        return Row(choice, value, drawn_on, None, None)
    resampled = Bootstrap(len(found))
    ours = resampled.mean(found)
    over = None if other is None else (ours - resampled.mean(other)).figure()
    return Row(choice, value, drawn_on, ours.figure(), over)


def add(commands: Any) -> None:
    """Registers the command with `argparse`'s subparsers."""
    command = commands.add_parser("fitting", help="what each choice in fitting a table is worth, and what transfers")
    command.set_defaults(run=_run)
    command.add_argument("model", metavar="MODEL", help="a bundle folder, or the name of a shipped one")
    command.add_argument("--to", nargs="+", default=[], metavar="BUNDLE", help="other bundles of the model")
    command.add_argument("--guidance-scale", type=float, nargs="+", default=[], metavar="G", help="to go between")
    command.add_argument("--calls", type=int, default=6, metavar="M", help="sequential calls (default 6)")
    command.add_argument("-k", type=int, default=2, metavar="K", help="directions (default 2)")
    command.add_argument("--trajectories", type=int, default=32, metavar="T", help="learned from (default 32)")
    command.add_argument("--teacher-calls", type=int, default=160, metavar="C", help="of each (default 160)")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line (default: the bundle's own)")
    command.add_argument("--only-transfer", action="store_true", help="nothing but what --to and --guidance-scale ask")
    command.add_argument("--work", type=Path, metavar="DIR", help="keep trajectories here, as `runtime fit` does")
    command.add_argument("--provider", default="cpu", metavar="NAME", help="ONNX Runtime execution provider")
    add_outputs(command)


def _run(options: argparse.Namespace) -> None:
    import sys

    check_outputs(options)
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        result = measure(options, work)
    publish(options, result, sys.modules[__name__], csv_of(result))


def measure(options: argparse.Namespace, work: Path) -> Result:
    """Fits and judges what the options ask for; all of it is opened and checked first.

    Raises
    ------
    RunError
    """
    from tqdm import tqdm

    from runtime.designs import described, starts
    from runtime.errors import NotFiniteError, RequestError
    from runtime.pipeline import Pipeline

    if options.only_transfer and not (options.to or options.guidance_scale):
        raise RequestError("--only-transfer needs --to or --guidance-scale")
    pipe = Pipeline.from_pretrained(options.model, provider=options.provider)
    facts = pipe.bundle.facts
    first = Case(facts.name, _fitting(options, pipe, (), work))
    base = starts(facts, options.calls - 1, options.k)[1]
    bundles = _bundles(options, pipe, work) if options.to else []
    scales = _scales(options, pipe, work) if options.guidance_scale else []
    rows: list[Row] = []
    with tqdm(unit="table", disable=None, leave=False) as bar:  # None: on a terminal only

        def progress(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        try:
            if not options.only_transfer:
                rows += ablate(first, base, options.trajectories, progress)
            rows += transfer(bundles, bundles, base)
            rows += transfer(scales, scales[:-1], base)
            images = (bundles or scales or [first])[0].images if options.only_transfer else first.images
        except FloatingPointError as error:
            raise NotFiniteError(f"a converged trajectory: {error}; give smaller guidance scales") from None
    usual = facts.defaults.guidance
    return Result(facts.name, options.calls, options.k, usual, options.trajectories, images, described(base), (*rows,))


def _bundles(options: argparse.Namespace, first: Any, work: Path) -> list[Case]:
    """MODEL and the others; those of its size have its converged latents."""
    from runtime.errors import RequestError
    from runtime.pipeline import Pipeline

    pipes = [first, *(Pipeline.from_pretrained(folder, provider=options.provider) for folder in options.to)]
    labels = [_label(pipe) for pipe in pipes]
    cases, ours = [], first.bundle.facts
    for folder, pipe, label in zip([options.model, *options.to], pipes, labels, strict=True):
        facts = pipe.bundle.facts
        if (facts.family, facts.latent, facts.schedule) != (ours.family, ours.latent, ours.schedule):
            raise RequestError(f"--to {folder}: no bundle of the same model as {options.model}")
        if labels.count(label) > 1:
            label = f"{folder}, {label}"
        if any(case.label == label for case in cases):
            raise RequestError(f"--to {folder}: given twice")
        teacher = first if pipe is not first and _size(pipe) == _size(first) else None
        cases.append(Case(label, _fitting(options, pipe, (), work, teacher)))
    return cases


def _scales(options: argparse.Namespace, pipe: Any, work: Path) -> list[Case]:
    """One each; the last is for all of them, and to fit on only."""
    scales = tuple(sorted({*options.guidance_scale, pipe.bundle.facts.defaults.guidance}))
    cases = [Case(f"guidance {scale:g}", _fitting(options, pipe, (scale,), work)) for scale in scales]
    return [*cases, Case("all of them", _fitting(options, pipe, scales, work))]


def _fitting(
    options: argparse.Namespace, pipe: Any, scales: tuple[float, ...], work: Path, teacher: Any = None
) -> Fitting:
    from runtime.fit import Fitting
    from runtime.order import Order, read_prompts

    order = Order(
        prompts=read_prompts(options.prompts, pipe.bundle.folder),
        calls=options.calls,
        directions=options.k,
        guidance=scales,
        trajectories=options.trajectories,
        teacher_calls=options.teacher_calls,
    )
    return Fitting(pipe, order, work, teacher)


def _size(pipe: Any) -> tuple[int, int]:
    plan = pipe.plan("", solver="euler")
    return plan.height, plan.width


def _label(pipe: Any) -> str:
    height, width = _size(pipe)
    return f"{width}x{height} {pipe.bundle.facts.components[pipe.bundle.backbone].precision}"


def markdown(result: Result) -> str:
    """A table for every choice, and one for what transfers."""
    lines = [
        f"# {result.model}: fitting a table of {result.calls} sequential calls, K = {result.directions}",
        "",
        f"PSNR in dB to converged pictures of {result.images} held-out prompts, guidance {result.guidance:g}, fitted "
        f"to {result.trajectories} trajectories; means with 95 % intervals, differences paired. Base design: "
        f"{result.base}.",
    ]
    kinds = dict.fromkeys((row.choice, row.drawn_on if row.choice == "fitted on" else "") for row in result.rows)
    for choice, drawn_on in kinds:
        some = [row for row in result.rows if row.choice == choice and drawn_on in ("", row.drawn_on)]
        cells = [[row.value, _told(row.psnr_db), _told(row.over_db, "+")] for row in some]
        last = f"over fitted on {drawn_on}" if drawn_on else "over the base"
        lines += ["", f"## Drawn on {drawn_on}" if drawn_on else f"## {choice.capitalize()}", ""]
        lines += table([choice, "PSNR dB", last], cells)
    return "\n".join(lines) + "\n"


def _told(figure: Figure | None, sign: str = "") -> str:
    return "not finite" if figure is None else f"{figure.mean:{sign}.2f} ± {figure.half or 0.0:.2f}"


def csv_of(result: Result) -> str:
    """One line a table."""
    return comma_separated(
        [
            {"choice": row.choice, "value": row.value, "drawn_on": row.drawn_on}
            | {f"psnr_db{end}": getattr(row.psnr_db, name, None) for end, name in _ENDS.items()}
            | {f"over_db{end}": getattr(row.over_db, name, None) for end, name in _ENDS.items()}
            for row in result.rows
        ]
    )


_ENDS = {"": "mean", "_low": "low", "_high": "high"}


def plot(result: Result, file: Path) -> None:
    """A panel for each choice: the difference to the base, with its interval."""
    from matplotlib.figure import Figure as Canvas

    kinds = list(dict.fromkeys((r.choice, r.drawn_on) for r in result.rows if r.choice != "base"))
    figure = Canvas(figsize=(4 * min(3, len(kinds)), 3.2 * -(-len(kinds) // 3)), layout="constrained")
    for index, kind in enumerate(kinds):
        some = [row for row in result.rows if (row.choice, row.drawn_on) == kind]
        axes = figure.add_subplot(-(-len(kinds) // 3), min(3, len(kinds)), index + 1)
        there = [(i, row.over_db) for i, row in enumerate(some) if row.over_db is not None]
        axes.errorbar([i for i, _ in there], [f.mean for _, f in there], [f.half for _, f in there], fmt="o", capsize=3)
        axes.axhline(0, color="0.5", linewidth=1)
        axes.set_xticks(range(len(some)), [row.value for row in some], rotation=40, ha="right", fontsize=8)
        axes.set_title(f"fitted on, drawn on {kind[1]}" if kind[0] == "fitted on" else kind[0], fontsize=10)
        axes.set_ylabel("dB")
        plain(axes)
    figure.suptitle(f"{result.model}, {result.calls} calls, K = {result.directions}: paired differences in dB")
    save(figure, file)
