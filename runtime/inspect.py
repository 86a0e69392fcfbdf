"""What a bundle holds, for a reader; whether all of it is whole; and the solvers that can draw with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from epd.solvers import METHODS

from .assignment import Assignment
from .bundle import Bundle
from .errors import ProviderError, RunError
from .facts import REQUIRED, Component, Family
from .footprint import predict
from .plan import make_plan
from .session import Session
from .tables import load_table
from .text import check_tokenizers


def verify(bundle: Bundle) -> None:
    """Compares every recorded file with its SHA-256, loads every graph on the CPU, opens tokenizers, reads tables.

    Raises
    ------
    BundleError, ProviderError, RequestError
        For the first thing that is wrong.
    """
    bundle.verify()
    for name in bundle.facts.components:
        for rows in bundle.facts.components[name].rows or (None,):
            with Session(bundle, name, rows=rows):
                pass
    check_tokenizers(bundle)
    for path in bundle.facts.tables:
        load_table(bundle.folder / path)


def assignments(bundle: Bundle, provider: str, options: Mapping[str, str]) -> list[Assignment]:
    """Where every component's nodes run on a provider, whatever part of them falls back; loads every graph.

    Of graphs of several row counts the one that has least on the provider.

    Raises
    ------
    BundleError, ProviderError
        Also where this release of onnxruntime cannot tell.
    """
    placed = []
    for name, component in bundle.facts.components.items():
        graphs = (_assignment(bundle, name, rows, provider, options) for rows in component.rows or (None,))
        placed.append(min(graphs, key=lambda one: one.share))
    return placed


def _assignment(bundle: Bundle, name: str, rows: int | None, provider: str, options: Mapping[str, str]) -> Assignment:
    with Session(bundle, name, provider=provider, provider_options=options, fallback="allowed", rows=rows) as session:
        if session.assignment is None:
            raise ProviderError(f"{name}: this release of onnxruntime cannot tell where its nodes run on {provider}")
        return session.assignment


def describe_assignments(placed: list[Assignment], backbone: str) -> str:
    """A table by operator and provider for each component, and whether `generate` would take the backbone so."""
    lines = []
    for one in placed:
        lines.append(one.table())
        if one.component == backbone and not one.fits("limited"):
            lines.append("  too much falls back: `generate` refuses this without --allow-fallback")
    return "\n".join(lines)


def describe(bundle: Bundle, *, verified: bool, process: int | None = None) -> str:
    """Facts and components, one line each."""
    facts = bundle.facts
    latent, text, defaults, source = facts.latent, facts.text, facts.defaults, facts.source
    size = f"{defaults.width}x{defaults.height}" if defaults.height else "any size"
    lines = [
        f"{facts.name}: {facts.family}, {facts.prediction} prediction, {bundle.folder}",
        f"source      {source.id}" + (f" at {source.revision}" if source.revision else ""),
        f"latent      {latent.channels} channels, factor {latent.factor}, patch {latent.patch}, "
        f"scaling {latent.scaling:g}, shift {latent.shift:g}",
        f"text        {text.clip_tokens} CLIP tokens" + (f", {text.t5_tokens} T5" if facts.family == "sd3" else ""),
        f"defaults    {size}, {defaults.steps} steps, guidance {defaults.guidance:g}, "
        f"solver {'epd' if facts.tables else defaults.solver}",
        *([] if bundle.foreign else [f"target      {facts.target}"]),
        f"tables      {', '.join(facts.tables) or 'none'}",
        f"picture     {_picture(bundle)}",
    ]
    if (told := predicted(bundle, process)) is not None:
        full, lean = (f"{count / 1e9:.3g} GB" for count in told.values())
        lines.append(f"memory      {full} to draw a picture, {lean} with --low-memory (predicted, on the CPU)")
    if source.random_weights:
        lines.append("RANDOM WEIGHTS: its pictures mean nothing")
    if bundle.foreign:
        lines.append("no bundle.json: described from its configurations; sizes, hashes and parity are not known")
    lines += [_component(name, component) for name, component in facts.components.items()]
    if verified:
        agree = "every SHA-256 agrees" if facts.files else "the SHA-256 of every graph agrees, no others are recorded"
        lines.append("verified: every graph and tokenizer loads" + ("" if bundle.foreign else f", {agree}"))
    return "\n".join(lines)


def predicted(bundle: Bundle, process: int | None) -> dict[str, int] | None:
    """Bytes that drawing a picture as the bundle does by default takes, at full speed and with low memory.

    None where the bundle, or the system, does not say what is needed to know it.

    Parameters
    ----------
    process
        Bytes of the process before anything is loaded; None where the system does not tell.
    """
    parts = bundle.facts.components
    known = all(name in parts and parts[name].activation_bytes is not None for name in REQUIRED[bundle.facts.family])
    if process is None or not known:
        return None
    try:
        plan = make_plan(bundle, "")
    except RunError:  # which drawing will tell
        return None
    full, lean = (predict(bundle, plan, low_memory, process) for low_memory in (False, True))
    return None if full is None or lean is None else {"full_speed": full, "low_memory": lean}


def _picture(bundle: Bundle) -> str:
    picture, backbone = bundle.facts.picture, bundle.facts.components.get(bundle.backbone)
    if backbone is not None and backbone.precision == "fp32":
        return "the backbone is in fp32"
    if picture is None:
        return "not checked against fp32"
    return (
        f"{picture.psnr_db:.1f} dB PSNR to the backbone in fp32 (tolerance {picture.tolerance_db:.0f} dB, "
        f"{picture.prompts} prompts, {picture.steps} steps"
        + (", drawn by torch at this precision)" if picture.by == "torch" else ")")
    )


def _component(name: str, component: Component) -> str:
    parity = component.parity
    size = sum(stored.bytes for stored in component.files)
    parts = [
        f"{name:16}{component.precision}",
        f"opset {component.opset}" if component.opset else "opset unknown",
        f"{size / 1e6:.1f} MB" if component.files else "size unknown",
        *([f"graphs of {', '.join(map(str, component.rows))} rows"] if component.rows else []),
        f"parity {parity.error:.1e} (tolerance {parity.tolerance:.0e}, rows {', '.join(map(str, parity.rows))})"
        if parity
        else "parity not checked",
    ]
    return ", ".join(parts)


def solvers() -> list[dict[str, Any]]:
    """What `--solver` takes: name, order, sequential calls a step, families, noisy, source; None where it depends.

    Order is the one a solver shows with the start it really uses; 0: it follows no differential equation.
    """
    rows: list[dict[str, Any]] = [
        {
            "name": method.name,
            "order": method.order,
            "calls": method.calls or None,
            "families": [family for family in method.families if family in get_args(Family)],
            "noisy": method.noisy,
            "source": method.source,
        }
        for method in METHODS.values()
    ]
    source = "Zhu et al. 2025, arXiv 2507.14797: a learned table (--table, --calls) or an untrained one (-k)"
    learned = {"name": "epd", "order": None, "calls": None, "families": sorted(get_args(Family)), "noisy": False}
    return [*rows, learned | {"source": source}]


def describe_solvers() -> str:
    """`solvers` as a table: one line each, under a heading."""
    lines = [("solver", "order", "calls/step", "families", "source")]
    for row in solvers():
        order, calls = ({None: "varies", 0: "none"}.get(row[key], str(row[key])) for key in ("order", "calls"))
        noisy = " (draws noise)" if row["noisy"] else ""
        lines.append((row["name"], order, calls, ", ".join(row["families"]), row["source"] + noisy))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
