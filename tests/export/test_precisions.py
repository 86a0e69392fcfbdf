"""Precisions below fp32: what becomes of a graph, what the pictures are then worth, what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from export import ExportError, graph, macs, picture, weights, worker, write
from export.__main__ import main
from export.components import TRACED, AtPrecision, Contract
from export.targets import CALIBRATED, DTYPES, TARGETS, precision
from export.worker import Job
from runtime.bundle import Bundle
from runtime.facts import PICTURE, Picture, Tensor, read_facts, write_facts
from runtime.inspect import describe
from tests.conftest import SIZES
from tests.pipelines import tiny_sd3


class Layers(nn.Module):
    """Linear layers in each form that a trace gives them; the last is too narrow for blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.plain, self.kept = nn.Linear(96, 64), nn.Linear(64, 80, bias=False), nn.Linear(80, 48)
        self.narrow = nn.Linear(8, 48)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
        pooled = self.plain(torch.relu(self.wide(x)).mean(1))  # (rows, 80): Gemm where there is a bias
        rest = torch.einsum("ri,oi->ro", pooled, self.kept.weight)  # which ONNX does not define for bf16
        return (self.kept(pooled) + self.narrow(y) + rest,)


def traced(folder: Path, at: str) -> Path:
    """`folder`, with a traced graph of any number of rows and one of two, over one data file, at a precision."""
    dtype = {"fp32": torch.float32, "fp16-weights": torch.float16, "bf16": torch.bfloat16}[at]
    module = AtPrecision(Layers().to(dtype).eval(), at)
    tensors = Tensor("x", "float32", ("rows", 5, 96)), Tensor("y", "float32", ("rows", 8))
    declared = Contract("layers", tensors, (Tensor("out", "float32", ("rows", 48)),))
    for name, contract in (("model.onnx", declared), ("model_rows2.onnx", declared.fixed(2))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of its exporter
            model = graph.trace(module, contract.inputs, contract.outputs, contract.samples(2), 20)
        if at == "bf16":
            weights.admit_bf16(model)
        if name == "model.onnx":
            graph.save(model, folder / name)
        else:
            graph.save_sharing(model, folder / name, folder / "model.onnx")
    return folder


@pytest.fixture(scope="module", params=["fp32", "fp16-weights"])
def layers(request, tmp_path_factory) -> tuple[Path, str]:
    return traced(tmp_path_factory.mktemp("layers"), request.param), request.param


def run(file: Path, rows: int) -> np.ndarray:
    random = np.random.default_rng(0)
    fed = {"x": random.standard_normal((6, 5, 96)), "y": random.standard_normal((6, 8))}
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {name: value[:rows].astype(np.float32) for name, value in fed.items()})
    return answer


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.2)])
def test_linear_layers_become_products_of_few_bits_over_one_data_file(layers, tmp_path: Path, bits: int, most: float):
    source, at = layers
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    first, second = folder / "model.onnx", folder / "model_rows2.onnx"
    before, size = run(first, 6), (folder / graph.DATA).stat().st_size
    counted = macs.count(first, "rows")
    weights.quantise([first, second], bits, 32)
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model_rows2.onnx", graph.DATA}
    after = run(first, 6)
    assert 0 < np.abs(after - before).max() < most * np.abs(before).max()
    assert np.array_equal(run(first, 2), after[:2])  # rows alone, and among others
    assert np.array_equal(run(second, 2), after[:2])
    assert macs.count(first, "rows") == counted
    for file in (first, second):
        model = onnx.load(file, load_external_data=False)
        kinds = Counter(node.op_type for node in model.graph.node)
        assert kinds["MatMulNBits"] == 3  # not `narrow`, nor Einsum
        assert all(len(one.raw_data) <= graph.INLINE for one in model.graph.initializer if not one.external_data)
    assert (folder / graph.DATA).stat().st_size < size * (0.75 if at == "fp32" else 0.95)


def test_a_bf16_graph_widened_computes_in_fp32_over_the_rounded_weights(tmp_path: Path):
    source = traced(tmp_path, "bf16") / "model.onnx"
    onnx.checker.check_model(source, full_check=True)
    weights.widen(source, tmp_path / "wide.onnx")
    model = ir.load(tmp_path / "wide.onnx")
    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    assert not [value for value in values if value.dtype == ir.DataType.BFLOAT16]
    module = Layers().to(torch.bfloat16).float()
    random = np.random.default_rng(0)
    x, y = (torch.tensor(random.standard_normal(shape), dtype=torch.float32) for shape in ((6, 5, 96), (6, 8)))
    with torch.inference_mode():
        (expected,) = module(x, y)
    np.testing.assert_allclose(run(tmp_path / "wide.onnx", 6), expected.numpy(), atol=1e-5)


