"""Optimum's pipelines open our bundles, and our runtime runs a folder that Optimum exported."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("optimum.onnxruntime", reason="needs the extra `interop`")

from runtime.pipeline import Pipeline
from tests.compare import by_diffusers, by_runtime, diffusers_pipeline, psnr
from tests.conftest import SIZES

pytestmark = pytest.mark.interop
PROMPTS = ["a red ring above a blue cross on a white background", ""]
DRAWING = {"num_inference_steps": 4, "guidance_scale": 4.0}


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_optimum_opens_our_bundle_and_draws_the_same(family, tiny_bundles):
    from optimum.onnxruntime import ORTStableDiffusion3Pipeline, ORTStableDiffusionPipeline

    kind = {"sd3": ORTStableDiffusion3Pipeline, "sd15": ORTStableDiffusionPipeline}[family]
    pipeline = kind.from_pretrained(tiny_bundles[family])
    pipeline.set_progress_bar_config(disable=True)
    height, width = SIZES[family]
    theirs = by_diffusers(pipeline, PROMPTS, 4, height=height, width=width, **DRAWING)
    ours = by_runtime(Pipeline.from_pretrained(tiny_bundles[family]), PROMPTS, 4, solver="euler", **DRAWING)
    assert theirs.std() > 0.02
    assert psnr(ours, theirs) >= 60


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_optimum_draws_with_our_solvers_as_schedulers(family, tiny_bundles, tmp_path):
    from optimum.onnxruntime import ORTStableDiffusion3Pipeline, ORTStableDiffusionPipeline

    import epd
    from epd.diffusers import EPDScheduler, SolverScheduler

    kind = {"sd3": ORTStableDiffusion3Pipeline, "sd15": ORTStableDiffusionPipeline}[family]
    times = {"sd3": epd.schedule.flow, "sd15": epd.schedule.discrete}[family](4)
    table = epd.start_table(times, 2)
    pipeline, runtime = kind.from_pretrained(tiny_bundles[family]), Pipeline.from_pretrained(tiny_bundles[family])
    height, width = SIZES[family]
    for scheduler, asked in (
        (SolverScheduler.from_config(pipeline.scheduler.config, solver="heun"), {"solver": "heun"}),
        (EPDScheduler.from_config(pipeline.scheduler.config, table=table), {"table": table}),
    ):
        pipeline.scheduler = scheduler
        pipeline.set_progress_bar_config(disable=True)
        theirs = by_diffusers(pipeline, PROMPTS, 4, height=height, width=width, **DRAWING)
        assert theirs.std() > 0.02
        assert psnr(by_runtime(runtime, PROMPTS, 4, **asked, **DRAWING), theirs) >= 60
    pipeline.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(by_diffusers(again, PROMPTS, 4, height=height, width=width, **DRAWING), theirs)


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_a_folder_of_optimums_runs_here(family, tiny_checkpoints, tmp_path, caplog):
    folder = tmp_path / "optimum"
    command = [
        sys.executable,
        "-m",
        "optimum.commands.optimum_cli",
        "export",
        "onnx",
        "--model",
        str(tiny_checkpoints[family]),
        "--task",
        "text-to-image",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    height, width = SIZES[family]
    pipeline = Pipeline.from_pretrained(folder)
    size = {"height": height, "width": width}
    ours = by_runtime(pipeline, PROMPTS, 4, solver="euler", **DRAWING, **size)
    reference = diffusers_pipeline(tiny_checkpoints[family], family)
    theirs = by_diffusers(reference, PROMPTS, 4, **DRAWING, **size)
    assert psnr(ours, theirs) >= 60
    result = pipeline("a red ring", seed=1, solver="epd", k=2, num_inference_steps=2, **size)
    assert np.asarray(result.images[0]).std() > 0
    assert result.report.directions == {"sd3": "batch", "sd15": "calls"}[family]
    assert ("calls in turn" in caplog.text) == (family == "sd15")
