"""What falls back on a provider that is really there: OpenVINO on the CPU, or WebGPU on a software Vulkan device.

Skipped where neither package is here, or no device: pip install onnxruntime-openvino (or onnxruntime-webgpu) onnx
pytest (an environment of its own), then: pytest tests/providers
"""

import dataclasses
import json
import os
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
CPU = "CPUExecutionProvider"
LACKS = {  # an attention that the provider leaves to the CPU: opset, domain and options
    "OpenVINOExecutionProvider": (18, "com.microsoft", "MultiHeadAttention", {"num_heads": 2}),
    "WebGpuExecutionProvider": (23, "", "Attention", {"q_num_heads": 2, "kv_num_heads": 2}),
}
HERE = next((one for one in onnxruntime.get_available_providers() if one in LACKS), CPU)
pytestmark = [
    pytest.mark.skipif(HERE == CPU, reason="needs onnxruntime-openvino or onnxruntime-webgpu"),
    pytest.mark.skipif(os.environ.get("PROVIDER_HARDWARE") == "none", reason="no device here"),
]
OPSET, DOMAIN, KIND, HEADS = LACKS.get(HERE, LACKS["OpenVINOExecutionProvider"])
SIDE, WIDTH = 4, tiny_bundle.WIDTH
MACS = {"mix": SIDE * SIDE * tiny_bundle.CHANNELS**2 * 9, "attend": 2 * tiny_bundle.TOKENS**2 * WIDTH}


def doctored(folder: Path, attention: int | None) -> Path:
    """A bundle that gives the compute of its UNet's nodes.

    The UNet holds an attention, too, that the provider leaves to the CPU: said to cost `attention`, None for none.
    """
    tiny_bundle.bundle(folder, "sd15")
    path, macs = folder / "unet" / "model.onnx", {"mix": MACS["mix"]}
    model = onnx.load(path)
    for node in model.graph.node:
        node.name = {"Conv": "mix"}.get(node.op_type, node.output[0])
    if attention is not None:
        for node in model.graph.node:
            node.input[:] = ["attended" if name == "encoder_hidden_states" else name for name in node.input]
        states, macs["attend"] = ["encoder_hidden_states"] * 3, attention
        model.graph.node.insert(0, helper.make_node(KIND, states, ["attended"], name="attend", domain=DOMAIN, **HEADS))
        model.opset_import[0].version = OPSET
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    facts = read_facts(folder / "bundle.json")
    stored = Stored("unet/model.onnx", path.stat().st_size, sha256(path))
    unet = dataclasses.replace(facts.components["unet"], files=(stored,), macs=macs)
    write_facts(folder, dataclasses.replace(facts, components={**facts.components, "unet": unet}))
    return folder


def test_a_heavy_operator_that_the_provider_lacks_is_refused_by_its_name(tmp_path):
    bundle = Bundle.open(doctored(tmp_path / "b", attention=MACS["mix"]))
    with pytest.raises(ProviderError) as refused:
        Session(bundle, "unet", provider=HERE).load()
    assert str(refused.value).startswith(
        f"unet: only 50 % of the compute would run on {HERE}, 90 % is wanted; the rest on {CPU}: {KIND} 50 % (nodes: 1)"
    )


def test_it_runs_where_fallback_is_allowed_and_tells(tmp_path, capsys, caplog):
    folder = doctored(tmp_path / "b", attention=MACS["mix"])
    draw = ["generate", "a", "--model", str(folder), "--provider", HERE, "-s", "1", "--json"]
    draw += ["-o", str(tmp_path / "a.png")]
    assert main(draw) == 2
    assert KIND in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
    assert main([*draw, "--allow-fallback"]) == 0
    provider = json.loads(capsys.readouterr().out)["provider"]
    assert provider["ran"] == HERE
    assert provider["macs_share"]["unet"] == pytest.approx(0.5)
    fallen = [part for part in provider["fallbacks"] if part["component"] == "unet"]
    assert tuple(fallen[0][key] for key in ("operator", "provider", "nodes")) == (KIND, CPU, 1)
    assert sum(part["share"] for part in fallen[1:]) == 0  # sizes, which WebGPU leaves to the CPU
    assert any(line.startswith("unet: 50 % of the compute") for line in caplog.messages)


def test_a_light_one_may_fall_back_unless_strict(tmp_path):
    bundle = Bundle.open(doctored(tmp_path / "b", attention=MACS["mix"] // 20))
    with Session(bundle, "unet", provider=HERE) as unet:
        assert 0.9 < unet.assignment.share < 1
    with pytest.raises(ProviderError, match=rf"unet: {HERE} cannot run it .*leave --strict out"):
        Session(bundle, "unet", provider=HERE, fallback="never").load()


def test_a_graph_that_fits_is_wholly_on_it(tmp_path, capsys):
    """Strictly so on OpenVINO; WebGPU leaves to the CPU what computes sizes."""
    folder = doctored(tmp_path / "b", attention=None)
    strict = HERE == "OpenVINOExecutionProvider"
    with Session(Bundle.open(folder), "unet", provider=HERE, fallback="never" if strict else "limited") as unet:
        assert unet.assignment.share == 1
        assert not strict or set(unet.assignment.nodes) == {HERE}
    if not strict:
        return  # WebGPU's record has gaps, and the other components of so small a bundle no compute to fill them by
    assert main(["inspect", str(folder), "--provider", HERE]) == 0
    shown = capsys.readouterr().out
    assert any(line.split()[-4:] == [HERE, "1", "100", "%"] for line in shown.splitlines())
