"""python -m epd.train distill|rdpo"""

from __future__ import annotations

import argparse

from runtime.__main__ import carried_out, leave, own_stdout

from . import distill, rdpo


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m epd.train", description="Train solver tables (needs torch).")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (distill, rdpo):
        module.add_command(commands)
    return carried_out(parser.parse_args(arguments))


if __name__ == "__main__":
    own_stdout()
    leave(main())
