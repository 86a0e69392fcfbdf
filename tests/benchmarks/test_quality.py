"""`python -m benchmarks quality` on bundles small enough to read."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import epd
from benchmarks.__main__ import main
from benchmarks.bench import Bench, psnr
from benchmarks.entrants import asked, entrants
from benchmarks.report import COLUMNS
from runtime.pipeline import Pipeline

sys.path.append(str(Path(__file__).parents[1] / "runtime"))
import tiny_bundle

SHORT = ["--calls", "3", "4", "--count", "3", "--batch", "2", "--reference-steps", "60"]


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    return {family: tiny_bundle.bundle(root / family, family) for family in ("sd3", "sd15")}


@pytest.fixture(params=["sd3", "sd15"])
def bench(request, bundles):
    return Bench(Pipeline.from_pretrained(bundles[request.param]), ["red", "blue cat", ""], 4.0, 2)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("red\n\nblue cat\nsquare\nnever used\n", encoding="utf-8")
    return str(file)


def test_every_solver_has_the_most_steps_that_fit(bench):
    for attempt in entrants(bench, [3, 4, 7], [], None):
        if attempt.calls is not None:
            assert asked(attempt.solver) <= attempt.calls
            assert asked(attempt.solver) > attempt.calls - 2
    found = {attempt.name for attempt in entrants(bench, [4], [], None)}
    methods = epd.solvers.METHODS.values()
    assert {m.name for m in methods if not m.noisy and m.calls} <= found
    assert not {m.name for m in methods if m.noisy} & found


def test_work_is_what_the_driver_counts(bench):
    """Alone and by hand, image by image: the same latents, the same calls; guidance doubles the rows."""
    for attempt in entrants(bench, [5], [], ["heun", "dpmpp_3m", "epd", "parataa"]):
        found = bench.run(attempt)
        counted = []
        for i, prompt in enumerate(bench.prompts):
            slopes = bench.pipe.slopes([prompt], 4.0)
            *_, last = epd.solve(attempt.solver, attempt.start_scale * bench._noise[i : i + 1], slopes)
            np.testing.assert_allclose(found.latents[i], last.x[0] / attempt.end_scale, rtol=1e-4, atol=1e-5)
            counted.append((last.calls, last.evaluations, slopes.guided_forwards))
        work = (found.sequential_calls, found.total_evaluations, found.guided_forwards)
        assert work == pytest.approx(np.mean(counted, 0).tolist())
        assert work[2] == pytest.approx(2 * work[1])


def test_psnr():
    truth = np.random.default_rng(0).random((2, 4, 4, 3)).astype(np.float32)
    assert psnr(truth, truth + np.float32(0.1)) == pytest.approx([20, 20], abs=1e-4)
    assert psnr(truth, truth).tolist() == [120, 120]


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_all_forms_say_the_same(bundles, family, prompts, tmp_path, capsys):
    files = {form: tmp_path / f"quality.{form}" for form in ("csv", "markdown", "plot")}
    told = [text for form, file in files.items() for text in (f"--{form}", str(file))]
    table = tmp_path / "mine.json"
    epd.start_table(np.linspace(0.9, 0.1, 3), 2).save(table)
    command = ["quality", str(bundles[family]), "--prompts", prompts, *SHORT, "--solvers", "dpmpp_2m", "paradigms"]
    command += ["--table", str(table), "--work", str(tmp_path / "work"), "--json", *told]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    names = {row["solver"] for row in result["rows"]}
    assert {"euler", "dpmpp_2m", "mine"} <= names
    assert {row["kind"] for row in result["rows"]} == {"solver", "table", "parallel"}
    assert result["agreement_db"]["mean"] >= 40
    assert result["prompts"] == 3
    with files["csv"].open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert tuple(rows[0]) == COLUMNS
    tables = files["markdown"].read_text(encoding="utf-8").partition("## ")[2]
    for row, line in zip(result["rows"], rows, strict=True):
        assert float(line["psnr_db"]) == row["psnr_db"]["mean"]
        assert float(line["guided_forwards"]) == row["guided_forwards"]
        assert line["over_euler_db"] == ("" if row["calls"] is None else str(row["over_euler_db"]["mean"]))
        assert f"{row['psnr_db']['mean']:.2f} ± " in next(
            text
            for text in tables.splitlines()
            if text.startswith(f"| {row['solver']} ") and f"{row['psnr_db']['mean']:.2f} ±" in text
        )
    assert files["plot"].read_bytes().startswith(b"\x89PNG")
    kept = sorted((tmp_path / "work").iterdir())
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert sorted((tmp_path / "work").iterdir()) == kept


def test_euler_is_zero_over_itself_and_errors_are_finite(bundles, prompts, capsys):
    assert main(["quality", str(bundles["sd3"]), "--prompts", prompts, *SHORT, "--solvers", "euler", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["sequential_calls"] for row in rows] == [3, 4]
    for row in rows:
        assert row["over_euler_db"] == {"mean": 0, "low": 0, "high": 0}
        assert math.isfinite(row["psnr_db"]["mean"])
        assert row["right"] is None
        assert row["guided_forwards"] == 2 * row["total_evaluations"]


def test_references_that_disagree_are_refused(bundles, prompts, capsys):
    command = ["quality", str(bundles["sd3"]), "--prompts", prompts, *SHORT[:-1], "6", "--solvers", "euler"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "raise --reference-steps 6" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "no model of the closed world; give --prompts FILE"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--calls", "0"], "must be 1 or more"),
        (["--count", "1"], "--count 2 or more"),
        (["--reference-steps", "28"], "must be above the largest of --calls, 28"),
        (["--csv", "nowhere/at/all.csv"], "no such folder"),
    ],
)
def test_a_users_mistake_is_one_line(bundles, extra, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["quality", str(bundles["sd3"]), *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_solver_is_named(bundles, prompts, capsys):
    assert main(["quality", str(bundles["sd3"]), "--prompts", prompts, "--solvers", "eulr"]) == 2
    assert "unknown solver 'eulr'; choose from euler, heun" in capsys.readouterr().err
