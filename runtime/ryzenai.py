"""AMD's NPU and its software on this machine: which generation and driver, which Ryzen AI release, its libraries.

Written from AMD's documentation of Ryzen AI 1.4 to 1.8; nothing in it was run on an NPU. Knows nothing of bundles or
onnxruntime, and imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

INSTALLATION = "RYZEN_AI_INSTALLATION_PATH"
Version = tuple[int, ...]

_LIBRARIES = {"win32": "onnxruntime_providers_ryzenai.dll", "linux": "libonnxruntime_providers_ryzenai.so"}
_OPERATORS = {"win32": "onnx_custom_ops.dll", "linux": "libonnx_custom_ops.so"}
_FOLDERS = ("deployment", "deployment/lib", "lib", "GenAI-SD/lib")  # of an installation, where they may be
_ROOTS = {"DD_ROOT": "GenAI-SD/lib", "DD_PLUGINS_ROOT": "GenAI-SD/lib/transaction/stx"}  # read by these libraries

_AMD = "1022"  # PCI vendor
_GENERATIONS = {  # PCI device -> revision ("": any other) -> name
    "1502": {"": "Phoenix or Hawk Point"},
    "17f0": {"": "Strix or newer", "00": "Strix", "10": "Strix", "11": "Strix", "20": "Krackan"},
}
_XDNA1 = "1502"  # compiles integer graphs alone
_OLDEST_DRIVER = (32, 0, 203, 280)  # of Windows, for Ryzen AI 1.5 to 1.8
_kept: list[object] = []  # folders of libraries, open as long as the process


@dataclass(frozen=True)
class Npu:
    """An NPU of AMD's on the PCI bus."""

    device: str  # four hexadecimal digits, lower case; vendor 1022
    revision: str  # two
    driver: str | None  # version of its driver; None: none, or not told

    @property
    def name(self) -> str:
        names = _GENERATIONS[self.device]
        return names.get(self.revision, names[""])

    @property
    def integers_only(self) -> bool:
        """Whether its compiler takes no float graph."""
        return self.device == _XDNA1

    def __str__(self) -> str:
        return f"AMD {self.name} ({_AMD}:{self.device} revision {self.revision})"


@dataclass(frozen=True)
class Software:
    """What of AMD's Ryzen AI software this process sees."""

    installation: Path | None  # from RYZEN_AI_INSTALLATION_PATH
    environment: str | None  # conda's name of the active one
    version: Version | None  # 1.7.1 as (1, 7, 1); None: it cannot be told
    xrt_smi: Path | None

    @property
    def release(self) -> str:
        return ".".join(map(str, self.version)) if self.version else "unknown"


def software(variables: Mapping[str, str] = os.environ) -> Software:
    """The release is told by the folder's name, as AMD's installer makes it, else by conda's environment."""
    given = variables.get(INSTALLATION)
    installation = Path(given) if given else None
    environment = variables.get("CONDA_DEFAULT_ENV") or None
    parts = installation.parts[::-1] if installation else ()
    named = [
        name for name in (*parts, environment or "") if re.fullmatch(r"(ryzen[_-]?ai[_-])?v?\d+\.\d+(\.\d+)*", name)
    ]
    found = re.search(r"\d+(\.\d+)+", named[0]) if named else None
    smi = shutil.which("xrt-smi", path=variables.get("PATH"))
    places = [Path(smi)] if smi else [Path("C:/Windows/System32/AMD/xrt-smi.exe"), Path("/opt/xilinx/xrt/bin/xrt-smi")]
    return Software(
        installation if installation and installation.is_dir() else None,
        environment,
        version_of(found[0]) if found else None,
        next((place for place in places if place.is_file()), None),
    )


