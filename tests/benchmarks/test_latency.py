"""`python -m benchmarks latency`: what adds up, what is told, and that watching changes nothing."""

import csv
import dataclasses
import hashlib
import importlib.util
import json

import numpy as np
import pytest

from benchmarks import latency
from benchmarks.__main__ import main
from benchmarks.latency_report import markdown
from runtime.pipeline import Pipeline
from runtime.profiles import Timing

pytestmark = pytest.mark.usefixtures("cache")
DRAWING = {"solver": "epd", "k": 3, "num_inference_steps": 3, "num_images_per_prompt": 2, "seed": 4}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What importing takes is measured once, below."""
    monkeypatch.setattr(latency, "_import_seconds", lambda: 0.25)


@pytest.fixture(scope="module", params=["sd3", "sd15"])
def measured(request, bundles, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "_import_seconds", lambda: 0.25)
        patch.setenv("EPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        pipe = Pipeline.from_pretrained(bundles[request.param])
        return latency.measure(pipe, pipe.plan("red", **DRAWING), 3, 2)


def test_parts_make_up_the_whole(measured):
    assert (measured.sequential_calls, measured.total_evaluations, measured.guided_forwards) == (6, 12, 48)
    assert len(measured.runs) == 3
    for run in (measured.first, *measured.runs):
        assert [(call.step, call.points, call.rows) for call in run.calls] == [
            (step, points, 4 * points) for step in (1, 2, 3) for points in (1, 3)
        ]
        assert sum(call.rows for call in run.calls) == measured.guided_forwards
        stages = {name: seconds for name, seconds in run.stages.items() if name not in ("total", "per_call")}
        assert sum(stages.values()) == pytest.approx(run.stages["total"])
        assert all(0 < call.inside <= call.seconds for call in run.calls)
        assert sum(call.seconds for call in run.calls) <= run.stages["denoise"]
        backbone = next(seconds for name, seconds in run.components.items() if name in ("transformer", "unet"))
        assert backbone == pytest.approx(sum(call.inside for call in run.calls))
        inside = sum(run.components.values())
        assert run.overhead == pytest.approx(run.stages["total"] - run.stages["load"] - inside)
        assert sum(run.loads.values()) == pytest.approx(run.stages["load"])
    assert measured.first.loads.keys() == measured.first.components.keys()
    assert sum(measured.start.values()) == pytest.approx(measured.import_seconds + measured.first.stages["total"])


def test_statistics_are_those_of_the_runs(measured):
    told = measured.summary()
    totals = [run.stages["total"] for run in measured.runs]
    assert told["picture"]["median"] == np.median(totals)
    assert told["picture"]["p90"] == pytest.approx(np.quantile(totals, 0.9))
    assert (told["picture"]["low"], told["picture"]["high"]) == pytest.approx(tuple(np.quantile(totals, [0.25, 0.75])))
    for step in range(3):
        seconds = [sum(call.seconds for call in run.calls if call.step == step + 1) for run in measured.runs]
        assert told["step"][step]["median"] == pytest.approx(np.median(seconds))
    calls = [call.seconds for run in measured.runs for call in run.calls]
    assert told["drift"] == pytest.approx(np.median(calls[9:]) / np.median(calls[:9]))
    assert told["rows_per_call"] == [4, 12]
    json.dumps(measured.to_json(), allow_nan=False)


def test_watching_changes_nothing(measured, bundles):
    """The hash is that of the pictures as they are drawn without it."""
    family = measured.model.removeprefix("tiny-")
    pictures = Pipeline.from_pretrained(bundles[family])("red", **DRAWING, output_type="np").images
    expected = hashlib.sha256(pictures.astype(np.float32).tobytes()).hexdigest()
    assert {run.sha256 for run in (measured.first, *measured.runs)} == {expected}
    assert measured.same
    assert measured.finite
    assert f"output finite, the same in every run: SHA-256 {expected}" in markdown(measured)


def test_what_plan_predicts_is_told_beside_the_median(measured, bundles, monkeypatch, tmp_path):
    """0.5 s beside the calls, 3 of 3 s and 3 of 6 s."""
    assert measured.predicted_seconds is None
    assert "what `plan` predicts: nothing, for `scaling` has not measured such calls here" in markdown(measured)
    monkeypatch.setenv("EPD_CACHE", str(tmp_path))
    pipe = Pipeline.from_pretrained(bundles["sd3"])
    plan = pipe.plan("red", solver="epd", num_inference_steps=3, k=2)
    taken = {"2 rows": 3.0, "4 rows": 6.0, "a picture in one call of 2 rows": 4.0, "decode": 0.5}
    pipe.profile(plan).sittings = [{name: Timing(seconds, seconds, seconds) for name, seconds in taken.items()}]
    result = latency.measure(pipe, plan, 3, 1)
    assert result.predicted_seconds == 0.5 + 3 * 3 + 3 * 6 + 0.5
    assert f"28 s, {28 / result.summary()['picture']['median']:.2f} of the median" in markdown(result)


def test_what_is_wrong_is_told(measured):
    first, second, third = measured.runs
    slow = tuple(dataclasses.replace(call, seconds=9 * call.seconds) for call in first.calls)
    other = dataclasses.replace(third, calls=slow, sha256="0" * 64, finite=False)
    same_calls = dataclasses.replace(second, calls=first.calls)
    told = markdown(dataclasses.replace(measured, runs=(first, same_calls, other, other)))
    assert "NOT THE SAME IN EVERY RUN" in told
    assert "NOT FINITE" in told
    assert "the device slowed down" in told


def test_many_steps_are_told_in_few_lines(bundles):
    pipe = Pipeline.from_pretrained(bundles["sd3"])
    for steps, lines in ((12, 12), (13, 2)):
        plan = pipe.plan("red", solver="heun", num_inference_steps=steps)
        told = markdown(latency.measure(pipe, plan, 3, 1))
        table = told.split("| step ")[1].split("\n\n")[0].splitlines()[2:]
        assert len(table) == lines
    assert table[0].startswith("| 1 to 12, each |     2 | 2 + 2 |")
    assert table[1].startswith("| 13            |     1 |     2 |")


@pytest.mark.parametrize(("solver", "calls"), [("heun", 2), ("euler", 1), ("euler_ancestral", 1)])
def test_solvers(bundles, solver, calls):
    pipe = Pipeline.from_pretrained(bundles["sd15"])
    result = latency.measure(pipe, pipe.plan("red", solver=solver, num_inference_steps=3, guidance_scale=1.0), 3, 1)
    per_step = [sum(call.step == step for call in result.runs[0].calls) for step in (1, 2)]
    assert per_step == [calls] * 2
    assert result.summary()["rows_per_call"] == [1]
    assert result.guided_forwards == result.sequential_calls
    assert result.same


@pytest.mark.parametrize(("provider", "way"), [("cpu,cpu", "spread"), ("cpu", "async")])
def test_calls_at_once(bundles, provider, way, monkeypatch):
    """Of sessions at once the slowest counts; of calls at once on one session nothing is known."""
    pipe = Pipeline.from_pretrained(bundles["sd3"], provider=provider, directions=way)
    result = latency.measure(pipe, pipe.plan("red", **DRAWING), 3, 1)
    told = result.summary()
    assert result.way == way
    if way == "async":
        assert told["overhead"] is None
        assert "not known where calls of one session run at once" in markdown(result)
    else:
        assert {"transformer", "transformer 1"} <= result.runs[0].components.keys()
        assert all(call.inside <= call.seconds for run in result.runs for call in run.calls)
        assert 0 < told["overhead_share"] < 1
        for run in result.runs:
            spent = {name: seconds for name, seconds in run.components.items() if name.split()[0] != "transformer"}
            backbone = sum(call.inside for call in run.calls)
            apart = run.stages["total"] - run.stages["load"] - sum(spent.values()) - backbone
            assert run.overhead == pytest.approx(apart)
            assert backbone < run.components["transformer"] + run.components["transformer 1"] + 1e-9


def test_files(bundles, tmp_path, capsys):
    files = {name: tmp_path / f"a.{name}" for name in ("csv", "md", "png")}
    options = ["--csv", str(files["csv"]), "--markdown", str(files["md"]), "--plot", str(files["png"])]
    draw = ["latency", str(bundles["sd3"]), "--solver", "epd", "-k", "2", "--steps", "2", "--runs", "3"]
    assert main([*draw, *options]) == 0
    assert capsys.readouterr().out == files["md"].read_text(encoding="utf-8") + "\n"
    with files["csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [str(run) for run in range(4) for _ in range(4)]
    assert [row["rows"] for row in rows[:4]] == ["2", "4"] * 2
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert main([*draw, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["summary"]["same_in_every_run"] is True
    assert told["provider"]["ran"] == "CPUExecutionProvider"
    assert told["summary"]["start"]["import"] == 0.25


def test_low_memory_is_told_and_loads_anew_for_every_picture(bundles, capsys):
    command = ["latency", str(bundles["sd15"]), "--steps", "1", "--runs", "3", "--low-memory"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["low_memory"]
    assert all(run["loads"]["unet"] > 0 for run in told["runs"])
    assert main(command) == 0
    assert "(--low-memory)" in capsys.readouterr().out


def test_importing_takes_time(monkeypatch):
    monkeypatch.undo()
    assert 0.01 < latency._import_seconds() < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "2"], "--runs must be 3 or more"),
        (["--warmup", "0"], "--warmup 1 or more"),
        (["--provider", "npu"], "npu"),
        (["--solver", "best"], "unknown solver 'best'"),
        (["--markdown", "nowhere/a.md"], "no such folder"),
        (["--plot", "."], ".: a folder; give a file name"),
    ],
)
def test_what_cannot_be_measured(bundles, options, message, capsys):
    assert main(["latency", str(bundles["sd3"]), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_plot_needs_matplotlib(bundles, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["latency", str(bundles["sd3"]), "--plot", "a.png"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'epd-toolkit[plot]'" in line
