"""What this machine can run on: `python -m runtime devices`, and what stands in the way: `python -m runtime doctor`.

Knows nothing of bundles. A provider counts as here when it has started a one-node graph, not when it is listed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from . import ryzenai
from .errors import ProviderError
from .ort import NEWEST, OLDEST, add_provider, base_wheels, driver, failures, installed, one_line, onnxruntime, require
from .providers import CPU, PROVIDERS, SYSTEMS, Provider

# y = x + x, float32 [1, 4]; ONNX IR 8, opset 17
_ADD = bytes.fromhex(
    "08083a3d0a0e0a01780a017812017922034164641201675a130a0178120e0a0c"
    "080112080a0208010a02080462130a0179120e0a0c080112080a0208010a02080442040a001011"
)
_GB = 1e9


@dataclass(frozen=True)
class Device:
    """A provider on this machine: `why` it is not here (None: it is), and what to type then."""

    name: str
    provider: str
    why: str | None
    install: str
    hardware: tuple[str, ...]  # kind and vendor of each device that onnxruntime tells of, else the NPUs that are here
    rows: str
    opset: int | None
    precisions: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `bad` means nothing can run, `advice` that something could be better."""

    level: Literal["ok", "advice", "bad"]
    what: str
    said: str
    remedy: str = ""


def devices() -> list[Device]:
    """Every provider of the table, each started on a one-node graph if it seems to be here."""
    try:
        ort = onnxruntime()
    except ProviderError as error:
        return [_told(row, str(error)) for row in PROVIDERS.values()]
    ort.set_default_logger_severity(4)  # the reason is told once, by us
    return [_probe(ort, row) for row in PROVIDERS.values()]


def doctor() -> list[Finding]:
    """Everything that is known to go wrong around onnxruntime, in the order in which to mend it."""
    return [*_wheels(), *_drivers(), *_npu(), *_disk(), *_memory()]


def add_commands(commands: Any) -> None:
    """`devices` and `doctor`, for the command line of this package."""
    told = {
        "devices": (_devices, "list the execution providers: which start here, and why the others do not"),
        "doctor": (_doctor, "look for what stands in the way; exits 2 if nothing can run"),
    }
    for name, (run, words) in told.items():
        command = commands.add_parser(name, help=words)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print one object on stdout")


def _devices(options: argparse.Namespace) -> None:
    rows = devices()
    if options.json:
        print(json.dumps({"devices": [asdict(row) for row in rows]}))
        return
    for row in rows:
        print(f"{row.name:13}{'ready' if row.why is None else 'no'}{', '.join(('', *row.hardware))}")
        if row.why is not None:
            print(f"{'':13}{row.why}")


def _doctor(options: argparse.Namespace) -> None:
    findings = doctor()
    if options.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            remedy = f"\n        {finding.remedy}" if finding.remedy else ""
            print(f"{finding.level:8}{finding.what}: {finding.said}{remedy}")
    bad = [finding for finding in findings if finding.level == "bad"]
    if bad:
        raise ProviderError(f"nothing can run here: {bad[0].said}; {bad[0].remedy}")


def _told(row: Provider, why: str | None, hardware: tuple[str, ...] = ()) -> Device:
    return Device(row.name, row.ort, why, row.install, hardware, row.rows, row.opset, row.precisions)


def _probe(ort: ModuleType, row: Provider) -> Device:
    try:
        hardware = _hardware(ort, row)
        _start(ort, row)
    except ProviderError as error:
        return _told(row, str(error), _npus(row))
    return _told(row, None, hardware)


def _hardware(ort: ModuleType, row: Provider) -> tuple[str, ...]:
    found = require(ort, row) or (ort.get_ep_devices() if hasattr(ort, "get_ep_devices") else ())
    ours = [one for one in found if one.ep_name.lower() == row.ort.lower()]
    told = tuple(f"{one.device.type.name} {one.device.vendor or hex(one.device.vendor_id)}" for one in ours)
    return told or _npus(row)


def _npus(row: Provider) -> tuple[str, ...]:
    """AMD's NPUs, of its own providers: what is here, also where the provider is not."""
    return tuple(str(npu) for npu in ryzenai.npus()) if row.name in ("vitisai", "ryzenai") else ()


