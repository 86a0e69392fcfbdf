import json
import logging
import math
from itertools import pairwise

import numpy as np
import pytest
import tiny_bundle

import epd
from runtime.bundle import Bundle
from runtime.errors import BundleError, NotFiniteError, RequestError
from runtime.noise import randn
from runtime.pipeline import Pipeline
from runtime.session import Session
from runtime.slopes import Slopes, directions_of
from runtime.text import conditioning


@pytest.fixture
def pipe(bundles, family):
    return Pipeline.from_pretrained(bundles[family])


def slopes(folder, directions, guided=True):
    bundle = Bundle.open(folder)
    prompts = ["", "red"] if guided else ["red"]
    told = conditioning(bundle, lambda name: Session(bundle, name), prompts)
    return Slopes(Session(bundle, bundle.backbone), bundle.facts, told, 4.0, directions)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("per_image", [True, False])
def test_one_batch_equals_calls_in_turn(bundles, family, k, guided, per_image):
    x = np.random.default_rng(k).standard_normal((k, 2, tiny_bundle.CHANNELS, 4, 4))
    t = np.linspace(0.9, 0.2, 2 * k).reshape(k, 2) if per_image else np.linspace(0.9, 0.2, k)
    batch, calls = slopes(bundles[family], "batch", guided), slopes(bundles[family], "calls", guided)
    together, in_turn = batch(epd.Points(x, t)), calls(epd.Points(x, t))
    assert together.shape == x.shape
    np.testing.assert_allclose(together, in_turn, rtol=1e-4, atol=1e-4 * abs(in_turn).max())
    assert batch.backbone.calls == 1
    assert calls.backbone.calls == k
    assert batch.guided_forwards == calls.guided_forwards == 2 * k * (2 if guided else 1)


