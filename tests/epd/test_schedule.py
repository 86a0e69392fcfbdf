"""Grids: against published values and against diffusers' own schedulers."""

import numpy as np
import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from epd import schedule
from epd.solvers import METHODS

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize(
    "build", ["polynomial", "logsnr", "time_uniform", "discrete", "flow", "flow_euler", "ddim", "lcm"]
)
def test_every_grid_has_n_plus_one_decreasing_float64(build, n):
    grid = getattr(schedule, build)(n)
    assert grid.shape == (n + 1,)
    assert grid.dtype == np.float64
    assert (np.diff(grid) < 0).all()
    assert grid[-1] >= 0
    with pytest.raises(ValueError, match="at least one"):
        getattr(schedule, build)(0)


@pytest.mark.parametrize("build", [schedule.polynomial, schedule.logsnr, schedule.time_uniform])
def test_edm_grids_reach_both_ends(build):
    np.testing.assert_allclose(build(9, 0.002, 80.0)[[0, -1]], [80.0, 0.002], rtol=1e-9)


def test_discrete_is_the_published_sd15_grid():
    published = "14.61464 8.30717 5.09241 3.32507 2.27973 1.61558 1.16287 .83188 .57119 .34371 .02917"
    np.testing.assert_allclose(schedule.discrete(10), [float(v) for v in published.split()], rtol=0, atol=6e-6)


def test_flow_is_the_published_sd3_grid():
    published = "1 .9644 .92334 .87547 .81892 .75112 .66833 .56495 .43223 .25559 .00893"
    np.testing.assert_allclose(schedule.flow(10, 3.0), [float(v) for v in published.split()], rtol=0, atol=6e-6)


@pytest.mark.parametrize("n", [1, 2, 10, 28, 50, 333])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
def test_flow_euler_is_diffusers(n, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(n)
    np.testing.assert_allclose(schedule.flow_euler(n, shift), scheduler.sigmas.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [1, 4, 7, 20, 28, 50])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 1), ("leading", 0), ("trailing", 0), ("linspace", 0)])
def test_ddim_is_diffusers(n, one, spacing, offset):
    scheduler = DDIMScheduler(**SD15, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=one)
    scheduler.set_timesteps(n)
    before = int(scheduler.timesteps[-1]) - 1000 // n
    final = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    abar = np.append(scheduler.alphas_cumprod.double()[scheduler.timesteps], float(final))
    expected = np.sqrt((1 - abar) / abar)
    if expected[-1] == expected[-2]:
        with pytest.raises(ValueError, match="no length"):
            schedule.ddim(n, spacing=spacing, steps_offset=offset, set_alpha_to_one=one)
        return
    grid = schedule.ddim(n, spacing=spacing, steps_offset=offset, set_alpha_to_one=one)
    # float32 keeps 1 - abar to 3e-8: where abar is near 1 that is all the agreement there can be
    np.testing.assert_allclose(grid, expected, rtol=2e-5, atol=1e-6)
    alpha = 1 / (1 + grid**2)
    np.testing.assert_allclose(alpha, abar, rtol=0, atol=1e-6)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_euler_on_the_ddim_grid_is_ddim(set_alpha_to_one):
    import torch

    import epd

    vp = schedule.VP()
    scheduler = DDIMScheduler(**SD15, clip_sample=False, steps_offset=1, set_alpha_to_one=set_alpha_to_one)
    scheduler.set_timesteps(10)
    sample = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = schedule.ddim(10, vp, set_alpha_to_one=set_alpha_to_one)
    x = sample.numpy() * np.sqrt(1 + times[0] ** 2)

    def network(scaled, time):
        return np.tanh(scaled) * np.cos(time / 500)

    def slope(points):
        t = points.t.reshape(-1, 1, 1, 1, 1)
        return network(points.x / np.sqrt(1 + t**2), vp.time(t))

    *_, last = epd.solve(epd.solvers.euler(times), x, slope)
    for time in scheduler.timesteps:
        epsilon = torch.tensor(network(sample.numpy(), float(time)))
        sample = scheduler.step(epsilon, time, sample).prev_sample
    np.testing.assert_allclose(last.x / np.sqrt(1 + times[-1] ** 2), sample.numpy(), rtol=0, atol=2e-5)


