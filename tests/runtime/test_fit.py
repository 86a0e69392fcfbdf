"""Fitting a table to a bundle: the whole command on hand-written graphs, stopped and resumed, installed, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import epd
from epd.fit import Design, fit, teach
from runtime.__main__ import main
from runtime.bundle import Bundle
from runtime.designs import moves
from runtime.fit import Fitting, fit_bundle, remembering
from runtime.order import Order, read_prompts
from runtime.pipeline import Pipeline
from tests.epd.oracle import flow_slope

PROMPTS = tuple(f"red a {i}" for i in range(8))
SMALL = {"prompts": PROMPTS, "calls": 3, "trajectories": 4, "teacher_calls": 32, "candidates": 3}


@pytest.fixture
def bundle(bundles, family, tmp_path):
    return shutil.copytree(bundles[family], tmp_path / family)


def test_the_table_draws_and_says_where_it_came_from(bundle, family, tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    pipe = Pipeline.from_pretrained(bundle)
    table, judgement = fit_bundle(pipe, Order(**SMALL), tmp_path / "table.json")
    assert epd.Table.load(tmp_path / "table.json").to_json() == table.to_json()
    assert (table.family, table.model, table.sequential_calls, table.directions) == (family, f"tiny-{family}", 3, 2)
    held_out = table.provenance["held_out"]
    assert table.held_out_psnr == held_out["psnr_db"] == judgement.psnr_db
    assert held_out["images"] == 2
    assert {"euler", "dpmpp_2m", "unipc_2", "ipndm_2"} <= set(held_out["training_free"])
    assert judgement.reference_db > 40
    assert judgement.best_other in judgement.told(3)
    assert "NOT CONVERGED" in replace(judgement, reference_db=39.0).told(3)
    for over, words in ((2.0, "closer than"), (-2.0, "NO closer than"), (0.5, "no clear difference")):
        assert words in replace(judgement, over_best_db=over, over_best_half_db=1.0).told(3)
    drawn = pipe("red a 3", seed=2, table=table)
    assert (drawn.report.sequential_calls, drawn.report.total_evaluations) == (3, table.total_evaluations)
    assert list((tmp_path / "cache").rglob("*.npz")) == []


@pytest.mark.parametrize(
    ("prompts", "words"), [(4, "(4 pictures of 1 held-out prompt)"), (6, "(4 pictures of 2 held-out prompts)")]
)
def test_pictures_of_one_prompt_are_not_taken_for_prompts(bundles, tmp_path, prompts, words):
    order = Order(**SMALL | {"prompts": PROMPTS[:prompts], "trajectories": 8, "candidates": 1})
    _, judgement = Fitting(Pipeline.from_pretrained(bundles["sd3"]), order, tmp_path).run()
    assert words in judgement.told(3)
    assert ("noises of ONE prompt" in judgement.told(3)) == (prompts == 4)


def test_the_same_order_gives_the_same_table_whatever_the_groups(bundle, tmp_path, monkeypatch):
    tables = []
    for name, group in (("one", 16), ("other", 1)):
        monkeypatch.setattr("runtime.fit._GROUP", group)
        table, _ = fit_bundle(
            Pipeline.from_pretrained(bundle), Order(**SMALL), tmp_path / f"{name}.json", tmp_path / name
        )
        tables.append(table)
    np.testing.assert_allclose(tables[0].w, tables[1].w, atol=1e-4)
    np.testing.assert_allclose(tables[0].place, tables[1].place, atol=1e-3)


def test_a_stopped_run_goes_on_where_it_was(bundle, tmp_path):
    def run(work, limit):
        rows = 0

        def ticked(count):
            nonlocal rows
            rows += count
            if rows > limit:
                raise KeyboardInterrupt

        Path(work).mkdir(exist_ok=True)
        return Fitting(Pipeline.from_pretrained(bundle), Order(**SMALL), work, ticked=ticked).run()[0]

    whole = run(tmp_path / "whole", 10**9)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 700)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("teacher-*")}
    assert kept
    assert not list(tmp_path.glob("*.partial"))
    damaged = min(kept)
    damaged.write_bytes(damaged.read_bytes()[:-50])  # as after a crash: made anew
    again = run(tmp_path, 10**9)
    assert [file for file, time in kept.items() if file.stat().st_mtime_ns != time] == [damaged]
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


@pytest.mark.parametrize(("candidates", "held"), [(3, 1 << 28), (14, 1 << 28), (14, 0)])
def test_the_prediction_is_about_what_is_done(bundle, tmp_path, monkeypatch, candidates, held):
    monkeypatch.setattr("runtime.fit._KNOWN", held)
    done, order = [], Order(**SMALL | {"candidates": candidates})
    fitting = Fitting(Pipeline.from_pretrained(bundle), order, tmp_path, ticked=done.append)
    rows, seconds, size = fitting.predict()
    assert sum(done) == 0
    assert seconds > 0
    stored = sum(x.nbytes for x in fitting._taught(fitting.groups[0]).__dict__.values())
    done.clear()
    assert size >= stored * 0.9
    fitting.run()
    assert sum(done) == pytest.approx(rows, rel=0.3)


@pytest.mark.parametrize("held", [1 << 28, 0])  # bytes
def test_a_neighbour_asks_only_for_what_its_design_does_not_share(monkeypatch, held):
    monkeypatch.setattr("runtime.fit._KNOWN", held)
    dice = np.random.default_rng(3).standard_normal((3, 4, 2, 2))
    teacher = teach(flow_slope, dice, np.linspace(1, 0, 41))
    base = Design((1.0, 0.8, 0.6, 0.3, 0.0), ((0.5, 1.0),) * 3 + ((0.5, 0.9),), place=2, carry=2)
    requests = []

    def counted(points):
        requests.append(points)
        return flow_slope(points)

    slope = remembering(counted)
    fit(base, slope, teacher)
    for design in moves(base):
        shared, before = base.begins_as(design), len(requests)
        table, ends = fit(design, slope, teacher)
        alone, same = fit(design, flow_slope, teacher)
        assert table.to_json() == alone.to_json()
        np.testing.assert_array_equal(ends, same)
        if held:
            assert len(requests) - before <= 4 - shared
            fit(base, slope, teacher)
    assert base.begins_as(base) == 4
    assert {base.begins_as(design) for design in moves(base)} == {0, 1, 2, 3}
    if not held:
        assert len(requests) == 5 * (1 + len(list(moves(base))))


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
        (["--calls", "1"], "--calls must be from 2 to 100, got 1"),
        (["-n", "99999999999"], "--calls must be from 2 to 100, got 100000000000"),
        (["-k", "0"], "-k must be from 1 to 64"),
        (["-k", "65"], "-k must be from 1 to 64"),
        (["--trajectories", "1"], "--trajectories must be from 2 to 10000"),
        (["--teacher-calls", "9999999999"], "--teacher-calls must be from 1 to 10000"),
        (["--candidates", "0"], "--candidates must be from 1 to 10000"),
        (["--calls", "6", "--teacher-calls", "12"], "give 48"),
        (["--guidance-scale", "nan"], "must be from -1000 to 1000"),
        (["--guidance-scale", "3", "1e308"], "must be from -1000 to 1000"),
        (["--guidance-scale", "1", "3", "7", "--trajectories", "4"], "3 guidance scales need --trajectories 6"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["-n", "0"], "-n must be 1 or more"),
        (["--teacher", "no-such-folder"], "no such folder"),
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


def test_installing_a_table_makes_no_other_bundle_and_loses_none(bundle):
    table = epd.start_table((1.0, 0.5), 1)
    one, other = Bundle.open(bundle), Bundle.open(bundle)
    before = one.fingerprint()
    one.install(table, "a.json")
    other.install(replace(table, provenance={"held_out": {"psnr_db": 30.0}}), "b.json")
    assert Bundle.open(bundle).facts.tables == ("tables/b.json", "tables/a.json")
    assert Bundle.open(bundle).fingerprint() == before
    with pytest.raises(ValueError, match="leads out of the bundle"):
        one.install(table, "c:d.json")
    Bundle.open(bundle).verify()


def test_a_teacher_of_higher_precision_is_met(bundle, bundles, family, tmp_path):
    """Slopes that are 3 % too large: a table of its own teacher keeps that error, one of the right teacher loses it."""
    pipe, right = Pipeline.from_pretrained(bundle), Pipeline.from_pretrained(bundles[family])
    exact = pipe.slopes

    def bad(*told):
        slopes = exact(*told)
        part = slopes.part

        def scaled(images, guidance):
            piece = part(images, guidance)
            whole = piece._evaluate

            def too_large(*given):
                slope, rows = whole(*given)
                return 1.03 * slope, rows

            piece._evaluate = too_large
            return piece

        slopes.part = scaled
        return slopes

    pipe.slopes = bad
    errors = []
    for teacher in (None, right):
        table, _ = Fitting(pipe, Order(**SMALL), tmp_path, teacher).run()
        judged = Fitting(pipe, Order(**SMALL), tmp_path, right)
        groups = [group for group in judged.groups if group.role == "judge"]
        aim = np.concatenate([judged._taught(group).x[-1] for group in groups])
        start = np.concatenate([judged._start(group) for group in groups])
        *_, last = epd.solve(epd.solvers.epd(table), start, judged._slope(groups))
        errors.append(np.abs(last.x - aim).mean())
    assert errors[1] < 0.8 * errors[0]


def test_a_bundle_that_takes_no_table_is_told_before_the_work(bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (bundle / "tables").write_text("", encoding="utf-8")  # stands where they would go
    assert main(["fit", str(bundle), "--install"]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert "leave --install out" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [bundle.name]


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("where", ["-o", "--work"])
def test_a_full_disk_is_told_by_the_name_of_the_file(bundles, small_disk, tmp_path, capsys, where):
    (small_disk / "full").write_bytes(bytes(12288))  # all there is
    places = {"-o": tmp_path / "table.json", "--work": tmp_path / "work"} | {
        where: small_disk / {"-o": "table.json", "--work": "work"}[where]
    }
    command = ["fit", str(bundles["sd3"]), "--calls", "3", "--trajectories", "2", "--teacher-calls", "24"]
    command += ["--candidates", "1", *(str(word) for place in places.items() for word in place)]
    assert main(command) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {places[where]}")
    assert line.endswith("No space left on device")
    assert [path for path in small_disk.rglob("*") if path.is_file()] == [small_disk / "full"]


def test_a_foreign_folder_takes_no_table(bundles, tmp_path):
    table = epd.start_table(epd.schedule.shifted(3), 1)
    with pytest.raises(ValueError, match=r"no bundle\.json to install a table in"):
        Bundle.open(bundles["optimum"]).install(table, "t.json")
