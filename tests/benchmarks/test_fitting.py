"""`python -m benchmarks fitting` on bundles small enough to read."""

import csv
import json
import shutil

import numpy as np
import pytest

from benchmarks import fitting
from benchmarks.__main__ import main
from runtime.designs import starts
from runtime.pipeline import Pipeline

SHORT = ["--calls", "3", "--trajectories", "4", "--teacher-calls", "32"]


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("".join(f"red a {i}\n" for i in range(8)), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("family", ["sd3", pytest.param("sd15", marks=pytest.mark.slow)])
def test_every_choice_is_judged_against_the_base(bundles, family, prompts, tmp_path, capsys):
    files = {form: tmp_path / f"fitting.{form}" for form in ("csv", "markdown", "plot")}
    told = [text for form, file in files.items() for text in (f"--{form}", str(file))]
    assert main(["fitting", str(bundles[family]), *SHORT, "--prompts", prompts, "--json", *told]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = result["rows"]
    assert (result["calls"], result["directions"], result["images"]) == (3, 2, 4)
    assert rows[0]["choice"] == "base"
    assert rows[0]["over_db"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    for row in rows[1:]:
        assert row["over_db"]["mean"] == pytest.approx(row["psnr_db"]["mean"] - rows[0]["psnr_db"]["mean"], abs=1e-9)
        assert row["over_db"]["low"] <= row["over_db"]["mean"] + 1e-9 <= row["over_db"]["high"] + 2e-9
    choices = {row["choice"]: [one["value"] for one in rows if one["choice"] == row["choice"]] for row in rows}
    assert choices["trajectories"] == ["1", "2"]
    assert {"points at", "shift of the grid", "slopes that place a point", "ridge"} <= set(choices)
    assert any(abs(row["over_db"]["mean"]) > 0.1 for row in rows)
    with files["csv"].open(encoding="utf-8", newline="") as lines:
        assert [line["value"] for line in csv.DictReader(lines)] == [row["value"] for row in rows]
    assert "## Ridge" in files["markdown"].read_text(encoding="utf-8")
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_where_a_table_may_be_taken(bundles, prompts, tmp_path, capsys):
    command = ["fitting", str(bundles["sd3"]), *SHORT, "--prompts", prompts, "--only-transfer", "--json"]
    other = shutil.copytree(bundles["sd3"], tmp_path / "other")
    command += ["--to", str(other), "--guidance-scale", "2", "--work", str(tmp_path)]
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["choice"] for row in rows} == {"fitted on"}
    between = [row for row in rows if not row["drawn_on"].startswith("guidance")]
    assert len({row["drawn_on"] for row in between}) == 2  # told apart although they are of one size and precision
    assert len(between) == 4
    assert all(abs(row["over_db"]["mean"]) < 1e-3 for row in between)  # their graphs are the same
    scales = [row for row in rows if row["drawn_on"].startswith("guidance")]
    usual = Pipeline.from_pretrained(bundles["sd3"]).bundle.facts.defaults.guidance
    labels = [f"guidance {scale:g}" for scale in sorted({2.0, usual})]
    assert list(dict.fromkeys(row["drawn_on"] for row in scales)) == labels
    for drawn_on in labels:
        some = {row["value"]: row["over_db"]["mean"] for row in scales if row["drawn_on"] == drawn_on}
        assert list(some) == [*labels, "all of them"]
        assert some[drawn_on] == 0
        assert any(value != 0 for value in some.values())


def test_a_table_that_diverges_is_told_and_the_others_stand(bundles, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fitting.Case, "psnr", _diverging(fitting.Case.psnr))
    command = ["fitting", str(bundles["sd3"]), *SHORT, "--prompts", prompts, "--csv", str(tmp_path / "f.csv")]
    assert main([*command, "--plot", str(tmp_path / "f.png")]) == 0
    text = capsys.readouterr().out
    assert text.count("not finite") == 2  # the figure and the difference of one row
    assert "## Trajectories" in text


def _diverging(psnr):
    """As if the third table gave NaN."""
    asked = []

    def found(case, made):
        asked.append(made)
        return psnr(case, None if len(asked) == 3 else made)

    return found


def test_designs_keep_the_rules(bundles):
    for family in ("sd3", "sd15"):
        facts = Pipeline.from_pretrained(bundles[family]).bundle.facts
        for k in (1, 2, 3):
            base = starts(facts, 3, k)[1]
            every = list(fitting.designs(facts, base))
            assert all(np.diff(design.times).max() < 0 for _, _, design in every)
            assert all(len(set(row)) == k for _, _, design in every for row in design.r)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only-transfer"], "--only-transfer needs"),
        (["--calls", "1"], "--calls must be"),
        (["--trajectories", "1"], "--trajectories must be"),
        (["--to", "nowhere"], "nowhere"),
        (["--to", "OTHER"], "no bundle of the same model"),
        (["--to", "SAME", "SAME"], "given twice"),
        (["--guidance-scale", "5000"], "guidance scales must be"),
        (["--markdown", "no/such/folder.md"], "make it first"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(bundles, prompts, capsys, monkeypatch, arguments, words):
    command = ["fitting", str(bundles["sd3"]), *SHORT, "--prompts", prompts]
    monkeypatch.setattr(fitting, "ablate", None)  # nothing is computed before it is told
    names = {"OTHER": str(bundles["sd15"]), "SAME": str(bundles["sd3"])}
    assert main([*command, *(names.get(word, word) for word in arguments)]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
