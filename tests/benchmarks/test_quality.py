"""`python -m benchmarks quality` on bundles small enough to read."""

import csv
import hashlib
import itertools
import json
import math
import os
import shutil

import numpy as np
import pytest

import epd
from benchmarks import comparison, quality, report
from benchmarks.__main__ import main
from benchmarks.bench import Attempt, Bench
from benchmarks.entrants import entrants, references
from runtime import figures
from runtime.errors import NotFiniteError
from runtime.pipeline import Pipeline
from runtime.png import version

pytestmark = pytest.mark.usefixtures("cache", "calm")

SHORT = ["--calls", "3", "4", "--count", "3", "--batch", "2", "--reference-steps", "60"]


def test_what_is_kept_belongs_to_one_provider_and_version(bench, monkeypatch):
    attempt = references(bench, 40)[0]
    keys = {bench.key(attempt)}
    monkeypatch.setattr(bench.pipe, "provider", "cuda")
    keys.add(bench.key(attempt))
    monkeypatch.setattr("runtime.png.version", lambda: "0.0.0")
    keys.add(bench.key(attempt))
    assert len(keys) == 3


def test_what_is_kept_belongs_to_the_weights(bundles, tmp_path):
    """The fingerprint's, as ever; a foreign folder's files."""
    shutil.copytree(bundles["optimum"], tmp_path / "theirs")
    own, foreign = (Bench(Pipeline.from_pretrained(f), ["red"], 4.0, 2) for f in (bundles["sd3"], tmp_path / "theirs"))
    attempt = references(own, 40)[0]
    told = [version(), "cpu", own.pipe.bundle.fingerprint(), ["red"], quality.NOISE_SEED, 4.0]
    told += [attempt.name, attempt.times, attempt.start_scale, "", None]
    assert own.key(attempt) == hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
    before = foreign.key(attempt)
    os.utime(tmp_path / "theirs" / "unet" / "model.onnx", (1, 1))
    assert foreign.key(attempt) != before


def test_what_is_kept_and_damaged_is_made_again(bench, tmp_path):
    bench.work = tmp_path
    made = bench.kept("some", lambda: {"x": np.arange(3)})
    whole = (tmp_path / "some.npz").read_bytes()
    (tmp_path / "some.npz").write_bytes(whole[:-30])
    assert bench.kept("some", lambda: {"x": np.arange(4)})["x"].tolist() == [0, 1, 2, 3]
    assert bench.kept("some", lambda: None)["x"].tolist() == [0, 1, 2, 3]
    assert made["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [("solver", "leave it out with --solvers"), ("table", "another --guidance-scale"), ("reference", "another --guid")],
)
def test_only_solvers_can_be_left_out(bundles, monkeypatch, kind, remedy):
    def fails(*_):
        raise FloatingPointError("NaN")

    monkeypatch.setattr(epd, "solve", fails)
    bench = Bench(Pipeline.from_pretrained(bundles["sd3"]), ["red"], 4.0, 2)
    with pytest.raises(NotFiniteError, match=f"mine: NaN; .*{remedy}"):
        bench.part(Attempt("mine", None, (1.0, 0.0), 1.0, 1.0, kind=kind), slice(0, 1))


def test_the_same_caption_twice_is_one_prompt(bundles):
    """Told with how many differ, and that intervals of so few are too narrow."""
    bench = Bench(Pipeline.from_pretrained(bundles["sd3"]), ["red", "blue cat", "red"], 4.0, 2, seeds=2)
    found = comparison.measure(bench, entrants(bench, [4], [], ["euler"]), None, 60)
    assert (found.prompts, found.different_prompts) == (3, 2)
    assert found.notes == ("Intervals of so few prompts, 2, are too narrow",)
    page = report.markdown(found)
    assert "3 prompts, 2 of them different, 2 start noises each" in page
    assert f"**{found.notes[0]}**" in page


def test_the_result_is_printed_before_files_are_written(bundles, prompts, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "x.csv")

    monkeypatch.setattr("benchmarks.common.write", full)
    command = ["quality", str(bundles["sd3"]), "--prompts", prompts, *SHORT, "--solvers", "euler", "--json"]
    assert main([*command, "--csv", str(tmp_path / "x.csv")]) == 2
    assert json.loads(capsys.readouterr().out)["rows"]