def job(checkpoint: Path, folder: Path, family: str, **changes: object) -> Job:
    height, width = SIZES[family]
    given = {
        "task": "export",
        "component": {"sd3": "transformer", "sd15": "unet"}[family],
        "checkpoint": str(checkpoint),
        "source": str(checkpoint),
        "folder": str(folder),
        "result": "",
        "precision": "int8-weights",
        "height": height,
        "width": width,
        "directions": 3,
        "opset": 23,
        "t5_tokens": 256,
        "prompts": ["a red circle", "a green square above a blue ring"],
    }
    return Job(**given | changes)


def test_a_backbone_in_8_bits_feels_no_row_in_another(tiny_checkpoints, tmp_path: Path):
    told = job(tiny_checkpoints["sd3"], tmp_path, "sd3", height=64, width=80, t5_tokens=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = worker.export(told)
    compared = worker.parity(told)
    assert 1e-4 < compared["error"] <= compared["tolerance"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    fed = {one["name"]: random.standard_normal((6, *one["shape"][1:])).astype(np.float32) for one in found["inputs"]}
    fed["timestep"] = np.linspace(900, 20, 6, dtype=np.float32)
    (six,) = session.run(None, fed)
    (two,) = session.run(None, {name: value[:2] for name, value in fed.items()})
    assert np.array_equal(six[:2], two)
    nodes = {node.name for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node}
    assert found["macs"].keys() <= nodes


def test_the_reference_of_the_gate_is_the_fp32_bundle_itself(tiny_bundles, tiny_checkpoints):
    folder = tiny_bundles["sd15"]
    found = picture.compare(job(tiny_checkpoints["sd15"], folder / "unet", "sd15"))
    assert found["psnr_db"] > 70
    assert found["error"] < 1e-4
    assert (found["prompts"], found["steps"], found["by"]) == (2, 6, "graph")


def test_pictures_that_are_too_far_from_fp32_are_refused(tiny_bundles, tiny_checkpoints, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_bundles["sd3"], tmp_path / "bundle"))
    model = ir.load(folder / "transformer" / "model.onnx")
    for value in model.graph.initializers.values():
        if (value.name or "").endswith("proj_out.weight") or value.shape == (48, 24):
            value.const_value = ir.tensor(-value.const_value.numpy(), name=value.name)
    graph.save(model, tmp_path / "model.onnx")
    for name in ("model.onnx", graph.DATA):
        shutil.move(tmp_path / name, folder / "transformer" / name)
    told = job(tiny_checkpoints["sd3"], folder / "transformer", "sd3")
    with pytest.raises(ExportError, match=r"transformer: pictures at int8-weights agree .* to -?\d+\.\d dB PSNR only"):
        picture.compare(told)


FIGURE = Picture(41.5, 25.0, 0.01, 2, 6)


def test_the_figure_has_a_file_of_its_own_that_older_programs_take_for_any_other(tiny_bundles, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_bundles["sd15"], tmp_path / "bundle"))
    before = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    facts = read_facts(folder / "bundle.json")
    assert facts.picture is None
    (folder / PICTURE).write_text(json.dumps(vars(FIGURE)), encoding="utf-8")
    from export.write import _stored

    write_facts(folder, replace(facts, files=(*facts.files, *_stored(folder, [folder / PICTURE])), picture=FIGURE))
    after = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    assert after.keys() == before.keys()
    bundle = Bundle.open(folder)
    bundle.verify()
    assert bundle.facts.picture == FIGURE
    component = replace(facts.components["unet"], precision="int8-weights")
    told = replace(bundle, facts=replace(bundle.facts, components={"unet": component}))
    assert "41.5 dB PSNR to the backbone in fp32 (tolerance 25 dB, 2 prompts, 6 steps)" in describe(
        told, verified=False
    )
    untold = replace(told, facts=replace(told.facts, picture=None))
    assert "not checked against fp32" in describe(untold, verified=False)


