"""Writes a bundle: runs the workers, gathers what they found, and puts the whole in place at once.

Everything is written into `.NAME.PID.partial` beside the bundle and renamed at the end, so that a folder that can be
read is always whole. What a killed export left behind is cleared by the next one to the same place.
An older bundle is first renamed to `.NAME.PID.old`: folders cannot be exchanged in one step everywhere. An export that
is killed between the two renames leaves nothing at the target; the next one to the same place, or a rename by hand,
puts the older bundle back. Two exports to one place at a time, from machines that share it, are not kept apart.
Knows nothing of torch's graphs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from epd import Table
from epd.catalogue import SHIPPED
from runtime.bundle import PROMPTS, TABLES, best_first, sha256
from runtime.facts import FILE, PICTURE, TINY_DECODER, Component, Parity, Picture, Stored, Tensor, write_facts
from runtime.order import read_prompts
from runtime.parse import load_json

from . import ExportError
from .checkpoint import part_of, read_config
from .plan import Plan
from .targets import CALIBRATED
from .worker import GRAPH, NO_RESULT, SHORT_OF_MEMORY, TRIAL, Job

_TOOLS = ("torch", "onnxscript", "onnx-ir", "diffusers", "transformers", "onnxruntime")
_ALLOCATION = re.compile("allocat|MemoryError|bad_alloc")  # as torch, numpy, ONNX Runtime and C++ complain
Say = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """A component, and what it took to write it."""

    component: Component
    seconds: float
    export_rss_bytes: int  # peak of the exporting process
    parity_rss_bytes: int  # largest peak of the processes that compared, calibrated or drew with it


def check_target(target: Path, overwrite: bool) -> None:
    """Refuses a place where no bundle can be put, before any work is done; what killed exports left there is cleared.

    Raises
    ------
    ExportError
        If nothing can be written there, or something is there, unless it is a bundle (or an empty folder) and
        `overwrite`.
    """
    with _writing(target):
        place = target.absolute()
        with tempfile.TemporaryDirectory(prefix=".export-", dir=next(up for up in place.parents if up.exists())):
            _clear_remains(place)
    if not target.exists():
        return
    if not target.is_dir():
        raise ExportError(f"{target}: a file is in the way; give another -o")
    if any(target.iterdir()):
        if not (target / FILE).is_file():
            raise ExportError(f"{target}: holds something that is no bundle, and is left alone; give another -o")
        if not overwrite:
            raise ExportError(f"{target}: exists; give --overwrite to replace it, or another -o")


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """An OSError of the block as an ExportError that tells what to do."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{target}: cannot be written ({error.strerror or error}: {error.filename or target.parent}); "
            "free some space or give another -o"
        ) from error


def write(plan: Plan, target: Path, overwrite: bool, say: Say) -> tuple[dict[str, Written], Picture | None]:
    """Exports all components of a plan into the bundle `target`, and compares its pictures with those at fp32.

    Raises
    ------
    ExportError
        If a component cannot be exported or differs from torch by more than its tolerance, or the pictures do;
        nothing is left behind.
    """
    check_target(target, overwrite)
    with tempfile.TemporaryDirectory(prefix="export-") as notes, _aside(target) as partial:
        write_configurations(plan, partial)
        _check_prompts(plan, partial)
        files = _stored(partial, partial.rglob("*"))  # graphs and tables come later
        written = {}
        for number, (component, at) in enumerate(plan.precisions.items(), 1):
            at = "fp32" if at in CALIBRATED else at  # the rest is done when the whole bundle can draw
            say(f"[{number}/{len(plan.precisions)}] {component}: exporting at {at}")
            written[component] = _write_component(plan, component, at, partial, Path(notes))
            say(_told(component, written[component]))
        facts = replace(
            plan.facts,
            components={name: one.component for name, one in written.items()},
            files=files,
            tables=_tables(plan, partial),
            exported_by=_tools(),
        )
        write_facts(partial, facts)
        if plan.calibrated:
            say(f"{plan.backbone}: calibrating at {plan.precisions[plan.backbone]}")
            written[plan.backbone] = _calibrate(plan, written[plan.backbone], partial, Path(notes))
            say(_told(plan.backbone, written[plan.backbone], "fp32"))
            facts = replace(facts, components={name: one.component for name, one in written.items()})
            write_facts(partial, facts)
        picture = None
        if plan.pictures:
            picture, peak = _compare_pictures(plan, partial, Path(notes), say)
            one = written[plan.backbone]
            written[plan.backbone] = replace(one, parity_rss_bytes=max(one.parity_rss_bytes, peak))
            _write_json(partial / PICTURE, asdict(picture))
            facts = replace(facts, files=(*facts.files, *_stored(partial, [partial / PICTURE])))
            write_facts(partial, facts)
        elif plan.precisions.get(plan.backbone, "fp32") != "fp32":
            say("pictures: not checked against fp32")
    return written, picture


