"""The lint finds every violation planted in small graphs, says where, and passes what the emulator runs."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import onnx
import pytest
from onnx import TensorProto, helper

import runtime
from export import ExportError
from export.lint import TARGETS, graph_files, lint
from export.lint.__main__ import main
from tests.export import lint_graphs as small

SHIPPED = Path(runtime.__file__).parent / "bundles" / "shapes-sd3"


def found(model: onnx.ModelProto, target: str, folder: Path) -> list[str]:
    """Rules that a graph breaks, advice included."""
    onnx.save(model, folder / "model.onnx")
    return [one.rule for one in lint([folder / "model.onnx"], target)]


@pytest.mark.parametrize("name", small.QNN)
def test_qnn(name: str, tmp_path: Path):
    build, rule = small.QNN[name]
    assert set(found(build(), "qnn", tmp_path)) >= ({rule} if rule else set())
    if rule is None:
        assert not found(build(), "qnn", tmp_path)


@pytest.mark.parametrize("name", small.QNN_ROWS)
def test_qnn_rows(name: str, tmp_path: Path):
    build, rule = small.QNN_ROWS[name]
    assert found(build(), "qnn", tmp_path) == ([rule] if rule else [])


def big() -> onnx.ModelProto:
    return small.unary("Relu", (2**15, 2**15))


def constant(node: onnx.NodeProto) -> onnx.ModelProto:
    """A node whose second input comes from outside."""
    return small.graph([node], [("x", small.FLOAT, (4, 4)), ("w", small.FLOAT, (4, 4))], [("y", small.FLOAT, (4, 4))])


PLANTED = {
    ("qnn", "shared-rows"): lambda: small.embedded((1, 16, 32)),
    ("vitisai", "static-shapes"): lambda: small.unary("Relu", ("rows", 4)),
    ("vitisai", "opset"): lambda: small.unary("Relu", opset=21),
    ("vitisai", "control-flow"): small.loop,
    ("vitisai", "opset-advised"): lambda: small.unary("Relu", opset=18),
    ("vitisai", "rows-advised"): lambda: small.conv(2),
    ("vitisai", "outputs-advised"): lambda: small.graph(
        [helper.make_node("Split", ["x"], ["y", "z"], num_outputs=2)],
        [("x", small.FLOAT, (2, 8))],
        [("y", small.FLOAT, (1, 8)), ("z", small.FLOAT, (1, 8))],
    ),
    ("openvino", "static-shapes"): small.nonzero,
    ("openvino", "operators"): lambda: constant(helper.make_node("GatherElements", ["x", "w"], ["y"])),
    ("coreml", "static-shapes"): lambda: small.unary("Relu", (2, "tokens", 4)),
    ("coreml", "axis"): lambda: small.unary("Relu", (1, 20000)),
    ("coreml", "operators"): lambda: small.unary("Sinh"),
    ("coreml", "cpu-advised"): lambda: small.gather(TensorProto.INT64),
    ("coreml", "control-flow"): small.loop,
    ("coreml", "constants"): lambda: constant(helper.make_node("Gemm", ["x", "w"], ["y"])),
    ("coreml", "rank"): lambda: small.unary("GlobalMaxPool", (1, 4, 8, 8, 8)),
    ("coreml", "dtypes"): lambda: small.add(TensorProto.DOUBLE),
    ("directml", "opset"): lambda: small.unary("Relu", opset=22),
    ("directml", "operators"): small.attention,
    ("directml", "control-flow"): small.loop,
    ("directml", "rank"): lambda: small.unary("Relu", (1,) * 9),
    ("directml", "dtypes"): lambda: small.add(TensorProto.BFLOAT16),
    ("directml", "tensor-size"): big,
    ("directml", "shapes-advised"): lambda: small.unary("Relu", ("rows", 4)),
    ("webgpu", "operators"): small.attention,
}
MISSING = {  # operators that a provider was seen, or is said, to leave to the CPU
    "openvino": (small.attention, lambda: small.attention("com.microsoft", 18)),
    "directml": (lambda: small.unary("Gelu", opset=20), small.attention),
    "webgpu": (small.attention,),
}


@pytest.mark.parametrize(("target", "rule"), PLANTED)
def test_planted(target: str, rule: str, tmp_path: Path):
    assert rule in found(PLANTED[target, rule](), target, tmp_path)


@pytest.mark.parametrize("target", MISSING)
def test_operators_that_a_target_lacks(target: str, tmp_path: Path):
    for build in MISSING[target]:
        assert "operators" in found(build(), target, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_a_plain_static_graph_passes(target: str, tmp_path: Path):
    assert not found(small.unary("Relu", opset=17), target, tmp_path)


def test_every_rule_is_planted():
    told = {("qnn", rule) for _, rule in small.QNN.values() if rule} | set(PLANTED)
    always = {"external-data", "file-size"}
    assert told == {(target, rule.id) for target, rules in TARGETS.items() for rule in rules if rule.id not in always}


def stored(folder: Path) -> Path:
    """A graph whose weight is in model.onnx_data."""
    folder.mkdir()
    model = small.matmul()
    options = {"save_as_external_data": True, "location": "model.onnx_data", "size_threshold": 0}
    onnx.save(model, folder / "model.onnx", **options)
    return folder / "model.onnx"


def test_external_data(tmp_path: Path):
    data = stored(tmp_path / "it").parent / "model.onnx_data"
    file = data.with_name("model.onnx")
    assert not list(lint([file], "openvino"))

    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    (short,) = lint([file], "openvino")
    assert (short.rule, short.where) == ("external-data", "w")
    assert "ends before" in short.what

    data.rename(tmp_path / "elsewhere")
    (missing,) = lint([file], "openvino")
    assert "missing" in missing.what

    data.symlink_to(tmp_path / "elsewhere")
    (link,) = lint([file], "openvino")
    assert "link" in link.what

    model = onnx.load(file, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../elsewhere"
    file.write_bytes(model.SerializeToString())
    (outside,) = lint([file], "openvino")
    assert "leads out" in outside.what


def test_file_size(tmp_path: Path, monkeypatch):
    """A graph of 2 GiB is not written here: the limit is lowered."""
    from dataclasses import replace

    from export.lint import rules

    lowered = tuple(replace(rule, limit=10) if rule.id == "file-size" else rule for rule in rules.TARGETS["openvino"])
    monkeypatch.setitem(rules.TARGETS, "openvino", lowered)
    assert found(small.unary("Relu"), "openvino", tmp_path) == ["file-size"]


def test_weights_are_not_read(tmp_path: Path):
    """Nothing of the data file is read: a file of nothing but holes is as good."""
    file = stored(tmp_path / "it")
    model = onnx.load(file, load_external_data=False)
    weight = model.graph.initializer[0]
    weight.dims[:] = [16, 2**30]
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 2**30
    next(one for one in weight.external_data if one.key == "length").value = str(2**36)
    file.write_bytes(model.SerializeToString())
    with (file.parent / "model.onnx_data").open("wb") as data:
        data.truncate(2**36)
    assert [one.rule for one in lint([file], "directml")] == ["tensor-size"] * 2


@pytest.mark.parametrize("target", ["qnn", "vitisai", "openvino", "coreml"])
def test_the_dynamic_backbone_that_comes_along(target: str):
    findings = [one for one in lint(graph_files(SHIPPED, "transformer"), target) if one.rule == "static-shapes"]
    names = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"]
    assert [one.where for one in findings] == names
    assert "make_dynamic_shape_fixed" in findings[0].remedy
    assert f"`python -m export ... --target {target}`" in findings[0].remedy
    assert findings[0].source


def test_functions_of_a_model_are_looked_into(tmp_path: Path):
    body = [helper.make_node("Sinh", ["a"], ["b"])]
    opsets = [helper.make_opsetid("", 18)]
    model = small.graph([helper.make_node("Mine", ["x"], ["y"], domain="own")], [("x", 1, (2,))], [("y", 1, (2,))])
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.functions.append(helper.make_function("own", "Mine", ["a"], ["b"], body, opsets))
    assert found(model, "qnn", tmp_path) == ["operators"]


def test_command(tmp_path: Path, capsys):
    onnx.save(small.unary("Relu", opset=17), tmp_path / "good.onnx")
    onnx.save(small.unary("Relu", ("rows", 4), opset=18), tmp_path / "bad.onnx")
    onnx.save(small.conv(2), tmp_path / "advised.onnx")
    assert main([str(tmp_path / "good.onnx"), "--target", "vitisai"]) == 0
    assert main([str(tmp_path / "advised.onnx"), "--target", "vitisai"]) == 0
    assert "advice: rows-advised" in capsys.readouterr().out
    assert main([str(tmp_path / "bad.onnx"), "--target", "vitisai", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == "vitisai"
    assert [(one["rule"], one["where"], one["advice"]) for one in report["findings"]] == [
        ("static-shapes", "x", False),
        ("opset-advised", "", True),
    ]


def test_long_lists_are_cut_and_said(capsys):
    assert main([str(SHIPPED), "--target", "coreml", "--component", "text_encoder"]) == 1
    assert main([str(SHIPPED), "--target", "directml", "--component", "transformer"]) == 1
    assert "more (--json tells all)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none", None, "no such folder"),
        ("empty.onnx", b"", "it names no operator set"),
        ("text.onnx", b"not a graph at all", "no valid ONNX graph"),
        ("folder", {}, "no bundle"),
    ],
)
def test_refusals(name: str, content: object, told: str, tmp_path: Path, capsys):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
    assert main([str(path), "--target", "qnn"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export.lint: ")
    assert told in line


def bad_dtype() -> onnx.ModelProto:
    model = small.unary("Relu")
    model.graph.input[0].type.tensor_type.elem_type = 99
    return model


def bad_place(key: str, value: str) -> onnx.ModelProto:
    model = small.matmul()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for entry in ({"location": "data"} | {key: value}).items():
        weight.external_data.add(key=entry[0], value=entry[1])
    return model


def bad_name() -> bytes:
    return small.unary("Relu").SerializeToString().replace(b"Relu", b"R\xbalu")


MALFORMED = {
    "Shape without input": (lambda: node("Shape", []), "Shape it has 0 inputs"),
    "Cast without output": (lambda: node("Cast", ["x"], [], to=1), "Cast it has 0 outputs"),
    "Einsum without equation": (lambda: node("Einsum", ["x"]), "Einsum it has no right equation"),
    "permutation that is a number": (lambda: node("Transpose", ["x"], perm=1), "Transpose it has no right perm"),
    "dtype that is none": (bad_dtype, "x is of type 99, which is none"),
    "offset that is no number": (lambda: bad_place("offset", "abc"), "invalid literal for int"),
    "offset below 0": (lambda: bad_place("offset", "-1"), "the place of the weight w in external data is none"),
    "NUL in the location": (lambda: bad_place("location", "a\0b"), "the place of the weight w"),
    "no location": (lambda: bad_place("location", ""), "the place of the weight w"),
    "no operator set": (lambda: node("Relu", ["x"], opset=0), "operator set that the graph does not name"),
    "name that is no text": (bad_name, "a name that is no text"),
}


def node(kind: str, inputs: list[str], outputs: tuple[str, ...] = ("y",), opset: int = 18, **options: object):
    made = helper.make_node(kind, inputs, outputs, name="it", **options)
    return small.graph([made], [("x", small.FLOAT, (2, 8))], [("y", small.FLOAT, (2, 8))], opset=opset)


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("target", ["qnn", "coreml"])
def test_malformed_graphs_are_one_line(name: str, target: str, tmp_path: Path, capsys):
    build, told = MALFORMED[name]
    model = build()
    (tmp_path / "model.onnx").write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    assert main([str(tmp_path / "model.onnx"), "--target", target]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no valid ONNX graph" in line
    assert told in line


def mutant(model: onnx.ModelProto, random: Random) -> bytes:
    """The graph with a few of its bytes changed, or one of its fields left out or given twice."""
    if random.random() < 0.5:
        content = bytearray(model.SerializeToString())
        for _ in range(random.randint(1, 4)):
            content[random.randrange(len(content))] = random.randrange(256)
        return bytes(content)
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    message = random.choice(list(messages(copy)))
    field, value = random.choice(message.ListFields() or [(None, None)])
    if field is not None and field.is_repeated and random.random() < 0.5:
        value.extend(list(value))
    elif field is not None:
        message.ClearField(field.name)
    return copy.SerializePartialToString()


def messages(message):
    """A protobuf message and all in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type:
            for one in value if field.is_repeated else [value]:
                yield from messages(one)


