import sys
from pathlib import Path

import pytest

from benchmarks.bench import Bench
from runtime import profiles
from runtime.pipeline import Pipeline

sys.path.append(str(Path(__file__).parents[1] / "runtime"))
import tiny_bundle


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """One bundle a family, and Optimum's way of writing them; not to be changed by a test."""
    root = tmp_path_factory.mktemp("benchmarks")
    made = {family: tiny_bundle.bundle(root / family, family) for family in ("sd3", "sd15")}
    return made | {"optimum": tiny_bundle.bundle(root / "optimum", "sd15", bare=True, scalar_timestep=True)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("runtime.profiles.Others.share", lambda self: None)  # as on a machine that does nothing else
    return tmp_path / "cache"


@pytest.fixture(params=["sd3", "sd15"])
def bench(request, bundles):
    return Bench(Pipeline.from_pretrained(bundles[request.param]), ["red", "blue cat", ""], 4.0, 2)


@pytest.fixture
def calm(monkeypatch):
    monkeypatch.setattr(profiles, "BUSY", 1e9)  # calls of so small a graph are never alike


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("red\n\nblue cat\nsquare\nnever used\n", encoding="utf-8")
    return str(file)
