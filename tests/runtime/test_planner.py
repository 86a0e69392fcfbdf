"""The planner: against an exhaustive sweep by other code, on simulated devices, and from the command line."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import tiny_bundle

import epd
from benchmarks import scaling
from benchmarks.__main__ import main as benchmarks
from epd.catalogue import SHIPPED
from epd.solvers import METHODS
from runtime import figures, profiles
from runtime.__main__ import main
from runtime.advice import describe, seconds
from runtime.bundle import Bundle
from runtime.costs import Costs, costs, requests, times_of
from runtime.errors import BundleError, RequestError
from runtime.figures import Figure, Figures, digest
from runtime.grid import own_grid
from runtime.pipeline import Pipeline, find
from runtime.planner import Advice, advise, candidates, choose
from runtime.profiles import Profile, Timing
from tests.runtime.test_directions import Clock, Device

BUSY = Costs({1: 0.006, 2: 0.010, 4: 0.0195, 6: 0.029}, {2: 1.0, 3: 1.02}, 0.01, 0.01)  # as two processors are
IDLE = Costs({1: 0.010, 2: 0.010, 4: 0.0105, 6: 0.011}, {}, 0.01, 0.01)  # with room beside one direction
DEVICES = {"busy": BUSY, "idle": IDLE}
BUDGETS = (0.0613, 0.083, 0.101, 0.115, 0.132)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("runtime.profiles.Others.share", lambda self: None)  # as on a machine that does nothing else


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Pipelines and figures: the shipped small model; and one of the other family with its tables and figures."""
    folder = tiny_bundle.bundle(tmp_path_factory.mktemp("planner") / "sd15", "sd15")
    (folder / "tables").mkdir()
    data = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    for file in SHIPPED.glob("shapes-sd15-*.json"):
        shutil.copy(file, folder / "tables")
        data["tables"].append(f"tables/{file.name}")
    (folder / "bundle.json").write_text(json.dumps(data), encoding="utf-8")
    found = {}
    for name, where in (("shapes-sd3", find("shapes-sd3")), ("shapes-sd15", folder)):
        pipe, known = Pipeline.from_pretrained(where), figures.read(SHIPPED / "quality" / f"{name}.json")
        precision = pipe.bundle.facts.components[pipe.bundle.backbone].precision  # else its loss is added
        rows = tuple(row for row in known.rows if row.steps <= 10)  # for speed
        known = dataclasses.replace(known, rows=rows, precision=precision)
        found[name] = pipe, known, {device: candidates(pipe, known, DEVICES[device])[0] for device in DEVICES}
    return found


def sweep(pipe, known, device):
    """[(dB, seconds)] of everything there is, in every way: by counting the driver's calls, not the planner's code."""
    facts, call = pipe.bundle.facts, device.rows
    found = []
    for path in facts.tables:
        table = epd.Table.load(pipe.bundle.folder / path)
        asked = [int(np.count_nonzero(w)) for w in table.w]
        singles = {"history": 1, "call": table.steps}[table.start]
        psnr = [row.psnr_db for row in known.rows if row.table == digest(table)] or [table.held_out_psnr]
        batch = sum(call[2 * k] for k in asked)
        turn = sum(asked) * call[2]
        found += [(one, 0.02 + singles * call[2] + taken) for one in psnr for taken in (batch, turn)]
    for name, k in {(row.solver, row.k) for row in known.rows if row.table is None}:
        line = sorted(
            (row.steps, row.psnr_db) for row in known.rows if (row.solver, row.k) == (name, k) and not row.table
        )
        steps, decibels = np.array(line).T
        for n in range(int(steps[0]), int(steps[-1]) + 1):
            grid = own_grid(facts, n, name)
            solver = METHODS[name].build(grid, facts.family == "sd3") if k is None else None
            if solver is None:
                work = 2 * n, n * (1 + k)
                taken = min(n * (call[2] + call[2 * k]), n * (1 + k) * call[2])
            else:
                *_, last = epd.solve(solver, np.ones((1, 2)), lambda points: 0 * points.x)
                work = last.calls, last.evaluations
                assert work[0] == work[1]
                taken = last.calls * call[2]
            found.append((float(np.interp(np.log(n), np.log(steps), decibels)), 0.02 + taken))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["shapes-sd3", "shapes-sd15"])
