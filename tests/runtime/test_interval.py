"""Guidance inside an interval of sigma only: half the rows outside, the same slopes as with and without guidance."""

import json

import numpy as np
import pytest
import tiny_bundle

import epd
from runtime.__main__ import main
from runtime.bundle import Bundle
from runtime.errors import RequestError
from runtime.pipeline import Pipeline
from runtime.session import Session
from runtime.slopes import Slopes
from runtime.text import conditioning

INTERVAL = (0.3, 0.8)


def slopes(folder, interval, directions="batch", guidance=4.0, prompts=("blue", "red")):
    bundle = Bundle.open(folder)
    told = conditioning(bundle, lambda name: Session(bundle, name), prompts)
    return Slopes(Session(bundle, bundle.backbone), bundle.facts, told, guidance, directions, interval)


@pytest.mark.parametrize("directions", ["batch", "calls"])
@pytest.mark.parametrize("times", [[0.9, 0.8, 0.5, 0.3, 0.2], [[0.9, 0.8], [0.5, 0.1], [0.7, 0.6]], [0.9], [0.5]])
def test_points_inside_are_guided_and_points_outside_are_not(bundles, family, directions, times):
    t = np.array(times)
    x = np.random.default_rng(0).standard_normal((len(t), 2, tiny_bundle.CHANNELS, 4, 4))
    points = epd.Points(x, t)
    some = slopes(bundles[family], INTERVAL, directions)
    answer = some(points)
    everywhere = slopes(bundles[family], None)(points)
    nowhere = slopes(bundles[family], None, prompts=["red"])(points)
    inside = np.broadcast_to(((t >= 0.3) & (t <= 0.8)).reshape(len(t), -1), (len(t), 2))  # the ends belong to it
    expected = np.where(inside[..., None, None, None], everywhere, nowhere)
    np.testing.assert_allclose(answer, expected, rtol=1e-6, atol=1e-6)
    assert some.guided_forwards == inside.size + inside.sum()
    assert some.backbone.calls == (1 if directions == "batch" else len(t))


def test_one_timestep_for_all_rows(bundles):
    x = np.random.default_rng(0).standard_normal((2, 2, tiny_bundle.CHANNELS, 4, 4))
    points = epd.Points(x, np.array([[0.9, 0.5], [0.7, 0.7]]))
    scalar, rows = slopes(bundles["optimum"], INTERVAL, "calls"), slopes(bundles["sd15"], INTERVAL)
    np.testing.assert_allclose(scalar(points), rows(points), rtol=1e-4, atol=1e-5)
    assert scalar.guided_forwards == rows.guided_forwards == 7


def test_no_guidance_has_no_interval(bundles, family):
    points = epd.Points(np.ones((1, 1, tiny_bundle.CHANNELS, 4, 4)), np.array([0.5]))
    some = slopes(bundles[family], INTERVAL, prompts=["red"])
    np.testing.assert_array_equal(some(points), slopes(bundles[family], None, prompts=["red"])(points))
    assert some.guided_forwards == 1


def test_rows_are_saved_where_it_is_not_guided(bundles):
    pipe = Pipeline.from_pretrained(bundles["sd3"])
    how = {"seed": 1, "num_inference_steps": 10, "num_images_per_prompt": 2, "output_type": "latent"}
    some = pipe("red", **how, guidance_interval=INTERVAL)
    inside = sum(0.3 <= t <= 0.8 for t in some.plan.times[:-1])
    assert 0 < inside < 10
    assert some.report.guided_forwards == 2 * (10 + inside)
    assert some.report.guidance_interval == INTERVAL
    everywhere = pipe("red", **how, guidance_interval=(0, 1))
    assert np.array_equal(everywhere.images, pipe("red", **how).images)
    assert not np.array_equal(everywhere.images, some.images)


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((0.8, 0.3), "0 <= LO < HI, got 0.8 0.3"),
        ((-1, 0.3), "0 <= LO < HI"),
        ((0.1, float("inf")), "0 <= LO < HI"),
        ((float("nan"), 0.3), "0 <= LO < HI"),
        ((2, 3), "lies above the grid, which starts at sigma 1; give a lower one"),
        ((0.1, 0.2, 0.3), "two sigmas"),
    ],
)
def test_intervals_that_do_not_fit(bundles, interval, words):
    with pytest.raises(RequestError) as refused:
        Pipeline.from_pretrained(bundles["sd3"]).plan("red", guidance_interval=interval)
    assert words in str(refused.value)


def test_the_command_records_it(bundles, tmp_path, capsys, family):
    model = ["--model", str(bundles[family]), "--json"]
    first, again = tmp_path / "a.png", tmp_path / "b.png"

    def report(*arguments):
        assert main(["generate", *model, *map(str, arguments)]) == 0
        return json.loads(capsys.readouterr().out)

    drawn = report("red", "-s", 1, "--steps", 8, "--guidance-interval", 0.25, 0.75, "-o", first)
    assert drawn["guidance_interval"] == [0.25, 0.75]
    assert drawn["guided_forwards"] < 2 * drawn["total_evaluations"]
    repeated = report("--from-metadata", first, "-o", again)
    assert first.read_bytes() == again.read_bytes()
    assert repeated["guided_forwards"] == drawn["guided_forwards"]
    other = report("--from-metadata", first, "-o", again, "--guidance-interval", 0, 1)
    assert other["guidance_interval"] == [0, 1]
