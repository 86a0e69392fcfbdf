"""python -m export.lint BUNDLE --target NAME: an NPU's constraints, checked on a machine without one.

Exit status: 0 without findings (advice is no finding), 1 with findings, 2 for a user's mistake, told in one line.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import Finding

_SHOWN = 8  # places of one rule in one graph; --json tells all


def parser(targets: Sequence[str]) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        "python -m export.lint",
        description="Checks a bundle, or one ONNX graph, against a device's constraints, without the device.",
        epilog="Exit status: 0 nothing found, 1 findings, 2 no bundle or graph to check.",
    )
    add = arguments.add_argument
    add("path", metavar="BUNDLE", type=Path, help="a bundle, or a single .onnx file")
    add("--target", required=True, choices=targets, help="the device's provider")
    add("--component", metavar="NAME", help="only this one, such as transformer (default: all)")
    add("--json", action="store_true", help="print one JSON object on standard output")
    return arguments


def main(arguments: list[str] | None = None) -> int:
    if importlib.util.find_spec("onnx") is None:
        print("export.lint: onnx not installed; pip install onnx", file=sys.stderr)
        return 2
    from runtime.bundle import BundleError

    from .. import ExportError
    from . import TARGETS, graph_files, lint

    given = parser(tuple(TARGETS)).parse_args(arguments)
    try:
        files = graph_files(given.path, given.component)
        found = list(lint(files, given.target))
    except (BundleError, ExportError) as error:
        print(f"export.lint: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"export.lint: {error.filename or given.path}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("export.lint: stopped", file=sys.stderr)
        return 130
    failed = any(not one.advice for one in found)
    if given.json:
        graphs = [str(file) for file in files]
        print(json.dumps({"target": given.target, "graphs": graphs, "findings": [asdict(one) for one in found]}))
    else:
        tell(found)
        print(f"{len(files)} graphs, {sum(not one.advice for one in found)} findings for {given.target}")
    return int(failed)


def tell(found: Sequence[Finding]) -> None:
    """Findings as text: a rule's source and remedy once for each graph, then the places."""
    for (graph, rule), group in itertools.groupby(found, key=lambda one: (one.graph, one.rule)):
        places = list(group)
        first = places[0]
        print(
            f"{graph}: {'advice: ' if first.advice else ''}{rule}\n  source: {first.source}\n  remedy: {first.remedy}"
        )
        for one in places[:_SHOWN]:
            print(f"  - {one.where + ': ' if one.where else ''}{one.what}")
        if len(places) > _SHOWN:
            print(f"  - and {len(places) - _SHOWN} more (--json tells all)")


if __name__ == "__main__":
    sys.exit(main())
