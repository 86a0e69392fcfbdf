from pathlib import Path

import pytest
import tiny_bundle


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One bundle a family, and Optimum's way of writing them; not to be changed by a test."""
    root = tmp_path_factory.mktemp("bundles")
    return {
        "sd3": tiny_bundle.bundle(root / "sd3", "sd3"),
        "sd15": tiny_bundle.bundle(root / "sd15", "sd15"),
        "optimum": tiny_bundle.bundle(root / "optimum", "sd15", bare=True, scalar_timestep=True),
    }


@pytest.fixture(params=["sd3", "sd15"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param