def _calibrate(plan: Plan, exported: Written, partial: Path, notes: Path) -> Written:
    """Quantises the backbone of the fp32 bundle in `partial`; what its component is then."""
    started, at = time.perf_counter(), plan.precisions[plan.backbone]
    prompts = _prompts(partial)
    prompts = prompts[: -plan.pictures or None] or prompts
    found = run(_job(plan, "calibrate", plan.backbone, at, partial, notes, prompts))
    component = replace(
        exported.component,
        files=_stored(partial, (partial / plan.backbone).glob(f"{Path(GRAPH).stem}*.onnx*")),
        precision=at,
        parity=Parity(tuple(found["rows"]), found["error"], found["tolerance"]),
    )
    seconds = exported.seconds + time.perf_counter() - started
    peak = max(exported.parity_rss_bytes, found["peak_rss_bytes"])
    return replace(exported, component=component, seconds=seconds, parity_rss_bytes=peak)


def _prompts(partial: Path) -> tuple[str, ...]:
    """The bundle's own, or those that come with the runtime."""
    if prompts := read_prompts(None, partial):
        return prompts
    raise ExportError(f"{PROMPTS}: holds no prompts; write some into the checkpoint's, one a line, or delete the file")


def _check_prompts(plan: Plan, partial: Path) -> None:
    """ExportError for too few prompts, before any graph is made."""
    there = len(_prompts(partial)) if plan.pictures or plan.calibrated else 0
    if there < plan.pictures:
        raise ExportError(
            f"--picture-check {plan.pictures}: {PROMPTS} of this model holds {there} prompts; give no more than that"
        )


def _compare_pictures(plan: Plan, partial: Path, notes: Path, say: Say) -> tuple[Picture, int]:
    """Of the last prompts, with which nothing was calibrated unless there are no others; the peak memory in bytes."""
    started, at, prompts = time.perf_counter(), plan.precisions[plan.backbone], _prompts(partial)[-plan.pictures :]
    say(f"pictures: drawing {len(prompts)} at {at} and as many at fp32")
    found = run(_job(plan, "picture", plan.backbone, at, partial, notes, prompts))
    picture = Picture(**{entry.name: found[entry.name] for entry in fields(Picture)})
    say(
        f"    pictures: {picture.psnr_db:.1f} dB PSNR to the backbone in fp32 (at least {picture.tolerance_db:.0f}); "
        f"{picture.steps} steps, error of the backbone {picture.error:.1e}, {time.perf_counter() - started:.0f} s"
        + ("; drawn by torch at this precision, NOT with the graph" if picture.by == "torch" else "")
    )
    return picture, found["peak_rss_bytes"]


def _stored(bundle: Path, paths: Iterable[Path]) -> tuple[Stored, ...]:
    """What is stored at paths in a bundle, sorted."""
    return tuple(
        Stored(path.relative_to(bundle).as_posix(), path.stat().st_size, sha256(path))
        for path in sorted(paths)
        if path.is_file()
    )


def _tables(plan: Plan, folder: Path) -> tuple[str, ...]:
    """Copies the shipped tables fitted to one of our own checkpoints, best first; their paths in the bundle."""
    if not plan.checkpoint.ours:
        return ()
    tables = {file.name: Table.load(file) for file in sorted(SHIPPED.glob(f"{plan.facts.name}-*.json"))}
    if tables:
        (folder / TABLES).mkdir()
    for name in tables:
        shutil.copyfile(SHIPPED / name, folder / TABLES / name)
    return tuple(f"{TABLES}/{name}" for name in best_first(tables))


