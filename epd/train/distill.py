"""python -m epd.train distill: a table learned from converged trajectories, gradients passing through the network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn


def add_command(commands: Any) -> None:
    """Registers the command with `argparse`'s subparsers."""
    command = commands.add_parser("distill", help="stage 1: learn a table from converged trajectories (minutes)")
    command.set_defaults(run=_run)
    command.add_argument("model", metavar="MODEL", help="a diffusers checkpoint folder, or shapes-sd3, shapes-sd15")
    command.add_argument("-n", type=int, metavar="N", help="intervals (default 5)")
    command.add_argument("-k", type=int, metavar="K", help="directions (default 2)")
    command.add_argument(
        "--start",
        choices=("call", "afs", "history"),
        help="what places the points: a call each interval (afs: analytic in the first), or the slopes already known "
        "(default: history)",
    )
    command.add_argument(
        "--from-table",
        type=Path,
        metavar="FILE",
        help="begin with this table (default: history: one fitted on the spot; else an even one)",
    )
    command.add_argument("--midpoint", choices=("geometric", "arithmetic"), help="default: by the grid's end")
    command.add_argument("--weights", choices=("simplex", "free"), help="default: history: free; else simplex")
    command.add_argument("--order", type=int, metavar="P", help="1 (default), or 2 to 4: the plugin on iPNDM")
    command.add_argument("--candidates", type=int, default=12, metavar="D", help="designs tried where it is fitted")

    command.add_argument("--teacher", choices=("dpm2", "heun", "unipc"), default="dpm2")
    command.add_argument("--teacher-calls", type=int, default=120, metavar="C", help="of each trajectory (default 120)")
    command.add_argument("--trajectories", type=int, default=32, metavar="T", help="to learn from (default 32)")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line (default: the checkpoint's own)")
    command.add_argument(
        "--guidance-scale", "--guidance", type=float, nargs="+", default=[], metavar="G", help="one, or several for one"
    )
    command.add_argument("--seed", type=int, default=100_000, metavar="S", help="of the first start noise")

    command.add_argument("--loss", choices=("state", "unrolled", "image"), default="unrolled", help="what is compared")
    command.add_argument("--steps", type=int, default=150, metavar="S", help="of the optimiser, at most (default 150)")
    command.add_argument("--batch", type=int, default=4, metavar="B", help="images in a step (default 4)")
    command.add_argument("--rate", type=float, default=0.1, help="learning rate of positions and scales")
    command.add_argument("--linear-rate", type=float, default=0.003, help="learning rate of free numbers")
    command.add_argument(
        "--patience", type=int, default=4, metavar="P", help="looks without a better table to end after"
    )
    command.add_argument("--every", type=int, default=15, metavar="S", help="steps between looks (default 15)")
    command.add_argument(
        "--freeze", nargs="+", default=[], metavar="NAME", help="of r w scale_dir scale_time place carry"
    )
    command.add_argument(
        "--scale-bound",
        type=float,
        default=0.3,
        metavar="S",
        help="largest change of a scale (default 0.3; in the paper 0.05)",
    )
    command.add_argument("--learn-grid", action="store_true", help="the times between the first and the last, too")
    command.add_argument("--drop", type=float, metavar="DB", help="drop directions that may go for so much, learn on")

    command.add_argument("--device", default="cpu", help="of torch (default cpu)")
    command.add_argument("--ray", metavar="ADDRESS", help="trajectories on a Ray cluster, or local: on all cores here")
    command.add_argument("--recompute", action="store_true", help="less memory, half as much work again")
    command.add_argument("--work", type=Path, metavar="DIR", help="keep trajectories here, for further tables, too")
    command.add_argument("-o", "--output", type=Path, metavar="JSON", help="table (default: named by what it is, here)")
    command.add_argument("--json", action="store_true", help="print one object on stdout")


def _run(options: argparse.Namespace) -> None:
    from importlib.util import find_spec

    for package in ("torch", "diffusers", "safetensors"):
        if find_spec(package) is None:
            _refuse(f"training needs {package}; install the extra: pip install 'epd-toolkit[train]'")
    from .stage1 import distil

    distil(options)


def _refuse(message: str) -> NoReturn:
    from runtime.errors import RequestError

    raise RequestError(message)