def test_the_choice_is_the_best_of_an_exhaustive_sweep(models, name, device):
    """Ten pairs of a budget and a model, on each of two devices."""
    pipe, known, found = models[name]
    every = sweep(pipe, known, DEVICES[device])
    for budget in BUDGETS:
        chosen = choose(found[device], budget)
        assert chosen.seconds <= budget
        assert chosen.psnr_db == pytest.approx(max(psnr for psnr, taken in every if taken <= budget + 1e-12))
    for psnr in (20, 30, 40, 45):
        chosen = choose(found[device], quality=psnr)
        assert chosen.psnr_db >= psnr
        assert chosen.seconds == pytest.approx(min(taken for found, taken in every if found >= psnr))
    assert choose(found[device]).psnr_db == pytest.approx(max(psnr for psnr, _ in every))


def test_devices_choose_differently(models):
    """Where further directions are nearly free they are taken; where one costs a call, that call is a step instead."""
    *_, found = models["shapes-sd3"]
    assert all(choose(found["idle"], budget).k > 1 for budget in (0.115, 0.132))
    assert [choose(found["busy"], budget).k for budget in (0.115, 0.132)] == [1, 1]


def test_seconds_of_a_drawing_by_hand():
    known = Costs({1: 1.0, 2: 2.0, 6: 4.0}, {2: 0.75}, 10, 100)
    asked = [(2,), (2, 2), (1, 2)]
    assert known.drawing(asked, "batch") == 110 + 2 + 3 + 2.5  # rows 2, 4 and 3, on the line from 2 to 6
    assert known.drawing(asked, "calls") == 110 + 2 + 4 + 3
    assert known.drawing(asked, "async") == 110 + 2 + 3 + 2.25
    assert known.drawing([(2, 2)], "batch", images=2) is None  # 8 rows
    assert known.drawing([(2,), (1,)], "calls", images=2) == 10 + 200 + 3 + 2
    assert known.drawing([(1, 1, 1)], "async") is None


def test_requests_are_those_of_the_driver():
    table = epd.Table.load(SHIPPED / "shapes-sd3-fitted-k2-calls6.json")
    solver = epd.solvers.epd(table)
    asked = requests(solver, 2)
    assert [len(points) for points in asked] == [1, *([2] * 5)]
    assert len(asked) == table.sequential_calls
    times = times_of(solver)
    assert times[0] == (table.times[0],)
    interval = (times[2][1], times[1][0])
    assert sum(map(sum, requests(solver, 2, interval))) == sum(map(len, times)) + 4  # the points of two requests


class Fixed:
    """A session whose calls take so many seconds of a clock. The answers are real."""

    def __init__(self, session, taken, clock):
        self.session, self.taken, self.clock = session, taken, clock

    def __getattr__(self, name):
        return getattr(self.session, name)

    def __enter__(self):
        self.session.__enter__()
        return self

    def __exit__(self, *error):
        self.session.__exit__(*error)

    def load(self):
        self.session.load()
        return self

    def __call__(self, **feeds):
        with self.clock.lock:
            self.clock.now += self.taken
        return self.session(**feeds)


