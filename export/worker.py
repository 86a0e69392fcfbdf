"""One component in a process of its own: `python -m export.worker JOB.json`, so that its memory goes back when it ends.

A job is done in two such processes: `export` traces and writes the graph, `parity` compares it with torch. Parity is
tried at a small latent size: where the picture is larger, `export` traces the same module a second time at that size,
over the weights of the first graph's data file, and only sizes may differ between the two graphs.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.memory import peak_rss_bytes

from . import ExportError

GRAPH, TRIAL = "model.onnx", "trial.onnx"  # of several, those of the first row count
NO_RESULT = 74  # exit status: the result could not be written
SHORT_OF_MEMORY = (
    "ran out of memory or was killed for it; `--dry-run` tells what it needs: give a smaller --height and --width, "
    "--components without this one, or a machine with more memory"
)

_REMEDIES = {
    errno.ENOSPC: "; free some space or give another -o",
    errno.ENOMEM: f"; the process {SHORT_OF_MEMORY}",
}


@dataclass(frozen=True)
class Job:
    """What a worker is told. Paths are absolute."""

    task: str  # export | parity
    component: str
    checkpoint: str  # folder
    folder: str  # of the component, in the bundle that is being written
    result: str  # JSON file that the worker leaves behind: what it found, or {"failure": one line}
    precision: str
    height: int  # pixels
    width: int
    directions: int
    opset: int
    t5_tokens: int
    target: str = "cpu"
    rows: tuple[int, ...] = ()  # a graph of each; (): one graph of any number
    variant: str | None = None
    random: bool = False


def main(path: str) -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    started = time.perf_counter()
    try:
        found = {"export": export, "parity": parity}[job.task](job)
    except ExportError as error:
        found = {"failure": str(error)}
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "")
        found = {"failure": f"{job.component}: {error.strerror or error}: {error.filename or job.folder}{remedy}"}
    found |= {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
    partial = Path(job.result).with_suffix(".partial")
    try:
        partial.write_text(json.dumps(found), encoding="utf-8")
        os.replace(partial, job.result)
    except OSError:
        return NO_RESULT
    return 1 if "failure" in found else 0


def export(job: Job) -> dict[str, Any]:
    """Writes the graphs, their data file and, at a small size, those for parity; gives what bundle.json says."""
    facts, module = _open(job)
    agreed = _contract(job, facts, job.height, job.width)
    found = [_export_graph(job, facts, module, rows) for rows in job.rows or (None,)]
    return {
        "inputs": [asdict(tensor) for tensor in agreed.inputs],
        "outputs": [asdict(tensor) for tensor in agreed.outputs],
        "macs": found[0],
    }


def _export_graph(job: Job, facts: Any, module: Any, rows: int | None) -> dict[str, int]:
    """Writes the graph of a row count, or of any (None), and its small twin; its multiply-accumulates for one row."""
    from . import graph, macs
    from .components import ROWS
    from .plan import trial_size

    size = trial_size(facts, job.height, job.width)
    agreed, small = (_contract(job, facts, *sides) for sides in ((job.height, job.width), size))
    if rows is not None:
        agreed, small = agreed.fixed(rows), small.fixed(rows)
    model = _trace(job, module, agreed, rows)
    if (declared := graph.declared(model)) != (agreed.inputs, agreed.outputs):
        raise ExportError(
            f"{job.component}: the graph declares {declared[0]} -> {declared[1]}, "
            f"agreed were {agreed.inputs} -> {agreed.outputs}; this is a fault of the exporter"
        )
    kinds = Counter(node.op_type for node in model.graph)
    _check_operators(job, kinds)
    first, path = Path(job.folder) / GRAPH, _graph_file(job, GRAPH, rows)
    if path == first:
        graph.save(model, path)
    else:
        graph.save_sharing(model, path, first)
    found = macs.count(path, ROWS, rows or 1)
    del model
    if small != agreed:
        model = _trace(job, module, small, rows)
        if (others := Counter(node.op_type for node in model.graph)) != kinds:
            raise ExportError(
                f"{job.component}: traced at {size[1]}x{size[0]} the graph has other nodes than at "
                f"{job.width}x{job.height} ({kinds - others} against {others - kinds}), so that parity "
                "cannot be tried at the small size; this is a fault of the exporter"
            )
        graph.save_sharing(model, _graph_file(job, TRIAL, rows), first)
    return found


def _trace(job: Job, module: Any, agreed: Any, rows: int | None) -> Any:
    from . import graph, rewrites

    model = graph.trace(module, agreed.inputs, agreed.outputs, agreed.samples(rows or 2), job.opset)
    return rewrites.rewrite(model, job.target)


def _check_operators(job: Job, kinds: Counter[str]) -> None:
    """ExportError for operators that the target denies."""
    from .targets import TARGETS

    if denied := sorted(TARGETS[job.target].denied & kinds.keys()):
        raise ExportError(
            f"{job.component}: its graph has {', '.join(denied)}, which --target {job.target} cannot run; "
            "give another --opset or --target"
        )


def _graph_file(job: Job, first: str, rows: int | None) -> Path:
    """The file of the graph of a row count, as `runtime.bundle.Component` names it."""
    path = Path(job.folder) / first
    return path if rows in (None, *job.rows[:1]) else path.with_stem(f"{path.stem}_rows{rows}")


def parity(job: Job) -> dict[str, Any]:
    """Largest error of the graphs against torch in fp32, at their rows or at 2 and 2 K; ExportError above tolerance."""
    import numpy as np
    import onnxruntime
    import torch

    from .plan import trial_size

    facts, module = _open(job)
    small = _contract(job, facts, *trial_size(facts, job.height, job.width))
    rows = tuple(job.rows) or tuple(dict.fromkeys((2, 2 * job.directions)))
    module = module.reference()
    with torch.inference_mode():
        expected = [[tensor.numpy() for tensor in module(*map(torch.from_numpy, small.samples(n)))] for n in rows]
    del module
    gc.collect()
    names = [tensor.name for tensor in small.inputs]
    error, session = 0.0, None
    for n, tensors in zip(rows, expected, strict=True):
        if session is None or job.rows:
            files = (_graph_file(job, kind, n if job.rows else None) for kind in (TRIAL, GRAPH))
            session = onnxruntime.InferenceSession(
                next(file for file in files if file.exists()), providers=["CPUExecutionProvider"]
            )
        got = session.run(None, dict(zip(names, small.samples(n), strict=True)))
        for declared, one, other in zip(small.outputs, got, tensors, strict=True):
            if not np.isfinite(one).all():
                raise ExportError(
                    f"{job.component}: {declared.name} is not finite at {n} rows in {job.precision}; "
                    "export with --dtype fp32"
                )
            scale = max(float(np.abs(other).max()), 1e-12)
            error = float(np.maximum(error, np.abs(one - other).max() / scale))  # unlike max, keeps a NaN
    tolerance = small.tolerance[job.precision]
    if not error <= tolerance:
        raise ExportError(
            f"{job.component}: differs from torch by {error:.1e} relative, {tolerance:.0e} are allowed "
            f"at {job.precision}; nothing was written; try another --opset, or --dtype fp32"
        )
    return {"rows": rows, "error": error, "tolerance": tolerance}


def _open(job: Job) -> tuple[Any, Any]:
    """Facts of the checkpoint and the component's torch module."""
    from safetensors import SafetensorError

    from runtime.bundle import describe
    from runtime.facts import Source

    from .components import module

    folder = Path(job.checkpoint)
    facts = describe(folder, folder.name, Source(str(folder)), t5_tokens=job.t5_tokens)
    try:
        return facts, module(job.component, folder, facts, job.precision, job.variant, job.random)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        if "allocate memory" in str(error):  # told by the exporter
            raise
        line = " ".join(str(error).split())
        raise ExportError(
            f"{job.component}: its weights in {folder} cannot be loaded ({line:.300}); download the checkpoint again"
        ) from error


def _contract(job: Job, facts: Any, height: int, width: int) -> Any:
    from .components import contract

    return contract(job.component, Path(job.checkpoint), facts, height, width)


def _end_with_parent() -> None:
    """The parent holds the other end of standard input: when it is gone, however it went, so are we."""
    while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    os._exit(1)


if __name__ == "__main__":
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1]))
