"""OpenVINO's own runtime on its CPU device: an ONNX graph, compiled for these very sizes and one call at a time."""

from __future__ import annotations

import sys
from typing import Any

from turn import Parent, Ready, serve, versions

_HINT = {"fp32": "f32", "bf16": "bf16"}


def load(job: dict[str, Any]) -> Ready:
    import numpy as np
    import openvino

    feeds = dict(np.load(job["feeds"]))
    try:
        model = openvino.Core().read_model(job["graph"])
    except RuntimeError as error:
        why = " ".join(str(error).split())
        sys.exit(f"cannot read {job['graph']} ({why:.160}); give openvino=FOLDER, made for it or by Optimum")
    told: dict[str, Any] = {"precision": job["dtype"], "versions": versions(["openvino"])}
    for tensor in model.inputs:
        if tensor.any_name == "timestep" and tensor.partial_shape.rank.get_length() == 0:
            feeds["timestep"], told["one_time"] = feeds["timestep"][0], True
    model.reshape({name: value.shape for name, value in feeds.items()})
    chosen = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job["threads"],
        "INFERENCE_PRECISION_HINT": _HINT[job["dtype"]],
    }
    compiled = openvino.Core().compile_model(model, "CPU", chosen)
    told["threads"] = compiled.get_property("INFERENCE_NUM_THREADS")
    kind = compiled.get_property("INFERENCE_PRECISION_HINT")
    if kind.get_type_name() != chosen["INFERENCE_PRECISION_HINT"]:
        told["notes"] = [f"asked for {job['dtype']}, computes in {kind.get_type_name()}"]
    return Ready(lambda: compiled(feeds)[0], told=told)


if __name__ == "__main__":
    serve(load, Parent())
