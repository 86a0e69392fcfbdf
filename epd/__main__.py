"""python -m epd show|import|fetch"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        told = f"{error.filename or 'file'}: {error.strerror}" if error.strerror else error
        print(f"error: {told}", file=sys.stderr)
        return 2
    except MemoryError:
        print("error: not enough memory; close other programs, or give a smaller file", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m epd", description="Tables: the numbers of learned solvers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="show a table: its numbers, where they came from, its work")
    show.set_defaults(run=_show)
    show.add_argument("table", metavar="TABLE", help="a table file, or the name of a shipped or fetched one")
    show.add_argument("--plot", type=Path, metavar="PNG", help="draw the points on the grid (needs the extra plot)")
    show.add_argument("--json", action="store_true", help="print one object on stdout")

    about = "Read an EPD predictor snapshot (*-best.pkl, *-distilled.pkl) as a table. Nothing in the file is executed."
    take = commands.add_parser("import", help="read the authors' .pkl as a table, executing nothing", description=about)
    take.set_defaults(run=_import)
    take.add_argument("file", type=Path, metavar="FILE.pkl")
    take.add_argument("-o", "--output", type=Path, required=True, metavar="TABLE.json")
    take.add_argument("--json", action="store_true", help="print one object on stdout")

    about = (
        "Download a published table from its authors' repository to your cache, check its SHA-256 and import it. "
        "We do not redistribute these tables: that repository states no licence, so what you may do with them is "
        "between you and their authors."
    )
    fetch = commands.add_parser("fetch", help="download a published table from its authors", description=about)
    fetch.set_defaults(run=_fetch)
    fetch.add_argument("name", metavar="NAME", help="sd15, sd3-medium-512, sd3-medium-1024, or one with -distilled")
    fetch.add_argument(
        "--url", default=os.environ.get("EPD_TABLES_URL"), help="folder of a mirror (or set EPD_TABLES_URL)"
    )
    fetch.add_argument("--json", action="store_true", help="print one object on stdout")
    return parser


def _show(options: argparse.Namespace) -> None:
    from . import catalogue, show
    from .table import Table

    given = Path(options.table)
    file = given if given.is_file() or given.suffix == ".json" else catalogue.find(options.table)
    table = Table.load(file)
    if options.plot is not None:
        show.plot(table, options.plot, file.stem)
    if options.json:
        _print({"path": str(file), **show.describe(table)})
    else:
        print(show.text(table, str(file)))


def _import(options: argparse.Namespace) -> None:
    from .catalogue import correct
    from .importer import import_table

    table = correct(import_table(options.file))
    table.save(options.output)
    _told(options.output, table, options.json)


def _fetch(options: argparse.Namespace) -> None:
    from . import catalogue
    from .table import Table

    live = sys.stderr.isatty()
    file = catalogue.fetch(options.name, options.url, progress=_progress if live else None)
    if live:
        print(file=sys.stderr)
    _told(file, Table.load(file), options.json)


def _progress(have: int, size: int) -> None:
    print(f"\r{have} of {size} bytes", end="", file=sys.stderr, flush=True)


def _told(file: Path, table: Any, as_json: bool) -> None:
    """What was made: one line, or one object."""
    from .show import describe

    if as_json:
        _print({"path": str(file), **describe(table)})
        return
    print(file)
    work = f"{table.sequential_calls} sequential calls, {table.total_evaluations} total evaluations"
    print(f"{table.steps} steps, K = {table.directions}, {work}; corrected: {_corrected(table)}", file=sys.stderr)


def _corrected(table: Any) -> str:
    told = (table.provenance or {}).get("corrected", {})
    return ", ".join(f"{name} {value}" for name, value in told.items()) or "nothing"


def _print(value: dict[str, Any]) -> None:
    print(json.dumps(value))


if __name__ == "__main__":
    sys.exit(main())
