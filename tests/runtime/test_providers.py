"""The table of providers against onnxruntime itself, on the CPU; hardware is faked by hand."""

import json
import sys
import time
from types import SimpleNamespace

import onnxruntime
import pytest

from runtime import devices, ort, providers
from runtime.__main__ import main
from runtime.bundle import Bundle
from runtime.errors import ProviderError
from runtime.ort import add_provider, settled
from runtime.providers import CPU, PROVIDERS, check_options, provider_of
from runtime.session import Session

ABSENT = [row for row in PROVIDERS.values() if row.ort not in onnxruntime.get_available_providers()]


@pytest.mark.parametrize("row", PROVIDERS.values(), ids=lambda row: row.name)
def test_a_row_keeps_its_own_rules(row):
    for spelling in (row.name, row.name.upper(), row.ort, row.ort.lower(), row.name.replace("-", "_")):
        assert provider_of(spelling) is row
    assert set(row.systems) <= set(providers.SYSTEMS)
    assert "pip install" in row.install
    defaults = {name: option.default for name, option in row.options.items() if option.default is not None}
    if row.options:
        check_options(row, defaults | row.emulated)
    assert row.cache is None or row.options[row.cache].kind == "path"
    options = onnxruntime.SessionOptions()
    for name, value in row.session.items():
        assert isinstance(value, bool) or hasattr(type(getattr(options, name)), value)


def test_onnxruntime_knows_every_name():
    known = set(onnxruntime.get_all_providers())
    missing = {row.ort for row in PROVIDERS.values()} - known
    assert missing <= {"WindowsML", "NvTensorRTRTXExecutionProvider", "RyzenAILightExecutionProvider"}, known


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cuda", {"use_tf33": "1"}, r"has no option 'use_tf33'; it has arena_extend_strategy, .*use_tf32"),
        ("cuda", {"use_tf32": "yes"}, "use_tf32 must be 0 or 1, got 'yes'"),
        ("cuda", {"device_id": "-1"}, "device_id must be a whole number, got '-1'"),
        (
            "cuda",
            {"cudnn_conv_algo_search": "heuristic"},
            "must be EXHAUSTIVE or HEURISTIC or DEFAULT, got 'heuristic'",
        ),
        ("vitisai", {"cache_dir": ""}, "cache_dir must be a path, got ''"),
        ("openvino", {"device_type": "XPU"}, r"device_type must be CPU, GPU, GPU\.1, NPU, .*, got 'XPU'"),
        ("openvino", {"device_type": "AUTO:NPU,"}, "device_type must be"),
        ("cpu", {"threads": "2"}, "takes no provider options"),
    ],
)
def test_what_onnxruntime_would_take_without_a_word_is_refused(name, options, words, capsys):
    with pytest.raises(ProviderError, match=words):
        check_options(PROVIDERS[name], options)
    typed = [f"--provider-option={key}={value}" for key, value in options.items()]
    assert main(["generate", "x", "--provider", name, *typed]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("row", ABSENT, ids=lambda row: row.name)
def test_one_that_is_not_here_is_refused_at_once(row, capsys, tmp_path):
    for spelling in (row.name, row.ort):
        started = time.perf_counter()
        assert main(["generate", "x", "--provider", spelling, "-o", str(tmp_path / "x.png")]) == 2
        assert time.perf_counter() - started < 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert told.startswith("error: ")
        assert row.install in told if sys.platform in row.systems else "here choose from cpu" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["CPU", "GPU.1", "NPU", "AUTO", "AUTO:NPU,CPU", "HETERO:GPU.0,CPU"])
def test_openvinos_devices(text):
    check_options(PROVIDERS["openvino"], {"device_type": text})


def test_the_provider_is_added_once_to_the_callers_options():
    options = onnxruntime.SessionOptions()
    for _ in range(2):
        add_provider(onnxruntime, options, CPU, {})
    ran = onnxruntime.InferenceSession(devices._ADD, options).get_providers()
    assert ran == ["CPUExecutionProvider"]


