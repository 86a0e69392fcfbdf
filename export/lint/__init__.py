"""Whether ONNX graphs keep to a target's constraints, on a machine without that target. Run as `python -m export.lint`.

    for finding in lint(graph_files("bundle"), "qnn"):
        print(finding.where, finding.rule, finding.what, finding.remedy)

Reads graphs without their weights, with onnx and numpy alone. No finding is no promise: see `rules` for what is known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from runtime.bundle import Bundle, BundleError

from .. import ExportError
from .graph import Graph, read
from .rules import OPERATORS, TARGETS, Rule

__all__ = ["OPERATORS", "TARGETS", "Finding", "graph_files", "lint"]

_MALFORMED = (  # what `read` and onnx below it raise; RuntimeError is onnx's own of its C++ part
    DecodeError,
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    RuntimeError,
    ValueError,
)


@dataclass(frozen=True)
class Finding:
    """A place in a graph that breaks a rule of a target."""

    graph: str  # path of the .onnx file
    where: str  # node (its type and outputs, if it has no name), input or weight; empty: the graph as a whole
    rule: str
    what: str
    source: str  # who says so: a vendor's documentation, or the measurement
    remedy: str
    advice: bool  # told, but no reason to fail


def graph_files(path: Path, component: str | None = None) -> list[Path]:
    """The graphs of a bundle, or of one of its components, those for other row counts included; or a single .onnx file.

    Raises
    ------
    BundleError
        If the path is neither, or the bundle is damaged or has no such component.
    """
    if path.is_file():
        if component:
            raise BundleError(f"{path}: a single graph has no component {component}; leave --component out")
        return [path]
    bundle = Bundle.open(path)
    graphs = [bundle.graph(name) for name in ([component] if component else bundle.facts.components)]
    return [file for graph in graphs for file in sorted(graph.parent.glob("*.onnx"))]


def lint(files: Sequence[Path], target: str, only: Collection[str] | None = None) -> Iterator[Finding]:
    """Every place in the graphs that breaks a rule of the target (of those named `only`), graph by graph, rule by rule.

    Raises
    ------
    ExportError
        If the target is unknown, or a file is no ONNX graph.
    """
    if target not in TARGETS:
        raise ExportError(f"no rules for the target {target!r}; there are some for {', '.join(sorted(TARGETS))}")
    for file in files:
        graph = _read(file)
        for rule in TARGETS[target]:
            if only is None or rule.id in only:
                for where, what in rule.check(graph, rule.limit):
                    yield _finding(file, where, what, rule, target)


def _finding(file: Path, where: str, what: str, rule: Rule, target: str) -> Finding:
    remedy = rule.remedy.format(target=target)
    return Finding(str(file), where, rule.id, what, rule.source, remedy, rule.advice)


def _read(file: Path) -> Graph:
    try:
        return read(file)
    except _MALFORMED as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"{file}: no valid ONNX graph ({reason:.120}); export or copy it again") from None
