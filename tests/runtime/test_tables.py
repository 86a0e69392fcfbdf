"""Which table draws, and what is said of one that was made for something else."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import tiny_bundle

import epd
from epd import catalogue
from runtime.__main__ import main
from runtime.bundle import best_first
from runtime.errors import RequestError
from runtime.pipeline import Pipeline


def table(n, k=1, psnr=None, **made_for):
    """Of 2 n calls and n (1 + k) evaluations."""
    told = {} if psnr is None else {"held_out": {"psnr_db": psnr}}
    return replace(epd.start_table(epd.schedule.flow(n), k), provenance=told, **made_for)


def with_tables(folder, *tables):
    return Pipeline.from_pretrained(
        tiny_bundle.bundle(folder / "b", "sd3", tables=[(f"{i}.json", one) for i, one in enumerate(tables)])
    )


@pytest.mark.parametrize(
    ("tables", "calls", "best"),
    [
        ([table(2), table(4), table(3)], 7, 2),  # without figures: most calls
        ([table(2), table(4), table(3)], 100, 1),
        ([table(3, 2), table(3, 1)], 6, 1),  # a tie: fewer evaluations
        ([table(4), table(3, psnr=31.0), table(2, psnr=32)], 8, 2),  # with figures: the highest, before those without
        ([table(3, 2, psnr=31.0), table(2, psnr=31.0)], 8, 1),
    ],
)
def test_the_best_table_of_so_many_calls(tmp_path, tables, calls, best):
    plan = with_tables(tmp_path, *tables).plan("red", calls=calls)
    assert plan.solver == "epd"
    assert plan.table.to_json() == tables[best].to_json()
    assert plan.table.sequential_calls <= calls


def test_the_default_is_as_close_as_the_own_solver_with_the_least_work():
    def one(k: int, psnr: float, **quality: float) -> epd.Table:
        told = {"held_out": {"psnr_db": psnr}} | ({"quality": quality} if quality else {})
        return replace(epd.start_table(epd.schedule.flow(2), k), provenance=told)

    made = {
        "closest": one(3, 10.0, psnr_db=60.0, own_solver_db=50.0),
        "enough": one(1, 10.0, psnr_db=51.0, own_solver_db=50.0),
        "as little, closer": one(1, 10.0, psnr_db=52.0, own_solver_db=50.0),
        "too far": one(1, 90.0, psnr_db=49.0, own_solver_db=50.0),
        "no own solver": one(1, 55.0),
    }
    assert best_first(made) == ("as little, closer", "closest", "no own solver", "enough", "too far")
    del made["closest"], made["enough"], made["as little, closer"]
    assert best_first(made) == ("no own solver", "too far")


@pytest.mark.parametrize("told", [5, 0.5, "4.5", {"a": 1}, [], None])
def test_what_a_strangers_table_says_of_itself_breaks_nothing(bundles, caplog, told):
    """Not ours to write: provenance may hold anything that JSON can."""
    strange = replace(
        epd.start_table(epd.schedule.flow(3), 1),
        model="\x1b[2J\nmodel",
        guidance=3.0,
        provenance={"guidance_scales": told, "held_out": {"psnr_db": 10**400}, "quality": told},
    )
    assert strange.held_out_psnr is None
    Pipeline.from_pretrained(bundles["sd3"]).plan("red", table=strange, guidance_scale=4.0)
    (warning,) = (record.getMessage() for record in caplog.records if "made for" in record.getMessage())
    assert "model ?[2J?model (here tiny-sd3), guidance 3.0 (here 4)" in warning
    assert warning.isprintable()


def test_calls_that_no_table_has(tmp_path, bundles):
    pipe = with_tables(tmp_path, table(4), table(3))
    with pytest.raises(RequestError, match=r"no table of at most 5 sequential calls \(it has: 6, 8\); give --calls 6"):
        pipe.plan("red", calls=5)
    with pytest.raises(RequestError, match="tiny-sd3 has no tables for --calls"):
        Pipeline.from_pretrained(bundles["sd3"]).plan("red", calls=5)
    with pytest.raises(RequestError, match="not for heun"):
        pipe.plan("red", calls=8, solver="heun")
    with pytest.raises(RequestError, match="give it or --table"):
        pipe.plan("red", calls=8, table=table(2))
    with pytest.raises(RequestError, match="-k"):
        pipe.plan("red", calls=8, solver="epd", k=2)
    with pytest.raises(RequestError, match="has 4 steps, asked for were 3"):
        pipe.plan("red", calls=8, num_inference_steps=3)


def test_a_name_is_looked_up_where_there_is_no_such_file(bundles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    pipe = Pipeline.from_pretrained(bundles["sd3"])
    with pytest.raises(RequestError, match="python -m epd fetch sd3-medium-512"):
        pipe.plan("red", table="sd3-medium-512")
    fetched = catalogue.cache_folder() / "sd3-medium-512.json"
    fetched.parent.mkdir(parents=True)
    table(3).save(fetched)
    assert pipe.plan("red", table="sd3-medium-512").steps == 3
    table(2).save("sd3-medium-512")
    assert pipe.plan("red", table="sd3-medium-512").steps == 2
    with pytest.raises(RequestError) as refused:
        pipe.plan("red", table="nothing")
    assert "'nothing'" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("made_for", "drawn", "told"),
    [
        ({"model": "someone/Big"}, {}, "model someone/Big (here tiny-sd3)"),
        ({"guidance": 4.5}, {"guidance_scale": 2.0}, "guidance 4.5 (here 2)"),
        ({"guidance": 4.0}, {"guidance_interval": (0.1, 0.9)}, "guidance everywhere (here in [0.1, 0.9])"),
        ({"size": (1024, 512)}, {}, "size 512x1024 (here 16x16)"),
        ({"t5": True}, {}, "T5 (here without it)"),
        ({"family": "flux"}, {}, "family flux (here sd3)"),
        ({"size": (32, 32), "t5": True}, {}, "size 32x32 (here 16x16), T5 (here without it)"),
        ({"grid": "of my own", "times": [1.0, 0.5, 0.25]}, {}, "grid of my own, 1 to 0.25 (here 1 to 0)"),
    ],
)
def test_a_table_made_for_something_else_says_so(bundles, caplog, made_for, drawn, told):
    Pipeline.from_pretrained(bundles["sd3"]).plan("red", table=table(2, **made_for), **drawn)
    assert caplog.messages == [f"the table was made for {told}"]


@pytest.mark.parametrize(
    "made_for",
    [
        {},
        {"model": "NOBODY/tiny", "guidance": 4.5, "size": (16, 16), "t5": False, "family": "sd3"},
        {"model": "tiny-sd3"},
        {"model": "tiny-sd3", "grid": "found by a search", "times": [1.0, 0.5, 0.25]},
        {"grid": "flow matching, shift 3"},
        {"grid": "flow matching, shift 3, to 0", "times": epd.schedule.flow_euler(2), "midpoint": "arithmetic"},
        {"times": [1.0, 0.5, 0.25]},
    ],
)
def test_a_table_in_its_place_says_nothing(bundles, caplog, made_for):
    with caplog.at_level(logging.WARNING):
        plan = Pipeline.from_pretrained(bundles["sd3"]).plan("red", table=table(2, **made_for))
    assert plan.guidance == made_for.get("guidance", 4.0)
    assert caplog.messages == []


def test_the_published_grid_of_sd15_is_known(bundles, caplog):
    own = replace(epd.start_table(epd.schedule.discrete(5), 2), grid="discrete", family="sd15", size=(16, 16))
    other = replace(own, times=epd.schedule.logsnr(5, 0.03, 14.0))
    pipe = Pipeline.from_pretrained(bundles["sd15"])
    pipe.plan("red", table=own)
    assert caplog.messages == []
    pipe.plan("red", table=replace(other, family="edm"))
    [line] = caplog.messages
    assert line.startswith("the table was made for family edm (here sd15), grid discrete, 14 to 0.03 (here ")


def test_another_kind_of_family_is_refused(bundles):
    with pytest.raises(RequestError, match="the table is for the family edm, tiny-sd3 is sd3"):
        Pipeline.from_pretrained(bundles["sd3"]).plan("red", table=table(2, family="edm"))
    with pytest.raises(RequestError, match="the table is for the family flux, tiny-sd15 is sd15"):
        Pipeline.from_pretrained(bundles["sd15"]).plan("red", table=table(2, family="flux"))


def test_the_command_picks_by_calls_warns_and_draws_again(tmp_path, capsys, caplog):
    pipe = with_tables(tmp_path, table(4), table(2, psnr=30.0, size=(8, 8)))
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    model = ["--model", str(pipe.bundle.folder), "--json"]

    def calls(*arguments):
        assert main(["generate", *model, *map(str, arguments)]) == 0
        return json.loads(capsys.readouterr().out)["sequential_calls"]

    assert calls("red", "-s", 1, "-o", first) == 8  # the first table
    assert calls("red", "-s", 1, "--calls", 9, "-o", first) == 4
    assert caplog.messages == [f"{pipe.bundle.folder / '1.json'} was made for size 8x8 (here 16x16)"]
    assert calls("--from-metadata", first, "-o", again) == 4
    assert first.read_bytes() == again.read_bytes()
    assert calls("--from-metadata", first, "--table", pipe.bundle.folder / "0.json", "-o", again) == 8
    assert calls("--from-metadata", again, "--calls", 4, "-o", again) == 4
    assert np.array_equal(pipe("red", seed=1, calls=5).report.seeds, [1])
