"""Whom `benchmarks compare` can set beside a bundle: what each needs, how it is started, what it is to load.

The scripts in this folder are run by path, in the contender's own environment; nothing here imports them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from epd.catalogue import cache_folder
from runtime.bundle import Bundle
from runtime.errors import RequestError
from runtime.pipeline import find
from runtime.providers import WHEELS

from ..compare_work import Work

SCRIPTS = Path(__file__).parent
ROOT = SCRIPTS.parents[1]  # where this program's packages are
# Of a contender, beside ours; none: nothing that could be compared.
Weights = Literal["same", "drawn alike", "unknown", "other", "none"]

_DRAWN = {"fp32": "fp32", "int8": "fp32", "w8a16": "fp32", "bf16": "bf16"}  # precision -> of random weights; else fp16
_ALONE = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH")  # of our interpreter, and no other's


@dataclass(frozen=True)
class Contender:
    """A script, the interpreter that runs it, and what it is told."""

    name: str
    script: str
    job: Mapping[str, Any]
    weights: Weights = "same"
    python: str = sys.executable
    does: str = ""  # where that is not what ours does
    forwards: int | None = None  # rows its backbone must see in a picture; None: not counted
    exports: Mapping[str, Any] | None = None  # a job to be done before the first round, unless its folder is there

    @property
    def command(self) -> list[str]:
        return [self.python, str(SCRIPTS / self.script)]

    @property
    def environment(self) -> dict[str, str]:
        """Of the process: so many threads, no network, no packages of another interpreter."""
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
        found = dict(os.environ) | dict.fromkeys(threads, str(self.job["threads"])) | {"HF_HUB_OFFLINE": "1"}
        if self.python != sys.executable:
            return {name: value for name, value in found.items() if name not in _ALONE}
        if self.script == _OURS:
            found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return found


@dataclass(frozen=True)
class Peer:
    """One kind of contender beside ours."""

    make: Callable[[Work, str], Contender]  # the folder; empty: none was given
    needs: tuple[str, ...] = ()  # packages; (): this program's own environment does
    install: str = ""  # for pip
    pictures: bool = True  # whether it can draw whole ones


def ours(work: Work) -> list[Contender]:
    """This bundle; beside pictures also Euler's method of as many sequential calls, in the same runtime."""
    first = Contender(
        "ours", _OURS, work.job | {"folder": str(work.bundle.folder.absolute())}, "none", forwards=work.forwards
    )
    if work.kind == "backbone":
        return [first]
    calls = work.picture["sequential_calls"]
    euler = {"solver": "euler", "num_inference_steps": calls}
    job = dict(first.job) | {"picture": dict(work.picture) | {"ours": euler}}
    does = f"Euler's method, {calls} steps: as many sequential calls"
    return [first, replace(first, name="ours, Euler", job=job, does=does, forwards=work.rows * calls, weights="other")]


def against(work: Work, asked: Sequence[str], pythons: Mapping[str, str]) -> list[Contender]:
    """The contenders of NAME or NAME=FOLDER; `pythons`: name -> interpreter.

    Raises
    ------
    RequestError
        An unknown name, a folder that does not fit, an environment that lacks something: with the lines that make it.
    """
    found: list[Contender] = []
    for text in asked:
        name, _, folder = text.partition("=")
        if name not in PEERS:
            raise RequestError(f"--against {name!r} is not known; choose from {', '.join(PEERS)}")
        peer = PEERS[name]
        if work.kind == "picture" and not peer.pictures:
            raise RequestError(f"{name} draws no whole pictures here; leave it out, or give --work backbone")
        one = peer.make(work, folder)
        if any(other.name == one.name for other in found):
            raise RequestError(f"--against names {one.name} twice; leave one out")
        found.append(_at_home(name, one, pythons.get(name)))
    unused = sorted(pythons.keys() - {text.partition("=")[0] for text in asked})
    if unused:
        raise RequestError(f"--python {unused[0]}=...: not among --against; leave it out")
    return found