def test_no_mutant_gets_through(tmp_path: Path):
    """Each is linted or refused in one line; any other exception fails."""
    random, file, refused = Random(0), tmp_path / "model.onnx", []
    graphs = [build() for build, _ in small.QNN.values()]
    for _ in range(150):
        file.write_bytes(mutant(random.choice(graphs), random))
        try:
            list(lint([file], random.choice(list(TARGETS))))
        except ExportError as error:
            refused.append(str(error))
    assert 20 < len(refused) < 140
    assert not any("\n" in line for line in refused)


def test_components(tmp_path: Path, capsys):
    assert main([str(SHIPPED), "--target", "qnn", "--component", "unet"]) == 2
    assert "no unet in this bundle" in capsys.readouterr().err
    onnx.save(small.unary("Relu"), tmp_path / "one.onnx")
    assert main([str(tmp_path / "one.onnx"), "--target", "qnn", "--component", "unet"]) == 2
    with pytest.raises(ExportError, match="there are some for"):
        list(lint([tmp_path / "one.onnx"], "abacus"))


def test_needs_no_torch(tmp_path: Path):
    """In a process where torch and ONNX Runtime cannot be imported."""
    onnx.save(small.unary("Relu", opset=17), tmp_path / "model.onnx")
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnxruntime', 'onnx_ir', 'diffusers']));"
        "from export.lint.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.onnx"), "--target", "qnn"]
    assert subprocess.run(command, check=False, cwd=Path(__file__).parents[2]).returncode == 0
