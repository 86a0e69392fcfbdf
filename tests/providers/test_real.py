"""Providers that start without hardware: run in an environment of each, skipped where its package is not.

EPD_TEST_BUNDLE is a bundle for that provider (see `.ci/run`), to be drawn from; without it only what needs no bundle
is tested. PROVIDER_HARDWARE=none says that there is no device (no Vulkan adapter), which must be an error then.
"""

import json
import os

import numpy as np
import pytest
from PIL import Image

from runtime.__main__ import main
from runtime.devices import _ADD
from runtime.ort import add_provider, base_wheels, failures, installed, onnxruntime
from runtime.providers import PROVIDERS

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
    pictures = []
    for provider in ("cpu", name):
        # allowed: onnxruntime-webgpu 1.27 records only some of the nodes that it runs
        status, picture = draw(tmp_path, "--provider", provider, "--allow-fallback")
        told = capsys.readouterr()
        assert status == 0, told.err
        assert json.loads(told.out)["provider"]["ran"] == PROVIDERS[provider].ort
        pictures.append(np.asarray(Image.open(picture), np.float64))
    error = ((pictures[0] - pictures[1]) ** 2).mean()
    assert error < 255**2 / 10**3.5, "PSNR under 35 dB"


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
