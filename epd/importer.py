"""From the authors' predictor snapshots (`*-best.pkl`, `*-distilled.pkl`) to a `Table`, executing nothing in them.

`epd.snapshot` reads the file as plain data; here its raw parameters become the numbers of a table, as the authors'
released code computes them (arXiv 2507.14797 and 2512.22796):

    r = sigmoid(r_params)    w = softmax(weight_s over K)    scale = s 2 sigmoid(p / 2) + (1 - s), s the recorded bound

Knows nothing of what is wrong in a published file's own description; `epd.catalogue` corrects that.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import schedule, snapshot
from .schedule import Floats
from .table import Table

EDM_DATASETS = ("cifar10", "ffhq", "afhqv2", "imagenet64")
MAX_METADATA = 1000  # entries
NEEDED = ("num_steps", "num_points", "sampler_stu", "schedule_type")


def import_table(path: str | os.PathLike[str]) -> Table:
    """The table of a predictor snapshot file, its provenance holding the file's name, SHA-256, bytes and metadata.

    Raises
    ------
    ValueError
        One line that names the file and what was refused, what is missing or which rule of `Table` it breaks.
    OSError
        The file cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        data = file.read(snapshot.MAX_BYTES + 1)
    try:
        state = _state(snapshot.read(data))
        digest = hashlib.sha256(data).hexdigest()
        return _table(state, {"file": path.name, "sha256": digest, "bytes": len(data)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _state(content: Any) -> dict[str, Any]:
    """Parameters and metadata of the predictor, in one dict."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, snapshot.Module):
        raise ValueError('no predictor snapshot: it holds no persistent object "model"')
    parameters = model.get("_parameters")
    return {**model, **(parameters if isinstance(parameters, dict) else {})}


def _table(state: Mapping[str, Any], source: Mapping[str, Any]) -> Table:
    metadata = _metadata(state)
    missing = [name for name in NEEDED if metadata.get(name) is None]
    if missing:
        raise ValueError(f"no predictor snapshot: it lacks {', '.join(missing)}")
    n, k = _count(metadata, "num_steps") - 1, _count(metadata, "num_points")
    if n < 1:
        raise ValueError("num_steps counts grid points and must be 2 or more")
    r, logits = (_raw(state, name, (n, k)) for name in ("r_params", "weight_s"))
    backend = metadata.get("backend_config")
    told = {**(backend if isinstance(backend, dict) else {}), **_given(metadata)}
    family = _family(told)
    size = told.get("resolution", told.get("img_resolution"))
    return Table(
        times=_grid(told, family, n),
        r=_sigmoid(r),
        w=_softmax(logits),
        scale_dir=_scale(state, metadata, "scale_dir", (n, k)),
        scale_time=_scale(state, metadata, "scale_time", (n, k)),
        start="afs" if metadata.get("afs") is True else "call",
        order=_order(metadata),
        family=family,
        model=told.get("model_name_or_path"),
        grid=_grid_name(told),
        guidance=metadata.get("guidance_rate") if metadata.get("guidance_type") else None,
        size=None if size is None else (size, size),
        provenance={**source, "metadata": metadata},
    )


def _metadata(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the predictor records of itself: its public attributes that are plain data."""
    public = {name: value for name, value in state.items() if isinstance(name, str) and not name.startswith("_")}
    plain = {name: value for name, value in public.items() if not isinstance(value, np.ndarray)}
    budget = [MAX_METADATA]
    for name, value in plain.items():
        _check_plain(name, value, budget)
    return plain


def _check_plain(name: str, value: Any, budget: list[int], depth: int = 4) -> None:
    """ValueError unless JSON can hold the value, in a file of reasonable size."""
    budget[0] -= 1
    if isinstance(value, dict | list | tuple) and depth and budget[0] > 0:
        for item in value.values() if isinstance(value, dict) else value:
            _check_plain(name, item, budget, depth - 1)
        if not isinstance(value, dict) or all(isinstance(key, str) for key in value):
            return
    simple = value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 1 << 63)
    if not simple or budget[0] <= 0:
        raise ValueError(f"its {name[:100]!a} is not plain data, or too much of it")


def _given(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if value is not None}


def _count(metadata: Mapping[str, Any], name: str) -> int:
    value = metadata[name]
    if type(value) is not int or not 1 <= value <= 1000:
        raise ValueError(f"its {name} must be an integer from 1 to 1000")
    return value


def _real(told: Mapping[str, Any], name: str, default: float) -> float:
    value = told.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(f"its {name} must be a finite number")
    return float(value)


def _raw(state: Mapping[str, Any], name: str, shape: tuple[int, int]) -> Floats:
    value = state.get(name)
    if not isinstance(value, np.ndarray):
        raise ValueError(f"no predictor snapshot: it lacks {name}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape (N, K) = {shape}, got {value.shape}")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} must be finite")
    return value.astype(np.float64)


