"""The bundle: a folder of ONNX graphs and the facts a runtime needs about them. Read, checked, written.

A bundle is a diffusers-ONNX folder as Optimum lays it out, with one more file, `bundle.json`, that holds our own facts.
A folder without that file (Optimum's) is described from its configurations alone. Knows nothing of ONNX Runtime,
of tensors or of pictures; the exporter writes bundles through it and the runtime reads them through it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import epd

from . import amd
from .errors import BundleError
from .facts import (
    BACKBONE,
    FILE,
    Component,
    Defaults,
    Facts,
    Family,
    Latent,
    Source,
    Stored,
    Text,
    check_inside,
    check_name,
    check_numbers,
    read_facts,
    whole,
    write_facts,
)
from .parse import load_json, parse

PROMPTS = "prompts.txt"  # of a bundle or checkpoint: what its model is told, to fit tables with
TABLES = "tables"  # folder of the solver tables that belong to a bundle
_FAMILIES: dict[str, Family] = {"StableDiffusion3Pipeline": "sd3", "StableDiffusionPipeline": "sd15"}
# Where a checkpoint says nothing: what diffusers and Optimum draw with by default.
_STEPS: dict[Family, int] = {"sd3": 28, "sd15": 50}
_GUIDANCE: dict[Family, float] = {"sd3": 7.0, "sd15": 7.5}
_T5_TOKENS = 256
_CLIP_TOKENS = 77  # positions that CLIP's text encoders have


@dataclass(frozen=True)
class Bundle:
    """A folder and its facts. `foreign`: there was no bundle.json, the facts come from configurations."""

    folder: Path
    facts: Facts
    foreign: bool = False
    common: str = ""  # folder in it that has the tokenizers

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Bundle:
        """Reads a bundle, or a folder of Optimum's or AMD's, and checks the size of every file that is recorded.

        Their content is compared by `verify`. Of a folder without bundle.json nothing is recorded.

        Raises
        ------
        BundleError
            If the folder is none, its format is unknown, or a recorded file is missing or has another size.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise BundleError(f"{folder}: no such folder; give a bundle made by `python -m export MODEL -o DIR`")
        if not (folder / FILE).exists() and (root := amd.root_of(folder)):
            return cls(root, amd.describe(root, folder), foreign=True, common=amd.COMMON)
        if not (folder / FILE).exists():
            return cls(folder, _foreign_facts(folder), foreign=True)
        bundle = cls(folder, read_facts(folder / FILE))
        for stored in bundle.stored():
            bundle._check_size(stored)
        return bundle

    def stored(self) -> list[Stored]:
        """The files whose size and hash are recorded: graphs and their data, then the others; never the tables."""
        return [*(one for part in self.facts.components.values() for one in part.files), *self.facts.files]

    @property
    def backbone(self) -> str:
        """Name of the component that is called at every step."""
        return BACKBONE[self.facts.family]

    def graph(self, component: str, rows: int | None = None) -> Path:
        """Path of a component's graph; where it has one per row count, that of `rows`, or its first.

        Raises
        ------
        BundleError
            If the bundle has no such component.
        """
        if component not in self.facts.components:
            have = ", ".join(self.facts.components) or "none"
            raise BundleError(
                f"{self.folder}: no {component} in this bundle (it has: {have}); "
                f"export it again without --components: `python -m export {self.facts.source.id} -o DIR`"
            )
        part = self.facts.components[component]
        return self.folder / (part.graph if rows is None else part.graph_of(rows))

    def tokenizer(self, suffix: str) -> Path:
        """Folder of the tokenizer of a text encoder: "", "_2" or "_3"."""
        return self.folder / self.common / f"tokenizer{suffix}"

    def require(self, *components: str) -> None:
        """Raises BundleError for the first of `components` that is missing."""
        for component in components:
            self.graph(component)

    def sample_size(self) -> tuple[int | None, int | None]:
        """Height and width in pixels that the backbone's configuration names, which diffusers draws by default."""
        places = (f"{self.backbone}/config.json", f"{amd.NORMAL}/{self.backbone}/config.json")
        size = _config(self.folder, *places).get("sample_size")
        sides = size if isinstance(size, list) else [size, size]
        if len(sides) != 2 or not all(side is None or whole(side) for side in sides):
            raise BundleError(f"{self.folder}: {self.backbone}/config.json: sample_size is {size!r:.60}; give pixels")
        height, width = (side and side * self.facts.latent.factor for side in sides)
        return height, width

    def verify(self) -> None:
        """Compares the SHA-256 of every recorded file with the one it was written with: reads all of them.

        A bundle whose facts have no `files` records its graphs and their data only, a foreign folder nothing.

        Raises
        ------
        BundleError
            For the first file that differs.
        """
        for stored in self.stored():
            self._check_size(stored)
            if sha256(self.folder / stored.path) != stored.sha256:
                raise BundleError(
                    f"{self.folder / stored.path}: SHA-256 differs from bundle.json: "
                    "the file was changed or damaged; export or copy the bundle again"
                )

    def fingerprint(self) -> str | None:
        """SHA-256 of bundle.json's content without its tables, so that installing one makes no other bundle of it.

        None for a foreign folder.
        """
        if self.foreign:
            return None
        content = {key: value for key, value in load_json(self.folder / FILE).items() if key != "tables"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def check_install(self, name: str) -> None:
        """Raises BundleError where `install` could put no table of this name; called before the work of making one."""
        if self.foreign:
            raise BundleError(f"{self.folder}: no {FILE} to install a table in; export it with `python -m export`")
        check_inside(self.folder, f"{TABLES}/{name}")
        try:
            for folder in (self.folder, self.folder / TABLES):
                if folder.exists():
                    with tempfile.TemporaryFile(dir=folder):
                        pass
        except OSError as error:
            raise BundleError(
                f"{self.folder}: cannot be written ({error.strerror}); leave --install out, or copy the bundle"
            ) from None

    def install(self, table: epd.Table, name: str) -> None:
        """Makes a table one of this bundle's, in place of an older one of that name; see `best_first`.

        Raises
        ------
        BundleError
            The folder has no bundle.json or cannot be written, or the name cannot be one of a file in it.
        """
        self.check_install(name)
        path = f"{TABLES}/{name}"
        (self.folder / TABLES).mkdir(exist_ok=True)
        table.save(self.folder / path)
        facts = read_facts(self.folder / FILE)  # as it is now: another may have been installed since
        tables = {other: epd.Table.load(self.folder / other) for other in {*facts.tables, path}}
        write_facts(self.folder, replace(facts, tables=best_first(tables)))

    def _check_size(self, stored: Stored) -> None:
        path = self.folder / stored.path
        if not path.is_file():
            raise BundleError(f"{path}: missing; export or copy the bundle again")
        if path.stat().st_size != stored.bytes:
            raise BundleError(
                f"{path}: {path.stat().st_size} bytes where bundle.json says {stored.bytes}: "
                "truncated or replaced; export or copy the bundle again"
            )


def describe(
    folder: Path, name: str, source: Source, defaults: Defaults | None = None, t5_tokens: int = _T5_TOKENS
) -> Facts:
    """The facts that configurations alone give: of a diffusers checkpoint, or of a folder Optimum exported.

    Reads model_index.json and the config.json of scheduler, backbone, VAE (`vae` or `vae_decoder`) and tokenizer.

    Raises
    ------
    BundleError
        If the folder is no checkpoint of the two families, one of those files or a key in it is missing, or a number
        in them is none or out of range.
    """
    try:
        facts = _describe(folder, name, source, defaults, t5_tokens)
    except KeyError as error:
        raise BundleError(f"{folder}: a configuration lacks {error}; give a whole diffusers folder") from None
    except TypeError as error:
        raise BundleError(
            f"{folder}: a configuration holds another kind of value than diffusers writes ({error}); "
            "give a whole diffusers folder"
        ) from None
    checked: Facts = parse(Facts, json.loads(json.dumps(asdict(facts))), folder)
    check_name(folder, name)
    check_numbers(folder, checked)
    return checked


def _describe(folder: Path, name: str, source: Source, defaults: Defaults | None, t5_tokens: int) -> Facts:
    family = family_of(folder)
    schedule = _config(folder, "scheduler/scheduler_config.json")
    backbone = _config(folder, f"{BACKBONE[family]}/config.json")
    vae = _config(folder, *(f"{part}/config.json" for part in ("vae", "vae_decoder")))
    limits = (  # transformers writes 10^30 where a tokenizer has none
        _config(folder, f"{part}/tokenizer_config.json").get("model_max_length", _CLIP_TOKENS)
        for part in (("tokenizer", "tokenizer_2") if family == "sd3" else ("tokenizer",))
    )
    tokens = min(_CLIP_TOKENS, *limits)
    latent = Latent(
        channels=backbone["in_channels"],
        factor=2 ** (len(vae["block_out_channels"]) - 1),
        patch=backbone.get("patch_size", 1) if family == "sd3" else 1,
        scaling=vae.get("scaling_factor") or (0.18215 if family == "sd15" else 1.0),
        shift=vae.get("shift_factor") or 0.0,
        down=1 if family == "sd3" else 2 ** (len(backbone["block_out_channels"]) - 1),
    )
    prediction: Literal["epsilon", "flow"] = "flow" if family == "sd3" else "epsilon"
    if family == "sd15" and schedule.get("prediction_type", "epsilon") != "epsilon":
        raise BundleError(
            f"{folder}: prediction type {schedule['prediction_type']!r}; only epsilon is supported for SD 1.5"
        )
    return Facts(
        family=family,
        name=name,
        source=source,
        prediction=prediction,
        schedule={key: value for key, value in schedule.items() if not key.startswith("_diffusers")},
        latent=latent,
        text=Text(tokens, t5_tokens, backbone["joint_attention_dim"]) if family == "sd3" else Text(tokens),
        defaults=defaults or Defaults(None, None, _GUIDANCE[family], _STEPS[family]),
    )


def family_of(folder: Path) -> Family:
    """Family of a checkpoint, from its model_index.json; BundleError if it is none of ours."""
    index = _config(folder, "model_index.json")
    kind = str(index.get("_class_name", "")).removeprefix("ORT").removeprefix("Onnx")
    if kind not in _FAMILIES:
        raise BundleError(f"{folder}: a {kind or 'folder of no named pipeline'}; supported are {', '.join(_FAMILIES)}")
    return _FAMILIES[kind]


def best_first(tables: Mapping[str, epd.Table]) -> tuple[str, ...]:
    """Names of tables, the default first.

    That is of those known to come as close to converged pictures as the model's own solver in its own steps the one of
    the least work; without such a one, the closest. The others follow, the closest first (`Table.held_out_psnr`), then
    those never measured.
    """
    names = sorted(tables, key=lambda name: (-(tables[name].held_out_psnr or 0.0), name))
    enough = [name for name in names if tables[name].as_good_as_own_solver]
    if enough:
        first = min(enough, key=lambda name: tables[name].total_evaluations)  # of as many, the closest
        names = [first, *(name for name in names if name != first)]
    return tuple(names)


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _foreign_facts(folder: Path) -> Facts:
    if not (folder / "model_index.json").exists():
        raise BundleError(
            f"{folder}: neither {FILE} nor model_index.json: no bundle; make one with `python -m export MODEL -o DIR`"
        )
    facts = describe(folder, folder.resolve().name, Source(str(folder)))
    graphs = sorted(folder.glob("*/model.onnx"))
    components = {
        path.parent.name: Component(path.relative_to(folder).as_posix(), (), "unknown", 0, (), ()) for path in graphs
    }
    if not components:
        raise BundleError(f"{folder}: a checkpoint, not a bundle; export it with `python -m export {folder} -o DIR`")
    return replace(facts, components=components)


def _config(folder: Path, *candidates: str) -> dict[str, Any]:
    for candidate in candidates:
        if (folder / candidate).is_file():
            return load_json(folder / candidate)
    raise BundleError(f"{folder}: {candidates[0]} is missing; give a whole diffusers folder")
