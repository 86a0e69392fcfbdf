"""The checkpoint as diffusers has it: the backbone alone, or all of it; read from a folder, or drawn at random.

For scripts of environments that have torch and diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PIPELINES = {"sd3": StableDiffusion3Pipeline, "sd15": StableDiffusionPipeline}
_EULER = {"sd3": FlowMatchEulerDiscreteScheduler, "sd15": DDIMScheduler}  # DDIM: Euler's method in its own variables
_PARTS: dict[str, dict[str, type[Any]]] = {
    "sd3": {
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
    },
    "sd15": {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel},
}
_NONE = {"sd3": ("text_encoder_3", "tokenizer_3"), "sd15": ("safety_checker", "feature_extractor")}


def backbone(job: dict[str, Any]) -> torch.nn.Module:
    """The network that is called at every step, in the job's precision."""
    kind, dtype = _PARTS[job["family"]][job["component"]], DTYPES[job["dtype"]]
    folder = Path(job["folder"], job["component"])
    if job["drawn"]:
        return drawn(kind, folder, DTYPES[job["drawn"]]).to(dtype)
    model: torch.nn.Module = kind.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
    )
    return model.eval()


def pipeline(job: dict[str, Any], dtype: torch.dtype) -> Any:
    """All of it, with the bundle's tokenizers, which transformers of any age can read.

    A third text encoder of SD3 only where the bundle has it; no safety checker.
    """
    family, folder = job["family"], Path(job["folder"])
    given = {} if family == "sd3" and job["t5"] else dict.fromkeys(_NONE[family])
    names = [name for name in ("tokenizer", "tokenizer_2") if Path(job["tokenizers"], name).is_dir()]
    given |= {name: CLIPTokenizer.from_pretrained(Path(job["tokenizers"], name)) for name in names}
    if not job["drawn"]:
        return PIPELINES[family].from_pretrained(folder, torch_dtype=dtype, local_files_only=True, **given)
    at = DTYPES[job["drawn"]]
    parts = {name: drawn(kind, _place(folder, name), at).to(dtype) for name, kind in _PARTS[family].items()}
    told = {} if family == "sd3" else {"requires_safety_checker": False}
    euler = _EULER[family].from_pretrained(folder, subfolder="scheduler")
    return PIPELINES[family](**parts, **given, **told, scheduler=euler)


def _place(folder: Path, part: str) -> Path:
    """Where a part's configuration is: a bundle has one for each half of its VAE, which say the same."""
    return folder / ("vae_decoder" if part == "vae" and not (folder / "vae").exists() else part)


def drawn(kind: type[Any], folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The architecture with the random weights that `python -m export --random-weights` gives it."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if issubclass(kind, PreTrainedModel):
            model = kind(kind.config_class.from_pretrained(folder)).to(dtype)
        else:
            model = kind.from_config(kind.load_config(folder)).to(dtype)
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            bound = (3 / parameter[0].numel()) ** 0.5
            parameter.data.uniform_(-bound, bound, generator=generator)
    made: torch.nn.Module = model.eval().requires_grad_(False)
    return made


class Drawing:
    """Pictures by a diffusers pipeline, or one of Optimum's, with Euler's method; counts what its backbone is asked."""

    def __init__(self, pipe: Any, job: dict[str, Any]) -> None:
        self.rows = 0  # of the last picture
        self._pipe, self._asked, self._sd3 = pipe, job["picture"], job["family"] == "sd3"
        pipe.scheduler = _EULER[job["family"]].from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        network = getattr(pipe, job["component"])
        forward = network.forward

        def counted(*tensors: Any, **named: Any) -> Any:
            self.rows += len(tensors[0] if tensors else named["hidden_states" if self._sd3 else "sample"])
            return forward(*tensors, **named)

        network.forward = counted

    def __call__(self, steps: int) -> Any:
        """One picture, (1, H, W, 3) in [0, 1]."""
        self.rows, asked = 0, self._asked
        more = {"max_sequence_length": asked["t5_tokens"]} if self._sd3 else {}
        same = {name: asked[name] for name in ("prompt", "negative_prompt", "guidance_scale", "height", "width")}
        noise = torch.Generator("cpu").manual_seed(asked["seed"])
        return self._pipe(num_inference_steps=steps, generator=noise, output_type="np", **same, **more).images
