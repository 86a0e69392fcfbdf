"""Fixtures that are made once: small random checkpoints of both families and the bundles exported from them."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.tmpdir import TempPathFactory

ROOT = Path(__file__).parent.parent
SIZES = {"sd3": (80, 112), "sd15": (72, 104)}  # height, width: nothing may be fitted to the shapes models


def pytest_configure() -> None:
    """Tests of Ctrl-C hold in a run, too, that a script has put in the background, which begins with it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: TempPathFactory) -> dict[str, Path]:
    """Family -> a small random diffusers folder."""
    from tests.pipelines import tiny_sd3, tiny_sd15

    root = tmp_path_factory.mktemp("checkpoints")
    return {"sd3": tiny_sd3(root / "sd3"), "sd15": tiny_sd15(root / "sd15")}


@pytest.fixture(scope="session")
def tiny_bundles(tiny_checkpoints: dict[str, Path], tmp_path_factory: TempPathFactory) -> dict[str, Path]:
    """Family -> the bundle of its small checkpoint, fp32, parity tried for three directions."""
    root = tmp_path_factory.mktemp("bundles")
    with ThreadPoolExecutor(len(SIZES)) as pool:  # most of an export is one core importing torch
        made = {
            family: pool.submit(_export, tiny_checkpoints[family], family, root / family, "fp32") for family in SIZES
        }
    return {family: one.result() for family, one in made.items()}


@pytest.fixture(scope="session")
def tiny_fp16_bundle(tiny_checkpoints: dict[str, Path], tmp_path_factory: TempPathFactory) -> Path:
    """The fp16 bundle of the small SD3 checkpoint."""
    return _export(tiny_checkpoints["sd3"], "sd3", tmp_path_factory.mktemp("fp16"), "fp16")


def _export(checkpoint: Path, family: str, folder: Path, dtype: str) -> Path:
    """The bundle of a checkpoint, in a folder that holds nothing else: the export leaves nothing beside it."""
    height, width = map(str, SIZES[family])
    target = folder / "bundle"
    options = ["-o", str(target), "--height", height, "--width", width, "--dtype", dtype, "-k", "3"]
    command = [sys.executable, "-m", "export", str(checkpoint), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["bundle"]
    return target
