"""What a picture records of how it was drawn, and how to draw it again from that."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bundle import Bundle
from .errors import RequestError
from .plan import Plan
from .png import version
from .tables import load_table

if TYPE_CHECKING:
    import epd

    from .report import Report

log = logging.getLogger(__name__)
_HASH = 16  # digits kept of a SHA-256
_SAMPLERS = {  # names that other tools know; every other solver has its own
    "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "dpm2": "DPM2", "dpmpp_2m": "DPM++ 2M",
    "dpmpp_3m": "DPM++ 3M", "unipc_2": "UniPC", "unipc_3": "UniPC", "deis_2": "DEIS", "deis_3": "DEIS", "lcm": "LCM",
    "epd": "EPD",
}  # fmt: skip


def settings(bundle: Bundle, plan: Plan, report: Report, seed: int) -> dict[str, Any]:
    """The settings line of a picture, in the order other tools write it; our own keys last."""
    facts = bundle.facts
    line: dict[str, Any] = {
        "Steps": plan.steps,
        "Sampler": _SAMPLERS.get(plan.solver, plan.solver),
        "CFG scale": repr(plan.guidance),
        "Seed": seed,
        "Size": f"{plan.width}x{plan.height}",
        "Model": facts.name,
        "Version": f"epd-toolkit {version()}",
        "Solver": plan.solver,
    }
    if plan.guidance_interval is not None:
        line["Guidance interval"] = " ".join(map(repr, plan.guidance_interval))
    fingerprint = bundle.fingerprint()
    if plan.table is not None:
        line |= {"K": plan.directions, "Table hash": "start" if plan.start_table else table_hash(plan.table)}
    if fingerprint is not None:
        line["Bundle hash"] = fingerprint[:_HASH]
    backbone = facts.components[bundle.backbone].precision
    return line | {"Provider": report.provider["ran"], "Precision": backbone}


def recorded(
    file: Path, line: Mapping[str, str], bundle: Bundle, asked: Mapping[str, Any], providers: Sequence[str]
) -> dict[str, Any]:
    """Arguments of `make_plan` from a picture's settings line, without those that what is `asked` replaces.

    A warning says where it was drawn on others than `providers` (ONNX Runtime's names), or at another precision of the
    backbone.

    Raises
    ------
    RequestError
        This bundle cannot draw the picture again, or the line is damaged.
    """
    facts = bundle.facts
    if "Solver" not in line:
        raise RequestError(f"{file}: made by another program; give a picture of this one, or its settings by hand")
    if line.get("Model") != facts.name:
        raise RequestError(
            f"{file}: drawn with {line.get('Model')}, this is {facts.name}; give its bundle with --model"
        )
    fingerprint = bundle.fingerprint()
    if line.get("Bundle hash") != (fingerprint and fingerprint[:_HASH]):
        raise RequestError(
            f"{file}: drawn with another export of {facts.name} (bundle {line.get('Bundle hash')}); "
            "give that bundle with --model"
        )
    here = {"Precision": facts.components[bundle.backbone].precision}
    if not {*line.get("Provider", "").split(",")} <= {*providers}:  # of several asked for, one may have drawn alone
        here["Provider"] = ",".join(providers)
    if other := [f"{key} {line.get(key)} (here {value})" for key, value in here.items() if line.get(key) != value]:
        log.warning("%s was drawn with %s: the picture may differ", file, ", ".join(other))
    try:
        width, height = map(int, line["Size"].split("x"))
        arguments: dict[str, Any] = {
            "guidance_scale": float(line["CFG scale"]),
            "seed": int(line["Seed"]),
            "height": height,
            "width": width,
        }
        if "Guidance interval" in line:
            low, high = map(float, line["Guidance interval"].split())
            arguments["guidance_interval"] = (low, high)
        arguments |= _recorded_solver(file, line, bundle, asked)
    except (KeyError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{file}: its metadata is damaged ({error}); give the settings by hand") from None
    return arguments


def _recorded_solver(file: Path, line: Mapping[str, str], bundle: Bundle, asked: Mapping[str, Any]) -> dict[str, Any]:
    solver = asked.get("solver", line["Solver"])
    new_table = solver == "epd" != line["Solver"] and "k" not in asked and bundle.facts.tables
    if "table" in asked or "calls" in asked or new_table:
        return {}  # a table has its own steps
    arguments = {"solver": solver, "num_inference_steps": int(line["Steps"])}
    own = solver == "epd" == line["Solver"] and "k" not in asked
    return arguments | (_recorded_table(file, line, bundle) if own else {})


def _recorded_table(file: Path, line: Mapping[str, str], bundle: Bundle) -> dict[str, Any]:
    if line["Table hash"] == "start":
        return {"k": int(line["K"])}
    for path in bundle.facts.tables:
        table = load_table(bundle.folder / path)
        if table_hash(table) == line["Table hash"]:
            return {"table": table}
    raise RequestError(
        f"{file}: drawn with a table (hash {line['Table hash']}) that is not the bundle's; give it with --table"
    )


def table_hash(table: epd.Table) -> str:
    """First digits of the SHA-256 of a table's content."""
    text = json.dumps(table.to_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH]
