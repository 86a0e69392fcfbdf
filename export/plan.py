"""What an export will do, decided and checked before anything is written: components, precisions, size, memory, disk.

Knows torch only to count parameters (`predict`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from runtime.bundle import describe
from runtime.facts import BACKBONE, REQUIRED, TINY_DECODER, Defaults, Facts
from runtime.parse import load_json

from . import ExportError
from .checkpoint import Checkpoint, read_config
from .targets import CALIBRATED, backbone_rows, choose, component_rows, precision

OPSETS = (17, 18, 20, 21, 23)
PICTURES, PICTURE_STEPS = 2, 6  # compared with those at fp32, unless told otherwise; a table has steps of its own
_BYTES = {"fp32": 4.0, "int8": 1.0, "w8a16": 1.0, "int8-weights": 1.1, "int4-weights": 0.7}  # a weight; others 2
MERGED = 64  # equal text tokens, at least, for one of them to be computed: heads a number wider cost something, too
TRIAL = (16, 24)  # latent height and width that parity is tried at, where the picture is larger


@dataclass(frozen=True)
class Options:
    """What the user may choose."""

    components: tuple[str, ...] | None = None  # None: all there are
    height: int | None = None  # pixels; None: the size the checkpoint was trained at
    width: int | None = None
    directions: int | None = None  # K, 2 if None: parity is tried at 2 and at 2 K rows, which static graphs have
    dtype: str | None = None  # one of targets.DTYPES; None: the target's
    t5: str = "none"  # none | fp16 | int8 | int4
    opset: int | None = None  # None: the target's
    target: str = "cpu"  # a key of targets.TARGETS
    rows: tuple[int, ...] | None = None  # of a static target's backbone, in place of 2 and 2 K
    vae_tile: int | None = None  # pixels, height and width: the decoder is for tiles of so many; None: for the picture
    pictures: int | None = None  # to compare with those at fp32, one a prompt, where that is possible; 0: none


@dataclass(frozen=True)
class Plan:
    """What will be exported."""

    checkpoint: Checkpoint
    facts: Facts  # without components
    precisions: dict[str, str]  # component -> precision, in the order of export
    height: int  # pixels
    width: int
    directions: int
    opset: int
    t5: bool
    target: str
    rows: dict[str, tuple[int, ...]]  # component -> row counts of its graphs, the first graph's first; (): dynamic
    pictures: int  # to compare with those at fp32; 0: none
    vae_tile: int | None = None  # pixels

    def size(self, component: str) -> tuple[int, int]:
        """Height and width in pixels that a component's graph is for."""
        if component != "vae_decoder" or self.vae_tile is None:
            return self.height, self.width
        return min(self.height, self.vae_tile), min(self.width, self.vae_tile)

    @property
    def backbone(self) -> str:
        return BACKBONE[self.facts.family]

    @property
    def equal_tokens(self) -> int:
        """Text tokens that are computed once, for they are always equal: T5's where there is none, on the CPU.

        On others a head of 65 numbers is no gain. SD 3.5 normalises heads: see `export.merged`.
        """
        count = self.facts.text.t5_tokens
        if self.t5 or self.target != "cpu" or self.backbone != "transformer" or count < MERGED:
            return 0
        return 0 if read_config(self.checkpoint.folder, self.backbone).get("qk_norm") else count

    @property
    def calibrated(self) -> bool:
        """Whether the backbone is quantised with activations, for which the rest of the bundle draws first."""
        return self.precisions.get(self.backbone) in CALIBRATED


