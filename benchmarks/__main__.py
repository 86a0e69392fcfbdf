"""python -m benchmarks quality|orders"""

from __future__ import annotations

import argparse
import logging
import sys

from . import orders, quality


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure solvers and models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    quality.add(commands)
    orders.add(commands)
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    from runtime.errors import RunError

    try:
        options.run(options)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
