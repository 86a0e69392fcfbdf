"""The bundle in the package is what the exporter makes of the checkpoint today, and it draws what captions say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.__main__ import main as export
from runtime.bundle import Bundle
from runtime.facts import Facts
from runtime.pipeline import BUILT_IN, DEFAULT, Pipeline
from shapes.captions import held_out_scenes
from shapes.check import accepts
from tests.compare import by_runtime, psnr

CAPTIONS = [scene.caption for scene in held_out_scenes(4, 21)]


def comparable(facts: Facts) -> Facts:
    """Without what another version of a tool may change: hashes, figures of parity and pictures, the names of nodes."""
    components = {
        name: replace(component, files=(), parity=None, macs={"all": sum(component.macs.values())})
        for name, component in facts.components.items()
    }
    return replace(facts, components=components, files=(), exported_by={}, tables=(), picture=None)


@pytest.mark.slow
def test_the_exporter_rebuilds_it(tmp_path: Path):
    assert export([DEFAULT, "--dtype", "fp16", "-o", str(tmp_path / DEFAULT)]) == 0
    shipped, rebuilt = Bundle.open(BUILT_IN / DEFAULT), Bundle.open(tmp_path / DEFAULT)
    assert comparable(shipped.facts) == comparable(rebuilt.facts)
    drawing = {"solver": "euler", "num_inference_steps": 8}
    ours, theirs = (
        by_runtime(Pipeline.from_pretrained(one.folder), CAPTIONS, 0, **drawing) for one in (shipped, rebuilt)
    )
    assert psnr(ours, theirs) >= 50


def test_its_files_are_those_it_was_written_with():
    Bundle.open(BUILT_IN / DEFAULT).verify()


@pytest.mark.slow
def test_it_draws_held_out_captions():
    pipeline, scenes = Pipeline.from_pretrained(DEFAULT), held_out_scenes(40, 22)
    right = [accepts(pipeline(scene.caption, seed=i).images[0], scene) for i, scene in enumerate(scenes)]
    assert np.mean(right) >= 0.9
