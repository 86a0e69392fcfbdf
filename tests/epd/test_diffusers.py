"""Our solvers as schedulers of unmodified diffusers pipelines: the pictures are our runtime's."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import epd
from epd.diffusers import EPDScheduler, SolverScheduler
from runtime.grid import own_grid
from runtime.pipeline import Pipeline
from tests.compare import by_diffusers, by_runtime, diffusers_pipeline, psnr
from tests.conftest import SIZES

PROMPTS = ["a red ring above a blue cross on a white background", ""]
FAMILIES = ["sd3", "sd15"]
STEPS = 4
DRAWING = {"num_inference_steps": STEPS, "guidance_scale": 4.0}
CONFIGURATIONS = {
    "sd3": FlowMatchEulerDiscreteScheduler(shift=3.0).config,
    "sd15": DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).config,
}


def table(family, start="call", steps=STEPS):
    """K = 2, on the grid of the published tables, which is not the checkpoint's own."""
    times = {"sd3": epd.schedule.flow, "sd15": epd.schedule.discrete}[family](steps)
    rng = np.random.default_rng(1)
    w = np.tile([0.3, 0.7], (steps, 1))
    history = {"place": np.ones((steps, 2, 1)), "carry": np.full((steps, 1), 0.1)} if start == "history" else {}
    return epd.Table(
        times=times,
        r=np.tile([0.3, 0.8], (steps, 1)),
        w=0.9 * w if history else w,
        scale_time=rng.uniform(0.98, 1.02, w.shape),
        start=start,
        weights="free" if history else "simplex",
        family=family,
        **history,
    )


def drawn(pipeline, family, **drawing):
    height, width = SIZES[family]
    return by_diffusers(pipeline, PROMPTS, 4, height=height, width=width, **DRAWING, **drawing)


