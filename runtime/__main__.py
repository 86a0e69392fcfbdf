"""python -m runtime generate|plan|fit|solvers|inspect|devices|doctor|cache"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from epd import Step

    from .bundle import Bundle
    from .pipeline import Pipeline
    from .plan import Plan
    from .report import Report, Result


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C."""
    try:
        options = _parser().parse_args(arguments)
    except KeyboardInterrupt:  # while it is imported
        print("stopped", file=sys.stderr)
        return 130
    return carried_out(options)


def carried_out(options: argparse.Namespace) -> int:
    """Exit status of the command `options.run`, warnings and errors told in one line each on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the console's encoding has not
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    from .errors import RunError

    try:
        options.run(options)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        return 0
    except OSError as error:
        print(f"error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except MemoryError:
        print(
            "error: out of memory; give --low-memory, fewer images, a smaller size or a half-precision bundle",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    from . import advice, cachelist, devices

    parser = argparse.ArgumentParser(prog="python -m runtime", description="Pictures from a bundle, without torch.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_generate(commands)
    _add_fit(commands)

    known = commands.add_parser("solvers", help="list what --solver takes")
    known.set_defaults(run=_solvers)
    known.add_argument("--json", action="store_true", help="print a list of objects on stdout")

    look = commands.add_parser("inspect", help="show what a bundle holds")
    look.set_defaults(run=_inspect)
    look.add_argument("folder", metavar="DIR", nargs="?", help="a bundle (default: shapes-sd3)")
    look.add_argument(
        "--verify", action="store_true", help="compare the SHA-256 of every file, load every graph and tokenizer"
    )
    look.add_argument("--provider", metavar="NAME", help="load every graph on it and show where each operator runs")
    look.add_argument("--provider-option", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")
    look.add_argument("--json", action="store_true", help="print one object on stdout")

    for others in (advice, devices, cachelist):
        others.add_commands(commands)
    return parser


def _path(text: str) -> Path:
    if not text:  # which Path takes for the current folder
        raise argparse.ArgumentTypeError("is empty; give a path, or leave the option out")
    return Path(text)


def _add_fallback(command: argparse.ArgumentParser) -> None:
    either = command.add_mutually_exclusive_group()
    either.add_argument(
        "--strict",
        dest="fallback",
        action="store_const",
        const="never",
        default="limited",
        help="every node of every component on the provider, or an error (default: 90 %% of the backbone's compute)",
    )
    either.add_argument(
        "--allow-fallback",
        dest="fallback",
        action="store_const",
        const="allowed",
        help="what the provider cannot run may run on the CPU, however much; it is told",
    )


def _add_low_memory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--low-memory",
        action="store_true",
        help="CPU: fp32 weights stay in their files, and every network is released once its work is done",
    )


def _add_generate(commands: Any) -> None:
    from . import advice

    draw = commands.add_parser("generate", help="draw pictures of a prompt")
    draw.set_defaults(run=_generate)
    draw.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw; may be empty")
    draw.add_argument(
        "--prompt-file", metavar="FILE", type=Path, help="read the prompt from a file instead (- is stdin)"
    )
    draw.add_argument(
        "--from-metadata", metavar="IMAGE", type=Path, help="draw a picture again; other options override"
    )
    draw.add_argument("--model", metavar="DIR", help="a bundle (default: the small shapes-sd3 that comes along)")
    draw.add_argument("--negative-prompt", metavar="TEXT", help="what not to draw")
    draw.add_argument("--steps", type=int, metavar="N", help="intervals of the time grid")
    draw.add_argument("--guidance-scale", type=float, metavar="G", help="1 or less: no guidance, half the work")
    draw.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="guidance where LO <= sigma <= HI only (sd3: sigma from 1 to 0); outside, half the work",
    )
    draw.add_argument(
        "-s", "--seed", type=int, metavar="S", help="of the first image; image i has S + i (default: random)"
    )
    draw.add_argument("-W", "--width", type=int, metavar="PIXELS")
    draw.add_argument("-H", "--height", type=int, metavar="PIXELS")
    draw.add_argument("--num-images", type=int, metavar="B", help="images of the prompt (default 1)")
    draw.add_argument(
        "--solver",
        metavar="NAME",
        help="one of `python -m runtime solvers` (default: epd with the bundle's first table, else the bundle's own)",
    )
    draw.add_argument(
        "--table", metavar="FILE|NAME", help="table for epd: a file, or the name of a shipped or fetched one"
    )
    draw.add_argument("--calls", type=int, metavar="M", help="the bundle's best table of at most M sequential calls")
    draw.add_argument("-k", type=int, metavar="K", help="directions of epd without a table (default 2)")
    draw.add_argument(
        "--provider",
        default="cpu",
        metavar="NAME",
        help="ONNX Runtime execution provider (default cpu), or several to divide the work among: webgpu,cpu",
    )
    draw.add_argument("--provider-option", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")
    for add in (_add_fallback, _add_low_memory, advice.add_options):
        add(draw)
    draw.add_argument(
        "--directions",
        metavar="WAY",
        help="how the K points of a step run: one batch, calls in turn, async (calls at once), spread over several "
        "providers, or auto: the fastest here, measured once (default: spread for several providers; auto if it was "
        "measured before; else batch)",
    )
    draw.add_argument(
        "--preview",
        type=_path,
        metavar="PNG",
        help="after every step, write here what the (first) picture will roughly be, by the bundle's tiny VAE decoder "
        "if it has one",
    )
    draw.add_argument(
        "-o", "--output", type=_path, metavar="PNG", help="file, or folder (default: MODEL-SEED.png here)"
    )
    draw.add_argument("--json", action="store_true", help="print one object on stdout")


def _add_fit(commands: Any) -> None:
    learn = commands.add_parser(
        "fit", help="fit a solver table to a bundle, on this machine, from forward passes alone (minutes)"
    )
    learn.set_defaults(run=_fit)
    learn.add_argument("model", nargs="?", metavar="MODEL", help="a bundle (default: shapes-sd3)")
    size = learn.add_mutually_exclusive_group()
    size.add_argument("-n", type=int, metavar="N", help="intervals; the table takes N + 1 sequential calls")
    size.add_argument("--calls", type=int, metavar="M", help="sequential calls (default 6)")
    learn.add_argument("-k", type=int, metavar="K", default=2, help="directions (default 2)")
    learn.add_argument(
        "--trajectories", type=int, metavar="T", default=16, help="to learn from (default 16; 4 will do)"
    )
    learn.add_argument("--teacher-calls", type=int, metavar="C", default=120, help="calls of each (default 120)")
    learn.add_argument("--candidates", type=int, metavar="D", default=24, help="designs tried (default 24)")
    learn.add_argument(
        "--guidance-scale", type=float, nargs="+", metavar="G", default=[], help="one, or several for one table"
    )
    learn.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line (default: the bundle's own)")
    learn.add_argument("--seed", type=int, metavar="S", default=100_000, help="of the first start noise")
    learn.add_argument(
        "--provider", default="cpu", metavar="NAME", help="ONNX Runtime execution provider (default cpu)"
    )
    learn.add_argument("--provider-option", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")
    _add_fallback(learn)
    learn.add_argument(
        "--teacher",
        type=_path,
        metavar="DIR",
        help="another bundle of the model, of higher precision, whose pictures are to be met",
    )
    learn.add_argument("--work", type=_path, metavar="DIR", help="keep trajectories here, for further tables, too")
    learn.add_argument("-o", "--output", type=_path, metavar="JSON", help="table (default: MODEL-kK-callsM.json here)")
    learn.add_argument("--install", action="store_true", help="make it one of the bundle's tables, too")
    learn.add_argument("--json", action="store_true", help="print one object on stdout")


def _say_default(bundle: Bundle, name: str, calls: int) -> None:
    """Whether a table that was installed is what is drawn with when nothing is said."""
    from .facts import FILE, read_facts

    first = read_facts(bundle.folder / FILE).tables[0].rpartition("/")[2]
    told = "is its default now" if first == name else f"its default stays {first}; --calls {calls} or --table picks one"
    print(f"installed in {bundle.folder}: {told}", file=sys.stderr)


def _generate(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from . import advice, png
    from .pipeline import DEFAULT, Pipeline

    asked = _asked(options)
    pipe = Pipeline.from_pretrained(
        DEFAULT if options.model is None else options.model,
        provider=options.provider,
        provider_options=_provider_options(options),
        fallback=options.fallback,
        directions=options.directions,
        low_memory=options.low_memory,
    )
    if options.from_metadata is not None:
        asked = _recorded(options.from_metadata, pipe, asked) | asked
    if "prompt" not in asked:
        _refuse('give a PROMPT ("" is allowed), --prompt-file or --from-metadata')
    planned, choice = advice.apply(pipe, options)
    asked |= planned
    plan = pipe.plan(**asked)
    files = _files(options.output, plan, pipe.bundle)
    for file in [*files, *filter(None, [options.preview])]:
        png.check_writable(file)
    _warn_of_memory(pipe, plan)
    result = _draw(pipe, plan, options.preview)
    for file, image, seed in zip(files, result.images, plan.seeds, strict=True):
        png.save(image, file, _parameters(pipe.bundle, result, seed))
    if (placed := pipe.assignment) is not None and placed.share == 1:  # else it was told by a warning
        print(placed, file=sys.stderr)
    paths = [str(file) for file in files]
    if options.json:
        chosen = {} if choice is None else {"planned": asdict(choice)}
        print(json.dumps({"images": paths} | asdict(result.report) | chosen))
    else:
        print("\n".join(paths))
        print(_told(result.report), file=sys.stderr)


def _told(report: Report) -> str:
    return (
        f"{report.steps} steps of {report.solver} in {report.seconds['total']:.1f} s on {report.provider['ran']}: "
        f"{report.sequential_calls} sequential calls, {report.total_evaluations} total evaluations, "
        f"{report.guided_forwards} guided forwards{_memory(report)}"
    )


def _memory(report: Report) -> str:
    told = {"predicted": report.predicted_rss_bytes, "measured": report.peak_rss_bytes}
    known = [f"{how} {gigabytes(count)}" for how, count in told.items() if count is not None]
    return f"; memory: {', '.join(known)}" if known else ""


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _warn_of_memory(pipe: Pipeline, plan: Plan) -> None:
    """One line, if a drawing is predicted to take more memory than there is."""
    from .memory import available_bytes, peak_rss_bytes

    needed, free, held = pipe.predict(plan), available_bytes(), peak_rss_bytes()
    if needed is None or free is None or held is None or needed - held <= free:
        return
    lean = pipe.predict(plan, low_memory=True)
    better = "give fewer images, or a bundle of a smaller size or precision"
    if not pipe.low_memory and lean is not None and lean < needed:
        better = f"give --low-memory (about {gigabytes(lean)})"
    logging.getLogger(__name__).warning(
        "drawing takes about %s of memory, %s are available: %s", gigabytes(needed), gigabytes(free), better
    )


def _draw(pipe: Pipeline, plan: Plan, preview: Path | None) -> Result:
    from tqdm import tqdm

    from . import png
    from .pipeline import picture_of

    with tqdm(total=plan.steps, unit="step", disable=None, leave=False) as bar:  # None: on a terminal only

        def done(step: Step) -> None:
            bar.update(1)
            if preview is not None:
                x = step.denoised[:1] / plan.end_scale
                png.save(picture_of(pipe.preview(x)[0]), preview)

        return pipe.draw(plan, callback_on_step_end=done)


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Pipeline.plan` that were typed."""
    if options.prompt is not None and options.prompt_file is not None:
        _refuse("give PROMPT or --prompt-file, not both")
    asked = {
        "prompt": options.prompt if options.prompt_file is None else _read(options.prompt_file),
        "negative_prompt": options.negative_prompt,
        "height": options.height,
        "width": options.width,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "num_images_per_prompt": options.num_images,
        "seed": options.seed,
        "solver": options.solver,
        "table": options.table,
        "k": options.k,
        "calls": options.calls,
        "guidance_interval": options.guidance_interval,
    }
    if options.seed is None and options.from_metadata is None:
        import secrets

        asked["seed"] = secrets.randbits(32)
    return {name: value for name, value in asked.items() if value is not None}


