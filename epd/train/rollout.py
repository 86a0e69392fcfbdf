"""Rollouts: tables draw the same prompt from the same noise, and rewards say what the pictures are worth.

One rollout is one prompt, one seed and G tables, which run side by side as one batch of the network (`epd.together`):
its numbers depend on these alone, not on what else is run, where, or in which order. Forward passes only: on ONNX
Runtime (any provider and precision that bundles run on) or on torch.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

import epd
from epd.solve import Slope, Solver
from runtime.errors import NotFiniteError
from runtime.facts import Facts
from runtime.judge import curve
from runtime.noise import randn
from runtime.tables import check_table, differences

from . import rewards
from .cluster import same_everywhere

log = logging.getLogger(__name__)
PROMPTS = 16  # whose encodings are kept
REFERENCES = 256  # converged latents kept: those of the validation prompts come again and again


class Rollout(NamedTuple):
    """What is to be drawn."""

    prompt: str
    seed: int
    tables: tuple[epd.Table, ...]  # G


class Network(Protocol):
    """A text-to-image model at one guidance scale."""

    @property
    def facts(self) -> Facts: ...
    @property
    def guidance(self) -> float: ...
    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        ...

    def slope(self, prompt: str) -> Slope: ...
    def decode(self, latents: NDArray[np.float64]) -> NDArray[np.float32]:
        """(G, C, h, w) to (G, H, W, 3) in [0, 1]."""
        ...

    def identity(self) -> str:
        """Of the weights."""
        ...


class Onnx:
    """A bundle on ONNX Runtime."""

    def __init__(self, pipe: Any, guidance: float | None) -> None:
        self._pipe, self.facts = pipe, pipe.bundle.facts
        plan = pipe.plan("", solver="euler", guidance_scale=guidance)
        self.guidance, self.size = plan.guidance, (plan.height, plan.width)
        self.slope = functools.lru_cache(PROMPTS)(self._slope)  # a prompt's pictures follow one another

    def _slope(self, prompt: str) -> Slope:
        return self._pipe.slopes([prompt], self.guidance)  # type: ignore[no-any-return]

    def decode(self, latents: NDArray[np.float64]) -> NDArray[np.float32]:
        return self._pipe.decode(latents)  # type: ignore[no-any-return]

    def identity(self) -> str:
        return f"{self._pipe.identity()} on {self._pipe.provider}"


class Torch:
    """A diffusers checkpoint in torch, fp32."""

    def __init__(self, model: Any, guidance: float | None) -> None:
        self._model, self.facts, self.size = model, model.facts, model.size
        self.guidance = model.facts.defaults.guidance if guidance is None else guidance

    def slope(self, prompt: str) -> Slope:
        import torch

        told, device = self._model.slopes([prompt], [self.guidance]), self._model.device

        def slope(points: epd.Points) -> NDArray[np.float64]:
            with torch.inference_mode():
                answer = told(epd.Points(*(torch.as_tensor(a, device=device) for a in points)))
            found: NDArray[np.float64] = answer.cpu().numpy()
            return found

        return slope

    def decode(self, latents: NDArray[np.float64]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            pictures = self._model.pictures(torch.as_tensor(latents, device=self._model.device), 0.0)
        return pictures.permute(0, 2, 3, 1).cpu().numpy()  # type: ignore[no-any-return]

    def identity(self) -> str:
        return f"{self._model.fingerprint} in torch"


@dataclass(frozen=True)
class Recipe:
    """All that rollouts need to start, in this process or in another; text and numbers only."""

    model: str  # a bundle's folder, or the name of a shipped one; torch: a checkpoint's folder, or the name of one
    reward: str  # a mix, see `rewards`
    reward_models: tuple[tuple[str, str], ...] = ()  # reward, path of its weights
    backend: str = "onnx"  # onnx | torch
    provider: str = "cpu"
    provider_options: tuple[tuple[str, str], ...] = ()
    guidance: float | None = None  # None: the model's own
    reference_calls: int = 60  # of a converged picture
    abreast: int = 0  # tables in one batch of the network at most; 0: all of a rollout
    threads: int = 0  # of a rollout; 0: the library's own choice
    network: str = ""  # what it has to be, see `Network.identity`; empty: any

    def open(self) -> Stage:
        """Loads the model and the rewards.

        Raises
        ------
        BundleError, ProviderError, RequestError
        """
        parts = rewards.load(self.reward, {name: Path(path) for name, path in self.reward_models})
        network = self._torch() if self.backend == "torch" else self._onnx()
        same_everywhere(self.model, network.identity(), self.network or network.identity())
        return Stage(network, parts, self.reference_calls, self.abreast)

    def identity(self) -> dict[str, Any]:
        """What the numbers of a rollout depend on, beside the model's weights."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("model", "abreast", "threads", "network")
        }

    def _onnx(self) -> Network:
        from runtime.pipeline import Pipeline

        pipe = Pipeline.from_pretrained(
            self.model, provider=self.provider, provider_options=dict(self.provider_options), threads=self.threads
        )
        return Onnx(pipe, self.guidance)

    def _torch(self) -> Network:
        import torch

        from . import model

        model.check_device("--provider", self.provider)
        if self.threads:
            torch.set_num_threads(self.threads)
        return Torch(model.load(self.model, self.provider), self.guidance)


