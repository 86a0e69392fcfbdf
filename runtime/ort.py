"""onnxruntime as it is installed here: the one package, libraries of further providers, and how a session gets one.

Knows nothing of bundles, graphs or what ran where. Imports onnxruntime when asked for it, never before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import ProviderError
from .providers import CPU, NVIDIA, PROVIDERS, SYSTEMS, WHEELS, Provider
from .ryzenai import load_beside, provider_library, software

OLDEST, NEWEST = (1, 23), (1, 32)  # releases of onnxruntime that this program was written against
_kept: list[Any] = []  # for as long as the process
_plugged: dict[str, tuple[Any, ...]] = {}  # ONNX Runtime's name -> devices of its registered library


def onnxruntime() -> ModuleType:
    """The onnxruntime package; ProviderError if there is none, or if two wheels of it overwrote each other."""
    wheels = base_wheels()
    if len(wheels) > 1:
        raise ProviderError(
            f"two onnxruntime packages break each other: {', '.join(wheels)}; "
            f"pip uninstall -y {' '.join(wheels)}, then install the one you want"
        )
    try:
        import onnxruntime as ort
    except ImportError as error:  # not there, or there and broken
        raise ProviderError(f"onnxruntime cannot be imported ({one_line(error)}); {CPU.install}") from None
    if not hasattr(ort, "SessionOptions"):  # an empty folder of that name, as a removed wheel leaves it
        raise ProviderError(f"onnxruntime is not whole; pip uninstall -y {' '.join(wheels)}, then {CPU.install}")
    return ort  # type: ignore[no-any-return]


def require(ort: ModuleType, row: Provider) -> tuple[Any, ...]:
    """The devices of a provider that comes as a library of its own, none of one that onnxruntime itself has.

    Raises
    ------
    ProviderError
        It is not here: why, and the line to type.
    """
    if row.ort in ort.get_available_providers() and row.ort not in _plugged:  # where a plugin comes in, too
        return ()
    if sys.platform not in row.systems:
        homes = " and ".join(SYSTEMS[system] for system in row.systems)
        raise ProviderError(
            f"{row.ort} runs on {homes}, this is {SYSTEMS.get(sys.platform, sys.platform)}; {_others()}"
        )
    if row.name == "windowsml":
        raise ProviderError(_catalogue_told(row))
    library = library_of(row)
    if library is None:
        plugin = row.plugins and row.packages[0] == "onnxruntime" and list(base_wheels()) == ["onnxruntime"]
        where = "" if plugin or not row.packages else "in an environment of its own: "
        has = ", ".join(ort.get_available_providers())
        raise ProviderError(f"{row.ort} is not in the installed onnxruntime (it has {has}); {where}{row.install}")
    devices = _registered(ort, row.ort, library)
    if not devices:
        raise ProviderError(
            f"{row.ort}: its library is installed and finds no device; install or update the device's driver, "
            "and see `python -m runtime doctor`"
        )
    return devices


def add_provider(
    ort: ModuleType, options: Any, row: Provider, chosen: Mapping[str, str], *, shared: bool = False
) -> list[tuple[str, dict[str, str]]] | None:
    """Makes the provider the one that session options `options` run on, unless they name theirs already.

    Parameters
    ----------
    shared
        More than one session is made with `options`: a provider that onnxruntime has built in is then not added to
        them but returned, as `InferenceSession`'s argument `providers`. (Two sessions of one added WebGPU provider, the
        second after the end of the first, ended the process.)

    Raises
    ------
    ProviderError
        It is not here, refuses the options, or does not start: then with the driver's libraries that are missing.
    """
    devices = require(ort, row)
    if options.has_providers():  # the caller's own, or a plugin's from the session before
        return None
    for name, value in row.session.items():
        current = getattr(options, name)
        setattr(options, name, getattr(type(current), value) if isinstance(value, str) else value)
    passed = settled(row, chosen)
    if devices:
        device = _device(row, devices, passed)
        with _starting(ort, row, chosen):
            options.add_provider_for_devices([device], passed)
        return None
    if row.prefix:
        for name, value in passed.items():
            options.add_session_config_entry(row.prefix + name, value)
        passed = {}
    if row.libraries is NVIDIA and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it misses; stdout may be a JSON object
            ort.preload_dlls()  # CUDA and cuDNN out of NVIDIA's wheels
    if shared:
        return [(row.ort, passed)]
    with _starting(ort, row, chosen):
        options.add_provider(row.ort, passed)
    return None


@contextlib.contextmanager
def _starting(ort: ModuleType, row: Provider, chosen: Mapping[str, str]) -> Iterator[None]:
    """ProviderError, with what is known of the driver, for whatever onnxruntime raises."""
    try:
        yield
    except failures(ort) as error:
        options = f"check {', '.join(chosen)}, or " if chosen else ""
        raise ProviderError(f"{row.ort} does not start ({one_line(error)}); {options}{driver(row)}") from None


def driver(row: Provider) -> str:
    """What to do about a provider that is installed and does not start."""
    if missing := missing_libraries(row):
        return f"install the driver that has {', '.join(missing)}"
    return row.install if row.name in ("cuda", "tensorrt") else "install or update the device's driver"


def missing_libraries(row: Provider) -> tuple[str, ...]:
    """The driver's libraries that the provider needs on this system and that cannot be loaded."""
    return tuple(name for name in row.libraries.get(sys.platform, ()) if not _loads(name))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def settled(row: Provider, chosen: Mapping[str, str]) -> dict[str, str]:
    """The options that are passed: our defaults, what the plugin's package answers, then the `chosen` ones."""
    passed = {name: option.default for name, option in row.options.items() if option.default is not None}
    if row.emulated and _on_x86():
        passed |= row.emulated
    if "backend_type" not in chosen:
        for plugin in row.plugins:
            if importlib.util.find_spec(plugin.module):
                module = importlib.import_module(plugin.module)
                passed |= {name: str(getattr(module, answer)()) for name, answer in plugin.fills.items()}
    return passed | dict(chosen)


