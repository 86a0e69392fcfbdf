"""What falls back, and what of that is refused: on records as data, and on the CPU for real."""

import json

import numpy as np
import onnxruntime
import pytest
import tiny_bundle
from onnx import TensorProto, helper, numpy_helper

from runtime import Pipeline, assignment
from runtime.__main__ import main
from runtime.assignment import Node, assign, check, fallback_of, summary
from runtime.bundle import Bundle
from runtime.errors import ProviderError
from runtime.pipeline import find
from runtime.session import Session

NPU, CPU = "QNNExecutionProvider", "CPUExecutionProvider"
WEIGHTS = {"w": (4, 6), "b": (6,)}
SHAPES = [Node(f"shape_{i}", "Shape", CPU) for i in range(100)]
MACS = {"conv": 600, "product": 300, "attention": 100}


def placed(nodes, macs=MACS):
    return assign("unet", NPU, nodes, macs)


def on(**providers):
    operators = {"conv": "Conv", "product": "MatMul", "attention": "Attention"}
    return [Node(name, operators[name], provider) for name, provider in providers.items()]


def test_a_share_is_of_the_compute_not_of_the_nodes():
    one = placed([*on(conv=NPU, product=NPU, attention=CPU), *SHAPES])
    assert one.by_compute
    assert one.share == pytest.approx(0.9)
    assert one.nodes == {NPU: 2, CPU: 101}
    assert [(part.operator, part.provider, part.nodes) for part in one.parts] == [
        ("Conv", NPU, 1), ("MatMul", NPU, 1), ("Attention", CPU, 1), ("Shape", CPU, 100)
    ]  # fmt: skip
    assert [part.operator for part in one.fallbacks] == ["Attention", "Shape"]
    assert sum(part.share for part in one.parts) == pytest.approx(1)


@pytest.mark.parametrize(
    ("nodes", "fits"),
    [
        (on(conv=NPU, product=NPU, attention=NPU), {"limited", "allowed", "never"}),
        ([*on(conv=NPU, product=NPU, attention=NPU), *SHAPES], {"limited", "allowed"}),
        (on(conv=NPU, product=NPU, attention=CPU), {"limited", "allowed"}),  # exactly 90 %
        (on(conv=NPU, product=CPU, attention=NPU), {"allowed"}),
        (on(conv=CPU, product=CPU, attention=CPU), {"allowed"}),
    ],
)
def test_how_much_may_fall_back(nodes, fits):
    one = placed(nodes)
    for fallback in ("limited", "allowed", "never"):
        assert one.fits(fallback) == (fallback in fits), fallback
        if fallback in fits:
            check(one, fallback)
        else:
            with pytest.raises(ProviderError):
                check(one, fallback)


def test_a_refusal_names_the_heaviest_operators_and_the_ways_out():
    nodes = [*on(conv=CPU, product=NPU, attention=CPU), *SHAPES, Node("r", "Resize", CPU)]
    with pytest.raises(ProviderError) as refused:
        check(placed(nodes), "limited")
    assert str(refused.value) == (
        "unet: only 30 % of the compute would run on QNNExecutionProvider, 90 % is wanted; the rest on "
        "CPUExecutionProvider: Conv 60 % (nodes: 1), Attention 10 % (nodes: 1), Shape 0 % (nodes: 100), "
        "1 other operators: it would be no faster than there, and copy to and fro; export it for this provider, "
        "choose another --provider, or give --allow-fallback"
    )
    with pytest.raises(ProviderError, match=r"100 % is wanted.*leave --strict out"):
        check(placed(nodes), "never")


def test_a_bundle_without_multiply_accumulates_is_judged_by_its_nodes_and_says_so():
    one = placed([*on(conv=CPU, product=NPU, attention=NPU)], macs={})
    assert one.share == pytest.approx(2 / 3)
    assert str(one) == (
        "unet: 67 % of the nodes (their compute is not known) on QNNExecutionProvider (2 nodes), the rest "
        "on CPUExecutionProvider: Conv 33 % (nodes: 1)"
    )
    with pytest.raises(ProviderError, match="67 % of the nodes"):
        check(one, "limited")


def test_names_that_are_not_found_again_make_no_judgement_by_compute():
    assert not placed([Node("a", "Conv", NPU), Node("b", "MatMul", CPU)]).by_compute
    assert not placed(on(product=NPU, attention=CPU)).by_compute  # 40 % found
    assert placed(on(conv=NPU)).by_compute


def test_fused_and_opened_nodes_keep_their_compute():
    fused = [Node("conv", "Conv", NPU), Node("product/MatMulAddFusion", "Gemm", CPU)]
    opened = [Node("", "MatMul", NPU), Node("", "Softmax", NPU), Node("", "MatMul", CPU)]
    shares = {(part.operator, part.provider): part.share for part in placed([*fused, *opened]).parts}
    assert shares == pytest.approx(
        {("Conv", NPU): 0.6, ("Gemm", CPU): 0.3, ("MatMul", NPU): 0.05, ("MatMul", CPU): 0.05, ("Softmax", NPU): 0}
    )


