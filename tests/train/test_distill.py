"""The command, on the small model that comes along, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import epd
from epd.table import start_table
from epd.train.__main__ import main
from epd.train.model import load
from epd.train.teacher import on_arrays
from runtime.noise import randn
from runtime.pipeline import Pipeline
from tests.conftest import ROOT

CHECKPOINTS = ROOT / "shapes" / "checkpoints"
CAPTIONS = ["a large red circle at the top left on a navy background", "a pink ring above a green square"]
SMALL = ["-n", "1", "-k", "1", "--teacher-calls", "16", "--trajectories", "2", "--guidance", "1", "--steps", "2"]


@pytest.fixture(scope="module")
def model():
    return load("shapes-sd3")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Where trajectories are kept, for all tests."""
    return str(tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_network_is_the_runtimes(model, guidance):
    pipe = Pipeline.from_pretrained("shapes-sd3")
    x = np.stack([randn((2, *model.shape), seed) for seed in (1, 2)], 1).astype(np.float64)
    points = epd.Points(x, np.array([0.9, 0.31]))
    theirs = pipe.slopes(CAPTIONS, guidance)(points)
    ours = on_arrays(model.slopes(CAPTIONS, [guidance] * 2), "cpu")(points)
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * abs(theirs).max())  # a bundle of half the bits
    with torch.no_grad():
        drawn = model.pictures(torch.tensor(x[0]), 0.0).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(drawn, pipe.decode(x[0]), atol=1e-4)


