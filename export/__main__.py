"""python -m export MODEL: from a diffusers checkpoint to a bundle."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from runtime.errors import RunError
from runtime.memory import peak_rss_bytes

from . import ExportError, checkpoint, plan, targets, write

_NEEDS = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "psutil", "safetensors", "onnxruntime")
_T5_NONE = (
    "no T5 (--t5 none): 9.5 GB less, but long prompts are followed less closely and lettering in pictures is "
    "lost; give --t5 fp16 for the whole model, or int8 or int4 for half or a third of its size"
)


def parser() -> argparse.ArgumentParser:
    names = ", ".join([*checkpoint.PUBLISHED, *checkpoint.OURS])
    arguments = argparse.ArgumentParser(
        "python -m export", description="Turns a diffusers checkpoint into a bundle of ONNX graphs."
    )
    add = arguments.add_argument
    add("model", metavar="MODEL", help=f"{names}, a diffusers folder, or a hub id")
    add("-o", "--output", type=Path, metavar="DIR", help="the bundle (default: bundles/NAME)")
    add("--components", nargs="+", metavar="NAME", help="only these, such as unet or vae_decoder (default: all)")
    add("--height", type=int, help="pixels (default: what the model was trained at)")
    add("--width", type=int, help="pixels")
    add("--target", choices=targets.TARGETS, default="cpu", help="what it will run on (default: %(default)s)")
    add(
        "-k",
        "--directions",
        type=int,
        metavar="K",
        help="points per step; parity is tried at 2 and 2 K rows, and a static target has graphs of these (default: 2)",
    )
    add(
        "--rows",
        type=int,
        nargs="+",
        metavar="ROWS",
        help="static targets: a graph of the backbone for each of these row counts, such as 2 4; 1 draws unguided",
    )
    add(
        "--dtype",
        choices=targets.DTYPES,
        help="of the backbone: fp16 and bf16 compute so, int8 and w8a16 in 8 bits with calibrated activations of 8 or "
        "16, int8-weights and int4-weights only store their linear layers so; encoders and VAE then keep fp16 weights, "
        "and compute in fp32 (default: the target's; fp32 for cpu)",
    )
    add(
        "--t5",
        choices=("none", "fp16", "int8", "int4"),
        default="none",
        help="Stable Diffusion 3's third text encoder, by how its weights are stored (default: none)",
    )
    add(
        "--picture-check",
        type=int,
        metavar="N",
        help=f"prompts whose pictures are compared with those at fp32, on the CPU (default: {plan.PICTURES}; 0: none)",
    )
    add(
        "--vae-tile",
        type=int,
        metavar="PIXELS",
        help="a VAE decoder for tiles of so many pixels, which are blended: less memory for large pictures, which "
        "then differ a little (default: for whole pictures)",
    )
    add(
        "--tiny-vae",
        metavar="NAME",
        help=f"a tiny VAE decoder beside the whole one, for previews: {', '.join(checkpoint.TINY)}, a folder, or a hub "
        "id",
    )
    add("--opset", type=int, choices=plan.OPSETS, help="of the graphs (default: the target's; 23 for cpu)")
    add("--revision", help="branch, tag or commit on the hub")
    add("--variant", help="weight files to take, such as fp16")
    add("--cache-dir", metavar="DIR", help="where downloads are kept (default: HF_HOME)")
    add("--offline", action="store_true", help="take only what was downloaded before")
    add("--random-weights", action="store_true", help="the architecture without its weights, for measuring a machine")
    add("--dry-run", action="store_true", help="say what it would take of disk and memory, and stop")
    add("--overwrite", action="store_true", help="replace the bundle that is there")
    add("--json", action="store_true", help="print one JSON object on standard output")
    return arguments


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        print(f"export: {', '.join(missing)} not installed; pip install '.[cpu,export]'", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="export-") as scratch:
            report = run(given, Path(scratch))
    except (ExportError, RunError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"export: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("export: stopped; nothing was written", file=sys.stderr)
        return 130
    if given.json:
        print(json.dumps(report))
    return 0


def run(given: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """What the arguments ask for; the report that --json prints."""
    started = time.perf_counter()
    targets.backbone_rows(given.target, given.directions, given.rows)
    if given.output and not given.dry_run:
        write.check_target(given.output, given.overwrite)
    hub = checkpoint.Hub(given.revision, given.cache_dir, given.offline)
    source = (
        checkpoint.random(given.model, scratch / given.model, given.tiny_vae)
        if given.random_weights
        else checkpoint.find(given.model, hub, given.variant)
    )
    _refuse_ignored(given, source)
    if given.tiny_vae is not None and source.tiny is None:
        source = replace(source, tiny=checkpoint.find_tiny(given.tiny_vae, hub))
    planned = plan.make(
        source,
        plan.Options(
            tuple(given.components) if given.components else None,
            given.height,
            given.width,
            given.directions,
            given.dtype,
            given.t5,
            given.opset,
            given.target,
            tuple(given.rows) if given.rows else None,
            given.vae_tile,
            given.picture_check,
        ),
    )
    target = given.output or Path("bundles") / source.name
    if planned.facts.family == "sd3" and not planned.t5 and given.model not in checkpoint.OURS:
        say(_T5_NONE)
    if planned.equal_tokens and planned.backbone in planned.precisions:
        say(
            f"no T5: the {planned.equal_tokens} zero vectors in its place are computed as one token, with the same "
            "result; the transformer takes no others there"
        )
    if given.random_weights:
        say("random weights: the bundle measures a machine, its pictures mean nothing")
    if given.dry_run:
        return dry_run(planned, target)
    write.check_target(target, given.overwrite)
    source.fetch(tuple(planned.precisions))
    written, picture = write.write(planned, target.resolve(), given.overwrite, say)
    seconds = time.perf_counter() - started
    peak = max(peak_rss_bytes() or 0, *(max(one.export_rss_bytes, one.parity_rss_bytes) for one in written.values()))
    say(f"{target}: {planned.width}x{planned.height}, {seconds:.0f} s, peak memory {peak / 1e9:.1f} GB in one process")
    return {
        "bundle": str(target),
        "target": planned.target,
        "components": [
            {
                "component": name,
                "file": one.component.graph,
                "bytes": sum(stored.bytes for stored in one.component.files),
                "precision": one.component.precision,
                "rows": one.component.rows,
                "parity": vars(one.component.parity),
                "seconds": one.seconds,
                "export_rss_bytes": one.export_rss_bytes,
                "parity_rss_bytes": one.parity_rss_bytes,
            }
            for name, one in written.items()
        ],
        "picture": picture and vars(picture),
        "seconds": seconds,
        "peak_rss_bytes": peak,
    }


def _refuse_ignored(given: argparse.Namespace, source: checkpoint.Checkpoint) -> None:
    """ExportError for an option about downloads or weight files where there are none."""
    hub = {"--revision": given.revision, "--cache-dir": given.cache_dir, "--offline": given.offline}
    if given.tiny_vae is not None and not Path(given.tiny_vae).is_dir():
        hub = {"--revision": given.revision}  # the others are for the tiny VAE, too
    options = {} if source.hub else hub
    if given.random_weights:
        options |= {"--variant": given.variant}
    for option, value in options.items():
        if value:
            why = (
                "--random-weights takes nothing from the hub and reads no weights"
                if given.random_weights
                else f"{given.model} is not taken from the hub"
            )
            raise ExportError(f"{option}: {why}; leave it out")


def dry_run(planned: plan.Plan, target: Path) -> dict[str, object]:
    predicted = plan.predict(planned)
    for name, one in predicted.items():
        say(
            f"{name}: {planned.precisions[name]}, {one['disk_bytes'] / 1e9:.2f} GB of disk, memory about "
            f"{one['export_ram_bytes'] / 1e9:.1f} GB to export, {one['parity_ram_bytes'] / 1e9:.1f} GB for parity"
        )
    if planned.pictures:
        say(
            f"picture check: {planned.pictures} pictures in fp32 by torch, then with the graph, on this CPU: minutes "
            "at 512x512 for a model of full size, and its weights in fp32 in memory; --picture-check 0 leaves it out"
        )
    if planned.calibrated:
        say(
            f"{planned.backbone}: exported in fp32 first, then calibrated on drawings, on this CPU: as long as about "
            "30 pictures take, or 6 at full size"
        )
    disk = sum(one["disk_bytes"] for one in predicted.values())
    ram = max(max(one["export_ram_bytes"], one["parity_ram_bytes"]) for one in predicted.values())
    say(f"{target}: {disk / 1e9:.2f} GB of disk, memory about {ram / 1e9:.1f} GB; nothing was written")
    return {"bundle": str(target), "components": predicted, "disk_bytes": disk, "ram_bytes": ram}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
