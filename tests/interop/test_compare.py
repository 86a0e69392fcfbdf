"""`python -m benchmarks compare` against Optimum: it exports the checkpoint once, runs its graph and its pipelines."""

import json

import pytest

pytest.importorskip("optimum.onnxruntime", reason="needs the extra `interop`")

from benchmarks.__main__ import main

pytestmark = pytest.mark.interop


def test_optimum_does_the_same_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path))
    compare = ["compare", "shapes-sd3", "--against", "optimum", "--rounds", "2", "--json"]
    assert main(compare) == 0
    ours, optimum = json.loads(capsys.readouterr().out)["sides"]
    assert optimum["weights"] == "same"
    assert 0 < optimum["error"] < 5e-3  # fp32 against fp16
    assert ours["notes"] == optimum["notes"] == []
    (made,) = (tmp_path / "optimum").iterdir()
    written = (made / "transformer" / "model.onnx").stat().st_mtime_ns

    assert main([*compare, "--work", "picture", "--steps", "2"]) == 0
    ours, _, optimum = json.loads(capsys.readouterr().out)["sides"]
    assert "Euler's method, 6 steps: as many guided forwards" in optimum["does"]
    assert ours["notes"] == optimum["notes"] == []  # as many rows as were asked for
    assert (made / "transformer" / "model.onnx").stat().st_mtime_ns == written
