"""The coroutines against diffusers' own schedulers: same closed-form network, same grid, same noise.

diffusers keeps its sigmas, and most schedulers their samples and log-SNRs, in float32 whatever the sample's dtype, so
agreement is asked for to 1e-5 of the sample's scale (the largest value of the trajectory), not to float64's precision.
"""

from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

import epd
from tests.epd.oracle import edm_slope, flow_slope

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # theirs, under numpy 2
STEPS = (4, 7, 10, 20)
TOLERANCE = 1e-5
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SHAPE = (2, 4, 3, 3)
NORMAL = np.random.default_rng(5).normal(size=SHAPE)


def answer(x, sigma, flow):
    """The network at one time: the slope, epsilon in sigma variables or the velocity; float64 tensors."""
    points = epd.Points(x[None], torch.tensor([float(sigma)], dtype=torch.float64))
    return (flow_slope if flow else edm_slope)(points, torch)[0]


def drive(scheduler, sigmas, x, kind, **options):
    """Run a scheduler as a pipeline does; yields the state after each step, in the state convention of `epd`.

    kind: "sigma" (the scheduler's sample is x_0 + sigma n), "vp" (it is that divided by sqrt(1 + sigma^2)), "flow".
    sigmas: one for each of its timesteps, and where it ends.
    """
    scales = [(1 + s**2) ** 0.5 if kind == "vp" else 1.0 for s in sigmas]
    sample = torch.tensor(x, dtype=torch.float64) / scales[0]
    for timestep, (sigma, _), (scale, scale_next) in zip(
        scheduler.timesteps, pairwise(sigmas), pairwise(scales), strict=True
    ):
        if kind == "sigma":
            scheduler.scale_model_input(sample, timestep)
        slope = answer(sample * scale, sigma, kind == "flow")
        sample = scheduler.step(slope, timestep, sample, return_dict=False, **options)[0]
        assert sample.dtype == torch.float64
        yield (sample * scale_next).numpy()


def own_sigmas(scheduler):
    return scheduler.sigmas.double().tolist()


def start(times, flow):
    return NORMAL if flow else NORMAL * times[0]


def assert_same(theirs, solver, times, flow):
    """`theirs`: the states they reach, at times[1:]."""
    mine = [step.x for step in epd.solve(solver, start(times, flow), flow_slope if flow else edm_slope)]
    scale = max(np.abs(state).max() for state in mine)
    assert len(mine) == len(theirs) == len(times) - 1
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=TOLERANCE * scale)


def compare(scheduler, build, n, kind, **options):
    """A scheduler with one sigma per timestep, whose last one is where it ends."""
    scheduler.set_timesteps(n)
    times = own_sigmas(scheduler)
    flow = kind == "flow"
    assert_same(list(drive(scheduler, times, start(times, flow), kind, **options)), build(times), times, flow)


@pytest.mark.parametrize("n", STEPS)
def test_euler(n):
    compare(diffusers.EulerDiscreteScheduler(**SD15), epd.solvers.euler, n, "sigma")


@pytest.mark.parametrize("n", STEPS)
def test_flow_match_euler(n):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    compare(scheduler, epd.solvers.euler, n, "flow")
    assert own_sigmas(scheduler)[0] == 1
    np.testing.assert_allclose(own_sigmas(scheduler), epd.schedule.flow_euler(n, 3.0), rtol=1e-6)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("flow", [False, True])
def test_heun(n, flow):
    """Two of their timesteps are one step, the last one excepted."""
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0) if flow else diffusers.HeunDiscreteScheduler(**SD15)
    scheduler.set_timesteps(n)
    sigmas = own_sigmas(scheduler)
    asked = [sigmas[0], *sigmas[1:-1:2]]
    asked_at = [asked[0], *np.repeat(asked[1:], 2), 0.0]  # where the network is asked, stage by stage
    times = [*asked, 0.0]
    assert len(times) == n + 1
    states = list(drive(scheduler, asked_at, start(times, flow), "flow" if flow else "sigma"))
    assert_same([*states[1::2], states[-1]], epd.solvers.heun(times), times, flow)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(n, spacing):
    if spacing == "trailing" and 1000 % n:
        n = {7: 8}[n]  # DDIM mislabels its own state where n does not divide 1000, see epd.schedule.ddim
    scheduler = diffusers.DDIMScheduler(
        **SD15, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing=spacing
    )
    scheduler.set_timesteps(n)
    times = epd.schedule.ddim(n, spacing=spacing).tolist()
    states = list(drive(scheduler, times, start(times, False), "vp"))
    assert_same(states, epd.solvers.euler(times), times, False)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("lower", [True, False], ids=["lower_order_final", "full order at the end"])