def test_every_precision_of_a_target_has_what_it_takes():
    for name, target in TARGETS.items():
        assert set(target.dtypes) <= set(DTYPES)
        for dtype in target.dtypes:
            assert precision("unet", dtype, name) == dtype
            assert precision("vae_decoder", dtype, name) in ("fp32", "fp16-weights")
            assert precision("text_encoder_3", dtype, name, "int4") == "int4-weights"
            assert dtype == "fp32" or dtype in picture.LIMIT_DB
    assert {at for at in TRACED if TRACED[at] == "fp32"} == set(CALIBRATED)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--dtype", "bf16"], "--dtype bf16: --target cpu takes fp32, fp16"),
        (["--dtype", "w8a16"], "--dtype w8a16: --target cpu takes"),
        (["--target", "qnn", "--dtype", "int4-weights"], "--dtype int4-weights: --target qnn takes"),
        (["--target", "directml", "--dtype", "int8-weights"], "--dtype int8-weights: --target directml takes"),
        (["--target", "cuda", "--dtype", "bf16", "--opset", "20"], "--opset 20: CUDA's convolutions take bf16 from"),
        (["--target", "qnn", "--t5", "int4"], "--t5 int4: --target qnn has no kernels for such weights"),
        (
            ["--target", "vitisai", "--dtype", "w8a16"],
            "--dtype w8a16: for transformers; of a UNet give --dtype int8, or",
        ),
        (["--dtype", "int8", "--components", "unet"], "--dtype int8: is calibrated on drawings"),
        (["--picture-check", "2"], "--picture-check 2: the backbone is in fp32 itself"),
        (["--dtype", "fp16", "--picture-check", "-1"], "--picture-check -1: give a number of prompts"),
        (["--dtype", "fp16", "--components", "unet", "--picture-check", "1"], "--picture-check 1: pictures need every"),
    ],
)
def test_precisions_that_do_not_fit(words, line, tiny_checkpoints, tmp_path, capsys):
    assert main([str(tiny_checkpoints["sd15"]), "-o", str(tmp_path / "bundle"), *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith(f"export: {line}")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--picture-check", "3"], "export: --picture-check 3: prompts.txt of this model holds 2 prompts"),
        (["--picture-check", "3", "--target", "qnn", "--dtype", "int8"], "export: --picture-check 3: prompts.txt"),
    ],
)
def test_more_pictures_than_prompts_are_refused_before_any_graph_is_made(
    words, line, tiny_checkpoints, tmp_path, capsys
):
    checkpoint = Path(shutil.copytree(tiny_checkpoints["sd15"], tmp_path / "checkpoint"))
    (checkpoint / "prompts.txt").write_text("a red circle\na ring\n", encoding="utf-8")
    dtype = [] if "--dtype" in words else ["--dtype", "fp16"]
    assert main([str(checkpoint), "-o", str(tmp_path / "bundle"), *dtype, *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith(line)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_model_without_prompts_is_refused_before_any_graph_is_made(tiny_checkpoints, tmp_path, capsys):
    checkpoint = Path(shutil.copytree(tiny_checkpoints["sd15"], tmp_path / "checkpoint"))
    (checkpoint / "prompts.txt").write_text("\n", encoding="utf-8")
    assert main([str(checkpoint), "-o", str(tmp_path / "bundle"), "--dtype", "int8", "--picture-check", "0"]) == 2
    assert capsys.readouterr().err.startswith("export: prompts.txt: holds no prompts; write some")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("component", "precision", "remedy"),
    [
        ("transformer", "int8", "give --dtype fp32"),
        ("transformer", "fp32", "give another --opset"),
        ("text_encoder_3", "int4-weights", "give --t5 fp16"),
        ("text_encoder_3", "fp16-weights", "give --t5 none"),
    ],
)
def test_what_differs_too_much_is_refused_with_an_option_that_changes_it(component, precision, remedy):
    told = job(Path(), Path(), "sd3", component=component, precision=precision)
    for error in (0.3, np.nan):
        with pytest.raises(ExportError, match=rf"{component}: differs from torch by .* nothing was written; {remedy}$"):
            worker._judged(told, "torch", (2,), error, 0.1)


@pytest.mark.parametrize(("task", "remedy"), [("picture", ", or --picture-check 0;"), ("parity", "more memory;")])
def test_want_of_memory_for_pictures_is_remedied_by_none(task, remedy, tmp_path, monkeypatch):
    class Killed:
        returncode, stdin = -9, (tmp_path / "stdin").open("wb")

        def wait(self):
            return self.returncode

        kill = wait

    monkeypatch.setattr(write.subprocess, "Popen", lambda *_, **__: Killed())
    told = job(tmp_path, tmp_path, "sd3", task=task, result=str(tmp_path / "result.json"))
    with pytest.raises(ExportError, match=rf"the {task} process ran out of memory.*{remedy} nothing was written$"):
        write.run(told)


def test_dry_run_says_that_pictures_will_be_compared(tiny_checkpoints, tmp_path, capsys):
    command = [str(tiny_checkpoints["sd15"]), "-o", str(tmp_path / "bundle"), "--dry-run", "--dtype"]
    assert main([*command, "int8"]) == 0
    told = capsys.readouterr().err
    assert "picture check: 2 pictures" in told
    assert "calibrated on drawings" in told
    assert main([*command, "int4-weights", "--picture-check", "0"]) == 0
    assert "picture check" not in capsys.readouterr().err


def exported(checkpoint: Path, target: Path, family: str, *words: str) -> Bundle:
    height, width = map(str, SIZES[family])
    assert main([str(checkpoint), "-o", str(target), "--height", height, "--width", width, *words]) == 0
    bundle = Bundle.open(target)
    bundle.verify()
    return bundle


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("sd15", ["--dtype", "int8-weights"]),
        ("sd3", ["--dtype", "bf16", "--target", "cuda"]),
        ("sd3", ["--dtype", "w8a16", "--target", "qnn"]),
    ],
)
def test_a_whole_bundle_of_a_precision(family, words, tiny_checkpoints, tmp_path: Path, capsys):
    bundle = exported(tiny_checkpoints[family], tmp_path / "bundle", family, *words, "--json")
    told = json.loads(capsys.readouterr().out)
    backbone = bundle.facts.components[bundle.backbone]
    assert backbone.precision == words[1]
    assert backbone.parity.error <= backbone.parity.tolerance
    figure = bundle.facts.picture
    assert told["picture"] == vars(figure)
    assert figure.psnr_db >= figure.tolerance_db == picture.LIMIT_DB[words[1]]
    assert figure.by == ("torch" if words[1] == "bf16" else "graph")
    assert {path.name for path in bundle.folder.iterdir() if path.is_file()} == {
        "bundle.json",
        "model_index.json",
        PICTURE,
    }
    names = {f"model_rows{rows}.onnx" for rows in backbone.rows[1:]} | {"model.onnx", "model.onnx_data", "config.json"}
    assert {path.name for path in (bundle.folder / bundle.backbone).iterdir()} == names


