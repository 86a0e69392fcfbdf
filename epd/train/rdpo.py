"""python -m epd.train rdpo: a table tuned to a reward, from forward passes alone."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime.errors import RequestError

from .settings import Settings


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
    command.add_argument(
        "--changed",
        type=Path,
        metavar="PNG",
        help="draw the 32 validation pictures that changed most, before and after (needs plot)",
    )
    for name, kind, text in (
        ("iterations", int, "more of them go on from a finished training"),
        ("batch", int, "prompts of an iteration, each with noise of its own"),
        ("group", int, "tables drawn for each prompt"),
        ("concentration", float, "how close to the table others are drawn"),
        ("scales", float, "learn the scales, too: standard deviation of their logarithms, such as 0.02"),
        (
            "alike",
            float,
            "draw each number so widely that, moved alone, it leaves pictures alike to so many dB, such as 70",
        ),
        ("rate", float, "learning rate to begin with"),
        ("step", float, "KL that the policy moves by in an iteration, to which the rate is adapted"),
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
    for package in ("torch", "safetensors"):
        if find_spec(package) is None:
            raise RequestError(f"training needs {package}; install the extra: pip install 'epd-toolkit[train]'")
    if (options.plot or options.changed) is not None and find_spec("matplotlib") is None:
        raise RequestError("--plot and --changed need matplotlib; install the extra: pip install 'epd-toolkit[plot]'")
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    settings.check()
    from .stage2 import tune

    tune(options, settings)
