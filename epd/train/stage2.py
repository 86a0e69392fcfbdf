"""Stage 2 as a command: a model, prompts and rewards for `epd.train.optimise`, and what is written and told."""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import epd
from epd.table import write_whole
from runtime.errors import RequestError
from runtime.interval import interval
from runtime.parse import pairs

from .cluster import connected, spread
from .optimise import VALIDATION_SEED, Score, Training, read_log
from .reach import Reach, measured
from .rollout import Recipe, Rollout, Stage
from .settings import Settings

CHANGED, ABREAST = 32, 4  # pictures shown of those that changed most, and of a row
REACH_SEED = 6_000_000  # of the first noise that reaches are measured with
Floats = NDArray[np.float64]


def tune(options: argparse.Namespace, settings: Settings) -> None:
    """Carries out the command."""
    from runtime.png import check_writable
    from runtime.tables import find_table, load_table

    source = find_table(options.table)
    table = load_table(source)
    output = options.output or Path(f"{source.stem}-rdpo.json")
    check_writable(output, ".json")
    for file in filter(None, [options.plot, options.changed]):
        check_writable(file, ".png")
    work = options.work or output.with_suffix("")
    recipe = _recipe(options, table)
    stage = recipe.open()
    stage.check(table)
    prompts = read_prompts(options.prompts, stage, settings.seed)
    parts = stage.rewards
    parts.check(prompts, stage.network.size)
    origin = json.dumps([stage.network.identity(), recipe.identity()])

    def reach(some: Sequence[str]) -> Reach:
        together = options.abreast or settings.group
        return measured(table, partial(_change, stage, some, together), settings.alike)

    training = Training(
        table, prompts, _score(options.ray, recipe, stage), parts.names, parts.weights, settings, work, origin,
        reach if settings.alike else None,
    )  # fmt: skip
    found = _trained(training, settings.iterations)
    found = replace(
        found,
        provenance={**(found.provenance or {}), "network": stage.network.identity()},
        family=stage.network.facts.family,
        model=stage.network.facts.name,
        guidance=stage.network.guidance,
        size=stage.network.size,
    )
    found.save(output)
    if options.plot is not None:
        plot(read_log(work), options.plot)
    _report(options, output, work, training)
    if options.changed is not None:
        show_changed(stage, training, options.changed)


def _change(
    stage: Stage, prompts: Sequence[str], together: int, table: epd.Table, others: Sequence[epd.Table]
) -> Floats:
    """Of every other table, the root of the mean square by which its pictures are not the table's: (G,).

    `together`: tables in one batch.
    """
    squares = np.zeros(len(others))
    for i, prompt in enumerate(prompts):
        own = stage.pictures(Rollout(prompt, REACH_SEED + i, (table,)))
        for first in range(0, len(others), together):
            some = slice(first, first + together)
            drawn = stage.pictures(Rollout(prompt, REACH_SEED + i, tuple(others[some])))
            squares[some] += np.square(drawn - own, dtype=np.float64).mean((1, 2, 3))
    return np.asarray(np.sqrt(squares / len(prompts)))


@contextmanager
def _told_once(name: str) -> Iterator[None]:
    """A logger's warnings that come with every rollout of a prompt are told once."""
    logger, told = logging.getLogger(name), set()

    def new(record: logging.LogRecord) -> bool:
        known = (line := record.getMessage()) in told
        told.add(line)
        return not known

    logger.addFilter(new)
    try:
        yield
    finally:
        logger.removeFilter(new)


def _score(address: str | None, recipe: Recipe, stage: Stage) -> Score:
    """Rollouts here, or on a cluster."""
    if address is None:
        return lambda rollouts: map(stage, rollouts)
    connected(address)
    job = replace(recipe, network=stage.network.identity())
    return lambda rollouts: spread(job, rollouts, address)


def _recipe(options: argparse.Namespace, table: epd.Table) -> Recipe:
    least = 2 * table.sequential_calls
    if options.reference_calls < least:
        raise RequestError(
            f"--reference-calls {options.reference_calls}: a converged picture takes more; give {least} or more"
        )
    if min(options.abreast, options.threads) < 0:
        raise RequestError("--abreast and --threads must be 0 or more")
    return Recipe(
        model=options.model,
        reward=options.reward,
        reward_models=tuple(pairs("--reward-model", options.reward_model).items()),
        backend=options.backend,
        provider=options.provider,
        provider_options=tuple(pairs("--provider-option", options.provider_option).items()),
        guidance=table.guidance if options.guidance_scale is None else options.guidance_scale,
        reference_calls=options.reference_calls,
        abreast=options.abreast,
        threads=options.threads or int(options.ray is not None),
    )