def make(checkpoint: Checkpoint, options: Options) -> Plan:
    """Checks what the user chose against what the checkpoint is.

    Raises
    ------
    BundleError, ExportError
        If the folder is no checkpoint, a component is missing, or a size does not fit.
    """
    folder = checkpoint.folder
    dtype, opset = choose(options.target, options.dtype, options.opset, options.t5)
    rows = backbone_rows(options.target, options.directions, options.rows)
    settings = {}
    if (folder / "shapes.json").is_file():
        settings = load_json(folder / "shapes.json")
    facts = describe(folder, checkpoint.name, checkpoint.source, t5_tokens=settings.get("t5_tokens", 256))
    t5 = options.t5 != "none"
    if t5 and facts.family != "sd3":
        raise ExportError(f"--t5 {options.t5}: only Stable Diffusion 3 has a T5 text encoder; leave the option out")
    if t5 and checkpoint.source.random_weights:
        raise ExportError(f"--t5 {options.t5}: --random-weights has no T5; leave one of them out")
    text = ("text_encoder", "text_encoder_2")[: 2 if facts.family == "sd3" else 1] + (("text_encoder_3",) if t5 else ())
    tiny = () if checkpoint.tiny is None else (TINY_DECODER,)
    known = (*text, BACKBONE[facts.family], "vae_decoder", "vae_encoder", *tiny)
    chosen = options.components or known
    if strangers := [name for name in chosen if name not in known]:
        hint = " (it needs --t5)" if strangers[0] == "text_encoder_3" else ""
        raise ExportError(f"--components {strangers[0]}: this model has {', '.join(known)}{hint}")
    chosen = tuple(name for name in known if name in chosen)
    for name in chosen:
        read_config(checkpoint.of(name), name)
    _check_tiny(checkpoint, facts, chosen)
    option = "--rows" if options.rows else "-k" if options.directions and rows else None
    if option and BACKBONE[facts.family] not in chosen:
        raise ExportError(
            f"{option}: of the backbone's graphs, which are not among --components; leave one of them out"
        )
    if dtype == "w8a16" and facts.family == "sd15":  # compiles for QNN and ends the emulator at its first run
        raise ExportError("--dtype w8a16: for transformers; of a UNet give --dtype int8, or leave it out")
    whole = set(REQUIRED[facts.family]) <= set(chosen)
    precisions = {name: precision(name, dtype, options.target, options.t5) for name in chosen}
    if precisions.get(BACKBONE[facts.family]) in CALIBRATED and not whole:
        raise ExportError(
            f"--dtype {dtype}: is calibrated on drawings, for which --components lacks parts; leave it out"
        )
    height, width = _size(facts, read_config(folder, BACKBONE[facts.family]), options)
    defaults = Defaults(
        height,
        width,
        float(settings.get("guidance", facts.defaults.guidance)),
        settings.get("steps", facts.defaults.steps),
    )
    return Plan(
        checkpoint,
        replace(facts, defaults=defaults, target=options.target),
        precisions,
        height,
        width,
        options.directions or 2,
        opset,
        t5,
        options.target,
        {name: component_rows(name, rows) for name in chosen},
        _pictures(dtype, whole and not checkpoint.source.random_weights, options.pictures),
        _tile(facts, options.vae_tile, max(height, width), "vae_decoder" in chosen),
    )


def _check_tiny(checkpoint: Checkpoint, facts: Facts, chosen: tuple[str, ...]) -> None:
    """ExportError for a tiny VAE that is not wanted, or of another kind of latents."""
    if checkpoint.tiny is None:
        return
    if TINY_DECODER not in chosen:
        raise ExportError(f"--tiny-vae: makes {TINY_DECODER}, which is not among --components; leave one of them out")
    config = read_config(checkpoint.of(TINY_DECODER), TINY_DECODER)
    kind, channels = config.get("_class_name"), config.get("latent_channels")
    factor = 2 ** (len(config.get("decoder_block_out_channels", ())) - 1)
    if kind != "AutoencoderTiny" or (channels, factor) != (facts.latent.channels, facts.latent.factor):
        raise ExportError(
            f"--tiny-vae: {checkpoint.tiny} is {kind} of {channels} channels, {factor} pixels a latent; {facts.name} "
            f"needs an AutoencoderTiny of {facts.latent.channels} and {facts.latent.factor}: taesd for Stable "
            "Diffusion 1.5, taesd3 for 3"
        )


def _tile(facts: Facts, pixels: int | None, side: int, decoder: bool) -> int | None:
    """The tile that was asked for; ExportError for one that the decoder cannot have or that would change nothing."""
    factor = facts.latent.factor
    if pixels is not None and not decoder:
        raise ExportError(f"--vae-tile {pixels}: of vae_decoder, which is not among --components; leave it out")
    if pixels is not None and (pixels % factor or not 4 * factor <= pixels < side):
        raise ExportError(
            f"--vae-tile {pixels}: must be a multiple of {factor}, {4 * factor} or more, and smaller than the "
            f"picture's {side} pixels; leave it out to decode pictures whole"
        )
    return pixels


