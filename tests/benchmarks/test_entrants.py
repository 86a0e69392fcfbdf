"""What `benchmarks quality` compares: every solver with the steps that fit, tables beside their equals."""

import dataclasses
import math

import numpy as np
import pytest

import epd
from benchmarks.bench import Bench
from benchmarks.entrants import asked, entrants, headline, own_solver, references
from runtime.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("cache", "calm")


def test_every_solver_has_the_most_steps_that_fit(bench):
    for attempt in entrants(bench, [3, 4, 7], [], None):
        if attempt.calls is not None:
            assert asked(attempt.solver) <= attempt.calls
            assert asked(attempt.solver) > attempt.calls - 2
    found = {attempt.name for attempt in entrants(bench, [4], [], None)}
    methods = epd.solvers.METHODS.values()
    assert {m.name for m in methods if not m.noisy and m.calls} <= found
    assert not {m.name for m in methods if m.noisy} & found


def test_solvers_are_chosen_by_the_names_they_are_told_by(bench):
    def chosen(*only):
        return [(one.name, one.calls) for one in entrants(bench, [4, 6], [], only)]

    assert chosen("dpmpp_2m") == [("euler", 4), ("euler", 6), ("dpmpp_2m", 4), ("dpmpp_2m", 6)]
    assert chosen("dpmpp_2m@5") == [("euler", 5), ("dpmpp_2m", 5)]  # which are compared
    assert chosen("dpmpp_2m@5", "euler@4") == [("euler", 4), ("dpmpp_2m", 5)]
    assert chosen("dpmpp_2m@5", "dpmpp_2m", "euler@4")[1:] == [("dpmpp_2m", n) for n in (4, 5, 6)]
    assert len(chosen("epd@6", "euler@4")) == 4  # K = 1, 2, 3
    if not bench.flow:
        assert chosen("dpmpp_2m even@5", "euler@4") == [("euler", 4), ("dpmpp_2m even", 5)]


@pytest.mark.slow
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


def test_tables_and_even_entrants_start_where_the_references_do(bench, tmp_path):
    """SD1.5: sigma times the noise; the solvers on DDIM's own grid start as users get them."""
    file = tmp_path / "mine.json"
    first = 1.0 if bench.flow else float(epd.schedule.SD15.sigma(999))
    epd.start_table([first, first / 2, first / 100], 2).save(file)
    pair = references(bench, 40)
    names = ["euler", "dpmpp_2m", *(() if bench.flow else ("euler even", "dpmpp_2m even"))]
    found = entrants(bench, [4], [file], names)
    same = [*pair, *(one for one in found if one.kind == "table" or one.name.endswith(" even"))]
    assert len(same) == (3 if bench.flow else 7)  # both in 4 calls and, as many as the table evaluates, in 6
    assert {(one.times[0], one.start_scale) for one in same} == {(first, first)}
    own = next(one for one in found if one.name == "euler")
    assert own.start_scale == bench.pipe.plan("", solver="euler", num_inference_steps=4).start_scale
    assert bench.flow or own.start_scale == math.hypot(1, own.times[0])


def test_tables_of_one_name_are_told_apart(bench, tmp_path):
    files = [tmp_path / folder / f"{name}.json" for folder, name in (("a", "my"), ("b", "my"), ("a", "euler"))]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        epd.start_table([0.9, 0.1], 2).save(file)
    found = entrants(bench, [4], files, ["euler"])
    assert [one.name for one in found if one.kind == "table"] == [str(file) for file in files]
    assert len({(one.name, one.calls) for one in found}) == len(found)


def test_a_table_is_planned_at_the_guidance_it_runs_with(bench, tmp_path, caplog):
    for guidance in (4.0, 2.0):
        epd.Table(times=[0.9, 0.1], r=[[0.5]], w=[[1.0]], guidance=guidance).save(tmp_path / f"{guidance}.json")
        entrants(bench, [4], [tmp_path / f"{guidance}.json"], ["euler"])
    assert "guidance 4.0" not in caplog.text
    assert "guidance 2.0 (here 4)" in caplog.text


def test_the_own_solver_meets_tables_only(bench, tmp_path):
    epd.start_table([0.9, 0.5, 0.1], 2).save(tmp_path / "mine.json")
    without = entrants(bench, [4], [], ["heun"])
    assert all(attempt.calls == 4 for attempt in without)
    beside = entrants(bench, [4], [tmp_path / "mine.json"], ["heun"], intervals=[(0.1, 0.5)])
    assert [attempt.interval for attempt in beside if attempt.calls == 3] == [None]


@pytest.mark.parametrize(("solver", "calls", "first"), [("heun", 5, "heun"), ("lcm", None, "euler")])
def test_the_headline_begins_with_the_own_solver_in_its_own_steps(bundles, solver, calls, first, tmp_path):
    """Of two calls a step too; Euler stands for one that adds noise."""
    bench = Bench(Pipeline.from_pretrained(bundles["sd3"]), ["red", "blue"], 4.0, 2)
    facts = bench.pipe.bundle.facts
    bench.pipe.bundle = dataclasses.replace(
        bench.pipe.bundle, facts=dataclasses.replace(facts, defaults=dataclasses.replace(facts.defaults, solver=solver))
    )
    own = own_solver(bench)
    assert (None if own is None else own.calls) == calls
    made = headline(bench, [])
    assert (made[0].name, made[0].calls) == (first, calls or 20)
    assert [attempt.calls for attempt in made[bool(own) :]] == [20] * 3


def test_work_beyond_a_limit_is_not_matched(bench, tmp_path):
    epd.start_table([0.9, 0.5, 0.1], 3).save(tmp_path / "mine.json")  # 4 calls, 8 evaluations
    for most, calls in ((math.inf, {3, 4, 8}), (8, {3, 4, 8}), (7, {3, 4})):
        found = entrants(bench, [3], [tmp_path / "mine.json"], ["euler"], most_work=most)
        assert {one.calls for one in found} == calls