def test_images_are_told_their_own_prompt_and_guidance(model):
    slopes = model.slopes(CAPTIONS, [1.0, 3.0])
    x, t = torch.tensor(randn((1, 2, *model.shape), 3), dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    whole = slopes(epd.Points(x, t))
    for i, scale in enumerate((1.0, 3.0)):
        alone = model.slopes([CAPTIONS[i]], [scale])(epd.Points(x[:, i : i + 1], t))
        torch.testing.assert_close(whole[:, i : i + 1], alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(slopes.part([i])(epd.Points(x[:, i : i + 1], t)), alone, atol=1e-4, rtol=1e-4)


def test_sigma_models_know_the_time_of_a_sigma_and_its_gradient():
    model = load("shapes-sd15", recompute=True)
    vp = epd.schedule.vp_of(model.facts.schedule)
    sigma = torch.tensor([14.6, 3.0, 0.5, 0.03], dtype=torch.float64, requires_grad=True)
    time = model._vp_time(sigma)
    np.testing.assert_allclose(time.detach().numpy(), vp.time(sigma.detach().numpy()), atol=1e-9)
    (rate,) = torch.autograd.grad(time.sum(), sigma)
    moved = (vp.time(sigma.detach().numpy() * (1 + 1e-7)) - vp.time(sigma.detach().numpy())) * 1e7
    np.testing.assert_allclose(rate.numpy(), moved / sigma.detach().numpy(), rtol=1e-3)
    slopes = model.slopes(CAPTIONS[:1], [5.0])
    x = torch.tensor(5 * randn((1, 1, *model.shape), 3), dtype=torch.float64)
    slope = {}
    for recompute in (True, False):
        model.recompute = recompute
        t = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
        slope[recompute] = torch.autograd.grad(slopes(epd.Points(x, t)).square().sum(), t)[0]
    torch.testing.assert_close(slope[True], slope[False])


@pytest.mark.slow
def test_a_table_is_distilled_and_draws_the_same_picture_without_torch(model, work, tmp_path, capsys):
    """And again: from what was kept nothing is made anew."""
    output = tmp_path / "table.json"
    command = ["distill", "shapes-sd3", *SMALL, "--candidates", "2", "--work", work, "-o", str(output)]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    table = epd.Table.load(output)
    assert (table.start, table.steps, table.directions, table.model) == ("history", 1, 1, "shapes-sd3")
    assert table.held_out_psnr == told["psnr_db"] > 5
    assert {"checkpoint", "teacher", "recipe", "prompts_sha256", "first_seed", "looks"} <= set(table.provenance)
    noise = randn(model.shape, 5)[None].astype(np.float64)
    *_, last = epd.solve(epd.solvers.epd(table), noise, on_arrays(model.slopes(CAPTIONS[:1], [1.0]), "cpu"))
    with torch.no_grad():
        ours = model.pictures(torch.tensor(last.x), 0.0)[0].permute(1, 2, 0).numpy()
    pipe = Pipeline.from_pretrained("shapes-sd3")
    theirs = pipe(CAPTIONS[0], seed=5, table=output, guidance_scale=1.0, output_type="np").images[0]
    np.testing.assert_allclose(ours, theirs, atol=5e-3)
    before = output.read_text(encoding="utf-8")
    assert main(command) == 0
    assert "goes on from step 2" in capsys.readouterr().err
    again = epd.Table.from_json(json.loads(before))
    assert (epd.Table.load(output).w == again.w).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere"], "nowhere: no such folder; give a diffusers checkpoint's, or one of shapes-sd15, shapes-sd3"),
        ([str(ROOT / "runtime/bundles/shapes-sd3")], "a bundle, which has no gradients"),
        ([str(ROOT / "shapes")], "model_index.json is missing"),
        (["shapes-sd3", "-n", "0"], "-n must be from 1 to 99, got 0"),
        (["shapes-sd3", "-k", "0"], "-k must be 1 or more, got 0"),
        (["shapes-sd3", "--order", "2"], "a start from history has none"),
        (["shapes-sd3", "--start", "call", "--order", "5"], "--order must be from 1 to 4"),
        (["shapes-sd3", "--midpoint", "geometric"], "from history it is arithmetic"),
        (["shapes-sd3", "--start", "call", "--midpoint", "geometric", *SMALL], "cannot reach 0"),
        (["shapes-sd3", "--weights", "simplex"], "from history they are free"),
        (["shapes-sd3", "--start", "afs"], "not for flow matching"),
        (["shapes-sd3", "--freeze", "q"], "--freeze q: choose from r, w"),
        (["shapes-sd3", "--steps", "0"], "steps must be 1 or more"),
        (["shapes-sd3", "--learn-grid", "--loss", "state"], "times are learned by the last state or picture"),
        (["shapes-sd3", "--teacher-calls", "20"], "must be 8 times --calls or more"),
        (["shapes-sd3", "--prompts", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["shapes-sd3", "--device", "warp"], "--device warp: torch has none here"),
        (["shapes-sd3", "--from-table", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["shapes-sd3", "-o", "nowhere/t.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(options, words, capsys, work):
    assert main(["distill", *options, "--work", work]) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert told.out == ""
    assert len(told.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"family": "sd15"}, [], "is for the family sd15, shapes-sd3 is sd3"),
        ({"times": np.array([3.0, 0.5, 0.0])}, [], "starts at sigma 3, shapes-sd3 at most at 1"),
        ({}, ["-k", "2"], "-k 2: "),
        ({}, ["--start", "history"], "has call; leave the option out"),
    ],
)
def test_a_table_of_another_kind_is_refused(change, options, words, capsys, tmp_path, work):
    file = tmp_path / "t.json"
    replace(start_table((1.0, 0.5, 0.0), 1), **change).save(file)
    assert main(["distill", "shapes-sd3", "--from-table", str(file), "--work", work, *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_keeps_what_there_is(tmp_path, capsys, monkeypatch):
    """Stopped in the middle of learning; the same command goes on, and leaves nothing but the table."""
    from epd.train import learning

    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    command = ["distill", "shapes-sd3", *SMALL, "--start", "call", "--every", "2"]
    output = tmp_path / "t.json"
    calls, loss = [], learning.loss

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(learning, "loss", interrupted)
    assert main([*command, "-o", str(output)]) == 130
    assert not output.exists()
    assert list((tmp_path / "cache").rglob("*.npz"))
    assert main([*command, "-o", str(output)]) == 0
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert "goes on from step 1" in capsys.readouterr().err
    assert len(calls) == 3
    assert epd.Table.load(output).provenance["recipe"]["steps"] == 2
