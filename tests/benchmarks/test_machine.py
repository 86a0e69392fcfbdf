"""The machine as figures need it described, from made-up files of the system."""

import os

import onnxruntime
import pytest

from benchmarks import machine as module
from benchmarks.machine import machine

TWO_CORES_OF_TWO_THREADS = "".join(
    f"processor\t: {thread}\nmodel name\t: Fast: Chip\nphysical id\t: 0\ncore id\t\t: {thread // 2}\n\n"
    for thread in range(4)
)


def test_this_machine():
    here = machine()
    assert here.versions["onnxruntime"] == onnxruntime.__version__
    assert {"python", "numpy", "epd-toolkit"} <= here.versions.keys()
    assert here.processor
    assert here.memory_bytes is None or here.memory_bytes > 1e9
    assert 1 <= here.threads <= os.cpu_count()
    assert here.processor in here.lines()[0]


def test_processors_of_linux(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text(TWO_CORES_OF_TWO_THREADS, encoding="utf-8")
    found = module._processors(file)
    assert [told["model name"] for told in found if told] == ["Fast: Chip"] * 4
    monkeypatch.setattr(module, "_processors", lambda: found)
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert (module._processor(), module._physical_cores()) == ("Fast: Chip", 2)


@pytest.mark.parametrize(
    ("supplies", "power"),
    [
        ({"AC": "1", "BAT0": None}, "mains"),
        ({"ADP1": "0", "BAT0": None}, "battery"),
        ({"AC": "0", "USBC": "1"}, "mains"),
        ({"BAT0": None}, None),
        ({}, None),
    ],
)
def test_power(supplies, power, tmp_path, monkeypatch):
    monkeypatch.setattr(module.sys, "platform", "linux")
    for name, online in supplies.items():
        (tmp_path / name).mkdir()
        if online is not None:
            (tmp_path / name / "online").write_text(online + "\n", encoding="utf-8")
    assert module._power(tmp_path) == power


def test_a_busy_machine_is_told():
    assert module.company(0.1) == "other programs took 10% of the processors meanwhile"
    assert module.company(0.9).startswith("THE MACHINE WAS BUSY, other programs took 90%")
    assert "not known" in module.company(None)
