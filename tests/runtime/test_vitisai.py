"""What Vitis AI is told, and what is read of AMD's NPU and software, on folders made like those of such a machine."""

import dataclasses
import json
import sys
from pathlib import Path

import onnxruntime
import pytest

from runtime import cache, cachekey, devices, ryzenai, vitisai
from runtime import session as sessions
from runtime.__main__ import main
from runtime.bundle import Bundle
from runtime.errors import ProviderError
from runtime.providers import PROVIDERS, check_options
from runtime.ryzenai import Npu, Software, hardware_id, npus, software
from runtime.session import Session
from runtime.vitisai import completed, configuration

VITISAI = PROVIDERS["vitisai"]
STRIX, KRACKAN, PHOENIX = Npu("17f0", "10", "1.0"), Npu("17f0", "20", "1.0"), Npu("1502", "00", "1.0")


@pytest.fixture
def bus(tmp_path) -> Path:
    """A PCI bus as Linux shows it."""
    cards = {"00:08.0": ("0x1022", "0x14e9", "0x00"), "c4:00.1": ("0x1022", "0x17f0", "0x20")}
    cards |= {"c5:00.1": ("0x1022", "0x1502", "0x00"), "c6:00.0": ("0x10de", "0x17f0", "0xa1"), "c7:00.0": ("0x1022",)}
    for address, words in cards.items():
        folder = tmp_path / "bus" / f"0000:{address}"
        folder.mkdir(parents=True)
        for name, word in zip(("vendor", "device", "revision"), words, strict=False):
            (folder / name).write_text(f"{word}\n", encoding="utf-8")
    return tmp_path / "bus"


@pytest.fixture
def bundle(bundles) -> Bundle:
    return Bundle.open(bundles["sd3"])


@pytest.fixture(autouse=True)
def _machine(monkeypatch, tmp_path):
    """A machine with a Strix and Ryzen AI 1.8.0, whose cache is empty."""
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XLNX_ONNX_EP_REPORT_FILE", "report.json")  # so that it is not set for the tests to come
    monkeypatch.setattr(vitisai, "npus", lambda: [STRIX])
    monkeypatch.setattr(vitisai, "software", lambda: Software(tmp_path, None, (1, 8, 0), None))


def filled(bundle: Bundle, component: str = "transformer", **chosen: str) -> dict[str, str]:
    return completed(VITISAI, bundle, component, chosen)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /sys")
def test_the_npus_of_a_bus(bus, tmp_path):
    assert [str(npu) for npu in npus(bus, tmp_path)] == [
        "AMD Krackan (1022:17f0 revision 20)",
        "AMD Phoenix or Hawk Point (1022:1502 revision 00)",
    ]
    assert npus(bus, tmp_path)[0].driver is None
    (tmp_path / "amdxdna").mkdir()
    assert npus(bus, tmp_path)[0].driver.startswith("amdxdna of Linux ")
    (tmp_path / "amdxdna" / "version").write_text("2.21.260102\n", encoding="utf-8")
    assert npus(bus, tmp_path)[0].driver == "2.21.260102"
    assert npus(tmp_path / "none", tmp_path) == []


def test_windows_words_for_a_device():
    assert hardware_id("VEN_1022&DEV_17F0&SUBSYS_20CF1043&REV_10") == ("17f0", "10")
    assert hardware_id(r"PCI\VEN_1022&DEV_1502&REV_00") == ("1502", "00")
    assert hardware_id("VEN_10DE&DEV_17F0&REV_10") is None
    assert (STRIX.name, KRACKAN.name, Npu("17f0", "30", None).name) == ("Strix", "Krackan", "Strix or newer")
    assert (STRIX.integers_only, PHOENIX.integers_only) == (False, True)


