"""CUDA on a real device: skipped where onnxruntime has it not. EPD_TEST_BUNDLE: another bundle than shapes-sd3.

Prints what keeping tensors on the device and capturing CUDA graphs are worth: run with `-s`.
"""

import dataclasses
import os
import statistics

import numpy as np
import pytest

from runtime import session as sessions
from runtime.ort import onnxruntime
from runtime.pipeline import DEFAULT, Pipeline
from runtime.providers import PROVIDERS

CUDA = PROVIDERS["cuda"]
BUNDLE = os.environ.get("EPD_TEST_BUNDLE", DEFAULT)
PROMPT = "a large red circle at the top left on a navy background"
EXACT = {"use_tf32": "0"}  # else products have 10 bits
CAPTURE = EXACT | {"enable_cuda_graph": "1"}

pytestmark = pytest.mark.skipif(
    CUDA.ort not in onnxruntime().get_available_providers(), reason="this onnxruntime has no CUDAExecutionProvider"
)


def draw(pipe, **asked):
    return pipe(PROMPT, seed=3, num_inference_steps=4, output_type="np", **{"solver": "epd", "k": 2} | asked)


def psnr(one, other):
    return 10 * np.log10(1 / max(((one.astype(np.float64) - other) ** 2).mean(), 1e-20))


@pytest.fixture(scope="module")
def expected():
    return draw(Pipeline.from_pretrained(BUNDLE)).images


@pytest.mark.parametrize("directions", ["batch", "calls", "async"])
def test_it_draws_the_picture_that_the_cpu_draws(expected, directions):
    pipe = Pipeline.from_pretrained(BUNDLE, provider="cuda", provider_options=EXACT, directions=directions)
    for _ in range(2):  # in new memory, and in the same again
        assert psnr(draw(pipe).images, expected) > 35
    assert pipe._session(pipe.bundle.backbone)._binding is not None


def test_a_cuda_graph_draws_the_same_picture_again_and_again(expected):
    pipe = Pipeline.from_pretrained(BUNDLE, provider="cuda", provider_options=CAPTURE)
    for pictures in (1, 2, 1, 1):  # other rows, and the first ones again
        images = draw(pipe, num_images_per_prompt=pictures).images
        assert psnr(images[:1], expected) > 35
    other = Pipeline.from_pretrained(BUNDLE, provider="cuda", provider_options=EXACT)
    prompt = "a small green square on a white background"
    asked = {"seed": 5, "num_inference_steps": 4, "output_type": "np", "solver": "epd", "k": 2}
    assert psnr(pipe(prompt, **asked).images, other(prompt, **asked).images) > 50  # another conditioning, same graph


def test_what_it_is_worth(monkeypatch, capsys):
    pipes = {}
    for name, device, options in (("run", "", EXACT), ("bound", "cuda", EXACT), ("captured", "cuda", CAPTURE)):
        row = dataclasses.replace(CUDA, device=device)
        monkeypatch.setattr(sessions, "provider_of", lambda _, row=row: row)
        pipes[name] = Pipeline.from_pretrained(BUNDLE, provider="cuda", provider_options=options)
        draw(pipes[name])
    seconds = {name: [] for name in pipes}
    for _ in range(10):
        for name, pipe in pipes.items():
            seconds[name].append(draw(pipe).report.seconds["per_call"])
    with capsys.disabled():
        for name, each in seconds.items():
            print(f"\n{name}: {1e3 * statistics.median(each):.3f} ms a call", end="")
    assert all(each > 0 for taken in seconds.values() for each in taken)
