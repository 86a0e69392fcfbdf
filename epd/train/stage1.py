"""Distillation carried out: model, trajectories, start table, learning, judgement, table with its provenance.

Three sets of images: one is learned from, one chooses when to stop, one judges the table and is used for nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runtime import png
from runtime.errors import NotFiniteError, RequestError
from runtime.interval import independent, interval
from runtime.order import Order, groups, read_prompts
from runtime.tables import check_table, differences

from ..catalogue import cache_folder
from ..table import Table
from .begin import even, fitted
from .cluster import connected
from .learning import Learning, Recipe, score
from .model import Model, check_device, load
from .student import LEARNED
from .teacher import REQUESTS, Lesson, Taught, digest, fine_grid

log = logging.getLogger(__name__)
_GROUP = 8  # images whose trajectories are made together


@dataclass(frozen=True)
class Task:
    """What is to be distilled, beside the recipe."""

    start: str  # call | afs | history
    intervals: int
    directions: int
    order: int
    midpoint: str | None
    weights: str
    teacher: str
    candidates: int  # designs tried where a start table is fitted

    @property
    def sequential_calls(self) -> int:
        """Requests in turn of such a table."""
        return {"call": 2 * self.intervals, "afs": 2 * self.intervals - 1, "history": self.intervals + 1}[self.start]


def distil(options: Namespace) -> None:
    """Carries out `python -m epd.train distill`.

    Raises
    ------
    RunError
        Something asked for that cannot be, a checkpoint that cannot be read, a model that gives NaN.
    OSError
        A file that cannot be read or written.
    """
    given = _given(options.from_table)
    task, recipe = _task(options, given), _recipe(options)
    check_device("--device", options.device)
    if options.ray is not None:
        if options.device != "cpu":
            raise RequestError("--ray makes trajectories on processors; leave --device or --ray out")
        connected(options.ray)
    model = load(options.model, options.device, options.recompute)
    order = _order(options, task, model, given)
    name = f"{model.facts.name}-{task.start}-k{task.directions}-calls{task.sequential_calls}"
    output = options.output or Path(f"{name}.json")
    png.check_writable(output, ".json")
    if given is not None:
        _check_given(model, order, given, options.from_table)
    folder = options.work or cache_folder() / "distill" / _named(order, task, recipe, given, model)
    folder.mkdir(parents=True, exist_ok=True)
    log.warning("a stopped run goes on from %s", folder)
    try:
        table, told = _distilled(model, order, task, recipe, given, folder, options.ray)
    except FloatingPointError as error:
        raise NotFiniteError(f"{model.facts.name}: {error}; give a smaller guidance scale") from None
    except torch.OutOfMemoryError:
        raise RequestError(
            f"--device {options.device} has too little memory; give --recompute or a smaller --batch"
        ) from None
    table.save(output)
    if options.json:
        print(json.dumps({"table": str(output)} | told))
    else:
        print(output)
        print(_sentence(told, table), file=sys.stderr)
    if options.work is None:
        shutil.rmtree(folder, ignore_errors=True)


def _distilled(
    model: Model, order: Order, task: Task, recipe: Recipe, given: Table | None, folder: Path, cluster: str | None
) -> tuple[Table, dict[str, Any]]:
    """The table, signed, and what its judgement says."""
    began = time.perf_counter()
    scales = order.guidance or (model.facts.defaults.guidance,)
    roles = groups(order, scales, _GROUP)
    with tqdm(unit="row", disable=None, leave=False, desc="teacher") as bar:  # None: on a terminal only
        taught = Taught(model, _teacher_times(model, order, task, given), task.teacher, folder, bar.update)
        bar.total = taught.rows(roles)
        if cluster is not None:
            taught.gather(roles, cluster)
        learn, held, judge = (
            taught.lesson([g for g in roles if g.role == role]) for role in ("learn", "choose", "judge")
        )
    start = given or _start(model, task, learn, held, folder)
    told = [asdict(order), asdict(recipe), asdict(task), start.to_json(), taught.times.tolist(), model.fingerprint]
    file = folder / f"distill-{digest(told)}.safetensors"
    with tqdm(total=recipe.steps, unit="step", disable=None, leave=False, desc="learning") as bar:
        news = partial(bar.write, file=sys.stderr)
        learning = Learning(recipe, start, learn, held, file, news, lambda: bar.update(1))
        bar.update(learning.progress.step)
        best = learning.run()
    prompts = [prompt for group in roles if group.role == "judge" for prompt in group.prompts]
    ours, theirs = (independent(score(table, judge, recipe.batch), prompts) for table in (best, start))
    mean, over = interval(ours), interval(ours - theirs)
    judgement = {
        "psnr_db": round(mean.mean, 2),
        "half_width_db": round(mean.half, 2),
        "images": len(prompts),
        "prompts": len(set(prompts)),
        "start_psnr_db": round(float(theirs.mean()), 2),
        "over_start_db": round(over.mean, 2),
        "over_start_half_db": round(over.half, 2),
    }
    origin = {
        "made by": f"epd.train distill {png.version()}",
        "checkpoint": model.fingerprint,
        "teacher": f"{task.teacher}, {len(taught.times) - 1} steps",
        "teacher_steps_per_interval": round((len(taught.times) - 1) / best.steps, 2),
        "trajectories": order.trajectories,
        "prompts": len(order.prompts),
        "prompts_sha256": hashlib.sha256("\n".join(order.prompts).encode()).hexdigest(),
        "guidance_scales": list(scales),
        "first_seed": order.seed,
        "recipe": asdict(recipe),
        "looks": learning.progress.looks,
        "start_table": start.provenance,
        "seconds": round(time.perf_counter() - began, 1),
        "held_out": judgement,
    }
    signed = replace(
        best,
        family=model.facts.family,
        model=model.facts.name,
        grid="learned" if "times" not in recipe.frozen else start.grid,
        guidance=scales[0] if len(scales) == 1 else None,
        size=model.size,
        t5=False if model.facts.family == "sd3" else None,
        provenance=origin,
    )
    return signed, judgement


def _named(order: Order, task: Task, recipe: Recipe, given: Table | None, model: Model) -> str:
    """A name for all that a command does: the same one goes on where it was stopped."""
    numbers = None if given is None else given.to_json()
    return digest([asdict(order), asdict(task), asdict(recipe), numbers, model.fingerprint])


def _start(model: Model, task: Task, learn: Lesson, held: Lesson, folder: Path) -> Table:
    """The table to begin with: fitted where it starts from history, else an even one."""
    if task.start != "history":
        return even(model.facts, task.intervals, task.directions, task.start, task.order, task.midpoint, task.weights)
    told = [asdict(task), learn.told, held.told, learn.teacher.times.tolist()]
    file = folder / f"start-{digest(told)}.json"
    if not file.is_file():
        with tqdm(total=task.candidates, unit="design", disable=None, leave=False, desc="start table") as bar:
            found = fitted(model.facts, task.intervals, task.directions, learn, held, task.candidates, bar.update)
        found.save(file)
    return Table.load(file)


def _teacher_times(model: Model, order: Order, task: Task, given: Table | None) -> Any:
    steps = order.teacher_calls // REQUESTS[task.teacher]
    if given is None:
        return fine_grid(model.facts, steps)
    return fine_grid(model.facts, steps, float(given.times[0]), float(given.times[-1]))


def _given(file: Path | None) -> Table | None:
    if file is None:
        return None
    try:
        return Table.load(file)
    except ValueError as error:
        raise RequestError(f"{error}; give a table file") from None


def _check_given(model: Model, order: Order, given: Table, file: Path) -> None:
    """RequestError for a table that cannot draw with the model; a warning for one that was made for something else."""
    check_table(model.facts, given, str(file), None)
    guidance = (*order.guidance, model.facts.defaults.guidance)[0]
    if other := differences(model.facts, given, guidance, None, model.size):
        log.warning("%s was made for %s", file, ", ".join(other))


def _task(options: Namespace, given: Table | None) -> Task:
    """Raises RequestError for the first thing that cannot be."""
    if given is not None:
        for name, asked, has in (
            ("-n", options.n, given.steps),
            ("-k", options.k, given.directions),
            ("--start", options.start, given.start),
            ("--midpoint", options.midpoint, given.midpoint),
            ("--order", options.order, given.order),
            ("--weights", options.weights, given.weights),
        ):
            if asked not in (None, has):
                raise RequestError(f"{name} {asked}: {options.from_table} has {has}; leave the option out")
        shape = (given.start, given.steps, given.directions, given.order, given.midpoint, given.weights)
        return Task(*shape, options.teacher, 0)
    start, n, k = options.start or "history", options.n or 5, options.k or 2
    order = 1 if options.order is None else options.order
    for holds, text in (
        (options.n is None or 1 <= options.n <= 99, f"-n must be from 1 to 99, got {options.n}"),
        (options.k is None or options.k >= 1, f"-k must be 1 or more, got {options.k}"),
        (1 <= order <= 4, f"--order must be from 1 to 4, got {order}"),
        (order == 1 or start != "history", "--order: a start from history has none; leave it out, or --start call"),
        (options.weights != "simplex" or start != "history", "--weights simplex: from history they are free"),
        (options.midpoint != "geometric" or start != "history", "--midpoint geometric: from history it is arithmetic"),
    ):
        if not holds:
            raise RequestError(text)
    weights = options.weights or ("free" if start == "history" else "simplex")
    return Task(start, n, k, order, options.midpoint, weights, options.teacher, options.candidates)


def _recipe(options: Namespace) -> Recipe:
    frozen = tuple(dict.fromkeys([*options.freeze, *([] if options.learn_grid else ["times"])]))
    if strangers := sorted(set(options.freeze) - set(LEARNED)):
        raise RequestError(f"--freeze {strangers[0]}: choose from {', '.join(LEARNED)}")
    recipe = Recipe(
        loss=options.loss,
        steps=options.steps,
        batch=options.batch,
        rate=options.rate,
        linear_rate=options.linear_rate,
        frozen=frozen,
        bound=options.scale_bound,
        every=options.every,
        patience=options.patience,
        drop=options.drop,
        seed=options.seed,
    )
    try:
        recipe.check()
    except ValueError as error:
        raise RequestError(f"{error}") from None
    return recipe


def _order(options: Namespace, task: Task, model: Model, given: Table | None) -> Order:
    own = () if given is None or given.guidance is None else (given.guidance,)
    order = Order(
        prompts=read_prompts(options.prompts, model.folder),
        calls=task.intervals + 1,
        directions=task.directions,
        guidance=tuple(options.guidance_scale) or own,
        trajectories=options.trajectories,
        teacher_calls=options.teacher_calls,
        candidates=max(1, options.candidates),
        seed=options.seed,
    )
    order.check()
    if task.start == "afs" and model.facts.family == "sd3":
        raise RequestError("--start afs: is for sigma grids, not for flow matching; give call or history")
    return order


def _sentence(told: dict[str, Any], table: Table) -> str:
    return (
        f"{told['psnr_db']:.1f} ± {told['half_width_db']:.1f} dB to converged ones of {told['images']} pictures of "
        f"{told['prompts']} held-out prompts at {table.sequential_calls} sequential calls, {table.total_evaluations} "
        f"total evaluations; over the start table by {told['over_start_db']:+.2f} ± {told['over_start_half_db']:.2f} dB"
    )