@pytest.mark.parametrize("family", ["sd3", "sd15"])
@pytest.mark.parametrize("cost", [lambda rows: 0.2 + rows, lambda rows: 5 + 0.01 * rows], ids=["busy", "idle"])
def test_a_drawing_takes_what_was_predicted(family, cost, tmp_path, monkeypatch):
    """From `benchmarks scaling` to the picture, by the clock of a simulated device; guidance intervals included."""
    clock = Clock()
    folder = tiny_bundle.bundle(tmp_path / "model", family)
    monkeypatch.setattr("runtime.pipeline.Profile", lambda key: Profile(key, clock))
    pipe = Pipeline.from_pretrained(folder)
    backbone = pipe.bundle.backbone
    for name in pipe.bundle.facts.components:
        session = pipe._session(name)
        pipe._sessions[name] = Device(session, cost, clock) if name == backbone else Fixed(session, 0.7, clock)
    scaling.measure(pipe, None, 3, 3)
    top = pipe.plan("", solver="euler").times[0]
    rows = [Figure("euler", n, 20.0 + n, 1.0) for n in (2, 6)] + [Figure("heun", 3, 25.0, 1.0)]
    rows += [Figure("epd", n, 25.0 + n, 1.0, k=3) for n in (2, 4)]
    rows += [Figure("dpm2", 3, 30.0, 1.0, guidance_interval=(0.0, top / 2))]
    monkeypatch.setattr(
        "runtime.planner.of_bundle", lambda bundle: (Figures("x", family, "fp32", 4.0, 2, 2, tuple(rows)), "")
    )
    found = advise([pipe]).candidates
    assert {one.name for one in found} == {"euler", "heun", "epd", "dpm2"}
    for one in found:
        pipe.directions = one.way if one.k > 1 else None
        before = clock.now
        report = pipe("red", seed=1, **one.asked).report
        assert clock.now - before == pytest.approx(one.seconds, rel=0.01)
        work = (one.sequential_calls, one.total_evaluations, one.guided_forwards)
        assert (report.sequential_calls, report.total_evaluations, report.guided_forwards) == work
    limited = next(one for one in found if one.name == "dpm2")
    assert limited.guided_forwards < 2 * limited.total_evaluations
    assert {one.way for one in found if one.k == 3} == {"batch"}


def known(pipe, rows, precision="fp32"):
    Figures("tiny", pipe.bundle.facts.family, precision, 4.0, 2, 2, rows).save(pipe.bundle.folder / figures.FILE)


def test_the_precision_is_chosen_too(tmp_path, monkeypatch):
    pipes = [Pipeline.from_pretrained(tiny_bundle.bundle(tmp_path / name, "sd3")) for name in ("slow", "quick")]
    cost = {
        str(pipe.bundle.folder): Costs({2: taken}, {}, 0.1, 0.1) for pipe, taken in zip(pipes, (1.0, 0.4), strict=True)
    }
    monkeypatch.setattr("runtime.planner._costs", lambda pipe: cost[str(pipe.bundle.folder)])
    known(pipes[0], (Figure("euler", 4, 30.0, 1.0), Figure("euler", 8, 50.0, 1.0)))
    known(pipes[1], (Figure("euler", 4, 29.0, 1.0), Figure("euler", 8, 35.0, 1.0)))
    chosen = {budget: advise(pipes, budget).chosen for budget in (2, 4.5, 9)}
    assert {budget: (one.model.rpartition("slow")[1], one.steps) for budget, one in chosen.items()} == {
        2: ("", 4),
        4.5: ("", 8),
        9: ("slow", 8),
    }