@pytest.mark.parametrize("start", ["call", "history"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_draws_what_our_runtime_draws(family, start, tiny_checkpoints, tiny_bundles):
    pipeline = diffusers_pipeline(tiny_checkpoints[family], family)
    pipeline.scheduler = EPDScheduler.from_config(pipeline.scheduler.config, table=table(family, start))
    theirs = drawn(pipeline, family)
    ours = by_runtime(Pipeline.from_pretrained(tiny_bundles[family]), PROMPTS, 4, table=table(family, start), **DRAWING)
    assert len(pipeline.scheduler.timesteps) == table(family, start).total_evaluations
    assert theirs.std() > 0.02
    assert psnr(ours, theirs) >= 60


@pytest.mark.parametrize("family", FAMILIES)
def test_solvers_draw_what_our_runtime_draws(family, tiny_checkpoints, tiny_bundles):
    pipeline, runtime = (
        diffusers_pipeline(tiny_checkpoints[family], family),
        Pipeline.from_pretrained(tiny_bundles[family]),
    )
    for solver in ("heun", "dpm2"):
        pipeline.scheduler = SolverScheduler.from_config(pipeline.scheduler.config, solver=solver)
        assert psnr(by_runtime(runtime, PROMPTS, 4, solver=solver, **DRAWING), drawn(pipeline, family)) >= 60


@pytest.mark.parametrize("family", FAMILIES)
def test_euler_is_the_checkpoints_own_scheduler_and_a_saved_pipeline_loads_again(family, tiny_checkpoints, tmp_path):
    pipeline = diffusers_pipeline(tiny_checkpoints[family], family)
    own = drawn(pipeline, family)
    pipeline.scheduler = SolverScheduler.from_config(pipeline.scheduler.config, solver="euler")
    assert psnr(drawn(pipeline, family), own) >= 60
    pipeline.scheduler = EPDScheduler.from_config(pipeline.scheduler.config, table=table(family))
    pipeline.save_pretrained(tmp_path)
    expected = drawn(pipeline, family)
    again = diffusers_pipeline(tmp_path, family)
    assert type(again.scheduler) is EPDScheduler
    assert np.array_equal(drawn(again, family), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_solver_goes_through_its_timesteps_as_the_driver_does(family, tiny_bundles):
    """On a closed-form network, without any pipeline, on the runtime's grid: same states, same count of evaluations."""
    facts, flow = Pipeline.from_pretrained(tiny_bundles[family]).bundle.facts, family == "sd3"
    config = facts.schedule
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    methods = [m for m in epd.solvers.METHODS.values() if m.calls and family in m.families]
    assert len(methods) > 8
    for method in methods:
        scheduler = SolverScheduler.from_config(config, solver=method.name)
        scheduler.set_timesteps(7)
        x = start = noise * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x, t)
            velocity = torch.tanh(scaled) * (0.5 + t / 1000)
            x = scheduler.step(velocity, t, x, generator=torch.Generator().manual_seed(i)).prev_sample

        times = own_grid(facts, 7, method.name)
        vp = epd.schedule.vp_of(config)

        def slope(points, vp=vp, flow=flow):
            t = points.t.reshape(-1, 1, 1, 1, 1)
            network = (1000 * t if flow else vp.time(t)).astype(np.float32)
            return np.tanh(points.x if flow else points.x / np.hypot(1, t)) * (0.5 + network / 1000)

        calls = []

        def unit(x, calls=calls, method=method):
            """The noise of step i: the generator of its (single) call."""
            calls.append(0)
            generator = torch.Generator().manual_seed(len(calls) - 1)
            return torch.randn(x.shape, generator=generator).double().numpy()

        extra = {"noise": unit} if method.noisy else {}
        *_, last = epd.solve(method.build(times, flow, **extra), start.numpy(), slope)
        end = 1 if flow else np.hypot(1, times[-1])
        np.testing.assert_allclose(x.numpy(), last.x / end, rtol=0, atol=2e-6 * abs(last.x).max(), err_msg=method.name)
        assert len(scheduler.timesteps) == last.evaluations


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_keep_every_number(family, tmp_path, caplog):
    EPDScheduler.from_config(CONFIGURATIONS[family], table=table(family)).save_pretrained(tmp_path / "epd")
    again = EPDScheduler.from_pretrained(tmp_path / "epd")
    assert again.table.to_json() == table(family).to_json()
    assert json.loads((tmp_path / "epd" / "scheduler_config.json").read_text(encoding="utf-8"))["family"] == family
    first = SolverScheduler.from_config(CONFIGURATIONS[family], solver="heun")
    first.save_pretrained(tmp_path / "heun")
    second = SolverScheduler.from_pretrained(tmp_path / "heun")
    for scheduler in (first, second):
        scheduler.set_timesteps(5)
    assert torch.equal(first.timesteps, second.timesteps)
    assert "will be ignored" not in caplog.text


def test_swapping_back_keeps_the_checkpoints_settings():
    ours = EPDScheduler.from_config(CONFIGURATIONS["sd15"], table=table("sd15"))
    theirs = DDIMScheduler.from_config(SolverScheduler.from_config(ours.config, solver="euler").config)
    for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset", "set_alpha_to_one", "clip_sample"):
        assert theirs.config[key] == CONFIGURATIONS["sd15"][key]


def test_half_precision_latents_stay_half_and_do_not_disturb_the_state():
    scheduler = EPDScheduler.from_config(CONFIGURATIONS["sd3"], table=table("sd3"))
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    for t in scheduler.timesteps:
        (x,) = scheduler.step(x * 0.5, t, x, return_dict=False)
        assert x.dtype == torch.float16


def test_add_noise_is_the_state_of_the_family():
    x0, n = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 2.0)
    flow = EPDScheduler.from_config(CONFIGURATIONS["sd3"], table=table("sd3"))
    assert flow.add_noise(x0, n, torch.tensor([250.0, 1000.0])).flatten().tolist() == [1.25, 2.0]
    vp = EPDScheduler.from_config(CONFIGURATIONS["sd15"], table=table("sd15"))
    sigma = epd.schedule.SD15.sigma(400)
    noisy = vp.add_noise(x0, n, torch.tensor([400, 400]))
    assert noisy.flatten().tolist() == pytest.approx([1 + 2 * sigma] * 2)


def test_what_does_not_fit_is_refused_in_one_line():
    sd3, sd15 = CONFIGURATIONS["sd3"], CONFIGURATIONS["sd15"]
    afs = epd.Table(times=[1.0, 0.5], r=[[0.5]], w=[[1.0]], start="afs")
    late = epd.Table(times=[0.9, 0.5], r=[[0.5]], w=[[1.0]])
    early = epd.Table(times=[80.0, 0.5], r=[[0.5]], w=[[1.0]])
    for build, message in (
        (lambda: EPDScheduler.from_config(sd15, table=table("sd3")), "family sd3"),
        (lambda: EPDScheduler.from_config(sd3, table=afs), "asks for .* first"),
        (lambda: EPDScheduler.from_config(sd3, table=late), "starts at 0.9"),
        (lambda: EPDScheduler.from_config(sd15, table=early), "at most at 14.61"),
        (lambda: EPDScheduler.from_config(sd15, table={"times": [1, 0]}), "not a table"),
        (lambda: EPDScheduler.from_config(sd15, table=5), "not a table"),
        (lambda: EPDScheduler.from_config({**sd15, "num_train_timesteps": None}, table=table("sd15")), "whole number"),
        (
            lambda: EPDScheduler.from_config({**sd3, "num_train_timesteps": 0}, table=table("sd3")),
            "whole number from 1",
        ),
        (lambda: SolverScheduler.from_config({**sd15, "steps_offset": "x"}, solver="euler"), "whole number from 0"),
        (lambda: SolverScheduler.from_config({**sd15, "beta_start": "x"}, solver="euler"), "a number from 0"),
        (lambda: SolverScheduler.from_config({**sd3, "shift": float("nan")}, solver="euler"), "a number from 1e-06"),
        (lambda: EPDScheduler.from_config({**sd15, "prediction_type": "v_prediction"}, table=table("sd15")), "v_pred"),
        (lambda: SolverScheduler.from_config({**sd3, "use_dynamic_shifting": True}, solver="euler"), "dynamic"),
        (lambda: SolverScheduler.from_config(sd3, solver="ddim"), "choose from euler, heun"),
        (lambda: SolverScheduler("euler", family="flux"), "sd3, sd15"),
        (lambda: SolverScheduler.from_config(sd15, solver="euler").set_timesteps(5000), "5000 steps"),
        (lambda: EPDScheduler.from_config(sd3, table=table("sd3")).set_timesteps(28), "num_inference_steps=4"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            build()
        assert "\n" not in str(error.value)


def test_another_timestep_or_changed_latents_are_refused():
    scheduler = EPDScheduler.from_config(CONFIGURATIONS["sd3"], table=table("sd3"))
    x = torch.ones(1, 4, 3, 3)
    with pytest.raises(ValueError, match="text to image only"):
        scheduler.step(x, scheduler.timesteps[3], x)
    following = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    with pytest.raises(ValueError, match="changed between two steps"):
        scheduler.step(x, scheduler.timesteps[1], following + 1)
    for t in scheduler.timesteps[1:]:
        following = scheduler.step(x, t, following).prev_sample
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, t, following)
