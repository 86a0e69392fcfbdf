"""This program itself: the backbone as `runtime.session` calls it, or pictures as `Pipeline.draw` draws them.

The one contender that needs this program's packages.
"""

from __future__ import annotations

from typing import Any

from turn import Parent, Ready, serve, versions


def load(job: dict[str, Any]) -> Ready:
    import numpy as np

    from runtime.bundle import Bundle
    from runtime.ort import base_wheels, onnxruntime
    from runtime.pipeline import Pipeline, find
    from runtime.providers import CPU
    from runtime.session import Session, default_options

    options = None  # as this program has them by itself
    if job["threads_given"]:
        options = default_options(onnxruntime(), CPU, job["threads"])
    bundle, lean = Bundle.open(find(job["folder"])), job.get("low_memory", False)
    told: dict[str, Any] = {
        "precision": bundle.facts.components[bundle.backbone].precision,
        "threads": job["threads"],
        "versions": versions(["epd-toolkit", *base_wheels()]),
    }
    if job["work"] == "picture":
        return _pictures(Pipeline(bundle, session_options=options, low_memory=lean), job["picture"], told)
    session = Session(bundle, bundle.backbone, session_options=options, low_memory=lean)
    session.load()
    feeds = session.fit(dict(np.load(job["feeds"])))
    return Ready(lambda: next(iter(session(**feeds).values())), told=told)


def _pictures(pipe: Any, asked: dict[str, Any], told: dict[str, Any]) -> Ready:
    """First a picture of one interval: every session is loaded and called, with as many rows as later on."""
    same = {name: asked[name] for name in ("negative_prompt", "guidance_scale", "seed", "height", "width")}
    plan = pipe.plan(asked["prompt"], **same, **asked["ours"])
    directions = {"k": plan.directions} if plan.table is not None else {}
    short = pipe.plan(asked["prompt"], **same, solver=plan.solver, num_inference_steps=1, **directions)

    def draw() -> Any:
        result = pipe.draw(plan, output_type="np")
        told["guided_forwards"] = result.report.guided_forwards
        return result.images

    return Ready(draw, lambda: pipe.draw(short, output_type="np"), told)


if __name__ == "__main__":
    serve(load, Parent())
