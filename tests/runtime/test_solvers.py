"""Every solver through the whole runtime: what it costs, what it draws, whose noise it takes."""

import json

import numpy as np
import pytest
import tiny_bundle

import epd
from epd.solvers import METHODS
from runtime.__main__ import main
from runtime.errors import RequestError
from runtime.grid import own_grid
from runtime.pipeline import DEFAULT, Pipeline
from runtime.session import Session
from runtime.text import conditioning

SOLVERS = [*METHODS, "epd"]
NOISY = [name for name, method in METHODS.items() if method.noisy]
STEPS = 6


@pytest.fixture
def rows(monkeypatch):
    """Rows of every call that a session makes of a backbone, in turn."""
    seen, call = [], Session.__call__

    def counted(self, *, want=None, **feeds):
        if "timestep" in feeds:
            seen.append(len(feeds["encoder_hidden_states"]))
        return call(self, want=want, **feeds)

    monkeypatch.setattr(Session, "__call__", counted)
    return seen


def draw(pipe, solver, **asked):
    return pipe("red", **{"seed": 3, "solver": solver, "num_inference_steps": STEPS, "output_type": "latent"} | asked)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("guidance", "interval"), [(1.0, None), (4.0, None), (4.0, (0.3, 0.8))])
def test_what_is_counted_is_what_the_session_saw(bundles, family, rows, solver, guidance, interval):
    finished = []
    result = draw(
        Pipeline.from_pretrained(bundles[family]),
        solver,
        guidance_scale=guidance,
        guidance_interval=interval,
        num_images_per_prompt=2,
        callback_on_step_end=finished.append,
    )
    report = result.report
    assert np.isfinite(result.images).all()
    assert [step.index for step in finished] == list(range(STEPS))
    assert report.sequential_calls == len(rows)
    assert report.guided_forwards == sum(rows)
    whole, halves = 2 * report.total_evaluations, 1 if guidance == 1 else 2
    if interval is None:
        assert report.guided_forwards == whole * halves
    else:
        assert whole < report.guided_forwards < whole * halves
    calls = METHODS[solver].calls if solver in METHODS else 2
    assert calls == 0 or report.sequential_calls in (calls * STEPS, calls * STEPS - 1)  # Heun ends at 0 by Euler


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_picture_of_a_seed_is_its_own(bundles, family, solver):
    pipe = Pipeline.from_pretrained(bundles[family])
    many = draw(pipe, solver, num_images_per_prompt=3).images
    assert np.array_equal(many[1], draw(pipe, solver, seed=4).images[0])
    assert not np.array_equal(many[0], many[1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_timestep_for_all_rows_draws_the_same(bundles, solver, caplog):
    scalar, per_row = (
        draw(Pipeline.from_pretrained(bundles[name]), solver, num_images_per_prompt=2, guidance_scale=4.0)
        for name in ("optimum", "sd15")
    )
    np.testing.assert_allclose(scalar.images, per_row.images, rtol=1e-4, atol=1e-4)
    assert scalar.report.guided_forwards == per_row.report.guided_forwards
    several = per_row.report.total_evaluations > per_row.report.sequential_calls
    assert ("run as calls in turn" in caplog.text) == several


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize(("solver", "scheduler"), [("euler_ancestral", "EulerAncestralDiscrete"), ("lcm", "LCM")])
def test_the_noise_is_that_of_diffusers(bundles, solver, scheduler):
    """diffusers' own scheduler over the same graph, start and steps from one generator a seed."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    theirs = getattr(diffusers, f"{scheduler}Scheduler").from_config(tiny_bundle.SD15_SCHEDULE)
    pipe = Pipeline.from_pretrained(bundles["sd15"])
    seeds = (8, 9)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    x = torch.cat([torch.randn((1, tiny_bundle.CHANNELS, 4, 4), generator=one) for one in generators])
    times = draw(pipe, solver).plan.times
    theirs.set_timesteps(STEPS)
    assert epd.schedule.SD15.time(times[:-1]).tolist() == pytest.approx(theirs.timesteps.tolist())
    assert times[-1] == 0
    x = x * theirs.init_noise_sigma
    told = conditioning(pipe.bundle, lambda name: Session(pipe.bundle, name), ["red"] * 2)
    with Session(pipe.bundle, "unet") as unet:
        for t in theirs.timesteps:
            sample = theirs.scale_model_input(x, t).numpy()
            e = torch.from_numpy(unet(sample=sample, timestep=np.full(2, float(t)), **told)["out_sample"])
            x = theirs.step(e, t, x, generator=generators).prev_sample
    ours = draw(pipe, solver, seed=seeds[0], num_images_per_prompt=2, guidance_scale=1.0).images
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", NOISY)
def test_noise_ends_with_the_last_step(bundles, family, solver):
    assert draw(Pipeline.from_pretrained(bundles[family]), solver).plan.times[-1] == 0


@pytest.mark.parametrize("solver", NOISY)
def test_given_latents_leave_the_noise_to_the_seed(bundles, family, solver):
    pipe = Pipeline.from_pretrained(bundles[family])
    latents = np.random.default_rng(0).standard_normal((1, tiny_bundle.CHANNELS, 4, 4))
    first, again, other = (draw(pipe, solver, latents=latents, seed=seed).images for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("solver", NOISY)
def test_a_noisy_picture_is_drawn_again_from_its_metadata(bundles, tmp_path, family, solver):
    model = ["--model", str(bundles[family]), "--json"]
    how = ["--solver", solver, "--steps", "4", "--num-images", "2", "-s", "5"]
    assert main(["generate", "red", *model, *how, "-o", str(tmp_path / "a.png")]) == 0
    assert main(["generate", "--from-metadata", str(tmp_path / "a-6.png"), *model, "-o", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a-6.png").read_bytes()


def test_a_solver_of_other_families_is_refused(bundles, monkeypatch):
    from dataclasses import replace

    from runtime import plan

    others = {**METHODS, "heun": replace(METHODS["heun"], families=("edm",))}
    monkeypatch.setattr(plan, "METHODS", others)
    with pytest.raises(RequestError, match="the solver heun is not for sd3; choose from euler, dpm2"):
        Pipeline.from_pretrained(bundles["sd3"]).plan("red", solver="heun")


def test_an_unknown_solver_gives_the_list(bundles):
    pipe = Pipeline.from_pretrained(bundles["sd3"])
    for asked in (lambda: pipe.plan("red", solver="ddim"), lambda: own_grid(pipe.bundle.facts, 4, "ddim")):
        with pytest.raises(RequestError) as refused:
            asked()
        assert str(refused.value) == f"unknown solver 'ddim'; choose from {', '.join(SOLVERS)}"


def test_lcm_takes_no_more_steps_than_it_was_distilled_at(bundles):
    with pytest.raises(RequestError, match="no grid of 51 steps: LCM takes at most its 50 original steps"):
        Pipeline.from_pretrained(bundles["sd15"]).plan("red", solver="lcm", num_inference_steps=51)


def test_the_command_lists_them(capsys):
    assert main(["solvers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["solvers"]
    assert [row["name"] for row in rows] == SOLVERS
    assert all(row.keys() == {"name", "order", "calls", "families", "noisy", "source"} for row in rows)
    assert main(["solvers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["solver", *SOLVERS]
    assert len({line.index(row["source"]) for line, row in zip(lines[1:], rows, strict=True)}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_shipped_model_draws_with_it(shipped, solver):
    how = {"solver": solver, "num_inference_steps": 6} | ({"k": 2} if solver == "epd" else {})  # not the bundle's table
    several, alone = (shipped("a red circle", seed=1 + one, num_images_per_prompt=2 - one, **how) for one in (0, 1))
    assert np.array_equal(np.asarray(several.images[1]), np.asarray(alone.images[0]))
    assert np.asarray(alone.images[0]).std() > 5


@pytest.fixture(scope="module")
def shipped():
    return Pipeline.from_pretrained(DEFAULT)


def test_epd_on_a_grid_of_its_own_keeps_its_end(bundles):
    """Only the noisy solvers' grids are made to end at 0."""
    times = epd.schedule.ddim(STEPS)
    assert draw(Pipeline.from_pretrained(bundles["sd15"]), "epd").plan.times == tuple(times)
