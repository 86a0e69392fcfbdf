"""Advantages and the clipped objective by hand, a toy whose best table is known, and runs that stop and go on."""

import json
import logging
import math
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import epd
from epd.train import rewards, stage2
from epd.train.__main__ import main
from epd.train.optimise import CHECKPOINT, Training, read_log
from epd.train.ppo import advantages, surrogate
from epd.train.rollout import Onnx, Rollout, Stage, Torch
from epd.train.settings import Settings
from runtime.errors import RequestError
from runtime.pipeline import Pipeline
from tests.runtime import tiny_bundle

PROMPTS = [f"a red {letter}" for letter in "abcdefghijklmnop"]
START = epd.Table(times=[1.0, 0.6, 0.3, 0.1], r=[[0.3], [0.6], [0.65]], w=[[1.0]] * 3, midpoint="arithmetic")
QUICK = Settings(iterations=4, batch=4, group=4, concentration=50, every=2, validation=4)


def test_an_advantage_is_a_reward_minus_the_mean_of_the_others():
    given = np.array([[1.0, 2.0, 6.0], [10.0, 10.0, 10.0]])
    plain = np.array([[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]])  # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    found = advantages(given)
    np.testing.assert_allclose(found, plain / math.sqrt((9 + 2.25 + 20.25) / 3))
    np.testing.assert_allclose(found.sum(1), 0, atol=1e-12)
    np.testing.assert_allclose(advantages(given + np.array([[100.0], [-7.0]])), found)  # the prompt
    np.testing.assert_array_equal(advantages(np.full((2, 3), 0.1)), np.zeros((2, 3)))


def test_a_group_counts_by_its_order_not_by_how_widely_it_differs_unless_it_hardly_does():
    group = np.array([-1.0, 0.0, 1.0])
    found = advantages(np.stack([0.001 * group, 0.01 * group, 1000 * group]))
    np.testing.assert_allclose(np.square(found).mean(1)[2], 1)  # its own unit
    np.testing.assert_allclose(found[1], found[2] * 0.01 / (0.01 * 1000 * math.sqrt(1 / 3)))  # a share of all groups'
    found = advantages(np.stack([0.001 * group, 0.01 * group, 0.02 * group]))
    np.testing.assert_allclose(found[2], found[1])  # the median group's unit, and its own
    np.testing.assert_allclose(found[0], found[1] / 10)


def test_rounding_is_no_group_of_its_own():
    noise, told = np.array([-1e-8, 0, 1e-8]), np.array([-0.01, 0, 0.01])
    found = advantages(np.stack([noise] * 9 + [told] * 7))
    assert np.square(found[:9]).sum() < 1e-6 * np.square(found[9:]).sum()


def test_the_objective_takes_the_worse_of_the_ratio_and_the_clipped_one():
    old = torch.zeros(4, 1, dtype=torch.float64)
    ratios = torch.tensor([[1.5], [1.5], [0.5], [0.5]], dtype=torch.float64)
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0], dtype=torch.float64)
    log_prob = torch.log(ratios).requires_grad_()
    found, clipped = surrogate(log_prob, old, advantage, 0.2)
    assert found.item() == pytest.approx((1.2 * 2 - 1.5 * 2 + 0.5 * 2 - 0.8 * 2) / 4)
    assert clipped == 1
    found.backward()  # no gradient where the ratio has gone far enough the right way
    np.testing.assert_allclose(log_prob.grad.ravel(), [0, -3 / 4, 1 / 4, 0])


