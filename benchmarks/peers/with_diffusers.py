"""diffusers, torch eager: the checkpoint's own modules, as its pipelines call them."""

from __future__ import annotations

from typing import Any

from turn import Parent, Ready, serve, versions


def load(job: dict[str, Any]) -> Ready:
    import models
    import numpy as np
    import torch

    torch.set_num_threads(job["threads"])
    dtype = models.DTYPES[job["dtype"]]
    told: dict[str, Any] = {
        "precision": job["dtype"],
        "threads": torch.get_num_threads(),
        "versions": versions(["diffusers", "torch", "transformers"]),
    }
    if job["drawn"]:
        told["notes"] = [
            f"its load, and maybe its peak memory, is that of drawing weights in {job['drawn']}, not of reading"
        ]
    if job["work"] == "picture":
        drawing = models.Drawing(models.pipeline(job, dtype), job)
        return pictures(drawing, job, told)
    model = models.backbone(job)
    tensors = {
        name: torch.from_numpy(value) if name == "timestep" else torch.from_numpy(value).to(dtype)
        for name, value in np.load(job["feeds"]).items()
    }

    def run() -> Any:
        with torch.inference_mode():
            return model(**tensors, return_dict=False)[0].float().numpy()

    return Ready(run, told=told)


def pictures(drawing: Any, job: dict[str, Any], told: dict[str, Any]) -> Ready:
    """Pictures of so many steps, after one of a single step."""

    def run() -> Any:
        picture = drawing(job["picture"]["steps"])
        told["guided_forwards"] = drawing.rows
        return picture

    return Ready(run, lambda: drawing(1), told)


if __name__ == "__main__":
    serve(load, Parent())
