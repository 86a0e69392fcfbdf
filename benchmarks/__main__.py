"""python -m benchmarks latency|scaling|compare|quality|fitting|orders"""

from __future__ import annotations

import argparse

from runtime.__main__ import carried_out, leave, own_stdout

from . import compare, fitting, latency, orders, quality, scaling


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure devices, solvers and models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (latency, scaling, compare, quality, fitting, orders):
        module.add(commands)
    return carried_out(parser.parse_args(arguments))


if __name__ == "__main__":
    own_stdout()
    leave(main())