def _scale(state: Mapping[str, Any], metadata: Mapping[str, Any], name: str, shape: tuple[int, int]) -> Any:
    """Scales (N, K) in [1 - bound, 1 + bound]; None, so ones, where the recorded bound is 0."""
    bound = _real(metadata, name, 0.0)
    if not 0 <= bound <= 1:
        raise ValueError(f"its {name}, a bound, must be from 0 to 1")
    if bound == 0:
        return None
    return bound * 2 * _sigmoid(_raw(state, f"{name}_params", shape) / 2) + (1 - bound)


def _sigmoid(p: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(p, -700, 700))))


def _softmax(p: Floats) -> Floats:
    weights = np.exp(p - p.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _order(metadata: Mapping[str, Any]) -> int:
    sampler = metadata["sampler_stu"]
    if sampler == "ipndm":
        return _count({"max_order": metadata.get("max_order")}, "max_order")
    if sampler != "epd":
        raise ValueError(f"its sampler_stu is {ascii(sampler)[:100]}; epd and ipndm (the plugin) can be imported")
    return 1


def _family(told: Mapping[str, Any]) -> str:
    backend, dataset = told.get("backend", "ldm"), told.get("dataset_name")
    if backend in ("sd3", "flux"):
        return str(backend)
    if backend == "ldm" and dataset == "ms_coco":
        return "sd15"
    if backend == "ldm" and dataset in EDM_DATASETS:
        return "edm"
    raise ValueError(
        f"no grid is known for its backend {ascii(backend)[:50]} with dataset {ascii(dataset)[:50]}; known: sd3, flux, "
        f"ldm with ms_coco (Stable Diffusion 1.5) or {', '.join(EDM_DATASETS)}"
    )


def _grid(told: Mapping[str, Any], family: str, n: int) -> Floats:
    """The N + 1 times the table was made on."""
    kind, rho = told["schedule_type"], _real(told, "schedule_rho", 1.0)
    low, high = _real(told, "sigma_min", 0.002), _real(told, "sigma_max", 80.0)
    if kind == "flowmatch" and family in ("sd3", "flux"):
        if "flowmatch_mu" in told:
            return schedule.flow_dynamic(n, _real(told, "flowmatch_mu", 0.0))
        if family == "flux":
            raise ValueError("its grid cannot be known: FLUX shifts by image size and the file records no flowmatch_mu")
        return schedule.flow(n, _real(told, "flowmatch_shift", 3.0))
    if kind == "discrete" and family == "sd15":
        return schedule.discrete(n, rho=rho)
    if family == "edm" and 0 < low < high and rho > 0:
        if kind == "polynomial":
            return schedule.polynomial(n, low, high, rho)
        if kind == "logsnr":
            return schedule.logsnr(n, low, high)
        if kind == "time_uniform":
            return schedule.time_uniform(n, low, high, rho)
    raise ValueError(f"no grid is known for its schedule_type {ascii(kind)[:100]} on {family}")


def _grid_name(told: Mapping[str, Any]) -> str:
    kind = str(told["schedule_type"])
    if kind == "flowmatch":
        shift = f"e^{told['flowmatch_mu']}" if "flowmatch_mu" in told else told.get("flowmatch_shift", 3.0)
        return f"flowmatch, shift {shift}"
    return kind if kind == "logsnr" else f"{kind}, rho {told.get('schedule_rho', 1.0)}"
