import sys
from pathlib import Path

import pytest

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
