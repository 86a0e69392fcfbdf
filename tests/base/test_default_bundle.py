"""The shipped bundle draws what a caption says, with the base and `cpu` dependencies alone: run without torch too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.pipeline import Pipeline
from shapes.captions import parse
from shapes.check import accepts

CAPTIONS = [
    "a large red circle at the top left on a navy background",
    "a pink ring to the left of a green square on a white background",
    "a small cyan cross in the centre on a grey background",
]


def runtime(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "runtime", *arguments], capture_output=True, text=True, check=False)


def test_generate_draws_the_caption_and_tells_what_it_cost(tmp_path):
    done = runtime("generate", CAPTIONS[0], "-s", "1", "-o", str(tmp_path / "out.png"), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert accepts(Image.open(tmp_path / "out.png"), parse(CAPTIONS[0]))
    assert (report["solver"], report["sequential_calls"], report["total_evaluations"]) == ("epd", 10, 10)  # its table
    assert report["guided_forwards"] == 2 * report["total_evaluations"]
    assert report["provider"]["ran"] == "CPUExecutionProvider"


def test_pictures_are_right_and_nothing_heavy_is_imported():
    pipeline = Pipeline.from_pretrained("shapes-sd3")
    right = [accepts(pipeline(caption, seed=2).images[0], parse(caption)) for caption in CAPTIONS]
    assert sum(right) >= 2, right
    code = "import sys, runtime.pipeline, runtime.__main__; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "diffusers", "onnx", "export"} & set(done.stdout.split())


def test_a_picture_draws_itself_again_from_its_metadata(tmp_path):
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert (
        runtime("generate", CAPTIONS[2], "-s", "9", "--steps", "6", "--solver", "heun", "-o", str(first)).returncode
        == 0
    )
    done = runtime("generate", "--from-metadata", str(first), "-o", str(again))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["generate", "x", "--model", "nowhere"], "no such folder"),
        (["generate", "x", "-H", "65"], "multiple"),
        (["generate", "x", "-H", "128", "-W", "128"], "python -m export"),
        (["generate", "x", "--provider", "cuda"], "pip install"),
        (["generate", "x", "--table", "none.json"], "none.json"),
        (["generate", "x", "-o", f"{__file__}/x.png"], "x.png"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments, remedy):
    done = runtime(*arguments)
    assert done.returncode == 2
    assert remedy in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