def _start(ort: ModuleType, row: Provider) -> None:
    """ProviderError if the provider does not start a graph of one node."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if row is not CPU and row.name not in ("vitisai", "ryzenai"):  # which may leave so small a graph to the CPU
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    add_provider(ort, options, row, {})
    try:
        ran = ort.InferenceSession(_ADD, options, enable_fallback=0).get_providers()[0]
    except failures(ort) as error:
        raise ProviderError(f"{row.ort} does not start ({one_line(error)}); {driver(row)}") from None
    if ran != row.ort:
        raise ProviderError(f"{row.ort} does not start, {ran} would stand in; {driver(row)}")


def _wheels() -> Iterator[Finding]:
    wheels = base_wheels()
    try:
        ort = onnxruntime()
    except ProviderError as error:
        said, _, remedy = str(error).partition("; ")
        yield Finding("bad", "onnxruntime", said, remedy)
        return
    release = tuple(int(part) for part in ort.__version__.split(".")[:2])
    said = f"{', '.join(wheels) or 'built by hand'} {ort.__version__}, with {', '.join(ort.get_available_providers())}"
    known = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    if release < OLDEST:
        yield Finding("bad", "onnxruntime", f"{said}; too old, wanted {known}", f"pip install -U {_wheel(wheels)}")
    elif release > NEWEST:
        yield Finding("advice", "onnxruntime", f"{said}; newer than {known}, which it was written against")
    else:
        yield Finding("ok", "onnxruntime", said)


def _wheel(wheels: dict[str, str]) -> str:
    return next(iter(wheels), CPU.packages[0])


def _drivers() -> Iterator[Finding]:
    """Of the providers whose package is installed: the driver's libraries, and whether they start."""
    try:
        ort = onnxruntime()
    except ProviderError:
        return
    ort.set_default_logger_severity(4)
    for row in PROVIDERS.values():
        named = row.ort in ort.get_available_providers() or installed(plugin.package for plugin in row.plugins)
        if row is CPU or not named:
            continue
        device = _probe(ort, row)
        if device.why is None:
            yield Finding("ok", row.name, "starts" + (f" on {', '.join(device.hardware)}" if device.hardware else ""))
        else:
            said, _, remedy = device.why.rpartition("; ")
            yield Finding("advice", row.name, said, remedy)


def _npu() -> Iterator[Finding]:
    """AMD's NPU and its software, from the PCI bus, the environment and, on Linux, /dev/accel."""
    here = ryzenai.software()
    given = os.environ.get(ryzenai.INSTALLATION)
    if here.installation:
        smi = f", {here.xrt_smi}" if here.xrt_smi else ", no xrt-smi"
        within = f", environment {here.environment}" if here.environment else ""
        said = f"{here.release} in {here.installation}{within}{smi}"
        if _built_in("vitisai"):
            yield Finding("ok", "Ryzen AI", said)
        else:
            remedy = f"conda activate ryzen-ai-{here.release}, or the environment that its installer made"
            yield Finding("advice", "Ryzen AI", f"{said}; this environment has not its onnxruntime", remedy)
    elif given is not None:
        said = f"{ryzenai.INSTALLATION} is {given}, no folder"
        yield Finding("advice", "Ryzen AI", said, "install Ryzen AI again")
    for npu in ryzenai.npus():
        nodes = sorted(node.name for node in Path("/dev/accel").glob("accel*"))
        told = f"{npu}, driver {npu.driver or 'unknown'}"
        if sys.platform == "linux" and not nodes:
            remedy = "install the amdxdna driver (Linux 6.14 has it)"
            yield Finding("advice", "NPU", f"{told}, no /dev/accel", remedy)
        elif nodes and not os.access(f"/dev/accel/{nodes[0]}", os.R_OK | os.W_OK):
            said = f"{told}, /dev/accel/{nodes[0]} may not be opened"
            yield Finding("advice", "NPU", said, "add yourself to the group render")
        elif ryzenai.driver_too_old(npu):
            yield Finding("advice", "NPU", f"{told}, too old", "install AMD's NPU driver 32.0.203.280 or newer")
        else:
            yield Finding("ok", "NPU", told)


def _built_in(name: str) -> bool:
    try:
        return PROVIDERS[name].ort in onnxruntime().get_available_providers()
    except ProviderError:
        return False


def _disk() -> Iterator[Finding]:
    from epd.catalogue import cache_folder

    elsewhere = "set EPD_CACHE to a folder of yours"
    try:
        folder = cache_folder()
        there = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), folder)
        free = shutil.disk_usage(there).free / _GB
        with tempfile.TemporaryFile(dir=there):
            pass
    except ValueError as error:
        yield Finding("advice", "disk", f"no folder for the cache: {error}", elsewhere)
        return
    except OSError as error:
        said = f"the cache {folder} cannot be written ({error.strerror or error})"
        yield Finding("advice", "disk", f"{said}, so that nothing is kept", elsewhere)
        return
    if free < 10:  # an SD3 bundle in half precision with its compiled form
        yield Finding(
            "advice", "disk", f"{free:.1f} GB free at {folder}", "free 10 GB, or set EPD_CACHE to a folder elsewhere"
        )
    else:
        yield Finding("ok", "disk", f"{free:.0f} GB free at {folder}")


def _memory() -> Iterator[Finding]:
    from .memory import available_bytes

    free = available_bytes()
    if free is None:
        yield Finding("advice", "memory", f"{SYSTEMS.get(sys.platform, sys.platform)} does not tell how much is free")
    elif free / _GB < 8:  # SD 1.5 in full precision peaks near 7 GB
        yield Finding(
            "advice", "memory", f"{free / _GB:.1f} GB free", "close programs, or take a half-precision bundle"
        )
    else:
        yield Finding("ok", "memory", f"{free / _GB:.0f} GB free")
