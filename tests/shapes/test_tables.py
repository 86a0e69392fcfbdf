"""How the shipped tables are made: commands that users have, captions that are kept apart, tables that say enough."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.quality import SCENES_SEED
from epd.catalogue import SHIPPED
from epd.table import Table
from runtime.bundle import best_first
from shapes import tables
from shapes.captions import held_out_scenes

FILES = sorted(SHIPPED.glob("shapes-*.json"))


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_every_command_is_one_that_users_have(family, tmp_path, monkeypatch):
    from epd.train.__main__ import main as train
    from runtime.__main__ import main as runtime

    rooms = {"runtime": runtime, "epd.train": train}
    understood = []
    for module in ("runtime.__main__", "epd.train.__main__"):
        monkeypatch.setattr(f"{module}.carried_out", lambda options: understood.append(options) or 0)
    for cell, kind in tables.CELLS:
        room, *arguments = tables.command(family, cell, kind, tmp_path)
        assert rooms[room](arguments) == 0
    assert len(understood) == len(tables.CELLS)
    with pytest.raises(SystemExit):  # so an option that is not there is told
        rooms[room]([*arguments, "--candidatez", "3"])
    names = [cell.name(family, kind) for cell, kind in tables.CELLS]
    assert len(set(names)) == len(names) == 35


def test_shipping_half_of_them_is_refused(tmp_path, capsys):
    before = {file: file.read_bytes() for file in FILES}
    assert tables.main(["sd3", "--work", str(tmp_path), "--ship"]) == 2
    assert "35 tables are missing, shapes-sd3-fitted-k2-calls10.json first" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in SHIPPED.glob("shapes-*.json")} == before


def test_tables_of_another_recipe_are_not_mixed_in(tmp_path, capsys, monkeypatch):
    tables.check_recipe(tmp_path)
    tables.check_recipe(tmp_path)
    monkeypatch.setattr(tables, "CANDIDATES", dict.fromkeys(tables.CALLS, 3))
    assert tables.main(["sd3", "--work", str(tmp_path)]) == 2
    assert "made by another recipe, recipe.json there; give another --work" in capsys.readouterr().err
    (tmp_path / "recipe.json").rename(tmp_path / "shapes-sd3-fitted-k1-calls4.json")
    assert tables.main(["sd3", "--work", str(tmp_path)]) == 2  # of a time when it was not told
    assert not (tmp_path / "recipe.json").exists()


def test_a_command_that_fails_is_told_in_a_line(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(tables, "command", lambda *_: ["runtime", "fit", "nowhere"])
    (tmp_path / "shapes-sd3").mkdir()
    assert tables.main(["sd3", "--work", str(tmp_path)]) == 2
    told = capfd.readouterr().err
    assert "`python -m runtime` ended with 2; the same command goes on from here" in told
    assert "Traceback" not in told


def test_a_shipped_table_stays_where_it_is_the_closer_one():
    def table(psnr, r, **others):
        quality = {"psnr_db": psnr, "images": 121, "own_solver_db": 52.26, **others}
        return Table(times=[1.0, 0.1], r=[[r]], w=[[1.0]], provenance={"quality": quality})

    made = {name: table(30.0, 0.5) for name in "abcd"}
    known = {
        "a": table(30.1, 0.4),
        "b": table(29.9, 0.4),
        "c": table(30.1, 0.4, own_solver_db=50.0),
        "e": table(99, 0.4),
    }
    assert {name: float(one.r[0, 0]) for name, one in tables.closer(made, known).items()} == {
        "a": 0.4, "b": 0.5, "c": 0.5, "d": 0.5
    }  # fmt: skip


def test_no_caption_has_two_uses(tmp_path):
    tables.write_captions(tmp_path)
    learn, validate = ((tmp_path / f"{name}.txt").read_text(encoding="utf-8").split("\n") for name in tables.SETS)
    test = {scene.caption for scene in held_out_scenes(512, SCENES_SEED)}
    assert len(learn) > 200
    assert len(validate) > 100
    assert not set(learn) & set(validate) - {""}
    assert not (set(learn) | set(validate)) & test


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_table_says_how_good_it_is(file):
    table = Table.load(file)
    quality = table.provenance["quality"]
    assert table.held_out_psnr == quality["psnr_db"] > 10
    assert quality["images"] >= 100
    assert math.isfinite(quality["own_solver_db"])
    assert table.model == "-".join(file.stem.split("-")[:2])
    assert file.stem.endswith(f"-k{table.directions}-calls{table.sequential_calls}")
    assert np.isfinite(table.w).all()


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_the_default_is_as_good_as_the_models_own_solver_for_less_work(family):
    made = {file.name: Table.load(file) for file in FILES if file.stem.startswith(f"shapes-{family}-")}
    names = {cell.name(family, kind) for cell, kind in tables.CELLS}
    assert {name.removesuffix(".json") for name in made} <= names
    for missing in names - {name.removesuffix(".json") for name in made}:  # distilled, and no better
        assert missing.replace("distilled", "fitted") + ".json" in made
    assert all(tables.better_than_fitted(name, made) for name in made)
    first = made[best_first(made)[0]]
    assert first.as_good_as_own_solver
    assert first.total_evaluations < {"sd3": 28, "sd15": 50}[family]
    enough = [one for one in made.values() if one.as_good_as_own_solver]
    assert first.total_evaluations == min(one.total_evaluations for one in enough)
