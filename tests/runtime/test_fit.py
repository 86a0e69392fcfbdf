"""Fitting a table to a bundle: the whole command on hand-written graphs, stopped and resumed, installed, refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import epd
from runtime.__main__ import main
from runtime.bundle import Bundle
from runtime.fit import Fitting, Order, fit_bundle, read_prompts
from runtime.pipeline import Pipeline

PROMPTS = tuple(f"red a {i}" for i in range(8))
SMALL = {"prompts": PROMPTS, "calls": 3, "trajectories": 4, "teacher_calls": 32, "candidates": 3}


@pytest.fixture
def bundle(bundles, family, tmp_path):
    return shutil.copytree(bundles[family], tmp_path / family)


def test_the_table_draws_and_says_where_it_came_from(bundle, family, tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    pipe = Pipeline.from_pretrained(bundle)
    table, judgement = fit_bundle(pipe, Order(**SMALL))
    assert (table.family, table.model, table.sequential_calls, table.directions) == (family, f"tiny-{family}", 3, 2)
    held_out = table.provenance["held_out"]
    assert table.held_out_psnr == held_out["psnr_db"] == judgement.psnr_db
    assert held_out["images"] == 2
    assert {"euler", "dpmpp_2m", "unipc_2", "ipndm_2"} <= set(held_out["training_free"])
    assert judgement.reference_db > 40
    assert judgement.best_other in judgement.told(3)
    drawn = pipe("red a 3", seed=2, table=table)
    assert (drawn.report.sequential_calls, drawn.report.total_evaluations) == (3, table.total_evaluations)
    assert list((tmp_path / "cache").rglob("*.npz")) == []


def test_the_same_order_gives_the_same_table_whatever_the_groups(bundle, tmp_path, monkeypatch):
    tables = []
    for name, group in (("one", 16), ("other", 1)):
        monkeypatch.setattr("runtime.fit._GROUP", group)
        table, _ = fit_bundle(Pipeline.from_pretrained(bundle), Order(**SMALL), tmp_path / name)
        tables.append(table)
    np.testing.assert_allclose(tables[0].w, tables[1].w, atol=1e-4)
    np.testing.assert_allclose(tables[0].place, tables[1].place, atol=1e-3)


def test_a_stopped_run_goes_on_where_it_was(bundle, tmp_path):
    class Stop(KeyboardInterrupt):
        pass

    def run(limit):
        rows = 0

        def ticked(count):
            nonlocal rows
            rows += count
            if rows > limit:
                raise Stop

        fitting = Fitting(Pipeline.from_pretrained(bundle), Order(**SMALL), tmp_path, ticked)
        return fitting, lambda: (fitting.run()[0], rows)

    whole = run(10**9)[1]()[0]
    for file in tmp_path.glob("*.*"):
        if file.name.startswith(("teacher", "scores")):
            file.unlink()
    fitting, stopped = run(700)
    with pytest.raises(Stop):
        stopped()
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("teacher-*.npz")}
    assert kept
    assert len(kept) < len(fitting.groups)
    again, _ = run(10**9)[1]()
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept
    assert again.to_json() | {"provenance": None} == whole.to_json() | {"provenance": None}


def test_no_prompt_and_no_seed_has_two_roles(bundle, tmp_path):
    order = Order(**SMALL | {"trajectories": 5, "guidance": (1.0, 3.0)})
    groups = Fitting(Pipeline.from_pretrained(bundle), order, tmp_path).groups
    for what in ("prompts", "seeds"):
        seen = {
            role: {one for g in groups if g.role == role for one in getattr(g, what)}
            for role in ("learn", "choose", "judge")
        }
        assert sum(map(len, seen.values())) == len(set.union(*seen.values()))
    assert sorted(seed for g in groups for seed in g.seeds) == list(range(100_000, 100_009))
    assert {g.guidance for g in groups if g.role == "learn"} == {1.0, 3.0}


def test_the_prediction_is_about_what_is_done(bundle, tmp_path):
    done = []
    fitting = Fitting(Pipeline.from_pretrained(bundle), Order(**SMALL), tmp_path, done.append)
    rows, seconds = fitting.predict()
    assert sum(done) == 0
    assert seconds > 0
    fitting.run()
    assert sum(done) == pytest.approx(rows, rel=0.3)


def test_on_the_command_line(bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    (bundle / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    command = ["fit", str(bundle), "-n", "2", "-k", "1", "--trajectories", "2", "--teacher-calls", "24"]
    command += ["--candidates", "1", "-o", str(tmp_path / "mine.json"), "--install", "--json"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    table = epd.Table.load(said["table"])
    assert (table.sequential_calls, table.directions, said["psnr_db"]) == (3, 1, table.held_out_psnr)
    assert Bundle.open(bundle).facts.tables == ("tables/mine.json",)
    assert main(["generate", "red a", "--model", str(bundle), "-o", str(tmp_path / "a.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sequential_calls"] == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--calls", "1"], "--calls must be 2 or more"),
        (["-k", "0"], "-k must be 1 or more"),
        (["--trajectories", "1"], "--trajectories must be 2 or more"),
        (["--candidates", "0"], "--candidates must be 1 or more"),
        (["--calls", "6", "--teacher-calls", "12"], "give 48"),
        (["--guidance-scale", "nan"], "must be finite"),
        (["--prompts", "no-such-file"], "no-such-file: No such file"),
        (["-o", "table.txt"], "written as .json"),
        (["-o", "no/such/folder/table.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given, words, bundles, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", str(bundles["sd3"]), *given]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_prompts_of_a_bundle_come_before_the_packages_own(tmp_path):
    assert len(read_prompts(None, tmp_path)) >= 32
    (tmp_path / "prompts.txt").write_text("one\n\n two \n", encoding="utf-8")
    assert read_prompts(None, tmp_path) == ("one", "two")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(tmp_path / "bytes.txt", tmp_path)


def test_a_foreign_folder_takes_no_table(bundles, tmp_path):
    table = epd.start_table(epd.schedule.shifted(3), 1)
    with pytest.raises(ValueError, match=r"no bundle\.json to install a table in"):
        Bundle.open(bundles["optimum"]).install(table, "t.json")