def _on_x86() -> bool:
    """Whether the processor itself is one: Windows on ARM says AMD64 to a Python of that kind, which it emulates."""
    told = (os.environ.get(name, "") for name in ("PROCESSOR_ARCHITEW6432", "PROCESSOR_IDENTIFIER"))
    return platform.machine().lower() in ("x86_64", "amd64") and not any(one.upper().startswith("ARM") for one in told)


def base_wheels() -> dict[str, str]:
    """The base wheels that are here -> version; onnxruntime-qnn is none since 2.0, but a plugin."""
    wheels = installed(WHEELS)
    if not wheels.get("onnxruntime-qnn", "2").startswith(("0.", "1.")):
        wheels.pop("onnxruntime-qnn", None)
    return wheels


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Those of the packages that are here -> version."""
    versions = {package: _version(package) for package in packages}
    return {package: version for package, version in versions.items() if version is not None}


def one_line(error: BaseException) -> str:
    """The message of an error, without line breaks; of a long one the ends, for the cause is often told last."""
    text = " ".join(str(error).split())
    return text if len(text) <= 320 else f"{text[:120]} ... {text[-200:]}"


def failures(ort: ModuleType) -> tuple[type[Exception], ...]:
    """What onnxruntime raises, beside its own classes, which share no base and differ between releases."""
    state = ort.capi.onnxruntime_pybind11_state
    classes = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*classes, RuntimeError, ValueError)


def _others() -> str:
    return f"here choose from {', '.join(row.name for row in PROVIDERS.values() if sys.platform in row.systems)}"


@functools.cache  # milliseconds, and asked at every call
def _version(package: str) -> str | None:
    import importlib.metadata  # 20 ms, of which `--help` needs none

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def library_of(row: Provider) -> str | None:
    """The file that holds the provider: of its own package or AMD's software, else of Windows ML; None: of none."""
    if row.name == "ryzenai" and (found := provider_library(software())):
        return str(_loaded(row, found))
    for plugin in row.plugins:
        if importlib.util.find_spec(plugin.module):
            try:
                return str(importlib.import_module(plugin.module).get_library_path())
            except (ImportError, OSError, RuntimeError) as error:
                raise ProviderError(
                    f"{row.ort}: {plugin.package} is damaged ({one_line(error)}); "
                    f"pip install --force-reinstall {plugin.package}"
                ) from None
    entry = _catalogued().get(row.ort.lower()) if row.catalogue else None
    if entry is None:
        return None
    try:
        entry.ensure_ready()  # Windows downloads it where it has it not yet
    except (OSError, RuntimeError) as error:
        raise ProviderError(f"{row.ort}: Windows ML cannot make it ready ({one_line(error)}); update Windows") from None
    return str(entry.library_path)