def test_a_node_of_another_layout_keeps_its_compute():
    """QNN's convolutions are made anew, channels last."""
    nodes = [Node("conv_token_17", "Conv", NPU), *on(product=NPU, attention=NPU)]
    assert placed(nodes).by_compute
    assert placed(nodes).parts == placed(on(conv=NPU, product=NPU, attention=NPU)).parts


def test_a_node_that_was_split_keeps_its_compute_once():
    halves = [Node("conv", "Conv", NPU), Node("conv/half", "Conv", CPU), *on(product=NPU, attention=NPU)]
    assert placed(halves).share == pytest.approx(0.7)


def test_providers_are_one_whatever_their_case():
    assert placed(on(conv="QNNEXECUTIONPROVIDER", product=NPU, attention="qnnexecutionprovider")).share == 1


def test_a_share_is_never_rounded_to_all_or_nothing():
    macs = {"conv": 1_000_000, "product": 7}
    assert "100.00" not in str(placed(on(conv=NPU, product=CPU), macs))
    assert str(placed(on(conv=NPU, product=CPU), macs)).startswith("unet: 99.99 % of the compute")
    assert "MatMul 0.01 %" in str(placed(on(conv=NPU, product=CPU), macs | {"product": 100}))
    assert str(placed(on(conv=NPU), macs)).startswith("unet: 100 %")


def test_the_summary_of_several_components():
    one, other = placed(on(conv=NPU, product=NPU, attention=CPU)), assign("vae", NPU, on(conv=CPU), {})
    told = json.loads(json.dumps(summary([one, None, other])))
    assert told["nodes"] == {NPU: 2, CPU: 2}
    assert told["macs_share"] == {"unet": pytest.approx(0.9), "vae": None}
    assert [(part["component"], part["operator"]) for part in told["fallbacks"]] == [
        ("unet", "Attention"),
        ("vae", "Conv"),
    ]
    assert summary([None]) == {"nodes": None, "macs_share": {}, "fallbacks": []}


def test_an_unknown_word_gives_the_choices():
    with pytest.raises(ProviderError, match="'strict'; choose from limited, allowed, never"):
        fallback_of("strict")


def test_on_the_cpu_everything_is_on_the_cpu(caplog):
    bundle = Bundle.open(find("shapes-sd3"))
    with Session(bundle, "transformer", fallback="never") as session:
        one = session.assignment
    if one is None:
        pytest.skip("this onnxruntime cannot tell where nodes run")
    assert one.by_compute
    assert one.share == 1
    assert set(one.nodes) == {CPU}
    assert {"MatMul", "MultiHeadAttention"} <= {part.operator for part in one.parts if part.share > 0.05}
    assert str(one) == f"transformer: 100 % of the compute on {CPU} ({one.nodes[CPU]} nodes)"
    assert caplog.messages == []


