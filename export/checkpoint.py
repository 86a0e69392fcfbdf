"""Finds the checkpoint that MODEL means: a local folder, one of ours, or one on the hub. Knows nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapes
from runtime.facts import TINY_DECODER, Source
from runtime.parse import load_json

from . import ExportError, architectures

PUBLISHED = {
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
OURS = ("shapes-sd3", "shapes-sd15")
TINY = {"taesd": "madebyollin/taesd", "taesd3": "madebyollin/taesd3"}  # of Stable Diffusion 1.5 and 3
_OWN_FOLDER = Path(shapes.__file__).parent / "checkpoints"
_TINY_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
_CONFIGURATIONS = ("model_index.json", "shapes.json", "scheduler/*", "tokenizer*/*", "*/config.json")


@dataclass(frozen=True)
class Hub:
    """How the hub is asked."""

    revision: str | None = None
    cache_dir: str | None = None
    offline: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder; its weights may still be on the hub (`fetch`)."""

    folder: Path
    name: str
    source: Source
    variant: str | None = None
    hub: Hub | None = None  # None: everything is in the folder
    tiny: Path | None = None  # the folder of a tiny VAE, which is its own checkpoint

    def of(self, component: str) -> Path:
        """The folder in which `part_of(component)` is."""
        return self.tiny if component == TINY_DECODER and self.tiny else self.folder

    @property
    def ours(self) -> bool:
        """Whether it is one that comes along, and no folder of the same name, which may hold other weights."""
        return self.folder.parent == _OWN_FOLDER

    def fetch(self, components: tuple[str, ...]) -> None:
        """Downloads the weights of components where they are not here yet, and makes sure that they are.

        Raises
        ------
        ExportError
            If they cannot be had.
        """
        parts = sorted({part_of(component) for component in components if component != TINY_DECODER})
        files = f"*.{self.variant}*.safetensors" if self.variant else "*.safetensors"
        if self.hub is not None:
            _download(
                self.source.id,
                self.hub,
                [f"{part}/{name}" for part in parts for name in (files, "*.index*.json")],
                [] if self.variant else ["*.fp16*", "*non_ema*"],
            )
        for part in parts:
            if not self.source.random_weights and not any((self.folder / part).glob(files)):
                raise ExportError(
                    f"{self.folder / part}: no {files} in it: the checkpoint lacks this component's weights "
                    "(pickled .bin files are not read); give a whole one, or --components without it"
                )


def part_of(component: str) -> str:
    """The checkpoint's folder of a component."""
    if component == TINY_DECODER:
        return "."
    return "vae" if component.startswith("vae") else component


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """A component's config.json; ExportError if it is missing."""
    file = folder / part_of(component) / "config.json"
    if not file.is_file() and component == TINY_DECODER:
        raise ExportError(f"--tiny-vae: {file} is missing; give {', '.join(TINY)}, a folder of a tiny VAE, or a hub id")
    if not file.is_file():
        raise ExportError(
            f"{file}: missing, so the checkpoint has no {component}; "
            "give a whole diffusers folder, or --components without it"
        )
    return load_json(file)


def find(model: str, hub: Hub, variant: str | None) -> Checkpoint:
    """The checkpoint that `model` names, its configurations downloaded if it is on the hub.

    Raises
    ------
    ExportError
        If there is none, or the hub does not give it.
    """
    if model in OURS:
        folder = _OWN_FOLDER / model
        if not folder.is_dir():
            raise ExportError(f"{folder}: no such folder; train it with `python -m shapes.train`")
        return Checkpoint(folder, model, Source(model), variant)
    if Path(model).is_dir():
        return Checkpoint(Path(model).resolve(), Path(model).resolve().name, Source(Path(model).as_posix()), variant)
    identity = PUBLISHED.get(model, model)
    if identity.count("/") != 1 or identity.startswith((".", "/", "~")) or "\\" in identity:
        raise ExportError(
            f"{model}: no such folder and no known model; give {', '.join([*PUBLISHED, *OURS])}, "
            "a diffusers folder, or a hub id such as owner/name"
        )
    folder = _download(identity, hub, list(_CONFIGURATIONS), [])
    name = model if model in PUBLISHED else identity.split("/")[1]
    return Checkpoint(folder, name, Source(identity, folder.name), variant, hub)


def find_tiny(name: str, hub: Hub) -> Path:
    """The folder of the tiny VAE that `name` means, downloaded if it is on the hub; ExportError if it cannot be had."""
    if Path(name).is_dir():
        return Path(name).resolve()
    return _download(TINY.get(name, name), Hub(None, hub.cache_dir, hub.offline), [*_TINY_FILES], [])


def random(model: str, folder: Path, tiny: str | None = None) -> Checkpoint:
    """A checkpoint without weights in `folder`: the configurations of a named architecture, and of a tiny VAE."""
    if model not in architectures.CONFIGURATIONS:
        raise ExportError(f"--random-weights knows {', '.join(architectures.CONFIGURATIONS)}, not {model}")
    architectures.write(model, folder)
    if tiny is not None and tiny not in TINY:
        raise ExportError(f"--tiny-vae {tiny}: --random-weights knows {', '.join(TINY)}")
    if tiny is not None:
        architectures.write_tiny(tiny, folder / TINY_DECODER)
    source = Source(PUBLISHED[model], random_weights=True)
    return Checkpoint(folder, model, source, tiny=None if tiny is None else folder / TINY_DECODER)


def _download(identity: str, hub: Hub, allow: list[str], ignore: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                identity,
                revision=hub.revision,
                cache_dir=hub.cache_dir,
                local_files_only=hub.offline,
                allow_patterns=allow,
                ignore_patterns=ignore,
            )
        )
    except errors.GatedRepoError:
        reason = f"gated; accept its licence at https://huggingface.co/{identity} and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {hub.revision}"
    except errors.RepositoryNotFoundError:
        reason = "not on the hub, or private: check the id, or set HF_TOKEN"
    except errors.HFValidationError:
        reason = "no valid hub id, and no folder of that name exists"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = "not in the cache, and the hub was not reached or not asked; connect and leave out --offline"
    except (errors.HfHubHTTPError, OSError) as error:
        reason = f"cannot be downloaded ({' '.join(str(error).split()):.200}); try again"
    raise ExportError(f"{identity}: {reason}")
