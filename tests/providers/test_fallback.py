"""What falls back on a provider that is really there: OpenVINO on the CPU. Skipped where the package is absent.

pip install onnxruntime-openvino onnx pytest    (an environment of its own), then: pytest tests/providers
"""

import dataclasses
import json
from pathlib import Path

import onnx
import pytest
from onnx import helper

from runtime.__main__ import main
from runtime.bundle import Bundle, sha256
from runtime.errors import ProviderError
from runtime.facts import Stored, read_facts, write_facts
from runtime.session import Session
from tests.runtime import tiny_bundle

onnxruntime = pytest.importorskip("onnxruntime")
OPENVINO, CPU = "OpenVINOExecutionProvider", "CPUExecutionProvider"
pytestmark = pytest.mark.skipif(
    OPENVINO not in onnxruntime.get_available_providers(), reason="needs onnxruntime-openvino"
)
SIDE, WIDTH = 4, tiny_bundle.WIDTH
MACS = {"mix": SIDE * SIDE * tiny_bundle.CHANNELS**2 * 9, "attend": 2 * tiny_bundle.TOKENS**2 * WIDTH}


def doctored(folder: Path, attention: int) -> Path:
    """A bundle whose UNet holds a MultiHeadAttention, which OpenVINO leaves to the CPU, said to cost `attention`."""
    tiny_bundle.bundle(folder, "sd15")
    path = folder / "unet" / "model.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        node.name = {"Conv": "mix"}.get(node.op_type, node.output[0])
        node.input[:] = ["attended" if name == "encoder_hidden_states" else name for name in node.input]
    states = ["encoder_hidden_states"] * 3
    model.graph.node.insert(
        0,
        helper.make_node(
            "MultiHeadAttention", states, ["attended"], name="attend", domain="com.microsoft", num_heads=2
        ),
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    facts = read_facts(folder / "bundle.json")
    stored = Stored("unet/model.onnx", path.stat().st_size, sha256(path))
    unet = dataclasses.replace(
        facts.components["unet"], files=(stored,), macs={"mix": MACS["mix"], "attend": attention}
    )
    write_facts(folder, dataclasses.replace(facts, components={**facts.components, "unet": unet}))
    return folder


def test_a_heavy_operator_that_openvino_lacks_is_refused_by_its_name(tmp_path):
    bundle = Bundle.open(doctored(tmp_path / "b", attention=MACS["mix"]))
    with pytest.raises(ProviderError) as refused:
        Session(bundle, "unet", provider="openvino").load()
    assert str(refused.value).startswith(
        f"unet: only 50 % of the compute would run on {OPENVINO}, 90 % is wanted; the rest on {CPU}: "
        "MultiHeadAttention 50 % (nodes: 1)"
    )


def test_it_runs_where_fallback_is_allowed_and_tells(tmp_path, capsys, caplog):
    folder = doctored(tmp_path / "b", attention=MACS["mix"])
    draw = ["generate", "a", "--model", str(folder), "--provider", "openvino", "-s", "1", "--json"]
    draw += ["-o", str(tmp_path / "a.png")]
    assert main(draw) == 2
    assert "MultiHeadAttention" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
    assert main([*draw, "--allow-fallback"]) == 0
    provider = json.loads(capsys.readouterr().out)["provider"]
    assert provider["ran"] == OPENVINO
    assert provider["macs_share"]["unet"] == pytest.approx(0.5)
    fallen = [part for part in provider["fallbacks"] if part["component"] == "unet"]
    assert [(part["operator"], part["provider"], part["nodes"]) for part in fallen] == [("MultiHeadAttention", CPU, 1)]
    assert any(line.startswith("unet: 50 % of the compute") for line in caplog.messages)


def test_a_light_one_may_fall_back_unless_strict(tmp_path):
    bundle = Bundle.open(doctored(tmp_path / "b", attention=MACS["mix"] // 20))
    with Session(bundle, "unet", provider="openvino") as unet:
        assert 0.9 < unet.assignment.share < 1
    with pytest.raises(ProviderError, match=r"unet: OpenVINOExecutionProvider cannot run it .*leave --strict out"):
        Session(bundle, "unet", provider="openvino", fallback="never").load()


def test_a_graph_that_fits_is_wholly_on_it_even_if_strict(tmp_path, capsys):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15")
    with Session(Bundle.open(folder), "unet", provider="openvino", fallback="never") as unet:
        assert set(unet.assignment.nodes) == {OPENVINO}
    assert main(["inspect", str(folder), "--provider", "openvino"]) == 0
    shown = capsys.readouterr().out
    assert any(line.split()[:2] == ["Conv", OPENVINO] for line in shown.splitlines())