@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_multistep(n, lower, kind, order):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **(FLOW if kind == "flow" else SD15), solver_order=order, lower_order_final=lower
    )
    solver = {2: epd.solvers.dpmpp_2m, 3: epd.solvers.dpmpp_3m}[order]
    compare(scheduler, lambda times: solver(times, kind == "flow", lower_order_final=lower), n, kind)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_multistep_on_a_grid_that_ends_above_zero(n, lower, order):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD15, solver_order=order, lower_order_final=lower, final_sigmas_type="sigma_min"
    )
    solver = {2: epd.solvers.dpmpp_2m, 3: epd.solvers.dpmpp_3m}[order]
    compare(scheduler, lambda times: solver(times, lower_order_final=lower), n, "vp")


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_dpm_solver_singlestep(n, kind):
    """On a grid of ours with its midpoints put in: two of their timesteps are one step.

    An odd number of their timesteps ends with an Euler step to 0. With an even one they end with two Euler steps; as
    that is comparable to nothing, the grid then ends above 0 and lower_order_final is off.
    """
    odd = n % 2 == 1
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **(FLOW if kind == "flow" else SD15),
        solver_order=2,
        lower_order_final=odd,
        final_sigmas_type="zero" if odd else "sigma_min",
    )
    scheduler.set_timesteps(n)
    times = own_sigmas(scheduler)[::2] if not odd else [*own_sigmas(scheduler)[:-1:2], 0.0]
    if not odd and kind == "flow":
        times[-1] = 0.01  # their sigma_min is a VP one
    flow = kind == "flow"
    solver = epd.solvers.dpmpp_2s(times, flow)
    requests = []
    list(epd.solve(solver, start(times, flow), lambda p: requests.append(float(p.t[0])) or p.x * 0))
    scheduler.sigmas = torch.tensor([*requests, times[-1]], dtype=torch.float32)
    states = list(drive(scheduler, own_sigmas(scheduler), start(times, flow), kind))
    assert len(requests) == n
    assert_same(states[1::2] if not odd else [*states[1:-1:2], states[-1]], solver, times, flow)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("order", [2, 3])
def test_unipc(n, kind, order):
    scheduler = diffusers.UniPCMultistepScheduler(**(FLOW if kind == "flow" else SD15), solver_order=order)
    compare(scheduler, lambda times: epd.solvers.unipc(times, order, kind == "flow"), n, kind)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_unipc_on_a_grid_that_ends_above_zero(n, lower, order):
    scheduler = diffusers.UniPCMultistepScheduler(
        **SD15, solver_order=order, lower_order_final=lower, final_sigmas_type="sigma_min"
    )
    compare(scheduler, lambda times: epd.solvers.unipc(times, order, lower_order_final=lower), n, "vp")


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_deis(n, lower, order):
    scheduler = diffusers.DEISMultistepScheduler(**SD15, solver_order=order, lower_order_final=lower)
    compare(scheduler, lambda times: epd.solvers.deis(times, order, lower_order_final=lower), n, "vp")


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("order", [2, 3])
def test_deis_with_flow_sigmas(n, order):
    """Their grid repeats its last sigma: a last step of no length, which moves nothing and is left out here.

    It would count as the one of lower order, so lower_order_final is off on both sides.
    """
    scheduler = diffusers.DEISMultistepScheduler(**FLOW, solver_order=order, lower_order_final=False)
    scheduler.set_timesteps(n)
    *times, last = own_sigmas(scheduler)
    assert times[-1] == last
    states = list(drive(scheduler, own_sigmas(scheduler), start(times, True), "flow"))
    assert_same(states[:-1], epd.solvers.deis(times, order, flow=True, lower_order_final=False), times, True)


def normals(seed):
    """Noise as the schedulers draw it, for numpy states."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).numpy()


@pytest.mark.parametrize("n", STEPS)
def test_euler_ancestral(n):
    compare(
        diffusers.EulerAncestralDiscreteScheduler(**SD15),
        lambda times: epd.solvers.euler_ancestral(times, noise=normals(3)),
        n,
        "sigma",
        generator=torch.Generator().manual_seed(3),
    )


@pytest.mark.parametrize("n", STEPS)
def test_lcm(n):
    scheduler = diffusers.LCMScheduler(**SD15)
    scheduler.set_timesteps(n)
    times = [*epd.schedule.SD15.sigma(scheduler.timesteps.numpy()).tolist(), 0.0]
    generator = torch.Generator().manual_seed(4)
    states = list(drive(scheduler, times, start(times, False), "vp", generator=generator))
    assert_same(states, epd.solvers.lcm(times, noise=normals(4)), times, False)


@pytest.mark.parametrize("n", STEPS)
def test_flow_match_lcm(n):
    compare(
        diffusers.FlowMatchLCMScheduler(shift=3.0),
        lambda times: epd.solvers.lcm(times, flow=True, noise=normals(4)),
        n,
        "flow",
        generator=torch.Generator().manual_seed(4),
    )
