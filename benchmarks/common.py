"""What the commands share: the options that name a device, the files they write, their tables.

Knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from epd.table import write_whole


def add_device(command: argparse.ArgumentParser) -> None:
    """--provider and all that goes with it, as `python -m runtime generate` has them."""
    from runtime.__main__ import _add_fallback

    command.add_argument("--provider", default="cpu", metavar="NAME", help="ONNX Runtime execution provider")
    command.add_argument("--provider-option", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")
    _add_fallback(command)


def device(options: argparse.Namespace) -> dict[str, Any]:
    """Of `Pipeline.from_pretrained`, what those options ask for."""
    from runtime.__main__ import _provider_options

    return {
        "provider": options.provider,
        "provider_options": _provider_options(options),
        "fallback": options.fallback,
    }


def add_outputs(command: argparse.ArgumentParser) -> None:
    """--json, --csv, --markdown, --plot."""
    command.add_argument("--json", action="store_true", help="print one object on stdout in place of the tables")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write it as CSV, too")
    command.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables, too")
    command.add_argument("--plot", type=Path, metavar="PNG", help="draw it (needs matplotlib: the extra `plot`)")


def check_outputs(options: argparse.Namespace, *more: Path | None) -> None:
    """Refuses what cannot be written, `more` files too, before anything is run."""
    from importlib.util import find_spec

    from runtime.errors import RequestError

    if options.plot is not None and find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib; install the extra: pip install 'epd-toolkit[plot]'")
    for file in (options.csv, options.markdown, options.plot, *more):
        if file is not None:
            _check_writable(file)


def _check_writable(file: Path) -> None:
    """Tries what `write` will do, without touching a file that is there."""
    from runtime.errors import RequestError

    try:
        if not file.parent.is_dir():
            raise RequestError(f"{file}: no such folder; make it first")
        if file.is_dir():
            raise RequestError(f"{file}: a folder; give a file name")
        tried = file.with_name(f".{os.getpid()}.tmp") if os.path.lexists(file) else file
        tried.touch()
        tried.unlink()
    except OSError as error:
        raise RequestError(f"{file}: cannot be written ({error.strerror}); give another name") from None


def publish(
    options: argparse.Namespace, result: Any, report: Any, csv: str, more: Callable[[], None] = lambda: None
) -> None:
    """Prints the tables, or the JSON, and then writes the files that `add_outputs` offers and were asked for.

    `report`: a module with `markdown(result)` and `plot(result, file)`; `more` writes files besides.
    """
    try:
        print(json.dumps(result.to_json(), allow_nan=False) if options.json else report.markdown(result))
    finally:  # as where nobody reads it any more
        _write_files(options, result, report, csv)
        more()


def _write_files(options: argparse.Namespace, result: Any, report: Any, csv: str) -> None:
    if options.csv is not None:
        write(options.csv, csv)
    if options.markdown is not None:
        write(options.markdown, report.markdown(result))
    if options.plot is not None:
        report.plot(result, options.plot)


def write(file: Path, text: str) -> None:
    """As UTF-8, the whole of it or nothing."""
    write_whole(file, text.encode())


def save(figure: Any, file: Path) -> None:
    """A matplotlib figure as PNG, in the same way."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(file, buffer.getvalue())


def plain(axes: Any) -> None:
    """The look of all plots: a faint grid behind the data, no frame above and on the right."""
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns are also straight in a terminal; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return f"| {first[0]:<{first[1]}} | " + " | ".join(f"{cell:>{width}}" for cell, width in rest) + " |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "|".join("-" * (width + 1) + ":" for width in widths[1:]) + "|"
    return [line(head), rule, *map(line, lines)]


def comma_separated(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a row under the names of the first, all digits, empty where a number does not apply."""
    import csv

    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def megabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:.0f} MB"
