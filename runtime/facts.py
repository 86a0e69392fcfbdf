"""The facts of a bundle: what `bundle.json` holds, read and written, every path, name and number in it checked.

Knows nothing of the folder they stand in; `runtime.bundle` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from epd.table import write_whole

from .errors import BundleError
from .parse import load_json, parse

FORMAT = 1
FILE = "bundle.json"
PICTURE = "picture.json"  # beside it: programs older than it take it for any other file
_MOST = 2**20  # of any whole number below: more is a damaged file

Family = Literal["sd3", "sd15"]
BACKBONE: dict[Family, str] = {"sd3": "transformer", "sd15": "unet"}
TINY_DECODER = "tiny_vae_decoder"  # of previews; takes latents as the backbone has them
REQUIRED: dict[Family, tuple[str, ...]] = {
    "sd3": ("text_encoder", "text_encoder_2", "transformer", "vae_decoder"),
    "sd15": ("text_encoder", "unet", "vae_decoder"),
}


@dataclass(frozen=True)
class Tensor:
    """A declared graph input or output."""

    name: str
    dtype: str  # numpy's name: float32, float16, int64, ...
    shape: tuple[int | str, ...]  # a string names a dynamic axis


@dataclass(frozen=True)
class Stored:
    """A file of the bundle."""

    path: str  # relative to the bundle, forward slashes
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Parity:
    """Largest difference from torch over the component's outputs, relative to each output's largest magnitude."""

    rows: tuple[int, ...]  # the row counts tried, each with a different timestep per row where there is one
    error: float
    tolerance: float  # above it the export fails


@dataclass(frozen=True)
class Component:
    """One network: its graphs and their data, what it was exported as, what it takes and gives.

    One graph takes any number of rows, or there is one graph per row count, all over the data file of the first:
    `model.onnx` has `rows[0]` rows, `model_rows4.onnx` beside it 4.
    """

    graph: str  # path of the .onnx file, relative to the bundle; of the first where there are several
    files: tuple[Stored, ...]
    precision: str  # fp32 | fp16 | bf16 | int8 | w8a16 | fp16-weights | int8-weights | int4-weights
    opset: int
    inputs: tuple[Tensor, ...]  # the first axis is named, also where the graphs fix it: see `rows`
    outputs: tuple[Tensor, ...]
    parity: Parity | None = None  # None: exported with the check switched off, or not by us
    rows: tuple[int, ...] = ()  # row counts of static graphs, one graph each; empty: the row axis is dynamic
    macs: Mapping[str, int] = field(default_factory=dict)  # node name -> multiply-accumulates for one row
    activation_bytes: int | None = None  # of tensors that live at once, at most, for one row; None: not counted

    def graph_of(self, rows: int) -> str:
        """Path of the static graph of so many rows, one of `self.rows`, relative to the bundle."""
        return self.graph if rows == self.rows[0] else f"{self.graph.removesuffix('.onnx')}_rows{rows}.onnx"


@dataclass(frozen=True)
class Latent:
    """The latent space. A picture of height x width has (channels, height / factor, width / factor) latents."""

    channels: int
    factor: int  # pixels per latent, each axis
    patch: int  # latents per token of the backbone, each axis (1 for a UNet)
    scaling: float  # latent = (vae - shift) * scaling
    shift: float
    down: int = 1  # the backbone halves its latents this many times over: sizes must divide by factor * patch * down


@dataclass(frozen=True)
class Text:
    """How prompts become conditioning."""

    clip_tokens: int
    t5_tokens: int = 0  # SD3: T5's tokens, zero vectors where there is no T5
    joint_width: int = 0  # SD3: width of a conditioning token, to which CLIP's are zero-padded


@dataclass(frozen=True)
class Defaults:
    """What `generate` does when told nothing."""

    height: int | None  # pixels; None: any size
    width: int | None
    guidance: float
    steps: int
    solver: str = "euler"


@dataclass(frozen=True)
class Source:
    """Where the weights came from."""

    id: str
    revision: str | None = None
    random_weights: bool = False  # True: an architecture without its training; its pictures mean nothing


@dataclass(frozen=True)
class Picture:
    """Pictures of the bundle's own prompts, drawn on the CPU, against those with the backbone in fp32 by torch."""

    psnr_db: float  # mean over the pictures
    tolerance_db: float  # below it the export fails
    error: float  # of the backbone in these drawings, relative to the largest magnitude of its answers
    prompts: int  # one picture of each
    steps: int
    by: Literal["graph", "torch"] = "graph"  # torch at the same precision: the CPU has no kernels for the graph