def renamed(folder, **source):
    data = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    data["source"] |= source
    (folder / "bundle.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


@pytest.fixture
def cheap(monkeypatch):
    monkeypatch.setattr("runtime.planner._costs", lambda pipe: Costs({2: 1.0}, {}, 0.1, 0.1))


@pytest.mark.parametrize(
    ("family", "source"), [("sd15", {}), ("sd3", {"id": "another"}), ("sd3", {"random_weights": True})]
)
def test_bundles_of_two_models_are_not_ranked_together(family, source, cheap, tmp_path):
    folders = tiny_bundle.bundle(tmp_path / "one", "sd3"), tiny_bundle.bundle(tmp_path / "other", family)
    renamed(folders[1], **source)
    with pytest.raises(RequestError, match=r"other is not of the model of .*one .* plan each by itself"):
        advise([Pipeline.from_pretrained(folder) for folder in folders])


def test_a_foreign_folder_does_not_say_its_model(cheap, tmp_path):
    made = tiny_bundle.bundle(tmp_path / "made", "sd15"), tiny_bundle.bundle(tmp_path / "foreign", "sd15", bare=True)
    other = tiny_bundle.bundle(tmp_path / "other", "sd3")
    made, foreign, other = map(Pipeline.from_pretrained, (*made, other))
    assert any(note.endswith(f"ASSUMED to be that of {made.bundle.folder}") for note in advise([foreign, made]).notes)
    with pytest.raises(RequestError, match="is not of the model of"):
        advise([foreign, other])
    known(made, (Figure("euler", 4, 30.0, 1.0),))
    with pytest.raises(RequestError, match=r"dB of .*shapes-sd15.* cannot be compared .* measures it"):
        advise([foreign, made])


def test_a_row_that_cannot_be_drawn_is_told_and_left_out(cheap, tmp_path):
    pipe = Pipeline.from_pretrained(tiny_bundle.bundle(tmp_path / "model", "sd3"))
    above = [Figure("heun", steps, 50.0, 1.0, guidance_interval=(90.0, 91.0)) for steps in (2, 5)]
    known(pipe, (*above, Figure("euler", 4, 30.0, 1.0)))
    advice = advise([pipe])
    assert [one.name for one in advice.candidates] == ["euler"]
    (note,) = (note for note in advice.notes if "90 91" in note)
    assert note.startswith("heun: left out")


def test_between_measured_steps_and_as_fitted(tmp_path):
    pipe = Pipeline.from_pretrained(tiny_bundle.bundle(tmp_path / "model", "sd3"))
    made = {
        "fitted": {"held_out": {"over_best_db": 3.0}},
        "told": {"held_out": {"over_best_db": 3.0}, "quality": {"psnr_db": 35.5}},
        "unknown": None,
    }
    for name, provenance in made.items():
        table = epd.Table(times=[1, 0.5, 0.1], r=[[0.5]] * 2, w=[[1.0]] * 2, family="sd3", provenance=provenance)
        pipe.bundle.install(table, f"{name}.json")
    pipe = Pipeline.from_pretrained(pipe.bundle.folder)
    rows = (Figure("euler", 2, 20.0, 1.0), Figure("euler", 8, 40.0, 1.0))
    rows += (Figure("epd", 1, 50.0, 1.0, k=1), Figure("heun", 1, 50.0, 1.0, guidance_interval=(0.0, 1.0)))  # not judged
    found, missing = candidates(pipe, Figures("tiny", "sd3", "fp32", 4.0, 2, 2, rows), Costs({2: 1.0}, {}, 0, 0))
    assert {one.steps: (one.psnr_db, one.basis) for one in found if one.name == "euler"} == {
        n: (pytest.approx(20 + 20 * math.log(n / 2, 4)), "measured" if n in (2, 8) else "between") for n in range(2, 9)
    }
    fitted = next(one for one in found if one.name == "fitted")
    assert (fitted.psnr_db, fitted.basis) == (pytest.approx(33.0), "as fitted")  # 3 dB above euler in 4 calls
    told = next(one for one in found if one.name == "told")
    assert (told.psnr_db, told.basis) == (35.5, "as told")
    assert [line.partition(":")[0] for line in missing] == ["tables/unknown.json"]


def test_what_is_not_known_is_said(tmp_path):
    pipe = Pipeline.from_pretrained(tiny_bundle.bundle(tmp_path / "model", "sd3"))
    with pytest.raises(RequestError, match=r"measure it once: python -m benchmarks scaling .*model"):
        advise([pipe], 20)
    assumed, note = figures.of_bundle(pipe.bundle)
    assert assumed.source == "shapes-sd3"
    assert "ASSUMED to rank as on shapes-sd3" in note
    assumed = dataclasses.replace(assumed, rows=(*assumed.rows, Figure("epd", 4, 30.0, 1.0, k=3)))
    found, missing = candidates(pipe, assumed, Costs({2: 1.0, 4: 2.0}, {}, 0, 0))
    assert max(one.k for one in found) == 3  # in turn, for 6 rows are not known
    with pytest.raises(RequestError, match=r"nothing takes 0.5 s or less here: the quickest, \w+ in 4 steps"):
        choose(found, 0.5)
    with pytest.raises(RequestError, match="nothing reaches 90 dB"):
        choose(found, quality=90)
    with pytest.raises(RequestError, match="nothing to choose from"):
        choose([])
    _, missing = candidates(
        pipe, Figures("t", "sd3", "fp32", 4, 2, 2, (Figure("epd", 2, 9.0, 1.0, k=3),)), IDLE, images=4
    )
    assert "python -m benchmarks scaling" in missing[0]
    assert "-k 12" in missing[0]


@pytest.mark.parametrize("text", ["{}", "[1]", '{"format": 1}', "x", '{"format": 9}'])
def test_damaged_figures_are_told(text, tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "model", "sd3")
    (folder / figures.FILE).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=figures.FILE):
        figures.of_bundle(Bundle.open(folder))


