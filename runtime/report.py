"""What a drawing did and what it cost: the report of a pipeline, and the clock that its seconds are from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .directions import Directions
from .plan import Plan

if TYPE_CHECKING:
    from .pipeline import Pipeline


@dataclass(frozen=True)
class Report:
    """What a drawing did and cost; `generate --json` prints it, with the paths of the pictures in front."""

    seeds: tuple[int, ...]
    prompt: str
    solver: str
    steps: int
    sequential_calls: int  # requests answered, one after the other
    total_evaluations: int  # points answered, per image
    guided_forwards: int  # rows the backbone really evaluated, all images
    guidance_interval: tuple[float, float] | None  # sigma; None: guided everywhere, or nowhere
    provider: Mapping[str, Any]  # asked, ran, retries; nodes, macs_share, fallbacks: see `assignment.summary`
    directions: Directions
    seconds: Mapping[str, float]  # load, compile (0: cached), encode, [measure,] denoise, decode, total, per_call
    predicted_rss_bytes: int | None  # see `runtime.footprint`; None: another provider, or the bundle does not say
    peak_rss_bytes: int | None  # of this process so far; None where the system does not tell
    bundle: Mapping[str, str | None]  # name, sha256 of bundle.json


@dataclass(frozen=True)
class Result:
    """`images`: PIL pictures, or (B, H, W, 3) float32 in [0, 1], or latents (B, C, h, w) float32."""

    images: Any
    plan: Plan
    report: Report


class Clock:
    """Seconds of each stage, the loading and compiling of sessions, and previews, apart; and calls made again."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._stages: dict[str, float] = {}
        self._started = self._lap = time.perf_counter()
        self._ready = self._before = self._starting()
        self._retried = self._retries()

    def _starting(self) -> NDArray[np.float64]:
        """(3,) seconds of loading and of compiling, of all sessions so far, and of previews."""
        sessions = self._pipeline.sessions.values()
        spent = [(session.load_seconds, session.compile_seconds, 0) for session in sessions]
        total: NDArray[np.float64] = np.asarray([*spent, (0, 0, self._pipeline.preview_seconds)], np.float64).sum(0)
        return total

    def _retries(self) -> int:
        return sum(session.retries for session in self._pipeline.sessions.values())

    def retries(self) -> int:
        return self._retries() - self._retried

    def lap(self, stage: str) -> None:
        now, ready = time.perf_counter(), self._starting()
        self._stages[stage] = now - self._lap - float((ready - self._ready).sum())
        self._lap, self._ready = now, ready

    def seconds(self, calls: int) -> dict[str, float]:
        load, compiling, previews = (self._ready - self._before).tolist()
        spent = {"load": load, "compile": compiling, **self._stages} | ({"preview": previews} if previews else {})
        return spent | {"total": self._lap - self._started, "per_call": self._stages["denoise"] / calls}