def test_what_onnxruntime_fuses_or_opens_is_found_again(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="product"),
        helper.make_node("Add", ["m", "b"], ["a"], name="sum"),
        helper.make_node("GroupNormalization", ["a", "b", "b"], ["y"], name="norm", num_groups=2),  # has no kernel
    ]
    weights = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in WEIGHTS.items()]
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", n]) for name, n in (("x", 4), ("y", 6))]
    model = helper.make_model(
        helper.make_graph(nodes, "g", io[:1], io[1:], weights),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(assignment.RECORD, "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    found = assignment.recorded(session)
    if found is None:
        pytest.skip("this onnxruntime cannot tell where nodes run")
    assert "product" not in {node.name for node in found}
    assert "" in {node.name for node in found}
    parts = assign("unet", CPU, found, {"product": 24}).parts
    assert (parts[0].operator, parts[0].share) == ("Gemm", 1)


GPU = "WebGpuExecutionProvider"


def test_what_a_silent_provider_does_not_record_is_its():
    """As WebGPU 1.27 does it: of its nodes only those made for its layout are recorded, of the CPU's all."""
    nodes = [Node("attention", "Attention", CPU), Node("shape", "Shape", CPU), Node("", "Conv", GPU)]
    one = assign("unet", GPU, assignment.completed(nodes, GPU, MACS), MACS)
    assert one.by_compute
    assert one.share == pytest.approx(0.9)
    assert [(part.operator, part.share) for part in one.fallbacks] == [("Attention", pytest.approx(0.1)), ("Shape", 0)]
    assert assign("unet", GPU, assignment.completed([], GPU, MACS), MACS).share == 1


def test_a_silent_provider_on_which_nothing_runs_has_no_share():
    nodes = on(conv=CPU, product=CPU, attention=CPU)
    with pytest.raises(ProviderError, match=f"only 0 % of the compute would run on {GPU}"):
        check(assign("unet", GPU, assignment.completed(nodes, GPU, MACS), MACS), "limited")


def test_what_cannot_be_told_is_not_told():
    opened = [Node("", "MatMul", CPU)]  # of which of the weighed nodes it is, nobody knows
    assert assignment.completed(opened, GPU, MACS) is None
    assert assignment.completed(on(conv=CPU), GPU, {}) is None
    assert assignment.completed([], NPU, MACS) is None
    assert assignment.completed(opened, NPU, MACS) == opened


def told_of(monkeypatch, providers):
    """The CPU runs it, but onnxruntime says so of another provider: component's operator -> provider."""

    def moved(session):
        return [Node(n.name, n.operator, providers.get(n.operator, CPU)) for n in told(session)]

    told = assignment.recorded
    monkeypatch.setattr(assignment, "recorded", moved)


def test_a_backbone_is_refused_and_its_other_components_are_not(bundles, monkeypatch, caplog):
    told_of(monkeypatch, {"Conv": NPU, "Sin": NPU})  # Sin is in the text encoder only
    bundle = Bundle.open(bundles["sd15"])
    with pytest.raises(ProviderError, match=r"unet: only .* of the nodes .*Conv") as refused:
        Session(bundle, "unet").load()
    assert "\n" not in str(refused.value)
    assert caplog.messages == []
    with Session(bundle, "text_encoder") as encoder:
        assert "Sin" in {part.operator for part in encoder.assignment.fallbacks}
    assert len(caplog.messages) == 1  # but it is told
    with pytest.raises(ProviderError, match="text_encoder: only"):
        Session(bundle, "text_encoder", fallback="never").load()
    with Session(bundle, "unet", fallback="allowed") as unet:
        unet.unload()
        unet.load()
    assert len(caplog.messages) == 2  # once, not at every load
    assert "Conv" in caplog.messages[1]


def test_the_command_line_refuses_allows_and_reports(tmp_path, monkeypatch, capsys, caplog):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15")
    draw = ["generate", "a", "--model", str(folder), "-s", "1", "-o", str(tmp_path / "a.png")]
    assert main(draw) == 0
    assert "unet: 100 % of the nodes" in capsys.readouterr().err
    assert caplog.messages == []
    told_of(monkeypatch, {"Conv": NPU})
    capsys.readouterr()
    assert main(draw) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: unet: only")
    assert "--allow-fallback" in told
    assert told.count("\n") == 1
    assert main([*draw, "--allow-fallback", "--json"]) == 0
    provider = json.loads(capsys.readouterr().out)["provider"]
    assert provider["macs_share"] == {"text_encoder": None, "unet": None, "vae_decoder": None}
    assert {(part["component"], part["operator"]) for part in provider["fallbacks"]} == {
        ("unet", "Conv"), ("vae_decoder", "Conv")
    }  # fmt: skip
    assert any(line.startswith("unet: ") and "Conv" in line for line in caplog.messages)
    with pytest.raises(SystemExit, match="2"):
        main([*draw, "--allow-fallback", "--strict"])


def test_inspect_shows_where_each_operator_runs(bundles, monkeypatch, capsys):
    look = ["inspect", str(bundles["sd15"]), "--provider", "cpu"]
    assert main(look) == 0
    shown = capsys.readouterr().out
    assert "unet: 100 % of the nodes" in shown
    assert any(line.split()[:3] == ["Conv", CPU, "1"] for line in shown.splitlines())
    assert "refuses" not in shown
    told_of(monkeypatch, {"Conv": NPU})
    assert main([*look, "--json"]) == 0
    unet = next(one for one in json.loads(capsys.readouterr().out)["assignments"] if one["component"] == "unet")
    assert {"operator": "Conv", "provider": NPU, "nodes": 1} in [
        {key: part[key] for key in ("operator", "provider", "nodes")} for part in unet["parts"]
    ]
    assert main(look) == 0
    assert "`generate` refuses this without --allow-fallback" in capsys.readouterr().out
    assert main(["inspect", str(bundles["sd15"]), "--provider-option", "a=b"]) == 2


def test_a_pipeline_passes_the_word_on(bundles, monkeypatch):
    told_of(monkeypatch, {"Conv": NPU})
    with pytest.raises(ProviderError, match="unet: only"):
        Pipeline.from_pretrained(bundles["sd15"])("a", seed=1)
    result = Pipeline.from_pretrained(bundles["sd15"], fallback="allowed")("a", seed=1)
    assert result.report.provider["fallbacks"]
    with pytest.raises(ProviderError, match="choose from limited"):
        Pipeline.from_pretrained(bundles["sd15"], fallback="no")