def test_files_are_written_where_nobody_reads_the_result(bundles, prompts, tmp_path, monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr("benchmarks.common.print", gone, raising=False)
    command = ["quality", str(bundles["sd3"]), "--prompts", prompts, *SHORT, "--solvers", "euler"]
    files = {form: tmp_path / form for form in ("csv", "figures")}
    assert main([*command, *(word for form, file in files.items() for word in (f"--{form}", str(file)))]) == 0
    assert all(file.is_file() for file in files.values())


def test_the_first_images_are_those_of_all(bench):
    attempt = references(bench, 6)[0]
    np.testing.assert_allclose(bench.run(attempt, 2).latents, bench.run(attempt).latents[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["sd3", pytest.param("sd15", marks=pytest.mark.slow)])
def test_all_forms_say_the_same(bundles, family, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "AGREEING", 2)  # prompts of three: the second reference is not run on all
    files = {form: tmp_path / f"quality.{form}" for form in ("csv", "markdown", "plot")}
    told = [text for form, file in files.items() for text in (f"--{form}", str(file))]
    table = tmp_path / "mine.json"
    epd.start_table(np.linspace(0.9, 0.1, 3), 2).save(table)
    command = ["quality", str(bundles[family]), "--prompts", prompts, *SHORT, "--solvers", "dpmpp_2m", "paradigms"]
    command += ["--table", str(table), "--work", str(tmp_path / "work"), "--json"]
    command += ["--seeds", "2", "--figures", str(tmp_path / "figures.json")]
    assert main([*command, *told]) == 0
    result = json.loads(capsys.readouterr().out)
    names = {row["solver"] for row in result["rows"]}
    assert {"euler", "dpmpp_2m", "mine"} <= names
    assert {row["kind"] for row in result["rows"]} == {"reference", "solver", "table", "parallel"}
    assert result["agreement_db"]["mean"] >= 40
    assert (result["prompts"], result["seeds"], result["baseline"]) == (3, 2, "euler")
    with files["csv"].open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    tables = files["markdown"].read_text(encoding="utf-8").partition("## ")[2]
    for row, line in zip(result["rows"], rows, strict=True):
        assert float(line["guided_forwards"]) == row["guided_forwards"]
        assert float(line["seconds"]) == row["seconds"] > 0
        if row["kind"] == "reference":
            continue
        psnr, over = row["figures"]["psnr_db"], row["baseline"] and row["baseline"]["over"]["psnr_db"]
        assert float(line["psnr_db"]) == psnr["mean"]
        assert line["over_baseline_psnr_db_low"] == ("" if row["calls"] is None else str(over["low"]))
        told = f"{psnr['mean']:.2f} ± {(psnr['high'] - psnr['low']) / 2:.2f}"
        assert any(text.startswith(f"| {row['solver']} ") and told in text for text in tables.splitlines())
    _check_table(result["rows"], tables)
    assert files["plot"].read_bytes().startswith(b"\x89PNG")
    _check_planners(result["rows"], figures.read(tmp_path / "figures.json"), figures.digest(epd.Table.load(table)))
    kept = sorted((tmp_path / "work").iterdir())
    for file in [file for file in kept if "figures" not in file.name][::3]:  # as if it had been stopped
        file.unlink()
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert sorted((tmp_path / "work").iterdir()) == kept


def _check_table(rows, tables):
    """The learned table beside the best training-free solver within as many calls, and evaluations."""
    mine = next(row for row in rows if row["kind"] == "table")
    assert (mine["sequential_calls"], mine["total_evaluations"]) == (4, 6)
    for name, calls in (("closest", 4), ("closest_by_work", 6)):
        others = [row for row in rows if row["kind"] == "solver" and row["calls"] == calls]
        best = max(others, key=lambda row: row["figures"]["psnr_db"]["mean"])
        over = mine[name]["over"]["psnr_db"]
        assert (mine[name]["name"], mine[name]["calls"]) == (best["solver"], calls)
        assert over["mean"] == pytest.approx(mine["figures"]["psnr_db"]["mean"] - best["figures"]["psnr_db"]["mean"])
        word = "better" if over["low"] > 0 else "worse" if over["high"] < 0 else "no clear difference"
        equal = {"closest": "sequential calls", "closest_by_work": "total evaluations"}[name]
        told = f"{over['mean']:+.2f} ± {(over['high'] - over['low']) / 2:.2f} PSNR dB over {best['solver']}"
        assert f"- mine, {calls} {equal}: {word}, {told}, the best of {len(others)}\n" in tables
    assert all(row["closest"] is None for row in rows if row["kind"] != "table")


def _check_planners(rows, made, digest):
    """What `--figures` writes."""
    assert {(row.solver, row.steps) for row in made.rows if row.table is None} == {
        (row["solver"], row["steps"]) for row in rows if row["kind"] == "solver" and not row["solver"].endswith(" even")
    }
    assert [(row.steps, row.table) for row in made.rows if row.table] == [(2, digest)]


def test_numbers_of_an_axis_do_not_overlap():
    """Those of tables come first."""
    values = [4, 6, 8, 10, 20, 7, 9, 11, 12, 15, 16, 19, 28]
    assert report._apart(values, 16) == [4, 6, 7, 8, 10, 12, 15, 20, 28]
    assert report._apart(values, 7) == [4, 6, 8, 11, 15, 20, 28]
    assert report._apart([5], 16) == [5]
    assert report._apart([], 16) == []  # seconds that are not known
    many = report._apart(range(3, 281), 16)
    assert len(many) < 18
    assert min(b / a for a, b in itertools.pairwise(many)) > 1.3


def test_tables_of_as_many_directions_differ_in_their_dashes():
    def row(solver, k, kind="table"):
        return comparison.Row(solver, kind, 4, 3, k, None, None, 4, 4, 8, None, {}, None, None, None, None)

    rows = [row("a-k1-calls4", 1), row("b-k1-calls4", 1), row("a-k1-calls6", 1), row("a-k2-calls4", 2)]
    found = report._dashes([*rows, row("euler", None, "solver")])
    assert {label: look["linestyle"] for label, look in found.items()} == {"a-k1": "-", "b-k1": "--", "a-k2": "-"}


def test_euler_is_zero_over_itself_and_errors_are_finite(bundles, prompts, capsys):
    assert main(["quality", str(bundles["sd3"]), "--prompts", prompts, *SHORT, "--solvers", "euler", "--json"]) == 0
    _, *rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["sequential_calls"] for row in rows] == [3, 4]
    for row in rows:
        assert row["baseline"]["over"]["psnr_db"] == {"mean": 0, "low": 0, "high": 0}
        assert math.isfinite(row["figures"]["psnr_db"]["mean"])
        assert set(row["figures"]) == {"psnr_db", "latent_rmse"}  # no captions of the closed world
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
        (["--reference-steps", "28"], "must be above the most calls that are compared, 28"),
        (["--csv", "nowhere/at/all.csv"], "no such folder"),
        (["--csv", f"{'x' * 300}.csv"], "cannot be written"),
        (["--figures", f"{'x' * 300}.json"], "cannot be written"),
        (["--seeds", "0"], "must be 1 or more"),
        (["--figures", "nowhere/at.json"], "no such folder"),
        (["--preset", "headline", "--calls", "4"], "solvers and calls of its own; leave --calls out"),
        (["--preset", "headline", "--solvers", "heun", "--most-work", "9"], "leave --most-work, --solvers out"),
        (["--preset", "headline", "--guidance-interval", "0", "1"], "leave --guidance-interval out"),
        (["--prompts", "PROMPTS", "--guidance-interval", "5", "6"], "5 6 lies above the grid, which starts at sigma 1"),
        (["--guidance-interval", "2", "1"], "two sigmas with 0 <= LO < HI"),
        (["--reference-steps", "0", "--figures", "f.json"], "need a reference"),
        (["--prompts", "PROMPTS", "--baseline", "heun", "--solvers", "euler"], "no baseline 'heun' among what is run"),
        (["--prompts", "PROMPTS", "--solvers", "hein@4"], "unknown solver 'hein'; choose from euler"),
        (["--prompts", "PROMPTS", "--solvers", "heun@x"], "heun@x: M is a number of calls from 1 to 1000; give heun@6"),
        (["--prompts", "PROMPTS", "--solvers", f"heun@{'9' * 5000}"], "M is a number of calls from 1 to 1000"),
        (["--prompts", "PROMPTS", "--solvers", "epd@1"], "M is a number of calls from 2 to 1000"),
        (["--prompts", "PROMPTS", "--solvers", "parataa@4"], "finds its calls by running; give parataa"),
        (["--prompts", "PROMPTS", "--solvers", "heun@4", "--calls", "4"], "leave --calls out"),
        (
            ["--prompts", "PROMPTS", "--solvers", "heun@9", "--reference-steps", "9"],
            "above the most calls that are comp",
        ),
        (["--prompts", "PROMPTS", "--baseline", "euler@5", "--solvers", "euler"], "is not run at '5' calls"),
        (["--prompts", "PROMPTS", "--reward-model", "hpsv2=x"], "not among --reward; leave it out"),
        (["--prompts", "PROMPTS", "--teacher", "OTHER"], "no bundle of the same model"),
        (["--prompts", "PROMPTS", "--reference-steps", "0"], "nothing is left to measure by"),
        (["--prompts", "PROMPTS", "--reference-steps", "0", "--inception", "x"], "nothing is left to measure by"),
        (["--prompts", "PROMPTS", "--solvers", "euler", "--reward", "shapes,clip"], "give one name, without a weight"),
    ],
)
def test_a_users_mistake_is_one_line(bundles, prompts, extra, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra = [{"PROMPTS": prompts, "OTHER": str(bundles["sd15"])}.get(word, word) for word in extra]
    assert main(["quality", str(bundles["sd3"]), *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_solver_is_named(bundles, prompts, capsys):
    assert main(["quality", str(bundles["sd3"]), "--prompts", prompts, "--solvers", "eulr"]) == 2
    assert "unknown solver 'eulr'; choose from euler, heun" in capsys.readouterr().err


def test_against_one_baseline_limited_guidance_and_a_teacher(bundles, prompts, tmp_path, capsys):
    """The reference of a teacher that is the model itself is the model's own; all are compared with Euler-4."""
    command = ["quality", str(bundles["sd3"]), "--prompts", prompts, *SHORT, "--solvers", "dpmpp_2m", "--json"]
    assert main([*command, "--baseline", "euler@4", "--guidance-interval", "0.2", "0.8"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert main([*command, "--teacher", str(bundles["sd3"])]) == 0
    taught = {(row["solver"], row["calls"]): row for row in json.loads(capsys.readouterr().out)["rows"]}
    rows = {(row["solver"], row["calls"]): row for row in result["rows"]}
    fixed = rows["euler", 4]["figures"]["psnr_db"]["mean"]
    for (name, calls), row in rows.items():
        if row["kind"] == "reference":
            continue
        over = row["figures"]["psnr_db"]["mean"] - fixed
        assert row["baseline"]["over"]["psnr_db"]["mean"] == pytest.approx(over, abs=1e-9)
        limited = row["guidance_interval"] is not None
        assert (row["guided_forwards"] < 2 * row["total_evaluations"]) == limited
        if not limited:
            assert row["figures"] == taught[name, calls]["figures"]
    assert {row["kind"] for row in rows.values() if row["guidance_interval"]} == {"solver"}
    assert len({json.dumps(row["figures"]) for row in rows.values()}) == len(rows)


def test_the_headline(bundles, prompts, tmp_path, capsys, monkeypatch):
    """The model's own steps first, everything else against it; rewards by name; no reference where none is wanted."""
    asked = []

    def bright(name, weights, told, size):
        assert (name, weights, size) == ("bright", None, (16, 16))
        asked.append(told)
        return lambda pictures, images: pictures.mean((1, 2, 3))

    monkeypatch.setattr("benchmarks.perceptual.reward", bright)
    table = tmp_path / "mine.json"
    epd.start_table(np.linspace(0.9, 0.1, 3), 2).save(table)
    command = [
        "quality",
        str(bundles["sd3"]),
        "--preset",
        "headline",
        "--prompts",
        prompts,
        "--count",
        "3",
        "--seeds",
        "2",
    ]
    command += ["--table", str(table), "--reference-steps", "0", "--reward", "bright", "--json"]
    assert main([*command, "--markdown", str(tmp_path / "headline.md")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["solver"], row["steps"]) for row in result["rows"]] == [
        ("euler", 3),  # the model's own
        ("euler", 20),
        ("ipndm_3", 20),
        ("dpmpp_2m", 20),
        ("mine", 2),
    ]
    assert (result["baseline"], result["references"]) == ("euler@3", [])
    assert [list(row["figures"]) for row in result["rows"]] == [["bright"]] * 5
    assert all(row["baseline"]["calls"] == 3 for row in result["rows"])
    assert asked[0] == [prompt for prompt in ("red", "blue cat", "square") for _ in range(2)]
    assert "converged" not in (tmp_path / "headline.md").read_text(encoding="utf-8")


def test_a_headline_without_a_table_says_so(bundles, prompts, capsys, caplog, monkeypatch):
    monkeypatch.setattr("benchmarks.perceptual.reward", lambda *_: lambda pictures, images: pictures.mean((1, 2, 3)))
    command = ["quality", str(bundles["sd3"]), "--preset", "headline", "--prompts", prompts, "--count", "2"]
    assert main([*command, "--reference-steps", "0", "--reward", "bright", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == 4
    assert "NO LEARNED TABLE" in caplog.text
    assert result["notes"][0] in caplog.messages


def test_another_seed_is_another_noise(bundles):
    pipe, prompts = Pipeline.from_pretrained(bundles["sd3"]), ["red", "blue cat"]
    usual, other = (Bench(pipe, prompts, 4.0, 2, noise_seed=seed) for seed in (quality.NOISE_SEED, 5))
    attempt = references(usual, 6)[0]
    assert usual.key(attempt) != other.key(attempt)
    assert np.abs(usual.run(attempt).latents - other.run(attempt).latents).min() < 1
    assert np.abs(usual.run(attempt).latents - other.run(attempt).latents).max() > 0.1


def test_tables_meet_the_models_own_solver_in_its_own_steps(bundles, prompts, tmp_path, capsys):
    """Which are 3; it is run whatever --calls and --solvers say."""
    epd.start_table([0.9, 0.5, 0.1], 2).save(tmp_path / "mine.json")
    command = ["quality", str(bundles["sd3"]), "--prompts", prompts, *SHORT, "--calls", "5", "--solvers", "heun"]
    command += ["--table", str(tmp_path / "mine.json"), "--markdown", str(tmp_path / "page.md"), "--json"]
    assert main(command) == 0
    rows = {(row["solver"], row["calls"]): row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert [calls for solver, calls in rows if solver == "euler"] == [
        4,
        5,
        6,
        3,
    ]  # the table has 4 calls, 6 evaluations
    table, own = rows["mine", 4], rows["euler", 3]
    assert (table["own_solver"]["name"], table["own_solver"]["calls"]) == ("euler", 3)
    over = table["own_solver"]["over"]["psnr_db"]["mean"]
    assert over == pytest.approx(table["figures"]["psnr_db"]["mean"] - own["figures"]["psnr_db"]["mean"])
    assert [row["own_solver"] for row in rows.values() if row["kind"] != "table"] == [None] * (len(rows) - 1)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "## Tables against euler in 3 calls, the model's own solver" in page
    assert f"- mine, 4 sequential calls: {'better' if over > 0 else 'worse'}, {over:+.2f} ± " in page


def test_references_are_finer_than_the_own_solver_too(bundles, prompts, tmp_path, capsys):
    epd.start_table([0.9, 0.5, 0.1], 2).save(tmp_path / "mine.json")
    command = ["quality", str(bundles["sd3"]), "--prompts", prompts, "--calls", "1", "--solvers", "euler"]
    assert main([*command, "--table", str(tmp_path / "mine.json"), "--reference-steps", "6"]) == 2
    assert "--reference-steps 6 must be above the most calls that are compared, 6" in capsys.readouterr().err


@pytest.mark.slow
def test_the_headline_with_a_learned_reward(bundles, prompts, tmp_path, capsys):
    """CLIP's architecture with small random weights: what it says means nothing, that it is asked rightly does."""
    pytest.importorskip("epd.train.rewards", reason="the extra `train`")
    import torch
    from transformers import CLIPConfig, CLIPModel

    from shapes.models import write_tokenizer

    folder = tmp_path / "clip"
    write_tokenizer(folder)
    words = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": words, "max_position_embeddings": 24, "eos_token_id": words - 1, "bos_token_id": words - 2}
    torch.manual_seed(0)
    towers = {"text_config": common | text, "vision_config": common | {"image_size": 32, "patch_size": 8}}
    CLIPModel(CLIPConfig(projection_dim=12, **towers)).save_pretrained(folder)
    command = ["quality", str(bundles["sd3"]), "--preset", "headline", "--prompts", prompts, "--seeds", "2", "--json"]
    for name in ("hpsv2", "clip"):
        command += ["--reward", name, "--reward-model", f"{name}={folder}"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    _, *rows = result["rows"]
    assert [row["solver"] for row in rows] == ["euler", "euler", "ipndm_3", "dpmpp_2m"]
    for row in rows:
        assert list(row["figures"]) == ["psnr_db", "latent_rmse", "hpsv2", "clip"]
        assert -1 <= row["figures"]["hpsv2"]["mean"] == row["figures"]["clip"]["mean"] <= 1
        assert row["baseline"]["over"]["hpsv2"]["low"] <= row["baseline"]["over"]["hpsv2"]["high"]
    assert len({row["figures"]["clip"]["mean"] for row in rows}) == 4
    assert main([*command, "--reward", "shapes"]) == 2
    assert "the reward shapes reads 64x64 pictures, this model draws 16x16" in capsys.readouterr().err