def test_figures_are_read_as_written(tmp_path):
    rows = (Figure("euler", 2, 20.25, 1.0, guidance_interval=(0.5, 1.0)), Figure("epd", 3, 9.0, 0.5, k=2))
    made = Figures("a/b", "sd15", "int8", 7.5, 4, 8, rows)
    made.save(tmp_path / "figures.json")
    assert figures.read(tmp_path / "figures.json") == made


def test_every_shipped_table_can_be_planned():
    for name in ("shapes-sd3", "shapes-sd15"):
        found = figures.read(SHIPPED / "quality" / f"{name}.json")
        for file in SHIPPED.glob(f"{name}-*.json"):  # else: python -m benchmarks quality MODEL --figures FILE
            table = epd.Table.load(file)
            assert "quality" in table.provenance or digest(table) in {row.table for row in found.rows}, file
        assert found.source == name


def test_times_that_people_type():
    assert [seconds(text) for text in ("20s", "500ms", "2min", "1.5")] == [20, 0.5, 120, 1.5]
    for text in ("", "s", "-1s", "nan", "inf", "20h"):
        with pytest.raises(Exception, match="is no time"):
            seconds(text)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A bundle whose calls `benchmarks scaling` has timed, for real."""
    monkeypatch.setattr(profiles, "BUSY", 1e9)  # calls of so small a graph are never alike
    folder = tiny_bundle.bundle(tmp_path / "model", "sd3")
    assert benchmarks(["scaling", str(folder), "-k", "3", "--runs", "3", "--json"]) == 0
    return str(folder)


def test_plan_and_generate_from_the_command_line(measured, tmp_path, capsys):
    capsys.readouterr()
    assert main(["plan", measured, "--budget", "10s", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chosen"]["psnr_db"] == max(one["psnr_db"] for one in told["candidates"])
    assert any("ASSUMED" in note for note in told["notes"])
    assert main(["plan", measured, "--quality", "30"]) == 0
    text = capsys.readouterr().out
    assert "\n*  " in text
    assert "- quality of" in text
    rows = (Figure("euler", 2, 20.0, 1.0), Figure("dpmpp_2m", 4, 30.0, 1.0))
    known(Pipeline.from_pretrained(measured), rows)
    picture = ["--model", measured, "-o", str(tmp_path / "a.png"), "-s", "1", "--json"]
    assert main(["generate", "red", *picture, "--budget", "10s"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["planned"]["solver"], report["solver"], report["steps"]) == ("dpmpp_2m", "dpmpp_2m", 4)
    assert report["sequential_calls"] == report["planned"]["sequential_calls"] == 4
    assert main(["generate", "red", *picture]) == 0
    assert "planned" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "MODEL", "--budget", "1ms"], "measure it once"),
        (["generate", "red", "--model", "MODEL", "--budget", "9s", "--steps", "4"], "leave --steps out"),
        (["generate", "red", "--model", "MODEL", "--quality", "-k", "4"], "leave -k out"),
        (["generate", "red", "--model", "MODEL", "--budget", "9s", "--guidance-scale", "1"], "leave --guidance-scale"),
        (["generate", "red", "--model", "MODEL", "--quality", "--directions", "batch"], "leave --directions out"),
        (["plan", "MODEL", "--quality", "--provider", "cpu,cpu"], "is known on one provider only"),
        (["generate", "red", "--model", "MODEL", "--quality", "--low-memory"], "is known without --low-memory only"),
        (["plan", "MODEL", "--quality", "--provider-option", "a=1"], "takes no provider options"),
        (["plan", "MODEL", "--quality", "--num-images", "0"], "--num-images must be 1 or more"),
    ],
)
def test_a_users_mistake_is_one_line(arguments, message, tmp_path, capsys):
    model = str(tiny_bundle.bundle(tmp_path / "model", "sd3"))
    assert main([model if word == "MODEL" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_table_holds_the_choice_and_what_more_time_would_buy(models):
    *_, found = models["shapes-sd3"]
    chosen = choose(found["busy"], 0.1)
    lines = describe(Advice(chosen, tuple(found["busy"]), ("a note",)), 0.1).splitlines()
    marked = {line[0]: line for line in lines if line[:3] in ("*  ", ">  ")}
    assert chosen.name in marked["*"]
    assert float(marked[">"].split()[-2]) > 0.1
    assert lines[-1] == "- a note"


def test_the_newest_sitting_that_knows_a_whole_drawing():
    one = Timing(1.0, 1.0, 1.0)
    without = {"2 rows": one, "4 rows": one}
    whole = {"2 rows": one, "1 row": one, "2 calls of 2 rows at once": one, "decode": one}
    whole["a picture in one call of 2 rows"] = Timing(5.0, 5.0, 5.0)
    assert costs([without], 2) is None
    assert costs([without, whole], 2) == Costs({2: 1.0, 1: 1.0}, {2: 0.5}, 3.0, 1.0)
    assert costs([whole], 4) is None
    assert costs([whole], 1) is None  # a guided drawing says nothing of one that is not
    assert costs([{**without, "2 rows": one}, whole], 2) == costs([whole], 2)  # a newer one that knows less
    assert costs([{**whole, "9 rows on DmlExecutionProvider 1": one}], 2) == costs([whole], 2)  # of another device


def test_a_graph_of_one_timestep_has_no_batches(tmp_path):
    """Optimum's: K directions are K calls."""
    pipe = Pipeline.from_pretrained(tiny_bundle.bundle(tmp_path / "model", "sd15", bare=True, scalar_timestep=True))
    made, note = figures.of_bundle(pipe.bundle)
    assert "ASSUMED to rank as on shapes-sd15" in note
    rows = (Figure("epd", 2, 20.0, 1.0, k=2), Figure("euler", 2, 20.0, 1.0))
    found, missing = candidates(pipe, dataclasses.replace(made, rows=rows), IDLE)
    assert {one.name: one.way for one in found} == {"epd": "calls", "euler": "batch"}
    assert not missing


def test_figures_of_another_family_or_guidance_are_told(tmp_path):
    bundle = Bundle.open(tiny_bundle.bundle(tmp_path / "model", "sd3"))
    found, _ = figures.of_bundle(bundle)
    dataclasses.replace(found, guidance=9.0).save(bundle.folder / "quality.json")
    assert figures.of_bundle(bundle)[1] == "quality was measured at guidance 9, the bundle draws at 4"
    dataclasses.replace(found, family="sd15").save(bundle.folder / "quality.json")
    with pytest.raises(BundleError, match="the bundle is of sd3; measure it anew"):
        figures.of_bundle(bundle)
