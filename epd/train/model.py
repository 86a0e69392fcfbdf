"""A diffusers checkpoint as the solver sees it: guided slopes on tensors, gradients passing through the network.

The same contract as `runtime.slopes`, from the checkpoint's own weights in fp32. SD3 is told prompts without T5.
Knows nothing of solvers or tables.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import shapes
from runtime.bundle import describe, sha256
from runtime.errors import BundleError, RequestError
from runtime.facts import BACKBONE, Defaults, Facts, Source
from runtime.parse import load_json
from runtime.slopes import variance_preserving

from ..solve import Points

_OURS = Path(shapes.__file__).parent / "checkpoints"


def check_device(option: str, name: str) -> None:
    """RequestError where torch has no such device here."""
    try:
        torch.zeros(1, dtype=torch.float64, device=name)
    except (RuntimeError, AssertionError):  # torch's own ways to say so
        raise RequestError(f"{option} {name}: torch has none here; give cpu") from None


class Model:
    """A text-to-image model, its weights frozen.

    Attributes
    ----------
    facts : Facts
        What its configurations say: family, schedule, latent space, default size and guidance.
    folder : Path
    device : str
    recompute : bool
        Give up activations on the way forward, make them again on the way back: less memory, half as much work again.
    """

    def __init__(self, folder: Path, facts: Facts, pipeline: Any, device: str = "cpu", recompute: bool = False) -> None:
        self.folder, self.facts, self.device, self.recompute = folder, facts, device, recompute
        self._pipeline = pipeline
        self._network = getattr(pipeline, BACKBONE[facts.family])
        for part in (self._network, pipeline.vae):
            part.to(self.device, torch.float32).eval().requires_grad_(False)
        if facts.family == "sd15":
            vp = variance_preserving(facts)
            rising = -np.log(vp.alphas_cumprod)  # log(1 + sigma^2) at network times 0, 1, ..
            self._rising = torch.from_numpy(rising).to(self.device)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one latent, (C, h, w)."""
        latent, size = self.facts.latent, self.size
        return latent.channels, size[0] // latent.factor, size[1] // latent.factor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, as it was trained."""
        height, width = self.facts.defaults.height, self.facts.defaults.width
        assert height is not None  # `load` sets both
        assert width is not None
        return height, width

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that pictures depend on: the files of every network, tokenizer and scheduler."""
        parts = (BACKBONE[self.facts.family], "scheduler", "text_encoder*", "tokenizer*", "vae")
        files = sorted(file for part in parts for file in self.folder.glob(f"{part}/*") if file.is_file())
        return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()

    def slopes(self, prompts: Sequence[str], guidance: Sequence[float]) -> Slopes:
        """The network told of B images, a prompt and a guidance scale each; text encoders run here, once."""
        told = self._encode(["", *prompts])
        scales = torch.tensor(guidance, dtype=torch.float64, device=self.device)
        return Slopes(self, {name: value[:1] for name, value in told.items()}, _rest(told), scales)

    def pictures(self, x: Tensor, sigma: float) -> Tensor:
        """States (B, C, h, w) at `sigma` decoded: (B, 3, H, W) float32 in [0, 1], gradients passing."""
        latent = self.facts.latent
        x = x if self.facts.family == "sd3" else x / math.hypot(1, sigma)
        decode = self._pipeline.vae.decode
        decoded = self._kept(lambda z: decode(z).sample, (x / latent.scaling + latent.shift).float())
        return (decoded / 2 + 0.5).clamp(0, 1)

    def answer(self, x: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        """Slopes (rows, C, h, w) at states of one time each, (rows,); `told` has an entry per row."""
        if self.facts.family == "sd3":
            time = self.facts.schedule.get("num_train_timesteps", 1000) * t
        else:
            x, time = x / _expand((1 + t * t) ** 0.5, x), self._vp_time(t)
        network = partial(self._network, return_dict=False)
        return self._kept(lambda x, time: network(x, timestep=time, **told)[0], x.float(), time.float()).to(t.dtype)

    def _kept(self, call: Any, *inputs: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(call, *inputs, use_reentrant=False)
        return call(*inputs)

    def _vp_time(self, t: Tensor) -> Tensor:
        """`epd.schedule.VP.time` on tensors."""
        at = torch.log1p(t * t)
        i = (torch.searchsorted(self._rising, at.detach()) - 1).clamp(0, len(self._rising) - 2)
        time = i + (at - self._rising[i]) / (self._rising[i + 1] - self._rising[i])
        return time.clamp(0, len(self._rising) - 1)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        pipeline, text = self._pipeline, self.facts.text
        if self.facts.family == "sd15":
            states, _ = pipeline.encode_prompt(list(prompts), "cpu", 1, do_classifier_free_guidance=False)
            told = {"encoder_hidden_states": states}
        else:
            states, _, pooled, _ = pipeline.encode_prompt(
                list(prompts),
                None,
                None,
                device="cpu",
                do_classifier_free_guidance=False,
                max_sequence_length=text.t5_tokens,
            )
            told = {"encoder_hidden_states": states, "pooled_projections": pooled}
        return {name: value.to(self.device, torch.float32) for name, value in told.items()}


@dataclass(frozen=True)
class Slopes:
    """Answers `epd.Points` on tensors with slopes (P, B, C, h, w), as `runtime.slopes.Slopes` does on arrays."""

    model: Model
    negative: Mapping[str, Tensor]  # (1, ...) each
    positive: Mapping[str, Tensor]  # (B, ...) each
    guidance: Tensor  # (B,); at 1 and below the prompt's own slope

    def part(self, images: Sequence[int]) -> Slopes:
        """The same network told of some of the images only."""
        at = torch.as_tensor(list(images), device=self.model.device)
        told = {name: value[at] for name, value in self.positive.items()}
        return replace(self, positive=told, guidance=self.guidance[at])

    def __call__(self, points: Points) -> Tensor:
        x, t = points.x, points.t  # (P, B, C, h, w), (P,) or (P, B)
        count, batch = x.shape[:2]
        guided = bool((self.guidance > 1).any())
        t = (t[:, None] if t.ndim == 1 else t).expand(count, batch).reshape(-1)
        x = x.reshape(-1, *x.shape[2:])
        halves = [_rows(self.negative, 1, count * batch)] if guided else []
        halves.append(_rows(self.positive, count, 1))
        told = {name: torch.cat([half[name] for half in halves]) for name in self.positive}
        answer = self.model.answer(x.repeat(len(halves), 1, 1, 1), t.repeat(len(halves)), told)
        if guided:
            negative, positive = answer.chunk(2)
            scale = self.guidance.clamp(min=1).repeat(count)
            answer = negative + _expand(scale, x) * (positive - negative)
        return answer.reshape(count, batch, *x.shape[1:])


def load(model: str, device: str = "cpu", recompute: bool = False) -> Model:
    """A diffusers folder, or one of ours by name (shapes-sd3, shapes-sd15).

    Raises
    ------
    BundleError
        No such checkpoint, or one that is damaged or of another family.
    """
    folder = _OURS / model if (_OURS / model).is_dir() and not Path(model).is_dir() else Path(model)
    if not folder.is_dir():
        known = ", ".join(sorted(path.name for path in _OURS.iterdir()))
        raise BundleError(f"{model}: no such folder; give a diffusers checkpoint's, or one of {known}")
    if (folder / "bundle.json").is_file():
        raise BundleError(f"{model}: a bundle, which has no gradients; give the checkpoint that it was exported from")
    settings = load_json(folder / "shapes.json") if (folder / "shapes.json").is_file() else {}
    facts = describe(folder, folder.resolve().name, Source(model), t5_tokens=settings.get("t5_tokens", 256))
    try:
        pipeline = _open(folder, facts)
    except (OSError, ValueError, RuntimeError) as error:
        raise BundleError(f"{folder}: cannot be loaded ({' '.join(str(error).split()):.200}); copy it again") from None
    side = getattr(pipeline, BACKBONE[facts.family]).config.sample_size
    height, width = (n * facts.latent.factor for n in (side if isinstance(side, list | tuple) else (side, side)))
    guidance = float(settings.get("guidance", facts.defaults.guidance))
    defaults = Defaults(height, width, guidance, facts.defaults.steps)
    return Model(folder, replace(facts, defaults=defaults), pipeline, device, recompute)


def _open(folder: Path, facts: Facts) -> Any:
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    kind = diffusers.StableDiffusion3Pipeline if facts.family == "sd3" else diffusers.StableDiffusionPipeline
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if facts.family == "sd3":
        absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, **absent)
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).to(torch.float32).eval().requires_grad_(False)
    return pipeline


def _expand(a: Tensor, x: Tensor) -> Tensor:
    return a.reshape(-1, *(1,) * (x.ndim - 1))


def _rows(told: Mapping[str, Tensor], points: int, images: int) -> dict[str, Tensor]:
    """Entries repeated for rows ordered (point, image)."""
    return {
        name: value.repeat_interleave(images, 0).repeat(points, *(1,) * (value.ndim - 1))
        for name, value in told.items()
    }


def _rest(told: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[1:] for name, value in told.items()}