@pytest.mark.slow
def test_int8_for_the_cpu_of_a_trained_unet(tmp_path: Path):
    """Of a random one the gate refuses the pictures: 17 dB."""
    assert main(["shapes-sd15", "-o", str(tmp_path / "bundle"), "--dtype", "int8"]) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    bundle.verify()
    backbone = bundle.facts.components["unet"]
    assert backbone.precision == "int8"
    assert backbone.parity.error <= backbone.parity.tolerance
    assert bundle.facts.picture.by == "graph"
    assert bundle.facts.picture.psnr_db >= bundle.facts.picture.tolerance_db
    kinds = Counter(node.op_type for node in onnx.load(bundle.graph("unet"), load_external_data=False).graph.node)
    assert min(kinds[kind] for kind in ("QuantizeLinear", "MatMulNBits", "MultiHeadAttention")) > 0


def t5_checkpoint(folder: Path) -> Path:
    """With queries as small as T5's own are: it does not scale scores, and large ones make every rounding count."""
    file = tiny_sd3(folder, t5=True) / "text_encoder_3" / "model.safetensors"
    tensors = load_file(file)
    tensors |= {name: value / 12**0.5 for name, value in tensors.items() if name.endswith("SelfAttention.q.weight")}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("t5", ["fp16", "int8", "int4"])
def test_t5_stores_few_bits_and_never_computes_in_fp16(t5, tmp_path: Path):
    told = job(
        t5_checkpoint(tmp_path / "checkpoint"),
        tmp_path,
        "sd3",
        component="text_encoder_3",
        precision=precision("text_encoder_3", "fp32", "cpu", t5),
        t5_tokens=16,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        worker.export(told)
    found = worker.parity(told)
    assert 0 < found["error"] <= found["tolerance"]
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx", load_external_data=False))
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["MatMulNBits"] == (0 if t5 == "fp16" else 14)  # 4 of attention and 3 others in each of two blocks
    cast = {name for node in model.graph.node if node.op_type in ("Cast", "Transpose") for name in node.output}
    half = {one.name for one in model.graph.value_info if one.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    assert half <= cast | {one.name for one in model.graph.initializer}


@pytest.mark.slow
def test_a_bundle_with_t5_in_4_bits_draws(tmp_path: Path):
    checkpoint = t5_checkpoint(tmp_path / "checkpoint")
    bundle = exported(checkpoint, tmp_path / "bundle", "sd3", "--t5", "int4", "--dtype", "int8-weights")
    assert bundle.facts.components["text_encoder_3"].precision == "int4-weights"
    assert bundle.facts.picture.psnr_db >= bundle.facts.picture.tolerance_db