def test_at_the_start_the_objectives_gradient_is_that_of_reinforce():
    log_prob = torch.tensor([[-1.0, -2.0], [0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.5, -0.5], dtype=torch.float64)
    found, clipped = surrogate(log_prob, log_prob.detach(), advantage, 0.2)
    found.backward()
    assert clipped == 0
    np.testing.assert_allclose(log_prob.grad, advantage[:, None].expand(2, 2) / 4)


def toy(rollouts):
    """dx/dt = 3 t^2 over every interval by one midpoint: the reward is minus the squared errors of the steps.

    The slope at t + r (t_next - t) must be the mean (t^2 + t t_next + t_next^2): known positions. The noise of a seed
    adds the same to the rewards of all tables of a prompt.
    """
    for prompt, seed, tables in rollouts:
        luck = np.random.default_rng(seed).normal() * 10 + len(prompt)
        yield np.array([[luck - 1e4 * _errors(table).sum()] for table in tables])


def _errors(table):
    t, t_next = table.times[:-1], table.times[1:]
    middle = t + table.r[:, 0] * (t_next - t)
    return np.square((t_next - t) * 3 * middle**2 - (t_next**3 - t**3))


def best(table):
    t, t_next = table.times[:-1], table.times[1:]
    return (np.sqrt((t * t + t * t_next + t_next * t_next) / 3) - t) / (t_next - t)


def test_a_toy_is_solved(tmp_path):
    settings = Settings(iterations=24, batch=6, group=8, concentration=200, rate=8e-3, every=8, validation=4)
    found = Training(START, PROMPTS, toy, ["toy"], [1.0], settings, tmp_path).run()
    before, after = (np.abs(table.r[:, 0] - best(START)) for table in (START, found))
    assert before.max() > 0.15
    assert after[:2].max() < 0.03
    assert _errors(found).sum() < 0.01 * _errors(START).sum()
    assert found.provenance["validation"]["gain_low"] > 0


@pytest.mark.parametrize("rate", [1e-5, 0.3, 30.0])
def test_a_policy_moves_as_far_as_it_is_asked_to_whatever_the_rate(tmp_path, rate, monkeypatch):
    learning, found = training(tmp_path, replace(QUICK, iterations=30, rate=rate, step=0.02)), []

    def measured(improve, *given):
        before = learning.policy()
        line = improve(*given)
        found.append(float(learning.policy().kl(before).mean().detach()))
        assert line["moved"] == pytest.approx(found[-1])
        return line

    monkeypatch.setattr(learning, "_improve", partial(measured, learning._improve))
    learning.run()
    assert max(found) <= 0.02 * (1 + 1e-9)
    assert min(found[25:]) > 0.002
    assert rate < 0.1 or found[0] == pytest.approx(0.02, rel=0.05)  # cut back, not given up
    assert (read_log(tmp_path)[-1]["rate"] > rate) == (rate < 0.1)


def test_iterations_that_tell_nothing_change_nothing(tmp_path):
    """Not by the momentum of earlier ones either."""
    told = [True]

    def some(rollouts):
        return toy(rollouts) if told[0] else (np.ones((len(rollout.tables), 1)) for rollout in rollouts)

    learning = training(tmp_path, replace(QUICK, iterations=40, every=40), some)
    for number in range(6):
        told[0] = number < 3
        before = [value.clone() for value in learning.policy.parameters()]
        rate = learning.rate
        learning._iterate()
        same = [torch.equal(*pair) for pair in zip(before, learning.policy.parameters(), strict=True)]
        assert all(same) != told[0]
        assert (learning.rate == rate) != told[0]


def training(work, settings=QUICK, score=toy, table=START, prompts=PROMPTS):
    return Training(table, prompts, score, ["toy"], [1.0], settings, work)


def numbers(work):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(work)]


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5])  # fours of rollouts that are done; of all 7, 3 are validations
def test_a_training_that_was_stopped_ends_as_an_unbroken_one(tmp_path, stop):
    whole = training(tmp_path / "whole").run()
    left = [stop * 4]

    def stops(rollouts):
        for found in toy(rollouts):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            yield found

    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "parts", score=stops).run()
    done = len(read_log(tmp_path / "parts"))
    assert done < 5
    told = []
    found = training(tmp_path / "parts").run(told.append)
    assert len(told) == 5 - max(done, 1) + (done > 0)
    assert found.to_json() == whole.to_json()
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert sorted(f.name for f in (tmp_path / "parts").iterdir()) == ["checkpoint.safetensors", "log.jsonl"]


def test_more_iterations_go_on_from_a_finished_training(tmp_path):
    longer = replace(QUICK, iterations=8)
    whole = training(tmp_path / "whole", longer).run()
    training(tmp_path / "parts").run()
    found = training(tmp_path / "parts", longer).run()
    assert found.to_json() == whole.to_json()


def test_fewer_iterations_than_are_done_are_refused(tmp_path):
    training(tmp_path).run()
    with pytest.raises(RequestError, match="4 iterations are done; give as many"):
        training(tmp_path, replace(QUICK, iterations=2)).run()