class Stage:
    """A network and rewards: carries out rollouts."""

    def __init__(self, network: Network, parts: rewards.Rewards, reference_calls: int = 60, abreast: int = 0) -> None:
        facts = network.facts
        self.network, self.rewards = network, parts
        self._flow, self._abreast = facts.family == "sd3", abreast
        self._shape = (facts.latent.channels, *(side // facts.latent.factor for side in network.size))
        self._fine = curve(facts, reference_calls, 2.0 if self._flow else 1.0)
        self._reference = functools.lru_cache(REFERENCES)(self._converged)

    def check(self, table: epd.Table) -> None:
        """RequestError where a table cannot draw with this model; a warning where it was made for something else."""
        network = self.network
        check_table(network.facts, table, "the table", None)
        if other := differences(network.facts, table, network.guidance, None, network.size):
            log.warning("the table was made for %s", ", ".join(other))

    def __call__(self, rollout: Rollout) -> NDArray[np.float64]:
        """Every reward of every table: (G, parts)."""

        def reference() -> NDArray[np.float32]:
            picture: NDArray[np.float32] = self.network.decode(self._reference(rollout.prompt, rollout.seed))[0]
            return picture

        return self.rewards(rewards.Shot(rollout.prompt, self.pictures(rollout), reference))

    def pictures(self, rollout: Rollout) -> NDArray[np.float32]:
        """Of every table: (G, H, W, 3) in [0, 1].

        Raises
        ------
        NotFiniteError
            NaN or infinity on the way.
        """
        slope, tables = self.network.slope(rollout.prompt), rollout.tables
        size = self._abreast or len(tables)
        found = [self._latents(slope, rollout, tables[i : i + size]) for i in range(0, len(tables), size)]
        return self.network.decode(np.concatenate(found))

    def _latents(self, slope: Slope, rollout: Rollout, tables: tuple[epd.Table, ...]) -> NDArray[np.float64]:
        def solver(x: Any) -> Any:
            return epd.together(*(epd.solvers.epd(table)(x) for table in tables))

        ends = self._ends(slope, solver, tables[0].times, rollout.prompt, rollout.seed)
        return np.concatenate(list(ends))

    def _converged(self, prompt: str, seed: int) -> NDArray[np.float64]:
        solver = epd.solvers.dpmpp_2m(self._fine, self._flow)
        return self._ends(self.network.slope(prompt), solver, self._fine, prompt, seed)

    def _ends(self, slope: Slope, solver: Solver, times: Any, prompt: str, seed: int) -> NDArray[np.float64]:
        """Latents (1, C, h, w), or (G, 1, C, h, w) of G solvers together."""
        noise = randn(self._shape, seed).astype(np.float64)[None]
        try:
            *_, last = epd.solve(solver, (1.0 if self._flow else float(times[0])) * noise, slope)
        except FloatingPointError as error:
            raise NotFiniteError(f"{error}, drawing {prompt!r:.100} with seed {seed}") from None
        return np.asarray(last.x) / (1.0 if self._flow else math.hypot(1, float(times[-1])))
