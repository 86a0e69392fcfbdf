"""Providers that start without hardware: run in an environment of each, skipped where its package is not.

EPD_TEST_BUNDLE is a bundle for that provider (see `.ci/run`), to be drawn from; without it only what needs no bundle
is tested. PROVIDER_HARDWARE=none says that there is no device (no Vulkan adapter), which must be an error then.
"""

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import directions
from runtime.__main__ import main
from runtime.assignment import RECORD, recorded
from runtime.bundle import Bundle
from runtime.devices import _ADD
from runtime.ort import add_provider, base_wheels, failures, installed, onnxruntime
from runtime.pipeline import find
from runtime.providers import PROVIDERS
from runtime.session import Session
from tests.runtime import tiny_bundle

REAL = ("openvino", "webgpu", "qnn")
BUNDLE = os.environ.get("EPD_TEST_BUNDLE")
NONE = os.environ.get("PROVIDER_HARDWARE") == "none"
PROMPT = "a large red circle at the top left on a navy background"


def here(name):
    row = PROVIDERS[name]
    return row.packages[-1] in base_wheels() or bool(installed(plugin.package for plugin in row.plugins))


@pytest.fixture(params=REAL)
def name(request):
    if not here(request.param):
        pytest.skip(f"no package of {request.param} in this environment")
    return request.param


def seen(name, capsys):
    assert main(["devices", "--json"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)["devices"]}[name]


def draw(folder, *options):
    picture = folder / f"{len(list(folder.iterdir()))}.png"
    model = ["--model", BUNDLE, "--solver", "euler", "--steps", "2"] if BUNDLE else []  # software Vulkan is slow
    status = main(["generate", PROMPT, "-s", "3", "-o", str(picture), "--json", *model, *options])
    return status, picture


def psnr(one, other):
    """In dB, of two PNG files."""
    first, second = (np.asarray(Image.open(file), np.float64) for file in (one, other))
    return 10 * np.log10(255**2 / max(((first - second) ** 2).mean(), 1e-9))


@pytest.mark.skipif(NONE, reason="no device here")
def test_it_is_found_and_starts(name, capsys):
    row = seen(name, capsys)
    assert row["why"] is None, row
    assert main(["doctor"]) == 0
    assert f"ok      {name}: starts" in capsys.readouterr().out


@pytest.mark.skipif(not NONE, reason="there is a device here")
def test_without_a_device_it_is_an_error_and_no_run_on_the_cpu(name, capsys, tmp_path):
    assert PROVIDERS[name].ort in seen(name, capsys)["why"]
    status, picture = draw(tmp_path, "--provider", name)
    told = capsys.readouterr()
    assert status == 2
    assert told.err.startswith("error: ")
    assert told.out == ""
    assert not picture.exists()


@pytest.mark.skipif(NONE or not BUNDLE, reason="needs EPD_TEST_BUNDLE and a device")
def test_it_draws_the_picture_that_the_cpu_draws(name, capsys, tmp_path):
    backbone = Bundle.open(find(BUNDLE)).backbone
    pictures = []
    for provider in ("cpu", name):
        status, picture = draw(tmp_path, "--provider", provider)
        told = capsys.readouterr()
        assert status == 0, told.err
        report = json.loads(told.out)["provider"]
        assert report["ran"] == PROVIDERS[provider].ort
        assert report["macs_share"][backbone] > 0.99
        pictures.append(picture)
    assert psnr(*pictures) > 35


@pytest.mark.skipif(NONE, reason="no device here")
def test_it_shares_the_points_of_a_step_with_the_cpu(name, capsys, caplog, tmp_path, monkeypatch):
    """Equal pictures, a division by measured speed, and calls of both at the same time."""
    if name == "qnn":
        pytest.skip("wants static graphs")
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15")
    spans = {PROVIDERS[one].ort: [] for one in ("cpu", name)}
    call = Session.__call__

    def timed(session, **given):
        started = time.perf_counter()
        answer = call(session, **given)
        time.sleep(0.02)  # of so small a graph the first call might end before the other begins
        spans[session.provider].append((started, time.perf_counter()))
        return answer

    def drawn(provider):
        options = ["--provider", provider, "--solver", "epd", "-k", "2", "--steps", "3", "--model", str(folder)]
        status, picture = draw(tmp_path, *options)
        told = capsys.readouterr()
        assert status == 0, told.err
        return picture, json.loads(told.out)

    alone, _ = drawn("cpu")
    measured, report = drawn(f"{name},cpu")
    assert report["directions"] == "spread"
    both = {PROVIDERS[name].ort, PROVIDERS["cpu"].ort}
    assert set(report["provider"]["ran"].split(",")) <= both  # one that got no points did not run
    assert re.search(
        rf"spread: 2 x 1 points and images: \d on {PROVIDERS[name].ort} \([^)]* s alone\), \d on ", caplog.text
    )
    monkeypatch.setattr(Session, "__call__", timed)
    monkeypatch.setattr(directions, "_speeds", lambda trial, points, profile: (directions.Speed(), directions.Speed()))
    halved, report = drawn(f"{name},cpu")
    assert set(report["provider"]["ran"].split(",")) == both
    assert "1 on CPUExecutionProvider (1 s alone)" in caplog.text
    assert min(psnr(alone, measured), psnr(alone, halved)) > 35
    ours, others = (spans[PROVIDERS[one].ort] for one in (name, "cpu"))
    assert any(max(one[0], other[0]) < min(one[1], other[1]) for one in ours for other in others)


@pytest.mark.skipif(NONE, reason="no device here")
def test_what_is_told_of_a_silent_provider_is_what_its_profile_says(name, tmp_path):
    """Of WebGPU's own nodes few are recorded; the CPU's all are, by the profile of a run."""
    if name == "qnn":
        pytest.skip("wants static graphs")
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    options.add_session_config_entry(RECORD, "1")
    add_provider(ort, options, PROVIDERS[name], {})
    path = tiny_bundle.bundle(tmp_path / "b", "sd15") / "text_encoder" / "model.onnx"
    session = ort.InferenceSession(path, options, enable_fallback=0)
    session.run(None, {one.name: np.ones((1, tiny_bundle.TOKENS), np.int64) for one in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = {e["name"].removesuffix("_kernel_time"): e["args"]["provider"] for e in events if e.get("cat") == "Node"}
    recorded_ones = {node.name for node in recorded(session) if node.provider == PROVIDERS["cpu"].ort}
    assert {node for node, provider in ran.items() if provider == PROVIDERS["cpu"].ort} <= recorded_ones


@pytest.mark.skipif(NONE, reason="no device here")
def test_options_reach_the_provider(name):
    wrong = {
        "openvino": ("device_type", "GPU.7"),
        "webgpu": ("preferredLayout", "HWCN"),
        "qnn": ("backend_path", "none"),
    }
    option, value = wrong[name]
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    with pytest.raises(failures(ort)):
        start(ort, options, PROVIDERS[name], {option: value})


def start(ort, options, row, chosen):
    add_provider(ort, options, row, chosen)
    ran = ort.InferenceSession(_ADD, options, enable_fallback=0).get_providers()
    if ran[0] != row.ort:
        raise ValueError(ran)


def test_an_unknown_option_is_refused(name, capsys, tmp_path):
    status, _ = draw(tmp_path, "--provider", name, "--provider-option", "fastest=1")
    assert status == 2
    assert "has no option 'fastest'; it has" in capsys.readouterr().err
