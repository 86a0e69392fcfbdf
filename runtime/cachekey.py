"""What a compiled model depends on, so that one made for something else is never used: the key of the compile cache.

A key is a tree of names and texts: the graph and its data, the provider with its options, the releases of onnxruntime,
of the provider's package and of the driver, and the machine. Weights are not read for it: a bundle records their
SHA-256; of a folder that records nothing, sizes and times are taken. Knows nothing of sessions.

The driver's release is read where the system tells it: on Windows of every display and compute accelerator, on Linux of
the kernel modules below (those without a release of their own have the kernel's), on macOS it is the system's.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from .bundle import Bundle, sha256
from .ort import installed, require, settled
from .providers import Provider
from .ryzenai import software

Key = Mapping[str, Any]  # as JSON gives it back
_MODULES = {  # the kernel's part of the driver
    "cuda": ("nvidia",),
    "tensorrt": ("nvidia",),
    "tensorrt-rtx": ("nvidia",),
    "vitisai": ("amdxdna",),
    "openvino": ("intel_vpu", "i915", "xe"),
    "migraphx": ("amdgpu",),
    "qnn": ("fastrpc", "qcom_fastrpc"),
}
_ADAPTERS = (  # Windows' classes of displays and of compute accelerators, which NPUs are
    "{4d36e968-e325-11ce-bfc1-08002be10318}",
    "{f01a9d53-3ff6-48d2-9f97-c8a7004be10c}",
)


def key_of(ort: ModuleType, row: Provider, chosen: Mapping[str, str], bundle: Bundle, graph: Path) -> Key:
    """The key of a graph of a bundle on a provider with `chosen` options; ProviderError if it is not here."""
    answered = {name for plugin in row.plugins for name in plugin.fills} - chosen.keys()  # paths of its package
    options = {
        name: _content(value) if row.options[name].kind == "path" else value
        for name, value in settled(row, chosen).items()
        if name not in answered
    }
    key = {
        "graph": graph_key(bundle, graph),
        "provider": row.ort,
        "options": options,
        "session": dict(row.session),
        "machine": machine(),
        **environment(ort, row),
    }
    told: Key = json.loads(json.dumps(key))
    return told


def machine() -> dict[str, str]:
    """What tells this machine from another that shares its cache."""
    return {"node": platform.node(), "processor": platform.processor() or platform.machine()}


def _content(value: str) -> str:
    """An option that names a path; of a file, such as a configuration, what is in it."""
    file = Path(value)
    return f"{file.name} {sha256(file)}" if file.is_file() else value


def digest(key: Key) -> str:
    """The name of a key's folder."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def graph_key(bundle: Bundle, graph: Path) -> dict[str, str]:
    """Path in the bundle -> SHA-256, of a graph and the data beside it; where none is recorded, size and time."""
    recorded = {stored.path: stored.sha256 for stored in bundle.stored()}
    beside = (path for path in sorted(graph.parent.iterdir()) if path.suffix not in (".onnx", ".json"))
    files = {path.relative_to(bundle.folder).as_posix(): path for path in (graph, *beside) if path.is_file()}
    return {
        name: recorded.get(name) or f"{path.stat().st_size} bytes of {path.stat().st_mtime_ns}"
        for name, path in files.items()
        if name in recorded or path == graph or bundle.foreign
    }


def environment(ort: ModuleType, row: Provider) -> dict[str, Any]:
    """What is installed here for a provider."""
    devices = require(ort, row)
    told = [
        {"kind": one.device.type.name, "vendor": one.device.vendor, "id": hex(one.device.device_id)}
        | {name: value for name, value in one.ep_metadata.items() if name != "library_path"}
        for one in devices
    ]
    return {
        "onnxruntime": ort.__version__,
        "packages": installed([*(plugin.package for plugin in row.plugins), *_wheels(row)]),
        "software": software().release if row.name == "vitisai" else None,
        "driver": drivers(row),
        "devices": told,
    }


def _wheels(row: Provider) -> list[str]:
    return [package.partition("[")[0].partition("<")[0] for package in row.packages]


def drivers(row: Provider) -> dict[str, str]:
    """Name -> release of the drivers a provider may use, as far as the system tells."""
    if sys.platform == "win32":
        return dict(_adapters())
    if sys.platform == "darwin":
        return {"macOS": platform.mac_ver()[0]}
    return dict(_modules(row))


def _modules(row: Provider, root: Path = Path("/sys/module")) -> Iterator[tuple[str, str]]:
    for name in _MODULES.get(row.name, ()):
        if (root / name).is_dir():
            try:
                yield name, (root / name / "version").read_text(encoding="utf-8").strip()
            except OSError:
                yield name, platform.release()


def _adapters() -> Iterator[tuple[str, str]]:
    import winreg

    registry: Any = winreg  # its names are Windows' alone
    for kind in _ADAPTERS:
        parent = rf"SYSTEM\CurrentControlSet\Control\Class\{kind}"
        for index in range(16):
            try:
                with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, rf"{parent}\{index:04}") as found:
                    names = [registry.QueryValueEx(found, name)[0] for name in ("DriverDesc", "DriverVersion")]
            except OSError:
                continue
            yield str(names[0]), str(names[1])


def changes(old: Key, new: Key) -> list[str]:
    """`onnxruntime 1.31.0 -> 1.32.0` for everything that differs."""
    before, after = dict(_flat(old)), dict(_flat(new))
    names = dict.fromkeys([*before, *after])
    return [
        f"{name} {before.get(name, 'none')} -> {after.get(name, 'none')}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf with its path; of a SHA-256 the beginning."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        yield name, str(value)[:12] if name.startswith("graph") and " " not in str(value) else str(value)
        return
    for part, inner in parts:
        yield from _flat(inner, f"{name}.{part}".lstrip("."))
