"""Where the nodes of a session run, weighed by their compute; and how much of it may run elsewhere than was asked.

ONNX Runtime tells the provider of every node as it divided the graph, after its first simplifications: a fused node is
named after the one it grew from (`node/MatMulAddFusion`), those of an operator that it opened have no names. Compute is
counted in multiply-accumulates (MACs), which the bundle gives by node: a hundred shape nodes on the CPU weigh nothing,
one attention does. Nodes that ONNX Runtime adds afterwards, such as copies between providers, are not seen.
Imports no onnxruntime and knows nothing of pipelines.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

from .errors import ProviderError

RECORD = "session.record_ep_graph_assignment_info"  # session option: 1 records what `recorded` reads
STRICT = "session.disable_cpu_ep_fallback"  # session option: 1 makes a node on the CPU an error of ONNX Runtime's
Fallback = Literal["limited", "allowed", "never"]
_LEAST: dict[Fallback, float] = {"limited": 0.9, "allowed": 0.0, "never": 1.0}  # share on the provider asked for
_FOUND = 0.5  # of the MACs that must be found again by node for a judgement by compute
_MADE = re.compile(r"(/[^/]*|_token_\d+)$")  # ends a name: made of another node, or laid out anew
_PRODUCTS = ("Attention", "Conv", "Gemm", "MatMul", "MultiHeadAttention")  # what an opened operator's MACs are done by
_TELL = "get_provider_graph_assignment_info"  # method of a session
_NAMED = 3  # operators that an error names
# Providers that lay tensors out in their own way before the graph is divided: of their nodes only those made by that
# are recorded, of the CPU's all. Seen with WebGPU 1.27, by its profile; with preferredLayout=NCHW all are.
_SILENT = ("WebGpuExecutionProvider",)
_UNTOLD = "(not recorded)"


class Node(NamedTuple):
    """A node as ONNX Runtime placed it."""

    name: str  # empty where it has none
    operator: str
    provider: str  # ONNX Runtime's name


@dataclass(frozen=True)
class Part:
    """All nodes of one operator on one provider."""

    operator: str
    provider: str
    nodes: int
    share: float  # of the component's compute (of its nodes, where the compute is not known), 0 to 1


@dataclass(frozen=True)
class Assignment:
    """Where one component runs."""

    component: str
    asked: str  # ONNX Runtime's name of a provider
    by_compute: bool  # False: the bundle does not give its MACs, shares are of nodes
    parts: tuple[Part, ...]  # the heaviest first

    @property
    def nodes(self) -> dict[str, int]:
        """Provider -> number of nodes."""
        counts: Counter[str] = Counter()
        for part in self.parts:
            counts[part.provider] += part.nodes
        return dict(counts)

    @property
    def fallbacks(self) -> tuple[Part, ...]:
        """What runs elsewhere than was asked."""
        return tuple(part for part in self.parts if part.provider != self.asked)

    @property
    def share(self) -> float:
        """Of the compute on the provider that was asked for, 0 to 1."""
        return 1.0 - sum(part.share for part in self.fallbacks)

    @property
    def measure(self) -> str:
        """What the shares are of, in words."""
        return "the compute" if self.by_compute else "the nodes (their compute is not known)"

    def fits(self, fallback: Fallback) -> bool:
        """Whether no more fell back than may: 10 % of the compute if `limited` (just 10 % may), no node if `never`."""
        return self.share >= _LEAST[fallback] and not (fallback == "never" and self.fallbacks)

    def __str__(self) -> str:
        """One line: share and nodes on the provider asked for, then what fell back."""
        ours = self.nodes.get(self.asked, 0)
        line = f"{self.component}: {_percent(self.share)} of {self.measure} on {self.asked} ({ours} nodes)"
        return f"{line}, the rest on {_listed(self.fallbacks)}" if self.fallbacks else line

    def table(self) -> str:
        """A line per operator and provider, the heaviest first, under one that sums up."""
        rows = [("operator", "provider", "nodes", "compute" if self.by_compute else "share")]
        rows += [(part.operator, part.provider, str(part.nodes), _percent(part.share)) for part in self.parts]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"  {o:{widths[0]}}  {p:{widths[1]}}  {n:>{widths[2]}}  {s:>{widths[3]}}" for o, p, n, s in rows]
        return "\n".join([str(self), *lines])


def tells(onnxruntime: ModuleType) -> bool:
    """Whether an onnxruntime package can tell where nodes run; from 1.24 on."""
    return hasattr(onnxruntime.InferenceSession, _TELL)


def recorded(session: Any) -> list[Node] | None:
    """The nodes that an onnxruntime.InferenceSession tells of; None where it cannot tell, as before 1.24.

    The session must have been created with `RECORD`.
    """
    if not hasattr(session, _TELL):
        return None
    subgraphs = session.get_provider_graph_assignment_info()
    return [Node(node.name, node.op_type, part.ep_name) for part in subgraphs for node in part.get_nodes()]


def completed(nodes: Sequence[Node], asked: str, macs: Mapping[str, int]) -> list[Node] | None:
    """The recorded nodes, and where the record of the provider that was asked for has gaps, what must be its.

    Those are the nodes which the bundle weighs and nobody is recorded for; others remain unknown and weigh nothing.
    None where that cannot be told: no node is known, or one without a name elsewhere may be of those.
    """
    if asked in _SILENT:
        if not macs or any(not node.name and node.operator in _PRODUCTS for node in nodes if node.provider != asked):
            return None
        known = {_origin(node, macs) for node in nodes}
        nodes = [*nodes, *(Node(name, _UNTOLD, asked) for name in macs if name not in known)]
    return list(nodes) or None


def assign(component: str, asked: str, nodes: Sequence[Node], macs: Mapping[str, int]) -> Assignment:
    """Weighs recorded nodes by the MACs that the bundle gives by node name; by their number if it gives none.

    By their number, too, if less than half of the MACs can be found again by name.
    """
    weights = _weights(nodes, macs)
    by_compute = sum(weights) > _FOUND * sum(macs.values())
    total = sum(weights) if by_compute else len(nodes)
    counts: Counter[tuple[str, str]] = Counter()
    loads: defaultdict[tuple[str, str], float] = defaultdict(float)
    for node, weight in zip(nodes, weights, strict=True):
        key = node.operator, asked if node.provider.lower() == asked.lower() else node.provider
        counts[key] += 1
        loads[key] += weight if by_compute else 1
    parts = [Part(*key, count, loads[key] / total) for key, count in counts.items()]
    return Assignment(
        component, asked, by_compute, tuple(sorted(parts, key=lambda p: (-p.share, -p.nodes, p.operator)))
    )


def _weights(nodes: Sequence[Node], macs: Mapping[str, int]) -> list[float]:
    """MACs of each node. Those of an opened operator are shared evenly among the nameless products."""
    origins = [_origin(node, macs) for node in nodes]
    times = Counter(origins)
    weights = [macs.get(origin, 0) / times[origin] for origin in origins]
    products = [i for i, node in enumerate(nodes) if not node.name and node.operator in _PRODUCTS]
    opened = sum(count for name, count in macs.items() if name not in times)
    for i in products:
        weights[i] = opened / len(products)
    return weights


def _origin(node: Node, macs: Mapping[str, int]) -> str:
    """Name of the node that the bundle weighs from which ONNX Runtime made this one."""
    return node.name if node.name in macs else _MADE.sub("", node.name)


def summary(assignments: Iterable[Assignment | None]) -> dict[str, Any]:
    """Of several components: what `generate --json` says of its provider; None is one whose nodes are not known.

    `nodes`: provider -> number, None where none are known. `macs_share`: component -> share of its compute on the
    provider that was asked for, None where its bundle does not give the compute; a component on several providers has
    an entry for each, `COMPONENT on PROVIDER`. `fallbacks`: what ran elsewhere.
    """
    known = [one for one in assignments if one is not None]
    nodes = sum((Counter(one.nodes) for one in known), Counter())
    asked: defaultdict[str, set[str]] = defaultdict(set)
    for one in known:
        asked[one.component].add(one.asked)
    names = [f"{one.component} on {one.asked}" if len(asked[one.component]) > 1 else one.component for one in known]
    return {
        "nodes": dict(nodes) or None,
        "macs_share": {name: one.share if one.by_compute else None for name, one in zip(names, known, strict=True)},
        "fallbacks": [{"component": one.component} | asdict(part) for one in known for part in one.fallbacks],
    }


def check(assignment: Assignment, fallback: Fallback) -> None:
    """ProviderError, with the heaviest operators that fell back, if more did than `fallback` allows."""
    if assignment.fits(fallback):
        return
    strict = fallback == "never"
    raise ProviderError(
        f"{assignment.component}: only {_percent(assignment.share)} of {assignment.measure} would run on "
        f"{assignment.asked}, {_percent(_LEAST[fallback])} is wanted; the rest on {_listed(assignment.fallbacks)}: "
        "it would be no faster than there, and copy to and fro; export it for this provider, choose another "
        f"--provider, or {'leave --strict out' if strict else 'give --allow-fallback'}"
    )


def fallback_of(text: str) -> Fallback:
    """One of the words for how much may fall back; ProviderError gives the choices."""
    for word in get_args(Fallback):
        if word == text:
            return word  # type: ignore[no-any-return]
    raise ProviderError(f"unknown fallback {text!r}; choose from {', '.join(get_args(Fallback))}")


def _listed(parts: Sequence[Part]) -> str:
    """`CPUExecutionProvider: MatMul 40 % (nodes: 70), Conv 2 % (nodes: 1), 3 other operators`, the heaviest first."""
    told = [f"{part.operator} {_percent(part.share)} (nodes: {part.nodes})" for part in parts[:_NAMED]]
    if len(parts) > _NAMED:
        told.append(f"{len(parts) - _NAMED} other operators")
    providers = ", ".join(dict.fromkeys(part.provider for part in parts))
    return f"{providers}: {', '.join(told)}"


def _percent(share: float) -> str:
    """Whole percent, but never 100 % of what is not all, nor 0 % of what is something."""
    percent = share * 100
    if 1e-9 < percent < 0.5 or 99.5 < percent < 100 - 1e-9:
        return f"{percent:.2f} %".replace("100.00", "99.99")
    return f"{percent:.0f} %"
