"""What `benchmarks compare` has everyone do: one call of the backbone on given inputs, or a picture of given cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

import epd
from epd.solvers import METHODS
from runtime import memory
from runtime.bundle import Bundle
from runtime.errors import RequestError
from runtime.plan import make_plan

TIMES = (901.25, 31.5)  # network times of the first and last point of a call


@dataclass(frozen=True)
class Work:
    """What every contender does; arrays are in files."""

    kind: Literal["backbone", "picture"]
    bundle: Bundle
    dtype: str  # of peers that can choose: fp32 | bf16
    rows: int  # of the backbone's call; in a picture of one point: 2 if guided
    runs: int  # timed, in each round
    threads: int
    macs: int  # multiply-accumulates of it all
    # By the user. Otherwise ONNX Runtime chooses: as many, one per core, but bound to their cores, as it does only then
    # (shapes-sd3 on two cores: 11 ms a call so, 16 ms with the same number given).
    threads_given: bool = True
    feeds: Path | None = None  # .npz of the backbone's inputs
    picture: Mapping[str, Any] = field(default_factory=dict)  # see `picture_work`
    forwards: int | None = None  # rows that the backbone sees in a picture

    @property
    def job(self) -> dict[str, Any]:
        """What all contenders are told."""
        facts = self.bundle.facts
        return {
            "work": self.kind,
            "family": facts.family,
            "component": self.bundle.backbone,
            "t5": "text_encoder_3" in facts.components,
            "tokenizers": str(self.bundle.folder.absolute()),
            "dtype": self.dtype,
            "runs": self.runs,
            "threads": self.threads,
            "threads_given": self.threads_given,
            "feeds": None if self.feeds is None else str(self.feeds),
            "picture": dict(self.picture),
            "memory": memory.__file__,
        }

    @property
    def told(self) -> str:
        """In words."""
        if self.kind == "backbone":
            return f"one call of its {self.bundle.backbone}, {self.rows} rows"
        asked = self.picture
        size = f"{asked['width']}x{asked['height']}, guidance {asked['guidance_scale']:g}"
        solver = f"{asked['intervals']} steps of {asked['solver']}, K = {asked['directions']}"
        counts = f"{asked['sequential_calls']} sequential calls, {asked['steps']} total evaluations"
        return f"a picture of {size}: {solver}: {counts}, {self.forwards} guided forwards"


def backbone_work(bundle: Bundle, rows: int, place: Path, **shared: Any) -> Work:
    """One call of the backbone with so many rows, ordered (guidance half, point); odd numbers of rows are not guided.

    `shared`: dtype, runs, threads and threads_given of `Work`.

    Raises
    ------
    RequestError
        Rows that the bundle has no graph of, or a bundle that does not tell sizes or multiply-accumulates.
    """
    part = bundle.facts.components[bundle.backbone]
    if part.rows and rows not in part.rows:
        have = " or ".join(map(str, part.rows))
        raise RequestError(f"{bundle.facts.name} has no graph of {rows} rows; give --rows {have}")
    random, halves, feeds = np.random.default_rng(0), 2 - rows % 2, {}
    for tensor in part.inputs:
        sides = [side for side in tensor.shape[1:] if isinstance(side, int)]
        if len(sides) != len(tensor.shape) - 1:
            raise RequestError(f"{bundle.facts.name}: its {tensor.name} has no fixed size; export it again")
        feeds[tensor.name] = random.standard_normal((rows, *sides)).astype(np.float32)
    feeds["timestep"] = np.tile(np.linspace(*TIMES, rows // halves, dtype=np.float32), halves)
    if "text_encoder_3" not in bundle.facts.components and bundle.facts.text.t5_tokens:
        feeds["encoder_hidden_states"][:, -bundle.facts.text.t5_tokens :] = 0  # as every pipeline gives them without T5
    file = place / "feeds.npz"
    with file.open("wb") as opened:
        np.savez(opened, **feeds)
    return Work("backbone", bundle, rows=rows, macs=rows * _macs(bundle, [bundle.backbone]), feeds=file, **shared)


def picture_work(bundle: Bundle, prompt: str, asked: Mapping[str, Any], **shared: Any) -> Work:
    """A picture that ours draws as `asked` (solver and steps, as of `make_plan`), and what costs others as much.

    Raises
    ------
    RequestError
        What does not fit the bundle; a solver whose number of calls depends on the picture.
    """
    plan = make_plan(bundle, prompt, **asked)
    if plan.table is None and METHODS[plan.solver].calls == 0:
        raise RequestError(f"how often {plan.solver} calls depends on the picture; give another solver")
    *_, last = epd.solve(plan.coroutine(np.zeros_like), np.zeros((1, 1)), lambda points: np.zeros_like(points.x))
    halves = 2 if plan.guided else 1
    picture = {
        "prompt": plan.prompt,
        "negative_prompt": plan.negative_prompt,
        "guidance_scale": plan.guidance,
        "seed": plan.seeds[0],
        "height": plan.height,
        "width": plan.width,
        "t5_tokens": bundle.facts.text.t5_tokens,
        "solver": plan.solver,
        "intervals": plan.steps,
        "directions": plan.directions,
        "sequential_calls": last.calls,
        "steps": last.evaluations,  # of Euler's method, for as many guided forwards
        "ours": dict(asked),
    }
    encoders = [name for name in bundle.facts.components if name.startswith("text_encoder")]
    forwards = halves * last.evaluations
    macs = halves * _macs(bundle, encoders) + forwards * _macs(bundle, [bundle.backbone])
    macs += _macs(bundle, ["vae_decoder"])
    return Work("picture", bundle, rows=halves, macs=macs, picture=picture, forwards=forwards, **shared)


def _macs(bundle: Bundle, components: Iterable[str]) -> int:
    """Multiply-accumulates of one row of each."""
    return sum(sum(bundle.facts.components[name].macs.values()) for name in components)
