"""Stage 2: tunes a table to a reward, from forward passes alone.

    python -m epd.train rdpo MODEL --table T --reward R

The algorithm is `epd.train.optimise`, over `epd.train.policy`; this module gives it a model, prompts and rewards.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import epd
from epd.table import write_whole
from runtime.errors import RequestError
from runtime.interval import interval

from .cluster import connected, spread
from .optimise import Score, Training, read_log
from .ppo import Settings
from .rollout import Recipe, Stage


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


def add_command(commands: Any) -> None:
    """Registers the command with `argparse`'s subparsers."""
    default = Settings()
    command = commands.add_parser("rdpo", help="tune a table's positions and weights to a reward (stage 2)")
    command.set_defaults(run=_run)
    command.add_argument("model", metavar="MODEL", help="a bundle folder, or the name of a shipped one")
    command.add_argument("--table", required=True, metavar="T", help="to begin with: a file, or a table's name")
    command.add_argument("--reward", required=True, metavar="R", help="such as shapes, or shapes:1,psnr:0.2")
    command.add_argument(
        "--reward-model", action="append", default=[], metavar="NAME=PATH", help="weights of a reward; may be repeated"
    )
    command.add_argument("-o", "--output", type=Path, metavar="JSON", help="default: TABLE-rdpo.json here")
    command.add_argument("--work", type=Path, metavar="DIR", help="checkpoint and log (default: OUTPUT without .json)")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="one a line (default: the closed world's)")
    command.add_argument("--guidance-scale", type=float, metavar="G", help="default: the table's, or the model's own")
    command.add_argument("--plot", type=Path, metavar="PNG", help="draw the log (needs the extra plot)")
    for name, kind, text in (
        ("iterations", int, "more of them go on from a finished training"),
        ("batch", int, "prompts of an iteration, each with noise of its own"),
        ("group", int, "tables drawn for each prompt"),
        ("concentration", float, "how close to the table others are drawn"),
        ("scales", float, "learn the scales, too: standard deviation of their logarithms, such as 0.02"),
        ("rate", float, "learning rate"),
        ("epochs", int, "steps of the optimiser an iteration"),
        ("clip", float, "of the ratio of probabilities"),
        ("kl", float, "weight of the divergence from the first policy"),
        ("every", int, "iterations from one validation to the next"),
        ("validation", int, "prompts set aside to choose by"),
        ("seed", int, "of everything drawn"),
    ):
        value = getattr(default, name)
        command.add_argument(f"--{name}", type=kind, default=value, metavar="X", help=f"{text} (default {value:g})")
    command.add_argument("--export", choices=("mean", "mode"), default=default.export, help="of the policy")
    command.add_argument("--reference-calls", type=int, default=60, metavar="N", help="of psnr's converged pictures")
    command.add_argument("--abreast", type=int, default=0, metavar="N", help="tables in one batch at most, for memory")
    command.add_argument(
        "--threads", type=int, default=0, metavar="N", help="of a rollout (default: all; with --ray 1)"
    )
    command.add_argument("--ray", metavar="ADDRESS", help="rollouts on a Ray cluster, or local: on all cores here")
    command.add_argument(
        "--backend", choices=("onnx", "torch"), default="onnx", help="torch: MODEL is a checkpoint's folder"
    )
    command.add_argument("--provider", default="cpu", metavar="NAME", help="execution provider, or torch's device")
    command.add_argument("--provider-option", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")
    command.add_argument("--json", action="store_true", help="print one object on stdout")


def _run(options: argparse.Namespace) -> None:
    from runtime.png import check_writable
    from runtime.tables import find_table, load_table

    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    settings.check()
    source = find_table(options.table)
    table = load_table(source)
    output = options.output or Path(f"{source.stem}-rdpo.json")
    check_writable(output, ".json")
    if options.plot is not None:
        check_writable(options.plot, ".png")
        if find_spec("matplotlib") is None:
            raise RequestError("--plot needs matplotlib; install the extra: pip install 'epd-toolkit[plot]'")
    work = options.work or output.with_suffix("")
    recipe = _recipe(options, table)
    stage = recipe.open()
    stage.check(table)
    prompts = read_prompts(options.prompts, stage, settings.seed)
    parts = stage.rewards
    parts.check(prompts, stage.network.size)
    origin = json.dumps([stage.network.identity(), recipe.identity()])
    training = Training(
        table, prompts, _score(options.ray, recipe, stage), parts.names, parts.weights, settings, work, origin
    )
    found = replace(
        _trained(training, settings.iterations),
        family=stage.network.facts.family,
        model=stage.network.facts.name,
        guidance=stage.network.guidance,
        size=stage.network.size,
    )
    found.save(output)
    if options.plot is not None:
        plot(read_log(work), options.plot)
    _report(options, output, work, training)


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
    return lambda rollouts: spread(recipe, rollouts, address)


def _recipe(options: argparse.Namespace, table: epd.Table) -> Recipe:
    return Recipe(
        model=options.model,
        reward=options.reward,
        reward_models=_pairs("--reward-model", options.reward_model),
        backend=options.backend,
        provider=options.provider,
        provider_options=_pairs("--provider-option", options.provider_option),
        guidance=table.guidance if options.guidance_scale is None else options.guidance_scale,
        reference_calls=options.reference_calls,
        abreast=options.abreast,
        threads=options.threads,
    )


def _pairs(option: str, texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    for text in texts:
        if "=" not in text:
            raise RequestError(f"{option} {text!r} is not KEY=VALUE")
    return tuple((text.partition("=")[0], text.partition("=")[2]) for text in texts)


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
