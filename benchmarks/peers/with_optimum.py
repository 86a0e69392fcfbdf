"""The graphs that Optimum exports of the checkpoint: the backbone in plain ONNX Runtime, pictures by its pipelines.

A job with `export` in place of work makes the folder of these graphs.
"""

from __future__ import annotations

from typing import Any

from turn import Parent, Ready, serve, versions
from with_diffusers import pictures

_NUMPY = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


def load(job: dict[str, Any]) -> Ready:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if job["threads_given"]:  # if not, as for ours
        options.intra_op_num_threads = job["threads"]
    told: dict[str, Any] = {
        "precision": "fp32",
        "threads": job["threads"],
        "versions": versions(["onnxruntime", "optimum-onnx"]),
    }
    if job["work"] == "picture":
        import models
        from optimum.onnxruntime import ORTStableDiffusion3Pipeline, ORTStableDiffusionPipeline

        kind = {"sd3": ORTStableDiffusion3Pipeline, "sd15": ORTStableDiffusionPipeline}[job["family"]]
        pipe = kind.from_pretrained(job["folder"], session_options=options, provider="CPUExecutionProvider")
        return pictures(models.Drawing(pipe, job), job, told)
    session = onnxruntime.InferenceSession(job["graph"], options, providers=["CPUExecutionProvider"])
    feeds = dict(np.load(job["feeds"]))
    for tensor in session.get_inputs():
        if tensor.name == "timestep" and (not tensor.shape or tensor.shape == [1]):
            feeds["timestep"] = feeds["timestep"][:1].reshape(tensor.shape)
            told["one_time"] = True
        feeds[tensor.name] = feeds[tensor.name].astype(_NUMPY[tensor.type])
    name = session.get_outputs()[0].name
    return Ready(lambda: session.run([name], feeds)[0], told=told)


def export(parent: Parent) -> None:
    """Writes the graphs of the whole checkpoint, fp32, with Optimum's own defaults."""
    import models
    import torch
    from optimum.exporters.onnx import onnx_export_from_model

    pipe = models.pipeline(parent.job, torch.float32)
    onnx_export_from_model(pipe, output=parent.job["export"], task="text-to-image", do_validation=False)
    parent.tell_loaded()
    parent.tell_memory()


if __name__ == "__main__":
    parent = Parent()
    if "export" in parent.job:
        export(parent)
    else:
        serve(load, parent)