def _loaded(row: Provider, library: Path) -> Path:
    """AMD's library, loaded before it is registered, for it finds its own only so."""
    try:
        load_beside(library, software())
    except OSError as error:
        raise ProviderError(f"{row.ort}: {library} does not load ({one_line(error)}); install Ryzen AI again") from None
    return library


@functools.cache
def _catalogued() -> dict[str, Any]:
    """Windows ML's providers that this machine can have: ONNX Runtime's name in lower case -> its entry."""
    if not importlib.util.find_spec("windowsml"):
        return {}
    _kept.append(importlib.import_module("windowsml").EpCatalog())  # closing it has crashed with some drivers
    return {entry.name.lower(): entry for entry in _kept[-1].find_all_providers()}


def _catalogue_told(row: Provider) -> str:
    if not importlib.util.find_spec("windowsml"):
        return f"Windows ML is not installed; in an environment of its own: {row.install}"
    held = [other.name for other in PROVIDERS.values() if other.ort.lower() in _catalogued()]
    if not held:
        return "Windows ML has no provider for this machine; update Windows and the device's driver"
    return f"Windows ML is a catalogue of providers; name one that it has here: {', '.join(held)}"


def _registered(ort: ModuleType, name: str, library: str) -> tuple[Any, ...]:
    """The devices that a library gives the provider, registered once in a process."""
    if name in _plugged:
        return _plugged[name]
    if not hasattr(ort, "register_execution_provider_library"):
        raise ProviderError(f"this onnxruntime {ort.__version__} takes no plugin providers; pip install -U onnxruntime")
    if sys.platform == "win32":
        _kept.append(os.add_dll_directory(str(Path(library).parent)))  # for the libraries that lie beside it
    try:
        ort.register_execution_provider_library(name, library)
    except failures(ort) as error:
        raise ProviderError(
            f"{name}: its library {library} does not load ({one_line(error)}); install it again, "
            "in the release that fits this onnxruntime"
        ) from None
    _plugged[name] = tuple(device for device in ort.get_ep_devices() if device.ep_name.lower() == name.lower())
    return _plugged[name]


def _device(row: Provider, devices: tuple[Any, ...], passed: dict[str, str]) -> Any:
    """Of the kind that `device_type` asks for (else NPU before GPU before CPU) the `device_id`-th."""
    named = passed.pop("device_type", "NPU")
    if not named.startswith(("CPU", "GPU", "NPU")):
        raise ProviderError(
            f"{row.ort}: its plugin runs on one device, such as CPU, GPU, GPU.1 or NPU, not on {named}; name one of "
            f"them, or take {row.packages[-1]} in an environment of its own"
        )
    asked = named.partition(".")
    order = {"NPU": 0, "GPU": 1, "CPU": 2}
    kinds = [device.device.type.name for device in devices]
    kind = asked[0] if "device_type" in row.options else min(kinds, key=lambda kind: order.get(kind, 3))
    found = [device for device, its in zip(devices, kinds, strict=True) if its == kind]
    index = int(passed.pop("device_id", asked[2] or "0"))
    if index >= len(found):
        raise ProviderError(f"{row.ort} has no device {kind} {index} here; it has {', '.join(kinds)}")
    return found[index]