def version_of(text: str) -> Version:
    """`1.7.1` as (1, 7, 1); what follows the numbers does not count."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def npus(bus: Path = Path("/sys/bus/pci/devices"), modules: Path = Path("/sys/module")) -> list[Npu]:
    """AMD's NPUs on this machine's PCI bus, as Linux lists them in /sys and Windows in its registry."""
    found = _windows() if sys.platform == "win32" else _linux(bus, modules)
    return [npu for npu in found if npu.device in _GENERATIONS]


def _linux(bus: Path, modules: Path) -> Iterator[Npu]:
    module = modules / "amdxdna"
    own = _line(module / "version")  # of the driver that comes apart from the kernel
    driver = own or (f"amdxdna of Linux {platform.release()}" if module.is_dir() else None)
    for folder in sorted(bus.glob("*")):
        vendor, device, revision = (_line(folder / name) for name in ("vendor", "device", "revision"))
        if vendor == f"0x{_AMD}" and device:
            yield Npu(device.removeprefix("0x").lower(), (revision or "0x00").removeprefix("0x"), driver)


def _line(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


if sys.platform == "win32":
    import winreg

    def _windows() -> Iterator[Npu]:
        """From Enum\\PCI, which keeps devices that were taken out, too: only those with a driver count."""
        root = r"SYSTEM\CurrentControlSet"
        for name in _keys(rf"{root}\Enum\PCI"):
            found = hardware_id(name)
            for instance in _keys(rf"{root}\Enum\PCI\{name}") if found else ():
                place = _value(rf"{root}\Enum\PCI\{name}\{instance}", "Driver")
                if found and place:
                    yield Npu(*found, _value(rf"{root}\Control\Class\{place}", "DriverVersion"))

    def _keys(path: str) -> list[str]:
        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
                return [winreg.EnumKey(key, index) for index in range(winreg.QueryInfoKey(key)[0])]
        except OSError:
            return []

    def _value(path: str, name: str) -> str | None:
        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
                return str(winreg.QueryValueEx(key, name)[0])
        except OSError:
            return None

else:

    def _windows() -> Iterator[Npu]:
        return iter(())


def hardware_id(text: str) -> tuple[str, str] | None:
    """Device and revision of an AMD device in Windows' words, such as `VEN_1022&DEV_17F0&SUBSYS_20CF1043&REV_10`."""
    found = re.search(rf"VEN_{_AMD}&DEV_([0-9A-F]{{4}})(?:&SUBSYS_\w+)?&REV_([0-9A-F]{{2}})", text.upper())
    return (found[1].lower(), found[2].lower()) if found else None


def driver_too_old(npu: Npu) -> bool:
    """Of Windows' drivers; Linux's have other numbers."""
    numbers = version_of(npu.driver or "")
    return sys.platform == "win32" and len(numbers) == 4 and numbers < _OLDEST_DRIVER


def provider_library(here: Software) -> Path | None:
    """That of the plugin provider, which runs AMD's prebuilt graphs from Ryzen AI 1.8 on."""
    return _file_of(here, _LIBRARIES)


def operator_library(here: Software) -> Path | None:
    """That of AMD's operators, with which the CPU provider runs its prebuilt graphs up to Ryzen AI 1.7."""
    return _file_of(here, _OPERATORS)


def _file_of(here: Software, names: Mapping[str, str]) -> Path | None:
    name = names.get(sys.platform)
    if here.installation is None or name is None:
        return None
    places = [here.installation / folder / name for folder in _FOLDERS]
    return next((place for place in places if place.is_file()), None)


@functools.cache
def load_beside(library: Path, here: Software) -> None:
    """Loads a library of AMD's with those that lie beside it; OSError if that cannot be."""
    if here.installation:
        for variable, folder in _ROOTS.items():
            if (here.installation / folder).is_dir():
                os.environ.setdefault(variable, str(here.installation / folder))
    if sys.platform == "win32":
        _kept.append(os.add_dll_directory(str(library.parent)))
    with contextlib.chdir(library.parent):  # it looks for further files there, too
        ctypes.CDLL(str(library))