def test_options_of_several_sessions_are_given_no_provider_that_is_built_in():
    options = onnxruntime.SessionOptions()
    named = add_provider(onnxruntime, options, CPU, {}, shared=True)
    assert named == [("CPUExecutionProvider", {})]
    assert not options.has_providers()


def test_another_provider_in_the_callers_options_is_told(bundles, monkeypatch):
    options = onnxruntime.SessionOptions()
    options.add_provider("CPUExecutionProvider", {})
    row = providers.Provider(
        "other", "OtherExecutionProvider", ("other",), "other", tuple(providers.SYSTEMS), "dynamic", ()
    )
    session = Session(Bundle.open(bundles["sd15"]), "unet", session_options=options)
    session._row, session.provider = row, row.ort
    monkeypatch.setattr(ort, "require", lambda onnxruntime, row: ())
    with pytest.raises(ProviderError, match="OtherExecutionProvider"):
        session.load()


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A plugin package that is installed, with a library that is none."""
    name = "plugin_that_is_damaged"
    library = tmp_path / "library.so"
    library.write_bytes(b"no library")
    (tmp_path / f"{name}.py").write_text(
        f"def get_library_path():\n    return {str(library)!r}\ndef backend():\n    return 'here'\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return providers.Provider(
        "odd",
        "OddExecutionProvider",
        ("onnxruntime", "odd"),
        "odd",
        tuple(providers.SYSTEMS),
        "static",
        ("fp16",),
        {"backend_path": providers.Option("path"), "backend_type": providers.Option()},
        plugins=(providers.Plugin("odd", name, {"backend_path": "backend"}),),
    )


def test_a_library_that_does_not_load_is_one_line(plugin):
    with pytest.raises(ProviderError, match=r"OddExecutionProvider: its library .*library\.so does not load") as told:
        ort.require(onnxruntime, plugin)
    assert "\n" not in str(told.value)


def test_a_plugin_answers_its_own_options(plugin):
    assert settled(plugin, {}) == {"backend_path": "here"}
    assert settled(plugin, {"backend_path": "there"}) == {"backend_path": "there"}
    assert settled(plugin, {"backend_type": "cpu"}) == {"backend_type": "cpu"}


def test_a_library_without_a_device_is_told(plugin, monkeypatch):
    monkeypatch.setattr(ort, "_registered", lambda onnxruntime, name, library: ())
    with pytest.raises(ProviderError, match="finds no device; install or update the device's driver"):
        ort.require(onnxruntime, plugin)


@pytest.mark.parametrize(
    ("name", "passed", "chosen"),
    [
        ("openvino", {"device_type": "CPU"}, 0),
        ("openvino", {"device_type": "GPU"}, 1),
        ("openvino", {"device_type": "GPU.1"}, 2),
        ("openvino", {"device_type": "NPU"}, 3),
        ("qnn", {}, 3),
        ("tensorrt-rtx", {"device_id": "0"}, 3),
    ],
)
def test_the_device_of_a_plugin(name, passed, chosen):
    there = tuple(SimpleNamespace(device=SimpleNamespace(type=SimpleNamespace(name=kind))) for kind in DEVICES)
    assert ort._device(PROVIDERS[name], there, passed) is there[chosen]
    assert passed == {}
    with pytest.raises(ProviderError, match=r"has no device .* 5 here; it has CPU, GPU, GPU, NPU"):
        ort._device(PROVIDERS[name], there, {"device_type": "GPU.5", "device_id": "5"})


DEVICES = ("CPU", "GPU", "GPU", "NPU")


def test_two_onnxruntimes_are_told(monkeypatch, capsys):
    two = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.0", "onnxruntime-qnn": "2.7.0"}
    monkeypatch.setattr(ort, "_version", two.get)
    words = "two onnxruntime packages break each other: onnxruntime, onnxruntime-gpu; pip uninstall -y onnxruntime"
    with pytest.raises(ProviderError, match=words):
        ort.onnxruntime()
    assert main(["doctor"]) == 2
    printed = capsys.readouterr()
    assert "bad     onnxruntime: two onnxruntime packages" in printed.out
    assert printed.err.startswith("error: nothing can run here: two onnxruntime packages")
    assert printed.err.count("\n") == 1


def test_an_old_qnn_package_is_a_base_wheel(monkeypatch):
    monkeypatch.setattr(ort, "_version", {"onnxruntime": "1.23.0", "onnxruntime-qnn": "1.23.0"}.get)
    assert list(ort.base_wheels()) == ["onnxruntime", "onnxruntime-qnn"]


def test_a_broken_onnxruntime_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what Python does for an import that is barred
    with pytest.raises(ProviderError, match=r"onnxruntime cannot be imported .*pip install onnxruntime"):
        ort.onnxruntime()
    assert main(["devices", "--json"]) == 0
    assert all("cannot be imported" in row["why"] for row in json.loads(capsys.readouterr().out)["devices"])


def test_devices_tells_of_every_provider(capsys):
    assert main(["devices", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["devices"]}
    assert list(rows) == list(PROVIDERS)
    assert rows["cpu"]["why"] is None
    for row in ABSENT:
        assert rows[row.name]["why"]
        assert "pip install" in rows[row.name]["install"]
    assert main(["devices"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("cpu          ready")
    assert all(row.install in text for row in ABSENT if sys.platform in row.systems)


def test_a_provider_that_only_seems_to_be_here_is_told(monkeypatch):
    monkeypatch.setattr(ort, "require", lambda onnxruntime, row: ())
    monkeypatch.setattr(devices, "require", lambda onnxruntime, row: ())
    with pytest.raises(ProviderError, match="CUDAExecutionProvider does not start"):
        devices._start(onnxruntime, PROVIDERS["cuda"])


def test_a_plugin_that_is_registered_stays_one(plugin, monkeypatch):
    ours = (SimpleNamespace(ep_name=plugin.ort),)
    monkeypatch.setitem(ort._plugged, plugin.ort, ours)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [plugin.ort])  # as it does from then on
    assert ort.require(onnxruntime, plugin) == ours


def test_doctor_finds_this_machine_able(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RYZEN_AI_INSTALLATION_PATH", str(tmp_path / "gone"))
    monkeypatch.setenv("EPD_CACHE", str(tmp_path))
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    told = {finding["what"]: finding for finding in findings}
    assert told["onnxruntime"]["level"] == "ok"
    assert told["Ryzen AI"]["level"] == "advice"
    assert {"disk", "memory"} <= set(told)
    assert all(finding["remedy"] and "\n" not in finding["remedy"] for finding in findings if finding["level"] != "ok")


@pytest.mark.parametrize(
    ("version", "level"), [("1.22.1", "bad"), ("1.23.0", "ok"), ("1.32.4", "ok"), ("1.40.0", "advice")]
)
def test_doctor_reads_the_release(monkeypatch, version, level):
    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert next(devices._wheels()).level == level


def test_windows_ml_is_a_catalogue(monkeypatch):
    entry = SimpleNamespace(name="VitisAIExecutionProvider", library_path="C:/vitis.dll", ensure_ready=lambda: None)
    catalogue = SimpleNamespace(find_all_providers=lambda: [entry])
    monkeypatch.setitem(sys.modules, "windowsml", SimpleNamespace(EpCatalog=lambda: catalogue, __spec__=object()))
    ort._catalogued.cache_clear()
    try:
        assert ort.library_of(PROVIDERS["vitisai"]) == "C:/vitis.dll"
        assert ort.library_of(PROVIDERS["migraphx"]) is None
        assert "name one that it has here: vitisai" in ort._catalogue_told(PROVIDERS["windowsml"])
    finally:
        ort._catalogued.cache_clear()
        ort._kept.clear()