def test_rows_belong_to_their_point_image_and_half(bundles, family):
    """Each point of each image alone, unbatched, by hand."""
    x = np.random.default_rng(5).standard_normal((2, 3, tiny_bundle.CHANNELS, 4, 4))
    t = np.array([[0.9, 0.7, 0.5], [0.4, 0.3, 0.2]])
    answer = slopes(bundles[family], "batch")(epd.Points(x, t))
    for p in range(2):
        for b in range(3):
            alone = slopes(bundles[family], "batch")(epd.Points(x[p : p + 1, b : b + 1], t[p : p + 1, b]))
            np.testing.assert_allclose(answer[p, b], alone[0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("directions", ["batch", "calls"])
def test_one_prompt_per_image(pipe, guidance, directions):
    """Many prompts in one batch: each image has the slope it has alone, with its own prompt."""
    x = np.random.default_rng(3).standard_normal((2, 3, tiny_bundle.CHANNELS, 4, 4))
    t = np.array([[0.9, 0.7, 0.5], [0.4, 0.3, 0.2]])
    prompts = ["red", "blue cat", ""]
    many = pipe.slopes(prompts, guidance, "dog")
    many.directions = directions
    answer = many(epd.Points(x, t))
    assert many.guided_forwards == 6 * (2 if guidance > 1 else 1)
    for b, prompt in enumerate(prompts):
        alone = pipe.slopes([prompt], guidance, "dog")(epd.Points(x[:, b : b + 1], t[:, b : b + 1]))
        np.testing.assert_allclose(answer[:, b], alone[:, 0], rtol=1e-5, atol=1e-5)
    assert abs(answer[:, 0] - many(epd.Points(x[:, [1, 1, 1]], t))[:, 0]).max() > 1e-3


def test_one_prompt_per_image_where_the_graph_takes_one_timestep(bundles):
    pipe = Pipeline.from_pretrained(bundles["optimum"])
    x = np.random.default_rng(3).standard_normal((2, 2, tiny_bundle.CHANNELS, 4, 4))
    t = np.array([[9.0, 7.0], [4.0, 3.0]])
    answer = pipe.slopes(["red", "blue"], 4.0)(epd.Points(x, t))
    for b, prompt in enumerate(["red", "blue"]):
        alone = pipe.slopes([prompt], 4.0)(epd.Points(x[:, b : b + 1], t[:, b : b + 1]))
        np.testing.assert_allclose(answer[:, b], alone[:, 0], rtol=1e-5, atol=1e-5)


def test_guidance_is_extrapolation_from_the_negative(bundles, family):
    bundle = Bundle.open(bundles[family])
    x, t = np.ones((1, 1, tiny_bundle.CHANNELS, 4, 4)), np.array([0.5])
    told = conditioning(bundle, lambda name: Session(bundle, name), ["blue", "red"])

    def at(rows, guidance):
        part = {name: value[rows] for name, value in told.items()}
        return Slopes(Session(bundle, bundle.backbone), bundle.facts, part, guidance, "batch")(epd.Points(x, t))

    negative, positive = at([0], 1.0), at([1], 1.0)
    np.testing.assert_allclose(at([0, 1], 4.0), negative + 4.0 * (positive - negative), rtol=1e-5, atol=1e-6)


def test_a_scalar_timestep_means_calls_in_turn(bundles, caplog):
    scalar, rows = Pipeline.from_pretrained(bundles["optimum"]), Pipeline.from_pretrained(bundles["sd15"])
    how = {"seed": 3, "solver": "epd", "k": 2, "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    theirs, ours = scalar("red", **how), rows("red", **how)
    assert (theirs.report.directions, ours.report.directions) == ("calls", "batch")
    assert "the points of a request run as calls in turn" in caplog.text
    np.testing.assert_allclose(theirs.images, ours.images, rtol=1e-4, atol=1e-5)
    assert theirs.report.guided_forwards == ours.report.guided_forwards


def test_times_per_image_on_a_scalar_timestep(bundles):
    x = np.random.default_rng(0).standard_normal((1, 2, tiny_bundle.CHANNELS, 4, 4))
    points = epd.Points(x, np.array([[0.9, 0.1]]))
    scalar, rows = slopes(bundles["optimum"], "calls"), slopes(bundles["sd15"], "batch")
    np.testing.assert_allclose(scalar(points), rows(points), rtol=1e-4, atol=1e-5)
    assert directions_of(scalar.backbone) == "calls"


def test_a_seed_gives_the_same_picture_in_any_batch(pipe):
    many = pipe("red", seed=5, num_images_per_prompt=3, output_type="np")
    assert many.report.seeds == (5, 6, 7)
    for index in range(3):
        alone = pipe("red", seed=5 + index, output_type="np")
        assert np.array_equal(many.images[index], alone.images[0])
    assert not np.array_equal(many.images[0], many.images[1])


def test_sd3_euler_is_the_textbook_loop(bundles):
    pipe = Pipeline.from_pretrained(bundles["sd3"])
    result = pipe("red", negative_prompt="blue", seed=9, output_type="latent")
    x = randn((1, tiny_bundle.CHANNELS, 4, 4), 9).astype(np.float64)
    sigmas = epd.schedule.flow_euler(3, 3.0)
    told = conditioning(pipe.bundle, lambda name: Session(pipe.bundle, name), ["blue", "red"])
    with Session(pipe.bundle, "transformer") as transformer:
        for s, s_next in pairwise(sigmas):
            feeds = {"hidden_states": np.concatenate([x, x]), "timestep": np.full(2, 1000 * s)}
            v = transformer(**feeds, **told)["out_hidden_states"].astype(np.float64)
            x = x + (s_next - s) * (v[:1] + 4.0 * (v[1:] - v[:1]))
    np.testing.assert_allclose(result.images, x, rtol=1e-6, atol=1e-6)
    assert result.plan.times[-1] == 0


def test_sd15_euler_is_ddim(bundles):
    """In x itself: x0 = (x - sqrt(1 - abar) eps) / sqrt(abar), x' = sqrt(abar') x0 + sqrt(1 - abar') eps."""
    pipe = Pipeline.from_pretrained(bundles["sd15"])
    result = pipe("red", seed=9, guidance_scale=1.0, num_inference_steps=4, output_type="latent")
    x = randn((1, tiny_bundle.CHANNELS, 4, 4), 9).astype(np.float64)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    told = conditioning(pipe.bundle, lambda name: Session(pipe.bundle, name), ["red"])
    with Session(pipe.bundle, "unet") as unet:
        for now, then in ((751, 501), (501, 251), (251, 1), (1, 0)):
            e = unet(sample=x, timestep=[now], **told)["out_sample"].astype(np.float64)
            clean = (x - math.sqrt(1 - abar[now]) * e) / math.sqrt(abar[now])
            x = math.sqrt(abar[then]) * clean + math.sqrt(1 - abar[then]) * e
    np.testing.assert_allclose(result.images, x, rtol=1e-5, atol=1e-5)


def test_tables_start_at_sigma_and_end_in_x(bundles):
    table = epd.start_table(epd.schedule.discrete(2), 2)
    plan = Pipeline.from_pretrained(bundles["sd15"]).plan("red", table=table)
    assert plan.start_scale == table.times[0]
    assert plan.end_scale == math.hypot(1, table.times[-1])
    assert plan.guidance == 4.0


def test_decoding_undoes_the_scaling(bundles, family):
    pipe = Pipeline.from_pretrained(bundles[family])
    latent = pipe("red", seed=1, output_type="latent").images
    picture = pipe("red", seed=1, output_type="np").images
    facts = pipe.bundle.facts.latent
    colours = tiny_bundle.random(3, tiny_bundle.CHANNELS, 1, 1, seed=9)[:, :, 0, 0]
    small = np.einsum("kc,bchw->bhwk", colours, latent / facts.scaling + facts.shift)
    expected = np.clip(small / 2 + 0.5, 0, 1).repeat(4, 1).repeat(4, 2)
    np.testing.assert_allclose(picture, expected, atol=1e-5)
    assert picture.shape == (1, 16, 16, 3)
    assert np.array_equal(np.asarray(pipe("red", seed=1).images[0]), np.rint(picture[0] * 255).astype(np.uint8))


def test_given_latents_replace_the_seeds(pipe):
    noise = randn((1, tiny_bundle.CHANNELS, 4, 4), 5)
    given = pipe("red", latents=noise, seed=0, output_type="latent").images
    assert np.array_equal(given, pipe("red", seed=5, output_type="latent").images)
    with pytest.raises(RequestError, match=r"latents must be \[1, 4, 4, 4\], got \[4, 4, 4\]"):
        pipe("red", latents=noise[0])


@pytest.mark.parametrize(("solver", "calls", "evaluations"), [("euler", 3, 3), ("epd", 6, 9), ("dpm2", None, None)])
def test_the_report_counts(pipe, solver, calls, evaluations):
    steps = []
    result = pipe("red", seed=1, solver=solver, num_images_per_prompt=2, callback_on_step_end=steps.append)
    report = result.report
    assert [step.index for step in steps] == [0, 1, 2]
    assert (report.solver, report.steps, len(result.images)) == (solver, 3, 2)
    assert calls in (None, report.sequential_calls)
    assert evaluations in (None, report.total_evaluations)
    assert report.guided_forwards == report.total_evaluations * 2 * 2
    assert report.seconds.keys() == {"load", "compile", "encode", "denoise", "decode", "total", "per_call"}
    parts = sum(report.seconds[name] for name in ("load", "encode", "denoise", "decode"))
    assert report.seconds["total"] == pytest.approx(parts)


def test_memory_policy(pipe):
    pipe("red", seed=1)
    loaded = {name for name, session in pipe._sessions.items() if session.loaded}
    assert loaded == {pipe.bundle.backbone, "vae_decoder"}
    pipe.close()
    assert not any(session.loaded for session in pipe._sessions.values())


def test_no_guidance_is_half_the_work(pipe):
    assert pipe("red", seed=1, guidance_scale=1.0).report.guided_forwards == 3
    assert pipe("red", seed=1, guidance_scale=1.5).report.guided_forwards == 6


@pytest.mark.parametrize(("limit", "step"), [(0.5, 1), (800.0, 1)])
def test_nan_names_component_and_step(tmp_path, limit, step):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd3", breaks_above=limit)
    with pytest.raises(NotFiniteError, match=rf"transformer: NaN .*\(at step {step} of 3\)"):
        Pipeline.from_pretrained(folder)("red", seed=1)


def test_nan_in_a_later_step(tmp_path):
    """A table whose second interval asks beyond the limit, by its time scale."""
    folder = tiny_bundle.bundle(tmp_path / "b", "sd3", breaks_above=1010.0)
    table = epd.Table(times=[1.0, 0.9, 0.8], r=[[0.5], [0.5]], w=[[1.0], [1.0]], scale_time=[[1.0], [1.5]])
    with pytest.raises(NotFiniteError, match=r"transformer: NaN .*\(at step 2 of 2\)"):
        Pipeline.from_pretrained(folder)("red", seed=1, table=table)


def test_the_bundles_first_table_is_the_default(tmp_path):
    table = epd.start_table(epd.schedule.flow(4), 3)
    folder = tiny_bundle.bundle(tmp_path / "b", "sd3", tables=[("four.json", table)])
    pipe = Pipeline.from_pretrained(folder)
    plan = pipe.plan("red")
    assert (plan.solver, plan.steps, plan.directions, plan.start_table) == ("epd", 4, 3, False)
    assert pipe.plan("red", solver="euler").steps == 3
    with pytest.raises(RequestError, match=r"four\.json has 4 steps, asked for were 5"):
        pipe.plan("red", num_inference_steps=5)


def test_tables_that_do_not_fit(bundles, tmp_path):
    pipe = Pipeline.from_pretrained(bundles["sd3"])
    other = epd.Table(times=[1.0, 0.5], r=[[0.5]], w=[[1.0]], family="sd15")  # a sigma of another kind
    with pytest.raises(RequestError, match="the table is for the family sd15, tiny-sd3 is sd3"):
        pipe.plan("red", table=other)
    with pytest.raises(RequestError, match=r"starts at sigma 14\.6"):
        pipe.plan("red", table=epd.start_table(epd.schedule.discrete(2), 2))
    with pytest.raises(RequestError, match="a table is for the solver epd, not for heun"):
        pipe.plan("red", table=epd.start_table([1.0, 0.5], 2), solver="heun")
    with pytest.raises(RequestError, match=r"nothing\.json"):
        pipe.plan("red", table=tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(RequestError, match=r"bad\.json: not a table"):
        pipe.plan("red", table=tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"height": 20}, "multiples of 8, got 20x16; try --height 16 --width 16"),
        ({"height": 32, "width": 24}, "type: python -m export nobody/tiny --height 32 --width 24"),
        ({"width": -8}, "multiples of 8"),
        ({"num_inference_steps": 0}, "steps must be from 1 to 1000, got 0"),
        ({"num_images_per_prompt": 0}, "images must be 1 or more"),
        ({"seed": -1}, "a seed must be 0 or more"),
        ({"solver": "ddim"}, "unknown solver 'ddim'; choose from euler, heun, dpm2, "),
        ({"guidance_scale": math.nan}, "finite"),
        ({"k": 2, "solver": "euler"}, "-k"),
    ],
)
def test_requests_that_do_not_fit(pipe, asked, words):
    with pytest.raises(RequestError) as refused:
        pipe.plan("red", **asked)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_any_size_where_the_bundle_allows_it(tmp_path, family):
    pipe = Pipeline.from_pretrained(tiny_bundle.bundle(tmp_path / "b", family, size=None))
    assert pipe("red", seed=1, height=24, width=40).images[0].size == (40, 24)


def test_a_scheduler_setting_that_is_not_supported(bundles, tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd3")
    tiny_bundle.change(folder, schedule={**tiny_bundle.SD3_SCHEDULE, "use_dynamic_shifting": True})
    with pytest.raises(RequestError, match="scheduler sets use_dynamic_shifting = True"):
        Pipeline.from_pretrained(folder).plan("red")


def test_random_weights_are_said_aloud(tmp_path, caplog):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd3", random_weights=True)
    with caplog.at_level(logging.WARNING):
        Pipeline.from_pretrained(folder)
    assert "its pictures mean nothing" in caplog.text


def test_a_missing_component_is_told_before_any_work(tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd3")
    content = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    del content["components"]["vae_decoder"]
    (folder / "bundle.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BundleError, match="no vae_decoder in this bundle"):
        Pipeline.from_pretrained(folder)


def test_an_empty_prompt_is_drawn(pipe):
    assert pipe("", seed=1).images[0].size == (16, 16)


def test_guidance_that_overflows_names_the_step(pipe, monkeypatch):
    with pytest.raises(NotFiniteError, match=r"beyond what float32 holds.*\(at step 2 of 3\)"):
        pipe("red", seed=1, guidance_scale=1e300)
    monkeypatch.setattr(Slopes, "__call__", lambda self, points: points.x * np.nan)
    with pytest.raises(NotFiniteError, match=r"guided slope, at guidance scale 4.*\(at step 1 of 3\)"):
        pipe("red", seed=1)


def test_latents_and_prompts_that_cannot_be(pipe):
    with pytest.raises(RequestError, match="latents must be finite"):
        pipe("red", latents=np.full((1, tiny_bundle.CHANNELS, 4, 4), np.nan))
    with pytest.raises(RequestError, match="must be Unicode text"):
        pipe.plan("caf\udce9")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule must be"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas = True"),
    ],
)
def test_sd15_schedulers_that_are_not_supported(tmp_path, setting, words):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15")
    tiny_bundle.change(folder, schedule=tiny_bundle.SD15_SCHEDULE | setting)
    with pytest.raises(RequestError, match=words):
        Pipeline.from_pretrained(folder).plan("red")


def test_tables_beyond_what_the_family_knows(bundles):
    with pytest.raises(RequestError, match=r"starts at sigma 80, tiny-sd15 at most at 14\.6"):
        Pipeline.from_pretrained(bundles["sd15"]).plan("red", table=epd.start_table(epd.schedule.polynomial(3), 2))
    analytic = epd.Table(times=[1.0, 0.5, 0.1], r=[[0.5], [0.5]], w=[[1.0], [1.0]], start="afs")
    with pytest.raises(RequestError, match=r"starts analytically \(afs\)"):
        Pipeline.from_pretrained(bundles["sd3"]).plan("red", table=analytic)


@pytest.mark.parametrize(("component", "stage"), [("text_encoder", "encoding"), ("vae_decoder", "decoding")])
def test_nan_beside_the_steps_names_the_stage(tmp_path, component, stage):
    import onnx

    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", bare=True)
    file = folder / component / "model.onnx"
    model = onnx.load(file)
    for weight in model.graph.initializer:
        if weight.name in ("words", "colours"):
            shape = tuple(weight.dims)
            weight.CopyFrom(onnx.numpy_helper.from_array(np.full(shape, np.nan, np.float32), weight.name))
    onnx.save(model, file)
    with pytest.raises(NotFiniteError, match=rf"{component}: NaN .*--dtype fp32 \(while {stage}\)"):
        Pipeline.from_pretrained(folder)("red", seed=1, num_inference_steps=2)


@pytest.mark.parametrize(
    "asked", [{"threads": -1}, {"threads": 2, "low_memory": True}, {"threads": 1, "provider": "cpu,cpu"}]
)
def test_threads_that_cannot_be(bundles, asked):
    with pytest.raises(RequestError, match="threads are 0 or more, for one provider without low_memory"):
        Pipeline.from_pretrained(bundles["sd3"], **asked)


def test_as_many_threads_as_asked_draw_the_same(bundles):
    drawn = [
        Pipeline.from_pretrained(bundles["sd3"], threads=threads)(
            "red", seed=1, num_inference_steps=2, output_type="np"
        )
        for threads in (0, 1)
    ]
    assert Pipeline.from_pretrained(bundles["sd3"], threads=1)._options["session_options"].intra_op_num_threads == 1
    np.testing.assert_array_equal(drawn[0].images, drawn[1].images)