def _at_home(name: str, one: Contender, python: str | None) -> Contender:
    """With its interpreter, which has what it needs."""
    peer = PEERS[name]
    if python is not None and not peer.needs:
        raise RequestError(f"--python {name}=...: {name} runs in this program's own environment; leave it out")
    if python is not None:
        one = replace(one, python=str(Path(python).absolute()))  # a link is what makes an environment: not resolved
    needs = peer.needs
    if name == "optimum" and one.exports is None and one.job["work"] == "backbone":
        needs = ("onnxruntime",)  # its graph is there
    missing = _missing(one, needs)
    if missing:
        home = f"{name}-env"
        program = f"{home}\\Scripts\\python" if sys.platform == "win32" else f"{home}/bin/python"
        raise RequestError(
            f"{name}: {one.python} has no {' and no '.join(missing)}; make it an environment of its own: python -m "
            f"venv {home} && {program} -m pip install {peer.install} ; then add --python {name}={program}"
        )
    return one


def _missing(one: Contender, needs: Sequence[str]) -> list[str]:
    asked = [wheel for name in needs for wheel in (WHEELS if name == "onnxruntime" else (name,))]
    if not asked:
        return []
    command = [one.python, str(SCRIPTS / "turn.py"), *asked]
    try:
        done = subprocess.run(
            command, env=one.environment, capture_output=True, text=True, encoding="utf-8", check=False
        )
    except OSError as error:
        raise RequestError(
            f"{one.python}: cannot be started ({error.strerror}); give a Python of 3.10 or newer"
        ) from None
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RequestError(f"{one.python}: does not run ({line:.200}); give a Python of 3.10 or newer")
    have = {package for package, version in json.loads(done.stdout).items() if version is not None}
    return [name for name in needs if not have & set(WHEELS if name == "onnxruntime" else (name,))]


def _floor(work: Work, folder: str) -> Contender:
    if folder:
        raise RequestError("floor is computed from MODEL; give it no folder")
    if work.macs == 0:
        raise RequestError(f"{work.bundle.facts.name} has no multiply-accumulates in bundle.json; export it again")
    return Contender("floor", "floor.py", work.job | {"macs": work.macs}, "none", does="computed, not run")


def _diffusers(work: Work, folder: str) -> Contender:
    told, weights = _checkpoint(work, folder, "diffusers=FOLDER, a checkpoint")
    does, forwards = _euler(work)
    return Contender("diffusers", "with_diffusers.py", work.job | told, weights, does=does, forwards=forwards)


def _checkpoint(work: Work, folder: str, remedy: str) -> tuple[dict[str, Any], Weights]:
    """Where diffusers finds the weights: the folder given, that which the bundle was exported from, or none: drawn."""
    source = work.bundle.facts.source
    if folder:
        if not Path(folder, work.bundle.backbone, "config.json").is_file():
            raise RequestError(f"{folder}: no {work.bundle.backbone}/config.json in it; give a diffusers folder")
        return {"folder": str(Path(folder).absolute()), "drawn": None}, "unknown"
    if source.random_weights:
        at = _DRAWN.get(work.bundle.facts.components[work.bundle.backbone].precision, "fp16")
        return {"folder": str(work.bundle.folder.absolute()), "drawn": at}, "drawn alike"
    from export import ExportError, checkpoint

    try:
        found = checkpoint.find(source.id, checkpoint.Hub(source.revision, offline=True), None)
        found.fetch(tuple(work.bundle.facts.components) if work.kind == "picture" else (work.bundle.backbone,))
    except ExportError as error:
        raise RequestError(f"{error}; or give {remedy}") from None
    return {"folder": str(found.folder.absolute()), "drawn": None}, "same"


def _euler(work: Work) -> tuple[str, int | None]:
    """In words, and the rows its backbone sees."""
    if work.kind == "backbone":
        return "", None
    return f"Euler's method, {work.picture['steps']} steps: as many guided forwards", work.forwards