def test_a_damaged_log_is_told(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"iteration": 0\n')
    with pytest.raises(RequestError, match="damaged; give another --work"):
        read_log(tmp_path)


def test_another_training_in_the_folder_is_refused_and_kept(tmp_path):
    training(tmp_path).run()
    before = (tmp_path / CHECKPOINT).read_bytes()
    for other in (
        training(tmp_path, replace(QUICK, seed=1)),
        training(tmp_path, table=replace(START, r=START.r + 0.01)),
        training(tmp_path, prompts=PROMPTS[1:]),
    ):
        with pytest.raises(RequestError, match="other settings"):
            other.run()
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    (tmp_path / CHECKPOINT).write_bytes(before[: len(before) // 2])
    with pytest.raises(RequestError, match="damaged"):
        training(tmp_path).run()


def test_where_no_table_is_better_the_given_one_is_kept(tmp_path):
    perfect = replace(START, r=best(START)[:, None])
    found = training(tmp_path, table=perfect).run()
    np.testing.assert_allclose(found.r, perfect.r, rtol=0, atol=1e-12)
    assert found.provenance["iteration"] == 0
    assert found.provenance["validation"]["gain"] == 0


def test_a_pull_towards_the_start_keeps_the_policy_there(tmp_path):
    free, pulled = (training(tmp_path / str(kl), replace(QUICK, iterations=12, rate=3e-3, kl=kl)) for kl in (0.0, 30.0))
    for one in (free, pulled):
        one.run()
    assert numbers(tmp_path / "30.0")[-1]["kl"] < 0.5 * numbers(tmp_path / "0.0")[-1]["kl"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"group": 1}, "--group must be 2 or more"),
        ({"iterations": 5}, "multiple of --every 2"),
        ({"rate": math.nan}, "--rate must be above 0"),
        ({"kl": -1.0}, "--kl must be 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_told(tmp_path, changed, told):
    with pytest.raises(RequestError, match=told):
        training(tmp_path, replace(QUICK, **changed))


# ---------------------------------------------------------------- on a bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("rdpo")
    return {family: tiny_bundle.bundle(root / family, family, size=32) for family in ("sd3", "sd15")}


def grid(family):
    return epd.schedule.flow(3) if family == "sd3" else epd.schedule.discrete(3)


def stage(bundle, reward="psnr", **options):
    return Stage(Onnx(Pipeline.from_pretrained(bundle), 3.0), rewards.load(reward, {}), **options)


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_a_rollout_draws_what_the_pipeline_draws(bundles, family):
    tables = (epd.start_table(grid(family), 2), epd.start_table(grid(family), 2))
    tables = (tables[0], replace(tables[1], r=tables[1].r * 0.8))
    found = stage(bundles[family]).pictures(Rollout("a red x", 5, tables))
    pipe = Pipeline.from_pretrained(bundles[family])
    for picture, table in zip(found, tables, strict=True):
        drawn = pipe("a red x", seed=5, table=table, guidance_scale=3.0, output_type="np").images[0]
        np.testing.assert_array_equal(picture, drawn)


def test_equal_tables_are_worth_the_same_whatever_they_run_beside(bundles):
    table = epd.start_table(grid("sd3"), 2)
    other = replace(table, r=table.r * 0.8)
    whole, narrow = stage(bundles["sd3"]), stage(bundles["sd3"], abreast=2)
    four = whole(Rollout("a red x", 5, (table, other, table, table)))[:, 0]
    assert four[0] == four[2] == four[3] != four[1]
    assert whole(Rollout("a red x", 5, (table,)))[0, 0] == four[0]
    np.testing.assert_array_equal(narrow(Rollout("a red x", 5, (table, other, table, table)))[:, 0], four)
    assert whole(Rollout("a red x", 6, (table,)))[0, 0] != four[0]


@pytest.mark.slow
def test_torch_and_onnx_runtime_draw_the_same():
    model = pytest.importorskip("epd.train.model")
    table = epd.start_table(grid("sd3"), 2)
    networks = Onnx(Pipeline.from_pretrained("shapes-sd3"), 3.0), Torch(model.load("shapes-sd3"), 3.0)
    stages = [Stage(network, rewards.load("shapes,psnr", {}), reference_calls=12) for network in networks]
    asked = Rollout(
        "a large red circle in the centre on a white background", 5, (table, replace(table, r=table.r * 0.8))
    )
    one, other = (stage.pictures(asked) for stage in stages)
    np.testing.assert_allclose(one, other, atol=0.02)  # the bundle's weights are fp16
    assert np.abs(one[0] - one[1]).max() > 0.1
    one, other = (stage(asked) for stage in stages)
    np.testing.assert_allclose(one, other, atol=0.02)


def test_a_history_table_of_the_closest_kind_runs(bundles):
    n = 3
    table = epd.Table(
        times=grid("sd3"), r=[[0.5, 1.0]] * n, w=[[0.6, 0.4]] * n, midpoint="arithmetic", start="history",
        place=np.tile([1.0], (n, 2, 1)),
    )  # fmt: skip
    assert np.isfinite(stage(bundles["sd3"])(Rollout("a red x", 1, (table,)))).all()


def test_a_warning_is_told_once(tmp_path, bundles, caplog):
    long = "\n".join(f"a red {letter} and so on and so on and so on" for letter in "abcd")
    made = replace(epd.start_table(grid("sd3"), 2), guidance=9.0, size=(64, 64))
    assert command(tmp_path, bundles["sd3"], prompts=long, table=made) == 0
    assert len([line for line in caplog.messages if "the prompt is cut" in line]) == 2  # of two tokenizers
    assert len([line for line in caplog.messages if line.startswith("the table was made for")]) == 1
    assert not logging.getLogger("runtime.text").filters


def command(tmp_path, bundle, *more, prompts=None, table=None):
    (tmp_path / "prompts.txt").write_text(prompts or "\n".join(PROMPTS), encoding="utf-8")
    (table or epd.start_table(grid("sd3"), 2)).save(tmp_path / "start.json")
    options = ["--table", tmp_path / "start.json", "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "out.json"]
    options += ["--iterations", 2, "--batch", 2, "--group", 2, "--every", 1, "--validation", 2, "--reference-calls", 12]
    if "--reward" not in more:
        options += ["--reward", "psnr"]
    return main([str(one) for one in ["rdpo", bundle, *options, *more]])


def test_the_command_writes_a_table_a_log_and_a_plot(tmp_path, bundles, capsys):
    shown = ["--plot", tmp_path / "log.png", "--changed", tmp_path / "changed.png"]
    assert command(tmp_path, bundles["sd3"], "--json", *shown) == 0
    told = json.loads(capsys.readouterr().out)
    table = epd.Table.load(told["table"])
    assert table.family == "sd3"
    assert table.guidance == 4.0
    assert table.provenance["settings"]["group"] == 2
    assert table.provenance["rewards"] == {"psnr": 1.0}
    lines = read_log(tmp_path / "out")
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert all(set(line["validation"]["rewards"]) == {"psnr"} for line in lines)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("log.png", "changed.png"))
    Pipeline.from_pretrained(bundles["sd3"])("a red x", table=told["table"], seed=1)


def test_how_far_numbers_may_be_moved_is_measured_once(tmp_path, bundles, capsys, caplog):
    long = "\n".join(f"a red {letter} and so on and so on and so on" for letter in "abcdefgh")

    def told(*more):
        assert command(tmp_path, bundles["sd3"], "--alike", "50", *more, prompts=long) == 0
        return "measuring how far each number may be moved, on 4 prompts" in capsys.readouterr().err

    def reach():
        kept = load_file(tmp_path / "out" / "checkpoint.safetensors")
        return {name: value for name, value in kept.items() if name.startswith("reach.")}

    assert told()
    assert len([line for line in caplog.messages if "the prompt is cut" in line]) == 2  # of two tokenizers
    first, table = reach(), epd.Table.load(tmp_path / "out.json")
    assert table.provenance["settings"]["alike"] == 50
    assert first["reach.scales"].shape == (table.steps, 2 * table.directions)
    assert not told("--iterations", "4")
    assert all(np.array_equal(value, first[name]) for name, value in reach().items())
    assert command(tmp_path, bundles["sd3"], "--alike", "40", prompts=long) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_prompt_that_looks_like_mathematics_is_drawn(tmp_path, bundles):
    prompts = "\n".join(f"a $^$ {letter}" for letter in "abcdefgh")
    assert command(tmp_path, bundles["sd3"], "--changed", tmp_path / "changed.png", prompts=prompts) == 0
    assert (tmp_path / "changed.png").read_bytes().startswith(b"\x89PNG")


def test_a_prompt_file_with_empty_lines_or_very_many(tmp_path, bundles, capsys):
    assert command(tmp_path, bundles["sd3"], prompts="\n\na\n  \nb\n\nc\nd\na\n") == 0
    assert epd.Table.load(tmp_path / "out.json").provenance["prompts"] == 2  # two of four are set aside
    (tmp_path / "many.txt").write_text("\n".join(f"a red {i}" for i in range(100_000)), encoding="utf-8")
    many = stage2.read_prompts(tmp_path / "many.txt", stage(bundles["sd3"]), 0)
    assert training(tmp_path / "many", prompts=many).run().provenance["prompts"] == 100_000 - 4
    capsys.readouterr()
    assert command(tmp_path, bundles["sd3"], prompts="\n \na\nb\nc") == 2
    assert capsys.readouterr().err == "error: training needs 4 prompts or more, one a line, got 3\n"


def broken(shot):
    return np.full(len(shot.pictures), math.nan) if calls() > 6 else np.zeros(len(shot.pictures))


def misshapen(shot):
    return np.zeros((len(shot.pictures), 2))


def calls(count=[0]):  # noqa: B006  a counter
    count[0] += 1
    return count[0]


def test_a_reward_that_breaks_loses_nothing(tmp_path, bundles, capsys, monkeypatch):
    name = f"{__name__}.broken"
    assert command(tmp_path, bundles["sd3"], "--reward", name) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith(f"error: the reward {name} is not finite for 'a red ")
    assert len(read_log(tmp_path / "out")) == 3 - 1  # the start and one iteration
    assert not (tmp_path / "out.json").exists()
    monkeypatch.setattr(sys.modules[__name__], "broken", lambda shot: np.zeros(len(shot.pictures)))
    assert command(tmp_path, bundles["sd3"], "--reward", name) == 0
    assert "going on after iteration 1" in capsys.readouterr().err
    assert len(read_log(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--reward", f"{__name__}.misshapen"], "returned the shape (1, 2) for 1 pictures"),
        (["--reward", "beauty"], "unknown reward 'beauty'; choose from shapes, psnr"),
        (["--reward", "shapes"], "the reward shapes reads 64x64 pictures, this model draws 32x32"),
        (["--reward", "clip"], "needs its weights: give --reward-model clip=PATH"),
        (["--reward", "no.such.module"], "the reward no.such.module"),
        (["--reward", ".x"], "the reward .x"),
        (["--backend", "torch", "--provider", "warp"], "--provider warp: torch has none here; give cpu"),
        (["--alike", "5"], "--alike must be 20 to 75 (dB), got 5"),
        (["--alike", "60", "--scales", "0.01"], "takes the place of --scales and --concentration"),
        (["--group", "1"], "--group must be 2 or more"),
        (["--reward-model", "clip"], "is not KEY=VALUE"),
        (["--reference-calls", "1"], "a converged picture takes more"),
        (["--abreast", "-1"], "must be 0 or more"),
        (["-o", "nowhere/out.json"], "nowhere"),
        (["--changed", "nowhere/changed.png"], "nowhere"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(tmp_path, bundles, capsys, more, told):
    assert command(tmp_path, bundles["sd3"], *more) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out.json").exists()


def test_a_table_of_another_family_is_refused(tmp_path, bundles, capsys):
    other = replace(epd.start_table(grid("sd3"), 2), family="sd15")
    assert command(tmp_path, bundles["sd3"], table=other) == 2
    error = capsys.readouterr().err
    assert "sd15" in error
    assert len(error.strip().splitlines()) == 1


def test_prompts_of_a_model_that_is_not_ours_must_be_given(bundles):
    with pytest.raises(RequestError, match="give --prompts FILE"):
        stage2.read_prompts(None, stage(bundles["sd3"]), 0)
