"""Networks that judge pictures, their weights from files: LPIPS, Inception features, rewards. Needs torch.

    LPIPS        torchmetrics (extra `quality`); file: torchvision's alexnet or vgg16, alexnet-owt-7be5be79.pth say;
                 its linear layers come with torchmetrics
    Inception    torch-fidelity (extra `quality`); the file: its own weights-inception-2015-12-05-6726825d.pth
    rewards      epd.train.rewards (extra `train`), by name

Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Pictures = NDArray[np.float32]  # (B, H, W, 3) in [0, 1]

_BATCH = 16
_NETS = {11: ("alex", "alexnet"), 3: ("vgg", "vgg16")}  # by the side of the first kernel


def lpips(file: Path) -> Callable[[Pictures, Pictures], Array]:
    """(B,) distances of pictures to others: Zhang et al. 2018, arXiv 1801.03924, version 0.1."""
    torch = _torch()
    try:
        from torchmetrics.functional.image.lpips import _LPIPS  # its public classes download the backbone
    except (ImportError, RuntimeError):  # torchvision's, where it was built for another torch
        raise _missing("LPIPS", "torchmetrics, and torchvision of the same build as torch") from None
    state = _state(file)
    first = state.get("features.0.weight")
    if first is None or first.ndim != 4 or first.shape[-1] not in _NETS:
        raise _refused(file, "not torchvision's weights of alexnet or vgg16")
    net, name = _NETS[first.shape[-1]]
    model = _LPIPS(net=net, pnet_rand=True)
    # Its slices keep the numbers of the layers: slice2.3.weight is features.3.weight
    wanted = {key: f"features.{key.partition('.')[2]}" for key in model.net.state_dict()}
    _fill(model.net, {key: state.get(source) for key, source in wanted.items()}, file, name)

    def judge(one: Any, other: Any) -> Any:
        return model(one, other, normalize=True).flatten()

    return lambda one, other: _batched(torch, judge, one, other)


def inception(file: Path) -> Callable[[Pictures], Array]:
    """(B, 2048) features, of the network that Frechet Inception distances are defined by."""
    torch = _torch()
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError):
        raise _missing("Inception", "torch-fidelity, and torchvision of the same build as torch") from None
    if not file.is_file():
        raise _refused(file, "no such file")
    try:
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise _refused(file, f"not torch-fidelity's Inception weights ({str(error).splitlines()[0]:.80})") from None

    def judge(one: Any) -> Any:
        return model((one * 255).round().to(torch.uint8))[0]

    return lambda pictures: _batched(torch, judge, pictures)


def reward(
    name: str, weights: Path | None, prompts: Sequence[str], size: tuple[int, int]
) -> Callable[[Pictures, slice], Array]:
    """One of `epd.train.rewards`: (B,) of pictures (B, H, W, 3) and which of all images they are.

    `prompts`: of all images, the same ones side by side; `size`: H, W.
    """
    try:
        from epd.train import rewards
    except ImportError:
        raise _missing(f"the reward {name}", "epd.train and torch", "train") from None
    from runtime.errors import RequestError

    if name == "psnr" or "," in name or ":" in name:
        raise RequestError(
            f"--reward {name}: give one name, without a weight, and not psnr: distances are measured anyway"
        )
    loaded = rewards.load(name, {} if weights is None else {name: weights})
    loaded.check(prompts, size)

    def judge(pictures: Pictures, images: slice) -> Array:
        found, first = [], 0
        for prompt, group in groupby(prompts[images]):
            end = first + len(list(group))
            found.append(loaded(rewards.Shot(prompt, pictures[first:end], _no_reference))[:, 0])
            first = end
        return np.concatenate(found)

    return judge


def _no_reference() -> Pictures:
    from runtime.errors import RequestError

    raise RequestError("this reward needs converged pictures; leave it out: distances to them are measured anyway")


def _batched(torch: Any, judge: Callable[..., Any], *pictures: Pictures) -> Array:
    tensors = [torch.from_numpy(one).permute(0, 3, 1, 2).float() for one in pictures]
    with torch.inference_mode():
        parts = [judge(*part) for part in zip(*(tensor.split(_BATCH) for tensor in tensors), strict=True)]
    found: Array = torch.cat(parts).double().numpy()
    return found


def _state(file: Path) -> Mapping[str, Any]:
    """Tensors by name, of a .safetensors file or of one that torch wrote; nothing in it is executed."""
    import pickle

    import torch

    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        # What is published is a .pth; with weights_only nothing in it is executed.
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise _refused(file, f"no weights ({str(error).splitlines()[0]:.80})") from None


def _fill(model: Any, state: Mapping[str, Any], file: Path, name: str) -> None:
    own = model.state_dict()
    wrong = [key for key, value in state.items() if value is None or value.shape != own[key].shape]
    if wrong:
        raise _refused(file, f"not the weights of {name}: {wrong[0]} is missing or of another shape")
    model.load_state_dict(state)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise _missing("this", "torch") from None
    return torch


def _missing(what: str, packages: str, extra: str = "quality") -> ValueError:
    from runtime.errors import RequestError

    return RequestError(f"{what} needs {packages}; install the extra: pip install 'epd-toolkit[{extra}]'")


def _refused(file: Path, why: str) -> ValueError:
    from runtime.errors import RequestError

    return RequestError(f"{file}: {why}; give the file that `python -m benchmarks quality --help` names")