@dataclass(frozen=True)
class Facts:
    """What `bundle.json` holds, beside its format version; `picture` is in a file of its own, PICTURE."""

    family: Family
    name: str
    source: Source
    prediction: Literal["epsilon", "flow"]
    schedule: Mapping[str, Any]  # the scheduler's configuration, as diffusers writes it
    latent: Latent
    text: Text
    defaults: Defaults
    components: Mapping[str, Component] = field(default_factory=dict)
    files: tuple[Stored, ...] = ()  # every other file: configurations, tokenizers, prompts; not tables
    tables: tuple[
        str, ...
    ] = ()  # solver tables that belong to it, paths relative to the bundle; the first is the default
    exported_by: Mapping[str, str] = field(default_factory=dict)  # package -> version
    target: str = "cpu"  # what it was exported for, a key of export.targets.TARGETS
    picture: Picture | None = None  # None: never compared


def read_facts(file: Path) -> Facts:
    """Reads and validates a bundle.json; BundleError names the field that is wrong."""
    content = load_json(file)
    if content.get("format") != FORMAT:
        raise BundleError(
            f"{file}: format {content.get('format')!r}, this program reads {FORMAT}; "
            "export again, or use the version that wrote it"
        )
    content = {key: value for key, value in content.items() if key != "format"}
    facts: Facts = parse(Facts, content, file)
    note = file.with_name(PICTURE)
    if PICTURE in {one.path for one in facts.files} and note.is_file():  # if not, `Bundle.open` says so
        facts = replace(facts, picture=parse(Picture, load_json(note), note))
    parts = facts.components.values()
    for name, part in facts.components.items():
        listed = {one.path for one in part.files}
        if any(not whole(rows) or part.graph_of(rows) not in listed for rows in part.rows):
            raise BundleError(
                f"{file}: components.{name}.rows is {list(part.rows)}, but not all of these graphs are there"
            )
        if part.activation_bytes is not None and part.activation_bytes < 0:
            raise BundleError(
                f"{file}: components.{name}.activation_bytes is {part.activation_bytes}; export or copy it again"
            )
    stored = [*(one for part in parts for one in part.files), *facts.files]
    for path in (*(part.graph for part in parts), *(one.path for one in stored), *facts.tables):
        check_inside(file, path)
    check_name(file, facts.name)
    check_numbers(file, facts)
    return facts


def write_facts(folder: Path, facts: Facts) -> None:
    """Writes bundle.json, so that no reader ever sees half of it; OSError names it if it cannot be written."""
    content = {"format": FORMAT} | asdict(facts)
    if facts.target == "cpu":  # the default; programs older than targets read the bundle too
        del content["target"]
    del content["picture"]
    for part in content["components"].values():
        if part["activation_bytes"] is None:
            del part["activation_bytes"]
    write_whole(folder / FILE, (json.dumps(content, indent=1) + "\n").encode())


def check_numbers(file: Path, facts: Facts) -> None:
    """Ranges of the numbers that the runtime counts with, and the kind of those in the schedule."""
    latent, text, defaults, schedule = facts.latent, facts.text, facts.defaults, facts.schedule
    sd3 = facts.family == "sd3"
    sizes = {f"latent.{name}": getattr(latent, name) for name in ("channels", "factor", "patch", "down")}
    sizes |= {f"defaults.{name}": getattr(defaults, name) for name in ("height", "width", "steps")}
    train_steps, offset = schedule.get("num_train_timesteps", 1000), schedule.get("steps_offset", 0)
    shift = schedule.get("shift", 1.0) if sd3 else 1.0
    checks = [(name, value, value is None or whole(value)) for name, value in sizes.items()]
    checks += [
        ("latent.scaling", latent.scaling, _number(latent.scaling) and latent.scaling > 0),
        ("latent.shift", latent.shift, _number(latent.shift)),
        ("text.clip_tokens", text.clip_tokens, whole(text.clip_tokens, 2)),  # the first and the last are its own
        ("text.t5_tokens", text.t5_tokens, whole(text.t5_tokens, 0)),
        ("text.joint_width", text.joint_width, whole(text.joint_width, 1 if sd3 else 0)),
        ("defaults.guidance", defaults.guidance, _number(defaults.guidance)),
        ("schedule.num_train_timesteps", train_steps, whole(train_steps)),
        ("schedule.steps_offset", offset, whole(offset, 0)),
        ("schedule.shift", shift, _number(shift) and shift > 0),
    ]
    betas = () if sd3 else ("beta_start", "beta_end")
    checks += [(f"schedule.{name}", schedule[name], _number(schedule[name])) for name in betas if name in schedule]
    for name, value, fits in checks:
        if not fits:
            raise BundleError(f"{file}: {name} is {value!r:.60}, out of its range; export or copy the bundle again")


def whole(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value <= _MOST


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MOST  # which NaN is not


def check_name(file: Path, name: str) -> None:
    """A bundle's name begins those of the files made with it, and stands in them."""
    if not name.isprintable() or set(name) & set('/\\:*?"<>|') or name.strip(" .") != name or not 0 < len(name) <= 100:
        raise BundleError(f"{file}: the name {name!a:.60} is not one plain file name; give it another")


def check_inside(file: Path, path: str) -> None:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path:
        raise BundleError(f"{file}: the path {path!r} leads out of the bundle")