def _pictures(dtype: str, drawable: bool, asked: int | None) -> int:
    """How many pictures to compare; ExportError for some that cannot be drawn or would show nothing."""
    if asked is not None and asked < 0:
        raise ExportError(f"--picture-check {asked}: give a number of prompts, or 0 for none")
    if asked and dtype == "fp32":
        raise ExportError(f"--picture-check {asked}: the backbone is in fp32 itself; leave it out")
    if asked and not drawable:
        raise ExportError(
            f"--picture-check {asked}: pictures need every component and trained weights; leave it out, or "
            "--components or --random-weights"
        )
    return 0 if dtype == "fp32" or not drawable else PICTURES if asked is None else asked


def _size(facts: Facts, backbone: dict[str, Any], options: Options) -> tuple[int, int]:
    latent = facts.latent
    trained = backbone.get("sample_size")
    sides = trained if isinstance(trained, list) and len(trained) == 2 else [trained, trained]
    if facts.family == "sd3" and "sample_size" in backbone and type(trained) is not int:
        raise ExportError(
            f"{facts.name}: sample_size in transformer/config.json is {trained!r:.60}, diffusers builds no SD3 model "
            "without a whole number there; write the latents' size, 128 for SD3-Medium"
        )
    if None in (options.height, options.width) and not all(isinstance(side, int) for side in sides):
        raise ExportError(f"{facts.name}: names no picture size (sample_size is {trained}); give --height and --width")
    height = sides[0] * latent.factor if options.height is None else options.height
    width = sides[1] * latent.factor if options.width is None else options.width
    multiple = latent.factor * latent.patch * latent.down
    for name, side in (("height", height), ("width", width)):
        if side < multiple or side % multiple:
            below = max(multiple, side // multiple * multiple)
            raise ExportError(
                f"--{name} {side}: must be a multiple of {multiple}, such as {below} or {below + multiple}"
            )
        most = backbone.get("pos_embed_max_size")
        if most and side > most * latent.factor * latent.patch:
            raise ExportError(f"--{name} {side}: this model goes up to {most * latent.factor * latent.patch}")
    return height, width


def trial_size(facts: Facts, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels that parity is tried at: about TRIAL latents, never more than the picture has."""
    step = facts.latent.patch * facts.latent.down
    sides = (-(-side // step) * step * facts.latent.factor for side in TRIAL)
    small_height, small_width = (min(full, side) for full, side in zip((height, width), sides, strict=True))
    return small_height, small_width


def predict(plan: Plan) -> dict[str, dict[str, int]]:
    """Bytes that each component will take: on disk at most, and of memory while it is exported and parity is tried.

    An estimate, from what the processes hold at their largest: the programs themselves 0.8 GB; exporting the weights
    once and a tenth more; calibrating 10 bytes a weight (measured for SD 1.5's UNet and a CPU; for an NPU, at 0.2 G
    weights, 5); parity them in fp32 and a share of the graph's copy. What is quantised lies on disk beside what it is
    made of. What it took in truth is in the report.
    """
    from .components import TRACED, count_parameters

    predicted = {}
    for component, at in plan.precisions.items():
        parameters = count_parameters(component, plan.checkpoint.of(component), plan.facts)
        disk = int(parameters * _BYTES.get(at, 2))
        traced = int(parameters * _BYTES.get(TRACED.get(at, at), 2))
        passing = parameters * 4 if at == "bf16" else traced if traced != disk else 0
        calibrating = parameters * 10 if at in CALIBRATED else 0
        predicted[component] = {
            "parameters": parameters,
            "disk_bytes": disk + passing,
            "export_ram_bytes": 800_000_000 + max(traced * 11 // 10 + (disk if traced != disk else 0), calibrating),
            "parity_ram_bytes": 800_000_000 + parameters * 4 + disk // 2,
        }
    return predicted
