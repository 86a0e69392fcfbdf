"""What a bundle holds, for a reader; and whether all of it is whole."""

from __future__ import annotations

from .bundle import Bundle, Component
from .plan import load_table
from .session import Session


def verify(bundle: Bundle) -> None:
    """Compares every file with its SHA-256, loads every graph on the CPU, reads every table.

    Raises
    ------
    BundleError, ProviderError, RequestError
        For the first thing that is wrong.
    """
    bundle.verify()
    for name in bundle.facts.components:
        with Session(bundle, name):
            pass
    for path in bundle.facts.tables:
        load_table(bundle.folder / path)


def describe(bundle: Bundle, *, verified: bool) -> str:
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
        f"tables      {', '.join(facts.tables) or 'none'}",
    ]
    if source.random_weights:
        lines.append("RANDOM WEIGHTS: its pictures mean nothing")
    if bundle.foreign:
        lines.append("no bundle.json: described from its configurations; sizes, hashes and parity are not known")
    lines += [_component(name, component) for name, component in facts.components.items()]
    if verified:
        lines.append("verified: every graph loads" + ("" if bundle.foreign else ", every SHA-256 agrees"))
    return "\n".join(lines)


def _component(name: str, component: Component) -> str:
    parity = component.parity
    size = sum(stored.bytes for stored in component.files)
    parts = [
        f"{name:16}{component.precision}",
        f"opset {component.opset}" if component.opset else "opset unknown",
        f"{size / 1e6:.1f} MB" if component.files else "size unknown",
        f"parity {parity.error:.1e} (tolerance {parity.tolerance:.0e}, rows {', '.join(map(str, parity.rows))})"
        if parity
        else "parity not checked",
    ]
    return ", ".join(parts)
