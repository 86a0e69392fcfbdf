"""`python -m benchmarks scaling`: costs, words, and the profile that `--directions auto` reads."""

import csv
import dataclasses
import json
from itertools import pairwise

import pytest
import tiny_bundle

import epd
from benchmarks import scaling
from benchmarks.__main__ import main
from benchmarks.scaling import Directions, Drawn
from benchmarks.scaling_report import markdown, verdict
from runtime import directions, profiles
from runtime.__main__ import main as runtime
from runtime.errors import RequestError
from runtime.pipeline import Pipeline
from runtime.profiles import Profile
from tests.runtime.test_directions import Clock, Device
from tests.runtime.test_rows import make_static

pytestmark = pytest.mark.usefixtures("cache")


class Ticking(Clock):
    """What is not simulated takes hardly any time, but some."""

    def __call__(self):
        self.now += 1e-9
        return self.now


def simulated(folder, cost, monkeypatch):
    """A pipeline whose backbone takes `cost(rows)` seconds of a clock that nothing else moves."""
    clock = Ticking()
    monkeypatch.setattr("runtime.pipeline.Profile", lambda key: Profile(key, clock))
    pipe = Pipeline.from_pretrained(folder)
    backbone = pipe._session(pipe.bundle.backbone)
    pipe._sessions[pipe.bundle.backbone] = Device(backbone.load(), cost, clock)
    return pipe


@pytest.mark.parametrize(
    ("cost", "best", "word"),
    [
        (lambda rows: rows**2, [2, 3, 4, 8], "this device is busy at one"),  # calls in turn, then
        (lambda rows: 10 + 0.1 * rows, [10.4 / 10.2, 10.6 / 10.2, 10.8 / 10.2, 11.6 / 10.2], "nearly free"),
        (lambda rows: 2 + rows, [1.5, 2, 2.5, 4.5], "some room"),
    ],
)
def test_costs_and_words_of_a_known_device(bundles, cost, best, word, monkeypatch):
    result = scaling.measure(simulated(bundles["sd3"], cost, monkeypatch), None, 4, 3)
    assert [(one.rows, one.seconds) for one in result.costs] == [
        (rows, pytest.approx(cost(rows))) for rows in (1, 2, 4, 6, 8, 16)
    ]
    assert [one.calls for one in result.costs] == pytest.approx([cost(one.rows) / cost(2) for one in result.costs])
    assert [way.k for way in result.directions] == [2, 3, 4, 8]
    assert [way.best for way in result.directions] == pytest.approx(best)
    assert [way.in_turn for way in result.directions] == [2, 3, 4, 8]
    assert verdict(result)[0].startswith(f"2 directions cost {best[0]:.2f} calls here; 3 cost {best[1]:.2f}; ")
    assert word in verdict(result)[0]
    assert f"as long as {1 + 5 * best[0]:.1f} calls of one direction" in verdict(result)[1]
    peaks = [one.peak_rss_bytes for one in result.costs]
    assert None in peaks or all(after > before - 1e6 for before, after in pairwise(peaks))  # Linux counts in batches