def _read(file: Path) -> str:
    try:
        return (sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")).rstrip("\n")
    except UnicodeDecodeError:
        _refuse(f"{file}: not UTF-8 text")


def _recorded(file: Path, pipe: Pipeline, asked: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Pipeline.plan` that a picture of this program was drawn with, where they are not `asked`."""
    from . import png
    from .record import recorded

    prompt, negative, settings = png.read_parameters(file)
    return {"prompt": prompt, "negative_prompt": negative} | recorded(
        file, settings, pipe.bundle, asked, pipe.providers
    )


def _parameters(bundle: Bundle, result: Result, seed: int) -> str:
    from . import png
    from .record import settings

    return png.format_parameters(
        result.plan.prompt, result.plan.negative_prompt, settings(bundle, result.plan, result.report, seed)
    )


def _files(output: Path | None, plan: Plan, bundle: Bundle) -> list[Path]:
    """One path per image: the one given, with the seed before its suffix if there are several."""
    if output is None or output.is_dir():
        return [(output or Path()) / f"{bundle.facts.name}-{seed}.png" for seed in plan.seeds]
    if len(plan.seeds) == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{seed}{output.suffix}") for seed in plan.seeds]


def _provider_options(options: argparse.Namespace) -> dict[str, str]:
    from .parse import pairs

    return pairs("--provider-option", options.provider_option)


def _refuse(message: str) -> NoReturn:
    from .errors import RequestError

    raise RequestError(message)


def _fit(options: argparse.Namespace) -> None:
    from . import png
    from .fit import fit_bundle
    from .order import Order, read_prompts
    from .pipeline import DEFAULT, Pipeline

    pipe = Pipeline.from_pretrained(
        DEFAULT if options.model is None else options.model,
        provider=options.provider,
        provider_options=_provider_options(options),
        fallback=options.fallback,
    )
    if options.n is not None and options.n < 1:
        _refuse(f"-n must be 1 or more, got {options.n}")
    if "," in options.provider:
        _refuse(f"fitting runs on one provider; give one of {options.provider}")
    calls = options.n + 1 if options.n is not None else 6 if options.calls is None else options.calls
    order = Order(
        prompts=read_prompts(options.prompts, pipe.bundle.folder),
        calls=calls,
        directions=options.k,
        guidance=tuple(options.guidance_scale),
        trajectories=options.trajectories,
        teacher_calls=options.teacher_calls,
        candidates=options.candidates,
        seed=options.seed,
    )
    output = options.output or Path(f"{pipe.bundle.facts.name}-k{options.k}-calls{calls}.json")
    png.check_writable(output, ".json")
    if options.install:
        pipe.bundle.check_install(output.name)
    teacher = Pipeline.from_pretrained(options.teacher) if options.teacher is not None else None
    table, judgement = fit_bundle(pipe, order, output, options.work, teacher)
    if options.install:
        pipe.bundle.install(table, output.name)
        _say_default(pipe.bundle, output.name, calls)
    if options.json:
        from dataclasses import asdict

        print(json.dumps({"table": str(output), "installed": options.install} | asdict(judgement)))
    else:
        print(output)
        print(judgement.told(order.calls), file=sys.stderr)


def _solvers(options: argparse.Namespace) -> None:
    from .inspect import describe_solvers, solvers

    print(json.dumps({"solvers": solvers()}) if options.json else describe_solvers())


def _inspect(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from .bundle import Bundle
    from .inspect import assignments, describe, describe_assignments, predicted, verify
    from .memory import peak_rss_bytes
    from .pipeline import DEFAULT, find

    bundle = Bundle.open(find(DEFAULT if options.folder is None else options.folder))
    process = peak_rss_bytes()  # before sessions are loaded
    if options.verify:
        verify(bundle)
    if options.provider_option and options.provider is None:
        _refuse("--provider-option needs --provider NAME")
    placed = assignments(bundle, options.provider, _provider_options(options)) if options.provider is not None else []
    if options.json:
        told = {"folder": str(bundle.folder), "foreign": bundle.foreign, "verified": options.verify}
        told |= {"predicted_rss_bytes": predicted(bundle, process)}
        print(json.dumps(told | asdict(bundle.facts) | ({"assignments": list(map(asdict, placed))} if placed else {})))
    else:
        print(describe(bundle, verified=options.verify, process=process))
        if placed:
            print(describe_assignments(placed, bundle.backbone))


def leave(status: int) -> NoReturn:
    """Ends the process; without its usual end where Ctrl-C has left a provider compiling, whose library crashes it."""
    from .watched import THREAD

    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        try:
            stream.flush()
        except OSError as error:  # a pipe that nobody reads any more, as after `| head`; a full disk
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                print(f"error: standard output: {error.strerror}", file=sys.stderr)
                status = 2
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes it once more
    if any(thread.name == THREAD for thread in threading.enumerate()):
        os._exit(status)
    sys.exit(status)


def own_stdout() -> None:
    """Keeps standard output for what commands print: what libraries print there (QNN's does) goes to standard error."""
    try:
        ours = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # closed, as Python's own is then
        return
    sys.stdout = os.fdopen(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


if __name__ == "__main__":
    own_stdout()
    leave(main())