def _told(component: str, one: Written, other: str = "torch") -> str:
    parity = one.component.parity
    assert parity is not None
    size = sum(stored.bytes for stored in one.component.files)
    return (
        f"    {component}: {size / 1e6:.1f} MB, error against {other} {parity.error:.1e} at rows "
        f"{', '.join(map(str, parity.rows))} (allowed {parity.tolerance:.0e}); {one.seconds:.0f} s, peak memory "
        f"{one.export_rss_bytes / 1e9:.1f} GB to export, {one.parity_rss_bytes / 1e9:.1f} GB for parity"
    )


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` that takes its place when the block ends well, and vanishes when it does not."""
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial, old = (target.parent / f".{target.name}.{os.getpid()}.{end}" for end in ("partial", "old"))
        partial.mkdir()
        try:
            yield partial
            if target.exists():
                os.replace(target, old)
            os.replace(partial, target)
        finally:
            if old.exists() and not target.exists():
                os.replace(old, target)
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _clear_remains(target: Path) -> None:
    """Removes what killed exports left beside `target`; a bundle they had moved away, and not replaced, goes back."""
    for remains in sorted(target.parent.glob(f".{target.name}.*")):
        pid, _, end = remains.name.removeprefix(f".{target.name}.").partition(".")
        if not pid.isdecimal() or end not in ("partial", "old") or _runs(int(pid), remains):
            continue
        if end == "old" and not target.exists():
            os.replace(remains, target)
        else:
            shutil.rmtree(remains)


def _runs(pid: int, remains: Path) -> bool:
    """Whether the export that made `remains` still runs. Numbers repeat: in containers they are mostly the same."""
    import psutil

    if pid == os.getpid():
        return False
    try:
        started = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
    # A minute, since systems round when a process started. A bundle that was moved away is older than the export.
    return remains.suffix == ".old" or started < remains.stat().st_mtime + 60


def write_configurations(plan: Plan, folder: Path) -> None:
    """Copies what is neither graph nor weights: the index, scheduler, tokenizers and the components' config.json."""
    source = plan.checkpoint.folder
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    absent = {"safety_checker", "feature_extractor", "image_encoder"}
    absent |= set() if plan.t5 else {"text_encoder_3", "tokenizer_3"}
    index |= {name: [None, None] for name in absent & set(index)}
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    _write_json(folder / "model_index.json", index)
    _copy(source / "scheduler", folder / "scheduler")
    if (source / PROMPTS).is_file():
        _copy(source / PROMPTS, folder / PROMPTS)
    for tokenizer in sorted(source.glob("tokenizer*")):
        if tokenizer.is_dir() and tokenizer.name not in absent:
            _copy(tokenizer, folder / tokenizer.name)
            _complete_tokenizer(folder / tokenizer.name, tokenizer)
    # The backbone and the VAE decoder say how large latents are: their configurations belong to every bundle.
    for component in {*plan.precisions, "vae_decoder", "unet" if plan.facts.family == "sd15" else "transformer"}:
        config = read_config(plan.checkpoint.of(component), component)
        if part_of(component) == "vae":  # Optimum takes another default where the scale is left out
            config |= {"scaling_factor": plan.facts.latent.scaling}
        (folder / component).mkdir()
        _write_json(folder / component / "config.json", config)


def _copy(source: Path, target: Path) -> None:
    """Copies a file or a folder. What cannot be read is an ExportError, what cannot be written an OSError."""
    try:
        entries = sorted(source.iterdir()) if source.is_dir() else None
        content = source.read_bytes() if entries is None else b""
    except OSError as error:
        raise ExportError(
            f"{source}: cannot be read ({error.strerror or error}); allow it, or download the checkpoint again"
        ) from error
    if entries is None:
        target.write_bytes(content)
        return
    target.mkdir()
    for entry in entries:
        _copy(entry, target / entry.name)


def _complete_tokenizer(folder: Path, source: Path) -> None:
    """Adds what a tokenizer folder lacks: tokenizer.json, which the runtime reads, and CLIP's older pair of files.

    transformers 5 writes only tokenizer.json; transformers 4, and so Optimum, reads CLIP's vocab.json and merges.txt.
    """
    whole = folder / "tokenizer.json"
    if not whole.exists():
        whole.write_text(_fast_tokenizer(source), encoding="utf-8")
    try:
        model = json.loads(whole.read_text(encoding="utf-8"))["model"]
        if model["type"] != "BPE" or (folder / "merges.txt").exists():
            return
        pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        merges, vocabulary = "".join(f"{pair}\n" for pair in pairs), json.dumps(model["vocab"], ensure_ascii=False)
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{source / whole.name}: damaged ({type(error).__name__}: {error}); download the checkpoint again"
        ) from error
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")


def _fast_tokenizer(source: Path) -> str:
    """The tokenizer.json that transformers makes of a folder without one."""
    from transformers import AutoTokenizer

    if (source / "vocab.json").exists():
        _check_pieces(source / "vocab.json", source / "merges.txt")
    try:
        text: str = AutoTokenizer.from_pretrained(source, use_fast=True).backend_tokenizer.to_str()
    except (OSError, ValueError, KeyError, TypeError) as error:
        line = " ".join(str(error).split())
        raise ExportError(
            f"{source}: no tokenizer can be read from it ({line:.300}); download the checkpoint again"
        ) from error
    return text


def _check_pieces(vocabulary: Path, merges: Path) -> None:
    """ExportError for files that are no vocabulary or no merges over it: tokenizers raises Exception itself on them."""
    numbers = load_json(vocabulary)
    if not all(type(number) is int and 0 <= number < 2**32 for number in numbers.values()):
        raise ExportError(f"{vocabulary}: damaged (a piece without a number); download the checkpoint again")
    try:
        text = merges.read_bytes().decode("utf-8") if merges.exists() else ""
    except UnicodeDecodeError as error:
        raise ExportError(f"{merges}: damaged ({error}); download the checkpoint again") from error
    for line in text.removesuffix("\n").split("\n") if text else ():
        pieces = line.removesuffix("\r").split(" ")
        if line.startswith("#version") or (len(pieces) == 2 and {*pieces, "".join(pieces)} <= numbers.keys()):
            continue
        raise ExportError(f"{merges}: damaged at {line!a:.60}; download the checkpoint again")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_component(plan: Plan, component: str, at: str, partial: Path, notes: Path) -> Written:
    folder = partial / component
    folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    exported, compared = (run(_job(plan, task, component, at, partial, notes)) for task in ("export", "parity"))
    for trial in folder.glob(f"{Path(TRIAL).stem}*.onnx*"):
        trial.unlink()
    return Written(
        Component(
            graph=f"{component}/{GRAPH}",
            files=_stored(partial, folder.glob(f"{Path(GRAPH).stem}*.onnx*")),
            precision=at,
            opset=plan.opset,
            inputs=_tensors(exported["inputs"]),
            outputs=_tensors(exported["outputs"]),
            parity=Parity(tuple(compared["rows"]), compared["error"], compared["tolerance"]),
            rows=plan.rows[component],
            macs=exported["macs"],
            activation_bytes=exported["activation_bytes"],
        ),
        time.perf_counter() - started,
        exported["peak_rss_bytes"],
        compared["peak_rss_bytes"],
    )


def _job(
    plan: Plan, task: str, component: str, at: str, partial: Path, notes: Path, prompts: Sequence[str] = ()
) -> Job:
    height, width = plan.size(component)
    return Job(
        task=task,
        component=component,
        checkpoint=str(plan.checkpoint.folder),
        source=str(plan.checkpoint.of(component)),
        folder=str(partial / component),
        result=str(notes / f"{component}.{task}.json"),
        precision=at,
        height=height,
        width=width,
        directions=plan.directions,
        opset=plan.opset,
        t5_tokens=plan.facts.text.t5_tokens,
        equal_tokens=plan.equal_tokens if component == plan.backbone else 0,
        target=plan.target,
        rows=plan.rows[component],
        variant=plan.checkpoint.variant if component != TINY_DECODER else None,
        random=plan.checkpoint.source.random_weights,
        prompts=tuple(prompts),
    )


def _tensors(declared: list[dict[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(one["name"], one["dtype"], tuple(one["shape"])) for one in declared)


def run(job: Job) -> dict[str, Any]:
    """Does a job in a process of its own, which ends with this one; gives what it found.

    Raises
    ------
    ExportError
        With the worker's own line, or, if it was killed or broke, with what is known of that.
    """
    result, log = Path(job.result), Path(job.result).with_suffix(".log")
    task = result.with_suffix(".job")
    task.write_text(json.dumps(asdict(job)), encoding="utf-8")
    with log.open("wb") as opened:
        process = subprocess.Popen(
            [sys.executable, "-m", "export.worker", str(task)],
            stdin=subprocess.PIPE,
            stdout=opened,
            stderr=opened,
            env=_environment(),
        )
        try:
            process.wait()
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
    if not result.exists():
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if process.returncode == NO_RESULT:
            raise ExportError(
                f"{job.component}: the {job.task} process could not write its result into {result.parent}; free some "
                "space there, or set TMPDIR to another disk; nothing was written"
            )
        if process.returncode in (-9, 137) or (tail and _ALLOCATION.search(tail[-1])):
            less = ", or --picture-check 0" if job.task == "picture" else ""
            raise ExportError(f"{job.component}: the {job.task} process {SHORT_OF_MEMORY}{less}; nothing was written")
        raise ExportError(
            f"{job.component}: the {job.task} process broke with status {process.returncode}: "
            f"{tail[-1] if tail else 'no message'}; this is a fault of the exporter; nothing was written"
        )
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "failure" in found:
        raise ExportError(found["failure"])
    return found


def _environment() -> dict[str, str]:
    """Ours, and the place these packages are imported from, wherever the command was started."""
    here = str(Path(__file__).resolve().parent.parent)
    return dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _tools() -> dict[str, str]:
    tools = {}
    for tool in _TOOLS:
        try:
            tools[tool] = version(tool)
        except PackageNotFoundError:  # onnxruntime goes by several names
            continue
    return tools
