"""One component in a process of its own: `python -m export.worker JOB.json`, so that its memory goes back when it ends.

A component is done in two such processes: `export` traces and writes the graph, `parity` compares it with torch. When
all are there, further ones may quantise the backbone (`calibrate`) and compare pictures (`picture`). Parity is tried at
a small latent size: where the picture is larger, `export` traces the same module a second time at that size,
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from runtime.errors import RunError
from runtime.memory import peak_rss_bytes

from . import ExportError

GRAPH, TRIAL = "model.onnx", "trial.onnx"  # of several, those of the first row count
CALLS, FEWEST = 100, 20  # calls of the backbone to calibrate with,
WORK = 20 * 10**12  # or as many as make up so many multiply-accumulates
HELD_OUT = 5  # every 5th is left out and judged by
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

    task: str  # export | parity | calibrate | picture
    component: str
    checkpoint: str  # folder
    source: str  # folder of the checkpoint that has the component: the same but for a tiny VAE
    folder: str  # of the component, in the bundle that is being written
    result: str  # JSON file that the worker leaves behind: what it found, or {"failure": one line}
    precision: str
    height: int  # pixels
    width: int
    directions: int
    opset: int
    t5_tokens: int
    equal_tokens: int = 0  # text tokens at the end, always equal, that the graph computes once: see `export.merged`
    target: str = "cpu"
    rows: tuple[int, ...] = ()  # a graph of each; (): one graph of any number
    variant: str | None = None
    random: bool = False
    prompts: tuple[str, ...] = ()  # to calibrate with, or to draw


def main(path: str) -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    started = time.perf_counter()
    try:
        found = _task(job.task)(job)
    except (ExportError, RunError) as error:
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


def _task(name: str) -> Callable[[Job], dict[str, Any]]:
    if name == "picture":
        from .picture import compare

        return compare
    return {"export": export, "parity": parity, "calibrate": calibrate}[name]


def export(job: Job) -> dict[str, Any]:
    """Writes the graphs, their data file and, at a small size, those for parity; gives what bundle.json says."""
    from . import merged

    facts, module = open_module(job)
    if job.equal_tokens:
        module.model = merged.Merged(module.model, facts.text.clip_tokens, job.equal_tokens)
    agreed = _contract(job, facts, job.height, job.width)
    found = [_export_graph(job, facts, module, rows) for rows in job.rows or (None,)]
    del module
    _rewrite(job)
    _check_operators(job)
    return {
        "inputs": [asdict(tensor) for tensor in agreed.inputs],
        "outputs": [asdict(tensor) for tensor in agreed.outputs],
        "macs": found[0][0],
        "activation_bytes": found[0][1],
    }


def _export_graph(job: Job, facts: Any, module: Any, rows: int | None) -> tuple[dict[str, int], int]:
    """Writes the graph of a row count, or of any (None), and its small twin.

    Gives its multiply-accumulates and the bytes of its activations, both for one row.
    """
    from . import activations, graph, macs
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
    first, path = Path(job.folder) / GRAPH, _graph_file(job, GRAPH, rows)
    if path == first:
        graph.save(model, path)
    else:
        graph.save_sharing(model, path, first)
    found = macs.count(path, ROWS, rows or 1), activations.peak(path, ROWS, rows or 1)
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
    from . import graph, rewrites, weights

    model = graph.trace(module, agreed.inputs, agreed.outputs, agreed.samples(rows or 2), job.opset)
    rewrites.rewrite(model, job.target)
    if job.precision == "bf16":
        weights.admit_bf16(model)
    return model


def _rewrite(job: Job) -> None:
    """Quantises the weights of what was traced; makes the graphs that parity is tried with such as the CPU can run."""
    import onnx

    from . import weights
    from .components import BLOCK, WEIGHT_BITS

    files = [_graph_file(job, first, rows) for first in (GRAPH, TRIAL) for rows in job.rows or (None,)]
    files = [file for file in files if file.exists()]
    if bits := WEIGHT_BITS.get(job.precision):
        weights.quantise(files, bits, BLOCK[job.precision])
    if job.precision == "bf16":
        for rows in job.rows or (None,):
            onnx.checker.check_model(_graph_file(job, GRAPH, rows), full_check=True)  # parity runs another graph
            trial = _graph_file(job, TRIAL, rows)
            weights.widen(trial if trial.exists() else _graph_file(job, GRAPH, rows), trial)


def calibrate(job: Job) -> dict[str, Any]:
    """Makes quantised graphs of fp32 ones in a whole bundle; their largest error at recorded inputs left out of that.

    ExportError above tolerance.
    """
    import numpy as np

    from runtime.bundle import Bundle

    from . import int8, qdq
    from .calibrate import record
    from .components import TOLERANCE
    from .targets import CALIBRATED, TARGETS

    folder = Path(job.folder)
    macs = sum(Bundle.open(folder.parent).facts.components[job.component].macs.values())
    files = {rows: _graph_file(job, GRAPH, rows) for rows in job.rows or (None,)}
    count = max(FEWEST, min(CALLS, WORK // (2 * macs)))
    feeds = record(folder.parent, prompts=job.prompts, count=count, sparing=count == FEWEST)
    apart = feeds[HELD_OUT - 1 :: HELD_OUT]
    held = {name: np.concatenate([feed[name] for feed in apart]) for name in feeds[0]}
    expected = [_answers(file, held, rows) for rows, file in files.items()]
    rest = [feed for number, feed in enumerate(feeds, 1) if number % HELD_OUT]
    if TARGETS[job.target].static:
        qdq.quantise(list(files.values()), rest, activations=CALIBRATED[job.precision])
    else:
        int8.quantise(files[None], rest)
    _check_operators(job)
    got = [_answers(file, held, rows) for rows, file in files.items()]
    pairs = zip(got, expected, strict=True)
    error = float(np.max([np.abs(one - other).max() / np.abs(other).max() for one, other in pairs]))
    return _judged(job, "fp32", tuple(job.rows) or (2,), error, TOLERANCE[job.precision])


def _answers(file: Path, feeds: dict[str, Any], rows: int | None) -> Any:
    """A graph's first output for (R, ...) inputs, in calls of `rows`, 2 where it takes any; rows left over are not run.

    NaN where it is not finite.
    """
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    rows = rows or 2
    starts = range(0, len(next(iter(feeds.values()))) - rows + 1, rows)
    calls = ({name: value[start : start + rows] for name, value in feeds.items()} for start in starts)
    return np.concatenate([session.run(None, call)[0] for call in calls])


def _check_operators(job: Job) -> None:
    """ExportError for what the target cannot run of the graphs, by the rules of `export.lint` for operators."""
    from .lint import OPERATORS, TARGETS, lint

    files = [_graph_file(job, GRAPH, rows) for rows in job.rows or (None,)]
    found = lint(files, job.target, OPERATORS) if job.target in TARGETS else ()
    if told := [one for one in found if not one.advice]:
        raise ExportError(
            f"{job.component}: --target {job.target} cannot run its graph: {told[0].what} ({told[0].where}; findings: "
            f"{len(told)}, {told[0].source}); give another --opset or --target"
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

    facts, module = open_module(job)
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
                    f"nothing was written; give {_instead(job)}"
                )
            scale = max(float(np.abs(other).max()), 1e-12)
            error = float(np.maximum(error, np.abs(one - other).max() / scale))  # unlike max, keeps a NaN
    return _judged(job, "torch", rows, error, small.tolerance[job.precision])


def _judged(job: Job, other: str, rows: tuple[int, ...], error: float, tolerance: float) -> dict[str, Any]:
    if not error <= tolerance:
        raise ExportError(
            f"{job.component}: differs from {other} by {error:.1e} relative, {tolerance:.0e} are allowed "
            f"at {job.precision}; nothing was written; give {_instead(job)}"
        )
    return {"rows": rows, "error": error, "tolerance": tolerance}


def _instead(job: Job) -> str:
    """The option that makes another graph of a component, where this one is not good enough."""
    if job.component == "text_encoder_3":
        return "--t5 none" if job.precision == "fp16-weights" else "--t5 fp16"
    return "another --opset" if job.precision == "fp32" else "--dtype fp32"


def open_module(job: Job) -> tuple[Any, Any]:
    """Facts of the checkpoint and the component's torch module."""
    from safetensors import SafetensorError

    from runtime.bundle import describe
    from runtime.facts import Source

    from .components import module

    folder, source = Path(job.checkpoint), Path(job.source)
    facts = describe(folder, folder.name, Source(str(folder)), t5_tokens=job.t5_tokens)
    try:
        return facts, module(job.component, source, facts, job.precision, job.variant, job.random)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        if "allocate memory" in str(error):  # told by the exporter
            raise
        line = " ".join(str(error).split())
        raise ExportError(
            f"{job.component}: its weights in {source} cannot be loaded ({line:.300}); download the checkpoint again"
        ) from error


def _contract(job: Job, facts: Any, height: int, width: int) -> Any:
    from .components import contract

    made = contract(job.component, Path(job.source), facts, height, width)
    return replace(made, zeros=job.equal_tokens)


def _end_with_parent() -> None:
    """The parent holds the other end of standard input: when it is gone, however it went, so are we."""
    while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    os._exit(1)


if __name__ == "__main__":
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1]))