def _trained(training: Training, iterations: int) -> epd.Table:
    from tqdm import tqdm

    with _told_once("runtime.text"), tqdm(total=iterations, unit="iteration", disable=None, leave=False) as bar:

        def told(line: str) -> None:
            bar.write(line, file=sys.stderr)
            bar.update(training.iteration - bar.n)

        return training.run(told)


def _report(options: argparse.Namespace, output: Path, work: Path, training: Training) -> None:
    gain = interval(training.gain)
    if options.json:
        told = {"table": str(output), "work": str(work), "iteration": training.best_iteration}
        print(json.dumps(told | {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}))
        return
    print(output)
    if training.best_iteration == 0:
        print("no table was better on the validation prompts: this is the one given", file=sys.stderr)
        return
    print(
        f"of iteration {training.best_iteration}: {gain.mean:+.4f} ± {gain.half:.4f} over the given table on "
        f"{len(training.gain)} validation prompts, which it was chosen by",
        file=sys.stderr,
    )


def plot(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Draws a log: rewards in training and on validation (its 95 % interval over the start), and the divergence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    trained = [line for line in lines if "reward" in line]
    judged = [(line["iteration"], line["validation"]) for line in lines if "validation" in line]
    above.errorbar(
        [i for i, _ in judged],
        [told["over start"] for _, told in judged],
        [told["half width"] for _, told in judged],
        marker="o",
        capsize=3,
    )
    above.axhline(0, color="0.6", linewidth=1)
    above.set_ylabel("validation reward over the start")
    numbers = [line["iteration"] for line in trained]
    below.plot(numbers, [line["reward"] for line in trained], color="C1")
    below.set(xlabel="iteration", ylabel="reward of drawn tables")
    beside = below.twinx()
    beside.plot(numbers, [line["kl"] for line in trained], color="0.6", linestyle=":")
    beside.set_ylabel("divergence from the start (dotted)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(file, buffer.getvalue())


def show_changed(stage: Stage, training: Training, file: Path) -> None:
    """Draws those of the validation pictures that differ most, before and after: what a reward was won by is seen."""
    from matplotlib.figure import Figure

    both = (training.first, training.best)
    rollouts = [Rollout(prompt, VALIDATION_SEED + i, both) for i, prompt in enumerate(training.validation)]
    change = np.array([_differ(stage.pictures(rollout)) for rollout in rollouts])
    most = np.argsort(-change, kind="stable")[:CHANGED]
    gain = training.gain if len(training.gain) else np.zeros(len(change))
    rows = -(-len(most) // ABREAST)
    figure = Figure(figsize=(2.6 * ABREAST, 1.75 * rows), layout="constrained")
    for axes, i in zip(figure.subplots(rows, ABREAST, squeeze=False).flat, most, strict=False):
        axes.imshow(np.concatenate(stage.pictures(rollouts[i]), 1), interpolation="nearest")
        told = f"{-10 * np.log10(max(change[i], 1e-12)):.0f} dB, reward {gain[i]:+.3f}"
        axes.set_title("\n".join([*textwrap.wrap(training.validation[i], 38)[:2], told]), fontsize=6, parse_math=False)
    for axes in figure.axes:
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(file, buffer.getvalue())


def _differ(pictures: NDArray[np.float32]) -> float:
    """Mean square difference of two."""
    return float(np.square(pictures[0] - pictures[1], dtype=np.float64).mean())


def read_prompts(file: Path | None, stage: Stage, seed: int) -> tuple[str, ...]:
    """Of a file, one a line, each once; else, of a model of the closed world, captions it was trained on."""
    from runtime import order

    if file is not None:
        return order.read_prompts(file, file.parent)
    source = stage.network.facts.source.id
    if not source.startswith("shapes-"):
        raise RequestError(f"{source} is no model of the closed world; give --prompts FILE, one prompt a line")
    from shapes.captions import training_scenes

    return tuple(dict.fromkeys(scene.caption for scene in training_scenes(4096, seed + 1)))
