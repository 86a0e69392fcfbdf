"""Bundles of static graphs, one per row count: any request that can be made up of them gives the same numbers."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_bundle

from runtime import assignment
from runtime.__main__ import main
from runtime.bundle import Bundle, sha256
from runtime.errors import BundleError, RequestError
from runtime.facts import Stored, read_facts, write_facts
from runtime.inspect import describe, verify
from runtime.pipeline import Pipeline
from runtime.rows import cut, join, split
from runtime.session import Session


def make_static(folder: Path, rows: tuple[int, ...]) -> Path:
    """Fixes the row axis of every graph: the backbone's to each of `rows`, the others' to one."""
    facts = read_facts(folder / "bundle.json")
    components = {}
    for name, dynamic in facts.components.items():
        component = dataclasses.replace(dynamic, rows=rows if name in ("transformer", "unet") else (1,))
        model = onnx.load(folder / dynamic.graph)
        for count in component.rows:
            for value in (*model.graph.input, *model.graph.output):
                value.type.tensor_type.shape.dim[0].dim_value = count
            onnx.save(model, folder / component.graph_of(count))
        paths = [folder / component.graph_of(count) for count in component.rows]
        files = (Stored(path.relative_to(folder).as_posix(), path.stat().st_size, sha256(path)) for path in paths)
        components[name] = dataclasses.replace(component, files=tuple(files))
    write_facts(folder, dataclasses.replace(facts, components=components, target="qnn"))
    return folder


@pytest.fixture(scope="module")
def static(tmp_path_factory) -> dict[str, Path]:
    """Family -> a bundle with graphs of 2 and 4 rows; not to be changed by a test."""
    root = tmp_path_factory.mktemp("static")
    return {name: make_static(tiny_bundle.bundle(root / name, name), (2, 4)) for name in ("sd3", "sd15")}


@pytest.mark.parametrize(
    ("rows", "have", "calls"),
    [
        (2, (2, 4), (2,)),
        (8, (2, 4), (4, 4)),
        (6, (2, 4), (4, 2)),
        (6, (4, 3), (3, 3)),  # the largest first leads nowhere
        (5, (2, 1), (2, 2, 1)),
        (3, (2, 4), None),
        (1, (2,), None),
    ],
)
def test_the_fewest_calls_that_make_up_a_request(rows, have, calls):
    assert split(rows, have) == calls


@pytest.mark.parametrize("calls", [(4,), (2, 2), (4, 2), (2, 2, 2), (4, 4), (2, 1)])
def test_rows_come_back_in_their_order_and_guidance_halves_stay_together(calls):
    parts = cut(calls)
    assert [len(part) for part in parts] == list(calls)
    rows = np.arange(sum(calls)) * 10
    assert np.array_equal(join([{"y": rows[part]} for part in parts], parts)["y"], rows)
    if all(size % 2 == 0 for size in calls):
        half = len(rows) // 2
        assert all(set(part) == {i % half for i in part} | {i % half + half for i in part} for part in parts)


def test_a_session_takes_any_rows_that_its_graphs_make_up(static, bundles, caplog):
    fixed, free = (Session(Bundle.open(folder["sd15"]), "unet") for folder in (static, bundles))
    random = np.random.default_rng(0)
    with caplog.at_level(logging.WARNING):
        for rows in (2, 4, 6, 8, 8):
            fed = {
                "sample": random.standard_normal((rows, 4, 4, 4)),
                "timestep": np.linspace(900, 10, rows),
                "encoder_hidden_states": random.standard_normal((rows, 8, tiny_bundle.WIDTH)),
            }
            np.testing.assert_allclose(fixed(**fed)["out_sample"], free(**fed)["out_sample"], rtol=0, atol=1e-6)
    assert fixed.calls == 1 + 1 + 2 + 2 + 2
    loading = fixed.load_seconds
    fixed.unload()
    assert fixed.load_seconds > loading > 0  # releasing its graphs is told, too
    assert [record.args[0].split(", for")[0] for record in caplog.records] == [
        "unet: 6 rows run as calls of 4 + 2",
        "unet: 8 rows run as calls of 4 + 4",
    ]
    assert "--target qnn --rows 2 4 8 -o DIR`" in caplog.text
    fixed.unload()
    assert not fixed.loaded


def test_one_call_of_all_rows_is_given_the_very_arrays(static, monkeypatch):
    session = Session(Bundle.open(static["sd15"]), "unet")
    part, given = session._parts[4], {}
    run = part._run
    monkeypatch.setattr(part, "_run", lambda names, feeds: given.update(feeds) or run(names, feeds))
    feeds = session.fit({"sample": np.ones((4, 4, 4, 4)), "timestep": np.arange(4)})
    feeds |= session.fit({"encoder_hidden_states": np.zeros((4, 8, tiny_bundle.WIDTH))})
    session(**feeds)
    assert all(given[name] is feeds[name] for name in feeds)


def test_rows_that_no_graphs_make_up_are_refused_with_the_line_to_type(static):
    fed = {
        "sample": np.ones((3, 4, 4, 4)),
        "timestep": np.ones(3),
        "encoder_hidden_states": np.zeros((3, 8, tiny_bundle.WIDTH)),
    }
    session = Session(Bundle.open(static["sd15"]), "unet")
    with pytest.raises(RequestError, match=r"3 rows .* of 2, 4 rows; `python -m export .* --rows 2 3 4 -o DIR`"):
        session(**fed)
    with pytest.raises(RequestError, match=r"as many rows each; got .*timestep 1"):
        session(**fed | {"timestep": np.ones(1)})


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_picture_is_that_of_the_dynamic_bundle(static, bundles, family, k, caplog):
    pictures, reports = [], []
    for folder in (bundles, static):
        result = Pipeline.from_pretrained(folder[family])(
            "red", seed=3, k=k, solver="epd", num_images_per_prompt=2, output_type="np"
        )
        pictures.append(result.images)
        reports.append(result.report)
    np.testing.assert_allclose(*pictures, rtol=0, atol=1e-6)
    assert reports[0].guided_forwards == reports[1].guided_forwards
    assert reports[0].directions == reports[1].directions == "batch"


def test_a_graph_of_one_row_draws_everything(bundles, tmp_path):
    single = make_static(tiny_bundle.bundle(tmp_path / "one", "sd15"), (1,))
    drawn = [
        Pipeline.from_pretrained(folder)("red", seed=1, output_type="np").images for folder in (bundles["sd15"], single)
    ]
    np.testing.assert_allclose(*drawn, rtol=0, atol=1e-6)


def test_unguided_without_a_graph_of_one_row_exits_with_one_line(static, capsys, tmp_path):
    command = ["generate", "red", "--model", static["sd3"], "--guidance-scale", 1, "-o", tmp_path / "p.png"]
    assert main([str(word) for word in command]) == 2
    assert "--rows 1 2 4 -o DIR" in capsys.readouterr().err


def test_inspect_tells_the_target_and_the_rows_and_verifies_every_graph(static, tmp_path):
    bundle = Bundle.open(static["sd3"])
    verify(bundle)
    told = describe(bundle, verified=True)
    assert "target      qnn" in told
    assert "graphs of 2, 4 rows" in told
    folder = make_static(tiny_bundle.bundle(tmp_path / "broken", "sd15"), (2, 4))
    facts = read_facts(folder / "bundle.json")
    unet = dataclasses.replace(facts.components["unet"], rows=(2, 4, 6))
    tiny_bundle.change(folder, components={**facts.components, "unet": unet})
    with pytest.raises(BundleError, match=r"components\.unet\.rows is \[2, 4, 6\]"):
        Bundle.open(folder)


@pytest.mark.skipif(not assignment.tells(onnxruntime), reason="this onnxruntime cannot tell of nodes")
def test_inspect_loads_the_graphs_of_all_rows(tmp_path, capsys):
    folder = make_static(tiny_bundle.bundle(tmp_path / "b", "sd15"), (2, 4))
    assert main(["inspect", str(folder), "--provider", "cpu"]) == 0
    assert capsys.readouterr().out.count("unet: 100 % of") == 1
    graph = Bundle.open(folder).graph("unet", 4)
    graph.write_bytes(bytes(graph.stat().st_size))
    assert main(["inspect", str(folder), "--provider", "cpu"]) == 2
    assert f"error: {graph}: onnxruntime cannot load it" in capsys.readouterr().err