def test_vp_time_maps_are_inverse_and_pass_through_the_training_times():
    vp = schedule.VP()
    times = np.append(np.linspace(0, 999, 777), [0, 1, 500, 999])
    np.testing.assert_allclose(vp.time(vp.sigma(times)), times, rtol=0, atol=1e-8)
    abar = vp.alphas_cumprod
    np.testing.assert_allclose(vp.sigma(np.arange(1000)), np.sqrt((1 - abar) / abar), rtol=1e-9)
    assert vp.time(1e9) == 999
    assert vp.time(0.0) == 0
    np.testing.assert_allclose(vp.time(schedule.discrete(10)), 1000 * np.linspace(1, 1e-3, 11) - 1, atol=1e-8)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_vp_betas_are_diffusers(kind):
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule=kind, num_train_timesteps=400)
    vp = schedule.VP(1e-4, 0.02, 400, kind)
    np.testing.assert_allclose(vp.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=2e-5)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: schedule.VP(beta_schedule="cosine"), "scaled_linear or linear"),
        (lambda: schedule.VP(beta_start=0.0), "0 < start"),
        (lambda: schedule.ddim(10, spacing="even"), "leading, trailing or linspace"),
        (lambda: schedule.ddim(1001), "do not fit"),
        (lambda: schedule.lcm(51), "at most its 50 original steps"),
        (lambda: schedule.lcm(4, original_steps=2000), "2000 original steps, of 1000 times"),
        (lambda: schedule.ddim(1000), "do not fit"),
        (lambda: schedule.decreasing([1.0]), "N \\+ 1 >= 2"),
        (lambda: schedule.decreasing([2.0, 2.0]), "strictly decreasing"),
        (lambda: schedule.decreasing([1.0, np.nan]), "finite"),
        (lambda: schedule.decreasing([1.0, -1.0]), "negative"),
    ],
)
def test_errors_name_the_rule(broken, message):
    with pytest.raises(ValueError, match=message):
        broken()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("n", [1, 4, 11])
def test_flow_even_is_dpm_solvers_use_flow_sigmas(n):
    diffusers = pytest.importorskip("diffusers")
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    scheduler = diffusers.DPMSolverMultistepScheduler(**flow)
    scheduler.set_timesteps(n)
    np.testing.assert_allclose(schedule.flow_even(n), scheduler.sigmas.numpy(), atol=1e-6)


def test_the_grid_of_a_checkpoint_has_two_forms_in_flow_matching():
    config = {"shift": 2.0}
    assert schedule.of_checkpoint(4, "sd3", config, "even").tolist() == schedule.flow_even(4, 2.0).tolist()
    assert schedule.of_checkpoint(4, "sd3", config).tolist() == schedule.flow_euler(4, 2.0).tolist()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("original", [50, 100])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 50])
def test_lcm_is_diffusers(n, original):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler(**SD15, original_inference_steps=original)
    scheduler.set_timesteps(n)
    grid = METHODS["lcm"].times(n, "sd15", dict(scheduler.config))
    np.testing.assert_allclose(schedule.vp_of(scheduler.config).time(grid[:-1]), scheduler.timesteps, atol=1e-6)
    assert grid[-1] == 0
    if (n, original) == (4, 50):
        assert scheduler.timesteps.tolist() == [999, 759, 499, 259]


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_noisy_methods_grid_ends_at_0_and_nothing_else_of_it_differs(family):
    config = SD15 | {"steps_offset": 1, "set_alpha_to_one": False}  # whose own grid of sd15 ends above 0
    own = schedule.of_checkpoint(6, family, config)
    noisy = METHODS["euler_ancestral"].times(6, family, config)
    assert noisy.tolist() == [*own[:-1], 0.0]
    assert METHODS["euler"].times(6, family, config).tolist() == own.tolist()


@pytest.mark.parametrize("vp", [None, schedule.SD15])
def test_shifted_runs_over_the_whole_range(vp):
    even, early, late = (schedule.shifted(6, shift, vp) for shift in (1.0, 3.0, 0.4))
    first, last = (1.0, 0.0) if vp is None else (float(vp.sigma(999)), float(vp.sigma(0)))
    for grid in (even, early, late):
        assert (grid[0], grid[-1]) == pytest.approx((first, last), rel=1e-12)
    assert (early[1:-1] > even[1:-1]).all()
    assert (late[1:-1] < even[1:-1]).all()
    with pytest.raises(ValueError, match="shift must be > 0"):
        schedule.shifted(6, 0.0, vp)