def _optimum(work: Work, folder: str) -> Contender:
    made, weights, exports = Path(folder).absolute(), "unknown", None
    if not folder:
        told, weights = _checkpoint(work, "", "optimum=FOLDER, as Optimum exported it")
        made = cache_folder().parent / "optimum" / _digest(work, told)
        if not made.is_dir():
            exports = work.job | told | {"export": str(made)}
    told = {"folder": str(made), "graph": str(made / work.bundle.backbone / "model.onnx")}
    if exports is None and not Path(told["graph"]).is_file():
        raise RequestError(f"{told['graph']}: missing; give a folder that Optimum exported, or optimum without one")
    does, forwards = _euler(work)
    return Contender(
        "optimum", "with_optimum.py", work.job | told, weights, does=does, forwards=forwards, exports=exports
    )


def _digest(work: Work, told: Mapping[str, Any]) -> str:
    """A folder name for Optimum's graphs of a checkpoint."""
    files = sorted(Path(told["folder"]).glob("*/*.safetensors"))
    weights = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    configs = [file.read_text(encoding="utf-8") for file in sorted(Path(told["folder"]).glob("*/config.json"))]
    content = json.dumps([asdict(work.bundle.facts.source), told["drawn"], weights, configs])
    return f"{work.bundle.facts.name}-{sha256(content.encode()).hexdigest()[:16]}"


def _openvino(work: Work, folder: str) -> Contender:
    """Reads our own graph, or that of a folder: a bundle for it, or Optimum's."""
    bundle = Bundle.open(folder) if folder else work.bundle
    bundle.require(work.bundle.backbone)
    rows = bundle.facts.components[work.bundle.backbone].rows
    if rows and work.rows not in rows:
        raise RequestError(f"{bundle.folder}: has graphs of {', '.join(map(str, rows))} rows, not {work.rows}")
    graph = bundle.graph(work.bundle.backbone, work.rows if rows else None).absolute()
    weights: Weights = _beside(work.bundle, bundle) if folder else "same"
    return Contender("openvino", "with_openvino.py", work.job | {"graph": str(graph)}, weights)


def _bundle(work: Work, folder: str) -> Contender:
    if not folder:
        raise RequestError("bundle needs the folder of another bundle: bundle=FOLDER")
    other, name = Bundle.open(find(folder)), work.bundle.backbone
    if other.foreign or other.facts.family != work.bundle.facts.family:
        raise RequestError(
            f"{folder}: not a bundle of the family {work.bundle.facts.family} made by `python -m export`"
        )
    if other.facts.components[name].inputs != work.bundle.facts.components[name].inputs:
        raise RequestError(f"{folder}: its {name} takes other shapes than MODEL's; export it for the same size")
    weights = _beside(work.bundle, other)
    job = work.job | {"folder": str(other.folder.absolute())}
    return Contender(f"bundle {other.folder.name}", _OURS, job, weights, forwards=work.forwards)


def _low_memory(work: Work, folder: str) -> Contender:
    if folder:
        raise RequestError("low-memory is of MODEL; give it no folder")
    if work.kind == "picture" and work.threads_given:
        raise RequestError("low-memory draws pictures with session options of its own; leave --threads out")
    first = ours(work)[0]
    job = dict(first.job) | {"low_memory": True}
    return replace(first, name="ours, low memory", job=job, weights="same")


def _beside(bundle: Bundle, other: Bundle) -> Weights:
    if other.foreign:
        return "unknown"
    return "same" if other.facts.source == bundle.facts.source else "other"


_OURS = "ours.py"
_TORCH = ("torch", "diffusers", "transformers")
PEERS: dict[str, Peer] = {
    "diffusers": Peer(_diffusers, _TORCH, "torch diffusers transformers"),
    "optimum": Peer(
        _optimum,
        ("onnxruntime", "optimum-onnx", *_TORCH),
        'onnxruntime optimum-onnx torch "diffusers<0.40" "huggingface-hub<1" "transformers<4.58"',
    ),
    "openvino": Peer(_openvino, ("openvino", "numpy"), "openvino numpy", pictures=False),
    "floor": Peer(_floor),
    "bundle": Peer(_bundle),
    "low-memory": Peer(_low_memory),
}
