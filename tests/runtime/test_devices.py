"""What `doctor` says of a machine that is not as it should be, and of drivers; each faked by hand."""

import os
import platform
from types import SimpleNamespace

import onnxruntime
import pytest

from runtime import devices, ort
from runtime.errors import ProviderError
from runtime.providers import PROVIDERS, Provider

ODD = Provider(
    "odd",
    "OddExecutionProvider",
    ("odd",),
    "",
    ("linux", "win32", "darwin"),
    "dynamic",
    (),
    libraries=dict.fromkeys(("linux", "win32", "darwin"), ("libsurely_not_here.so.7",)),
)


class Refusing:
    """Session options whose provider does not start."""

    def has_providers(self):
        return False

    def add_provider(self, name, options):
        raise RuntimeError("cannot open\nthe device")


@pytest.mark.parametrize(("chosen", "first"), [({}, ""), ({"device_id": "3"}, "check device_id, or ")])
def test_a_provider_that_does_not_start_names_the_drivers_missing_libraries(chosen, first, monkeypatch):
    monkeypatch.setattr(ort, "require", lambda onnxruntime, row: ())
    with pytest.raises(ProviderError) as told:
        ort.add_provider(onnxruntime, Refusing(), ODD, chosen)
    assert str(told.value) == (
        "OddExecutionProvider does not start (cannot open the device); "
        f"{first}install the driver that has libsurely_not_here.so.7"
    )


@pytest.mark.parametrize(
    ("machine", "environment", "emulated"),
    [
        ("AMD64", {"PROCESSOR_IDENTIFIER": "AMD64 Family 25 Model 97"}, True),
        ("x86_64", {}, True),
        ("AMD64", {"PROCESSOR_IDENTIFIER": "ARMv8 (64-bit) Family 8 Model 1 Revision 201, Qualcomm"}, False),
        ("AMD64", {"PROCESSOR_ARCHITEW6432": "ARM64"}, False),
        ("ARM64", {}, False),
    ],
)
def test_qnn_is_emulated_on_x86_alone(machine, environment, emulated, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for name in ("PROCESSOR_ARCHITEW6432", "PROCESSOR_IDENTIFIER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ("soc_model" in ort.settled(PROVIDERS["qnn"], {"backend_type": "cpu"})) == emulated


@pytest.mark.parametrize("named", ["AUTO", "AUTO:NPU,CPU", "MULTI:GPU.1,CPU"])
def test_a_plugin_runs_on_one_device(named):
    there = (SimpleNamespace(device=SimpleNamespace(type=SimpleNamespace(name="CPU"))),)
    with pytest.raises(
        ProviderError, match=f"runs on one device, such as CPU, GPU, GPU.1 or NPU, not on {named}; name"
    ):
        ort._device(PROVIDERS["openvino"], there, {"device_type": named})


def disk():
    (finding,) = devices._disk()
    return finding


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path))
    assert "free at" in disk().said

    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(devices.tempfile, "TemporaryFile", refuse)
    found = disk()
    assert (found.level, found.remedy) == ("advice", "set EPD_CACHE to a folder of yours")
    assert "cannot be written (Permission denied)" in found.said


def test_a_cache_on_a_drive_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(devices.Path, "is_dir", lambda path: False)
    monkeypatch.setenv("EPD_CACHE", os.fspath(devices.Path("no drive") / "folder"))
    assert "cannot be written" in disk().said


def test_no_home_is_told(monkeypatch):
    for name in ("EPD_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(devices.Path, "home", homeless)
    assert disk().said.startswith("no folder for the cache: no home directory")
