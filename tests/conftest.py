"""Fixtures that are made once: small random checkpoints of both families and the bundles exported from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.tmpdir import TempPathFactory

SIZES = {"sd3": (80, 112), "sd15": (72, 104)}  # height, width: nothing may be fitted to the shapes models


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: TempPathFactory) -> dict[str, Path]:
    """Family -> a small random diffusers folder."""
    from tests.pipelines import tiny_sd3, tiny_sd15

    root = tmp_path_factory.mktemp("checkpoints")
    return {"sd3": tiny_sd3(root / "sd3"), "sd15": tiny_sd15(root / "sd15")}


@pytest.fixture(scope="session")
def tiny_bundles(tiny_checkpoints: dict[str, Path], tmp_path_factory: TempPathFactory) -> dict[str, Path]:
    """Family -> the bundle of its small checkpoint, fp32."""
    from export.__main__ import main

    root = tmp_path_factory.mktemp("bundles")
    for family, (height, width) in SIZES.items():
        size = ["--height", str(height), "--width", str(width)]
        assert main([str(tiny_checkpoints[family]), "-o", str(root / family), *size]) == 0
    return {family: root / family for family in SIZES}
