"""Predictor snapshots as the authors' programs write them: pickles of a persistent torch module, by torch itself."""

import io
import pickle
import sys
import types
from contextlib import contextmanager

import numpy as np
import torch

PARAMETERS = ("r_params", "scale_dir_params", "scale_time_params", "weight_s")
METADATA = {
    "training": True,
    "dataset_name": "ms_coco",
    "img_resolution": 512,
    "num_steps": 4,
    "sampler_stu": "epd",
    "sampler_tea": "dpm",
    "M": 1,
    "guidance_type": "cfg",
    "guidance_rate": 4.5,
    "schedule_type": "flowmatch",
    "schedule_rho": 1.0,
    "afs": False,
    "scale_dir": 0.0,
    "scale_time": 0.0,
    "max_order": 2,
    "num_points": 2,
    "backend": "sd3",
    "backend_config": {"model_name_or_path": "a/model", "sigma_min": 0.003, "sigma_max": 1.0, "resolution": 512},
}


def raw_parameters(n=3, k=2, seed=0):
    """Raw parameters (N, K) by name, float32."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(n, k)).astype(np.float32) for name in PARAMETERS}


def predictor(raw, metadata):
    """A module that pickles like a persistent one; its class is not the authors', its reduction is."""

    class Predictor(torch.nn.Module):
        def __reduce__(self):
            meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": "EPD_predictor"}
            return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (
                meta | {"state": self.__dict__},
            )

    model = Predictor()
    for name, value in metadata.items():
        setattr(model, name, value)
    for name, value in raw.items():
        setattr(model, name, torch.nn.Parameter(torch.tensor(np.asarray(value))))
    model.sigmoid, model.softmax = torch.nn.Sigmoid(), torch.nn.Softmax(dim=-1)
    model._init_args, model._init_kwargs = (), dict(metadata)
    return model


def snapshot(raw=None, metadata=None, protocol=4):
    """The bytes of a snapshot file; `metadata` changes `METADATA`."""
    metadata = METADATA | (metadata or {})
    raw = raw_parameters(metadata["num_steps"] - 1, metadata["num_points"]) if raw is None else raw
    return dumps({"model": predictor(raw, metadata)}, protocol)


def dumps(content, protocol=4):
    with lookalikes():
        return pickle.dumps(content, protocol)


@contextmanager
def lookalikes():
    """The authors' modules that the names in a snapshot belong to, while it is written."""

    def reconstruct(meta):
        raise AssertionError("called")

    class EasyDict(dict):
        pass

    made = {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): reconstruct,
        ("dnnlib.util", "EasyDict"): EasyDict,
    }
    names = {name.split(".")[0] for name, _ in made} | {name for name, _ in made}
    sys.modules |= {name: types.ModuleType(name) for name in names}
    for (module, name), value in made.items():
        value.__module__, value.__name__, value.__qualname__ = module, name, name
        setattr(sys.modules[module], name, value)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def reduce_to_zip(storage):
    """A storage as bytes in torch's zip format, where torch itself writes its older one."""
    buffer = io.BytesIO()
    torch.save(storage, buffer)
    return torch.storage._load_from_bytes, (buffer.getvalue(),)
