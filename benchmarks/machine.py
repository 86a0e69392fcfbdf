"""The machine as figures need it described: processor, memory, system, versions, power.

From Python's standard library and the system's own files. Knows nothing of models.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runtime.cachekey import drivers
from runtime.ort import base_wheels, installed
from runtime.png import version
from runtime.profiles import OTHERS, usable_cores
from runtime.providers import Provider

_SUPPLIES = Path("/sys/class/power_supply")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_GB = 1e9


@dataclass(frozen=True)
class Machine:
    """None, wherever the system does not tell."""

    processor: str
    cores: int | None  # physical
    threads: int | None  # logical processors that this process may use
    memory_bytes: int | None
    system: str
    versions: dict[str, str]  # python, numpy, onnxruntime and the provider's packages, this program
    drivers: dict[str, str]  # of accelerators
    power: str | None  # mains | battery
    governor: str | None  # of the processor's clock (Linux)

    def lines(self) -> list[str]:
        """Described in a few lines."""
        cores = f"{_told(self.cores)} cores, {_told(self.threads)} threads"
        memory = "memory unknown" if self.memory_bytes is None else f"{self.memory_bytes / _GB:.0f} GB"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            f"{self.processor}: {cores}, {memory}; {self.system}",
            versions,
            f"power {_told(self.power)}, governor {_told(self.governor)}",
            *(f"{name}: {version}" for name, version in self.drivers.items()),
        ]


def company(others: float | None) -> str:
    """What other programs took of the processors meanwhile, 0 to 1, in words."""
    if others is None:
        return "what other programs took of the processors is not known: close them before you measure"
    told = f"other programs took {others:.0%} of the processors meanwhile"
    return f"THE MACHINE WAS BUSY, {told}: close them and measure again" if others > OTHERS else told


def machine(providers: Iterable[Provider] = ()) -> Machine:
    """This one, now."""
    rows = list(providers)
    plugins = [plugin.package for row in rows for plugin in row.plugins]
    packages = {"epd-toolkit": version()} | installed(["numpy"]) | base_wheels() | installed(plugins)
    return Machine(
        processor=_processor(),
        cores=_physical_cores(),
        threads=usable_cores(),
        memory_bytes=_memory(),
        system=platform.platform(),
        versions={"python": platform.python_version()} | packages,
        drivers={name: release for row in rows for name, release in drivers(row).items()},
        power=_power(),
        governor=_line(_GOVERNOR),
    )


def _told(value: object) -> str:
    return "unknown" if value is None else str(value)


def _line(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _processor() -> str:
    if sys.platform == "win32":
        import winreg

        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return next((told["model name"] for told in _processors() if "model name" in told), platform.machine())


def _physical_cores() -> int | None:
    if sys.platform == "darwin":
        told = _sysctl("hw.physicalcpu")
        return int(told) if told else None
    cores = {(told.get("physical id"), told["core id"]) for told in _processors() if "core id" in told}
    return len(cores) or None


def _processors(file: Path = Path("/proc/cpuinfo")) -> list[dict[str, str]]:
    """Of every logical processor what Linux tells."""
    blocks = (_line(file) or "").split("\n\n")
    pairs = [[line.partition(":") for line in block.splitlines()] for block in blocks]
    return [{name.strip(): value.strip() for name, _, value in block} for block in pairs]


def _memory() -> int | None:
    if sys.platform == "win32":
        import ctypes

        kilobytes = ctypes.c_ulonglong()
        read = ctypes.WinDLL("kernel32").GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
        return 1024 * kilobytes.value if read else None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _power(supplies: Path = _SUPPLIES) -> str | None:
    if sys.platform == "win32":
        import ctypes

        status = (ctypes.c_ubyte * 12)()  # SYSTEM_POWER_STATUS, ACLineStatus first
        read = ctypes.WinDLL("kernel32").GetSystemPowerStatus(ctypes.byref(status))
        return {0: "battery", 1: "mains"}.get(status[0]) if read else None
    if sys.platform == "darwin":
        told = _output("pmset", "-g", "batt")
        return None if told is None else "battery" if "Battery Power" in told else "mains"
    online = [_line(supply / "online") for supply in sorted(supplies.glob("*")) if (supply / "online").is_file()]
    return None if not online else "mains" if "1" in online else "battery"


def _sysctl(name: str) -> str | None:
    return _output("/usr/sbin/sysctl", "-n", name)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