@pytest.mark.parametrize("k", [2, 3])
def test_auto_does_not_measure_what_scaling_has(bundles, k, tmp_path, capsys, caplog, cache, monkeypatch):
    monkeypatch.setattr(profiles, "BUSY", 1e9)  # calls of so small a graph are never alike
    model = str(bundles["sd15"])
    assert main(["scaling", model, "-k", "3", "--runs", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (file,) = (cache_file for cache_file in cache.rglob("*.json"))
    assert result["profile"] == str(file)
    kept = file.read_bytes()

    def never(*arguments):
        pytest.fail("measured again")

    monkeypatch.setattr(profiles, "measure", never)
    draw = [
        "generate",
        "red",
        "--model",
        model,
        "--solver",
        "epd",
        "-k",
        str(k),
        "--json",
        "-o",
        str(tmp_path / "a.png"),
    ]
    for more in (["--directions", "auto"], []):
        assert runtime([*draw, *more]) == 0
        report = json.loads(capsys.readouterr().out)
        assert "measure" not in report["seconds"]
        costs = next(way for way in result["directions"] if way["k"] == k)
        told = {"batch": "batch", "calls": "in_turn", "async": "at_once"}
        best = min(costs[name] for name in told.values())
        assert costs[told[report["directions"]]] <= directions._CLOSE * best
    assert f"measured before: {file}" in caplog.text
    assert file.read_bytes() == kept


def test_scaling_measures_anew_and_replaces(bundles, monkeypatch):
    cost = {"now": 1.0}
    pipe = simulated(bundles["sd3"], lambda rows: cost["now"] * rows, monkeypatch)
    plan = pipe.plan("", solver="euler")
    scaling.measure(pipe, [2, 4], 4, 3)
    cost["now"] = 7.0
    scaling.measure(pipe, [2, 8], 4, 3)
    kept = Profile(pipe._key(plan)).sittings
    assert [sorted(sitting) for sitting in kept] == [
        ["2 rows", "4 calls of 2 rows at once", "8 rows", "a picture in one call of 2 rows", "decode"]
    ]
    assert kept[0]["2 rows"].seconds == pytest.approx(14)


def test_what_a_busy_machine_gave_is_told_and_not_kept(bundles, monkeypatch, caplog):
    times = iter(range(1, 10_000))
    pipe = simulated(bundles["sd3"], lambda rows: next(times) % 7 + 0.1, monkeypatch)
    result = scaling.measure(pipe, [2, 4], 4, 5)
    assert result.profile is None
    assert "not kept" in markdown(result)
    assert "the machine is still busy" in caplog.text
    assert Profile(pipe._key(pipe.plan("", solver="euler"))).sittings == []


def test_words_of_a_busy_machine_are_not_to_be_relied_on(bundles, monkeypatch):
    monkeypatch.setattr("runtime.profiles.Others.share", lambda self: 0.6)
    result = scaling.measure(simulated(bundles["sd3"], lambda rows: rows, monkeypatch), [2, 4], 4, 3)
    assert (result.profile, result.others) == (None, 0.6)
    assert verdict(result)[-1].startswith("Do not rely on it: THE MACHINE WAS BUSY, other programs took 60%")
    quiet = dataclasses.replace(result, others=0.1)
    assert not any("rely" in line for line in verdict(quiet))


def test_one_timestep_for_all_rows_means_calls(bundles, monkeypatch):
    result = scaling.measure(simulated(bundles["optimum"], lambda rows: 8 + rows, monkeypatch), [2, 4], 4, 3)
    (way,) = result.directions
    assert (way.k, way.batch, way.in_turn) == (2, None, 2)
    assert way.best == pytest.approx(2)


def test_static_graphs_are_measured_at_their_own_rows(tmp_path, monkeypatch):
    folder = make_static(tiny_bundle.bundle(tmp_path / "static", "sd3"), (2, 4))
    monkeypatch.setattr(profiles, "BUSY", 1e9)
    result = scaling.measure(Pipeline.from_pretrained(folder), None, 4, 3)
    assert [one.rows for one in result.costs] == [2, 4]
    assert [way.k for way in result.directions] == [2]
    with pytest.raises(RequestError, match=r"has graphs of 2, 4 rows; 6 cannot be measured, give --rows 2 4"):
        scaling.measure(Pipeline.from_pretrained(folder), [2, 6], 4, 3)


def test_tables_are_ranked_by_what_they_take_here(tmp_path, monkeypatch):
    """N wide requests and the first, narrow one; three directions were not measured."""
    times = [1.0, 0.5, 0.1]
    tables = [(f"k{k}.json", epd.start_table(times, k)) for k in (1, 2, 3)]
    folder = tiny_bundle.bundle(tmp_path / "bundle", "sd3", tables=tables)
    result = scaling.measure(simulated(folder, lambda rows: 1 + rows / 2, monkeypatch), [2, 4], 4, 3)
    assert {one.name: one.seconds for one in result.tables} == pytest.approx(
        {"k1": 8, "k2": 10}
    )  # 4 x 2, 2 x 2 + 2 x 3
    assert len(verdict(result)) == 2  # no figures of theirs to judge them by
    judged = tuple(dataclasses.replace(one, psnr_db=40.0) for one in result.tables)
    quick = Drawn("quick", 1, 2, 2, 4.0, 30.0)
    told = verdict(dataclasses.replace(result, tables=(quick, *judged)))[2]
    assert "quick (4 s, 30.0 dB), k1 (8 s, 40.0 dB)." in told


def test_one_row_count_says_nothing_of_directions(bundles, monkeypatch):
    result = scaling.measure(simulated(bundles["sd3"], lambda rows: rows, monkeypatch), [2], 4, 3)
    assert result.directions == ()
    assert verdict(result) == ["No two directions were measured: give more --rows."]
    assert Directions(2, None, 2, None).best == 2


def test_files(bundles, tmp_path, capsys):
    files = {name: tmp_path / f"a.{name}" for name in ("csv", "md", "png")}
    options = ["--csv", str(files["csv"]), "--markdown", str(files["md"]), "--plot", str(files["png"])]
    assert main(["scaling", str(bundles["sd3"]), "--rows", "2", "4", "--runs", "3", *options]) == 0
    assert capsys.readouterr().out == files["md"].read_text(encoding="utf-8") + "\n"
    with files["csv"].open(encoding="utf-8", newline="") as file:
        assert [row["rows"] for row in csv.DictReader(file)] == ["2", "4"]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a.csv", "a.md", "a.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "2"], "--runs must be 3 or more"),
        (["--rows", "0"], "--rows 1 or more"),
        (["-k", "0"], "-k 1 to 64"),
        (["--provider", "cpu,cpu"], "scaling measures one provider"),
        (["--provider", "npu"], "npu"),
        (["--provider-option", "a"], "not KEY=VALUE"),
        (["--csv", "nowhere/a.csv"], "no such folder"),
    ],
)
def test_what_cannot_be_measured(bundles, options, message, capsys):
    assert main(["scaling", str(bundles["sd3"]), *options]) == 2
    assert message in capsys.readouterr().err