def test_a_driver_too_old_is_one_of_windows(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    told = {"32.0.203.257": True, "32.0.203.280": False, "32.0.20102.3930": False, "unknown": False}
    assert {text: ryzenai.driver_too_old(Npu("17f0", "10", text)) for text in told} == told


@pytest.mark.parametrize(
    ("folder", "environment", "version"),
    [
        ("RyzenAI/1.7.1", None, (1, 7, 1)),
        ("ryzen_ai-1.8.0/venv", "base", (1, 8, 0)),
        ("software", "ryzen-ai-1.6.0", (1, 6, 0)),
        ("software", "py3.12", None),
        (None, "ryzen-ai-1.8.0", (1, 8, 0)),
    ],
)
def test_the_release_of_an_installation(tmp_path, folder, environment, version):
    variables = {"PATH": str(tmp_path)} | ({"CONDA_DEFAULT_ENV": environment} if environment else {})
    if folder:
        (tmp_path / folder).mkdir(parents=True)
        variables["RYZEN_AI_INSTALLATION_PATH"] = str(tmp_path / folder)
    here = software(variables)
    assert here.version == version
    assert here.installation == (tmp_path / folder if folder else None)
    assert software({"RYZEN_AI_INSTALLATION_PATH": str(tmp_path / "gone")}).installation is None


def test_the_configuration_of_a_float_graph(bundle, tmp_path):
    told = filled(bundle)
    check_options(VITISAI, told)
    content = json.loads(Path(told["config_file"]).read_text(encoding="utf-8"))
    assert content == configuration("transformer")
    assert [one["name"] for one in content["passes"]] == ["init", "vaiml_partition"]
    assert content["targets"] == [{"name": "VAIML", "pass": ["init", "vaiml_partition"]}]
    settings = {
        name: configuration(name)["passes"][1]["vaiml_config"] for name in ("transformer", "unet", "vae_decoder")
    }
    layouts = {name: one["preferred_data_storage"] for name, one in settings.items()}
    assert layouts == {"transformer": "unvectorized", "unet": "vectorized", "vae_decoder": "vectorized"}
    assert configuration("text_encoder_2")["passes"][1]["vaiml_config"]["preferred_data_storage"] == "unvectorized"
    assert all(one["optimize_level"] in (1, 2, 3) for one in settings.values())
    assert list((tmp_path / "cache" / "tables" / "vitisai").iterdir()) == [Path(told["config_file"])]
    assert filled(bundle) == told


def test_what_the_user_gives_stays(bundle, tmp_path):
    own = tmp_path / "own.json"
    own.write_text("{}", encoding="utf-8")
    given = {"config_file": str(own), "cache_dir": str(tmp_path / "mine"), "cache_key": "mine"}
    assert filled(bundle, **given) == given
    with pytest.raises(ProviderError, match=r"no config_file .*; give a file"):
        filled(bundle, config_file=str(tmp_path / "none.json"))
    cpu = PROVIDERS["cpu"]
    assert completed(cpu, bundle, "transformer", {}) == {}


def test_each_generation_has_its_options(bundle, monkeypatch, tmp_path):
    with pytest.raises(ProviderError, match=r"xclbin is for Phoenix and Hawk Point, on AMD Strix \(1022:17f0"):
        filled(bundle, xclbin="x")
    monkeypatch.setattr(vitisai, "npus", lambda: [PHOENIX])
    with pytest.raises(
        ProviderError, match=r"Phoenix or Hawk Point .* runs integer graphs alone, .*--provider directml"
    ):
        filled(bundle)
    part = dataclasses.replace(bundle.facts.components["transformer"], precision="int8")
    components = {**bundle.facts.components, "transformer": part}
    bundle = dataclasses.replace(bundle, facts=dataclasses.replace(bundle.facts, components=components))
    assert filled(bundle)["target"] == "X1"
    assert not {"config_file", "xclbin"} & filled(bundle).keys()
    overlay = tmp_path / "voe-4.0-win_amd64" / "xclbins" / "phoenix" / "4x4.xclbin"
    overlay.parent.mkdir(parents=True)
    overlay.touch()
    assert filled(bundle)["xclbin"] == str(overlay)
    with pytest.raises(ProviderError, match=r"target X2 needs Strix or newer, here is AMD Phoenix"):
        filled(bundle, target="X2")


def test_a_cache_that_cannot_be_written_is_told(bundle, tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").touch()
    with pytest.raises(ProviderError, match="set EPD_CACHE to a folder that can be written"):
        filled(bundle)
    monkeypatch.delenv("EPD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert filled(bundle, log_level="info") == {"log_level": "info"}
    assert "Vitis AI compiles with its own settings" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "X3"}, "target must be X2 or X1"),
        ({"encryption_key": "secret"}, "encryption_key must be 64 hexadecimal digits"),
        ({"opt_level": "4"}, "opt_level must be 0 or 1 or 2 or 3 or 65536"),
        ({"cacheDir": "x"}, "has no option 'cacheDir'"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ProviderError, match=words):
        check_options(VITISAI, options)


def test_a_session_gives_them_to_the_provider(bundle, monkeypatch, tmp_path):
    given = {}

    def add(ort, options, row, chosen, *, shared):
        given.update(chosen)
        return [("CPUExecutionProvider", {})]  # as if it could not start

    monkeypatch.setattr(cache, "add_provider", add)
    for module in (cachekey, sessions):
        monkeypatch.setattr(module, "require", lambda ort, row: ())
    with pytest.raises(ProviderError, match="asked for VitisAIExecutionProvider, onnxruntime would run it on CPU"):
        Session(bundle, "transformer", provider="vitisai", provider_options={"log_level": "info"}).load()
    assert given.pop("cache_key") == "model"
    assert Path(given.pop("cache_dir")).parent == tmp_path / "cache" / "tables" / "compiled"
    assert given == filled(bundle, log_level="info")


def test_where_it_is_not_nothing_is_written_for_it(bundle, tmp_path):
    with pytest.raises(ProviderError, match="VitisAIExecutionProvider is not in the installed onnxruntime"):
        Session(bundle, "transformer", provider="vitisai").load()
    assert not (tmp_path / "cache").exists()


def test_the_cache_key_holds_the_release(bundle, monkeypatch):
    monkeypatch.setattr(cachekey, "require", lambda ort, row: ())
    keys = []
    for release in ((1, 7, 1), (1, 8, 0)):
        monkeypatch.setattr(cachekey, "software", lambda release=release: Software(None, None, release, None))
        keys.append(cachekey.key_of(onnxruntime, VITISAI, {}, bundle, bundle.graph("transformer")))
    assert cachekey.changes(*keys) == ["software 1.7.1 -> 1.8.0"]


def test_doctor_tells_of_npu_and_software(monkeypatch, tmp_path, capsys):
    here = Software(tmp_path, "ryzen-ai-1.8.0", (1, 8, 0), tmp_path / "xrt-smi")
    monkeypatch.setattr(ryzenai, "software", lambda: here)
    monkeypatch.setattr(ryzenai, "npus", lambda: [KRACKAN])
    monkeypatch.setenv("RYZEN_AI_INSTALLATION_PATH", str(tmp_path))
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert f"Ryzen AI: 1.8.0 in {tmp_path}, environment ryzen-ai-1.8.0, {tmp_path / 'xrt-smi'}" in told
    assert "this environment has not its onnxruntime\n        conda activate ryzen-ai-1.8.0" in told
    assert "NPU: AMD Krackan (1022:17f0 revision 20), driver 1.0" in told
    assert main(["devices"]) == 0
    assert "vitisai      no, AMD Krackan (1022:17f0 revision 20)" in capsys.readouterr().out
    monkeypatch.setattr(ryzenai, "software", lambda: Software(None, None, None, None))
    assert "no folder" in next(one.said for one in devices._npu() if one.what == "Ryzen AI")
