"""AMD's prebuilt Stable Diffusion 3 (and 3.5) Medium for its NPU, as a model: how its folder is laid out.

    common/     scheduler, tokenizer{,_2,_3}, text_encoder{,_2,_3}, vae_decoder/[SIZE|dynamic/]dd/replaced.onnx
    normal/     transformer/[SIZE_83|dynamic/]dd/replaced.onnx

A `dd` folder holds a graph of AMD's own operators, with a folder `cache` or `.cache` of compiled pieces, and runs on
one release of Ryzen AI. The transformer takes 2 rows, 77 CLIP and 83 T5 tokens. The layout is what AMD's published
programs read (amd/sd-sandbox, lemonade-sdk/ryzenai-sd-server, 2025 to 2026); the folders themselves are gated and were
not seen. Knows nothing of ONNX Runtime.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import BundleError
from .facts import Component, Defaults, Facts, Latent, Source, Text, check_name, check_numbers
from .parse import load_json, parse

TARGET = "ryzenai"  # of the facts of such a folder; the provider's name, too
COMMON, NORMAL = "common", "normal"
ROWS = 2  # that the transformer takes: the guidance halves of one point
_CLIP_TOKENS, _T5_TOKENS = 77, 83
_DD = "dd/replaced.onnx"
_PLAIN = ("model.onnx", "{}.onnx", "{}_fp16.onnx", _DD)  # {}: the component
# Stable Diffusion 3 Medium's own numbers, where the folder has no configuration of them.
_TRANSFORMER = {"in_channels": 16, "patch_size": 2, "joint_attention_dim": 4096}
_VAE = {"block_out_channels": [128, 256, 512, 512], "scaling_factor": 1.5305, "shift_factor": 0.0609}
_SCHEDULE = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
_STEPS, _GUIDANCE = 28, 7.0
log = logging.getLogger(__name__)


def root_of(folder: Path) -> Path | None:
    """The folder of AMD's that this one is, or that it is the folder of one size of; None: it is none."""
    for root in (folder, *folder.absolute().parents[:3]):
        if (root / NORMAL / "transformer").is_dir() and (root / COMMON).is_dir():
            return root
    return None


def describe(root: Path, asked: Path) -> Facts:
    """The facts of AMD's folder `root`; `asked` may be the folder of one size in it (`normal/transformer/512_83`).

    Raises
    ------
    BundleError
        A piece is missing, or a configuration holds something else than diffusers writes.
    """
    room = _room(root, asked)
    size = re.match(r"\d+", room)
    side = int(size[0]) if size else None
    net = _config(root / NORMAL / "transformer", _TRANSFORMER)
    vae = _config(root / COMMON / "vae_decoder", _VAE)
    graphs = {"transformer": (f"{NORMAL}/transformer/{room}/{_DD}", (ROWS,))} | _others(root, room, side)
    t5 = re.search(r"_(\d+)$", room)
    try:
        clip = _clip_tokens(root)
        facts = Facts(
            family="sd3",
            name=root.resolve().name,
            source=Source(str(root)),
            prediction="flow",
            schedule=_config(root / COMMON / "scheduler", _SCHEDULE, "scheduler_config.json"),
            latent=Latent(
                channels=net["in_channels"],
                factor=2 ** (len(vae["block_out_channels"]) - 1),
                patch=net["patch_size"],
                scaling=vae["scaling_factor"],
                shift=vae["shift_factor"],
            ),
            text=Text(clip, int(t5[1]) if t5 else _T5_TOKENS, net["joint_attention_dim"]),
            defaults=Defaults(side, side, _GUIDANCE, _STEPS),
            components={
                name: Component(path, (), "unknown", 0, (), (), rows=rows) for name, (path, rows) in graphs.items()
            },
            target=TARGET,
        )
    except TypeError as error:
        raise BundleError(f"{root}: a configuration holds another kind of value ({error}); download it again") from None
    checked: Facts = parse(Facts, json.loads(json.dumps(asdict(facts))), root)
    check_name(root, checked.name)
    check_numbers(root, checked)
    return checked


def made_for(root: Path) -> str | None:
    """The Ryzen AI release that the folder's README names, such as `1.7.1`; None where it names none, or several."""
    try:
        text = (root / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    named = set(re.findall(r"ryzen\s?ai(?:\s+software)?\s+(?:version\s+)?v?(\d+\.\d+(?:\.\d+)*)", text.lower()))
    return named.pop() if len(named) == 1 else None


def is_compiled(graph: Path) -> bool:
    """Whether it is one of AMD's operators, for the NPU: the others are plain ONNX."""
    return graph.as_posix().endswith(_DD)


def compiled_pieces(graph: Path) -> Path:
    """The folder of compiled pieces beside a graph of AMD's operators; BundleError if it is missing."""
    for name in ("cache", ".cache"):
        if (graph.parent / name).is_dir():
            return graph.parent / name
    raise BundleError(
        f"{graph.parent}: no folder cache or .cache of compiled pieces beside the graph; download it again"
    )


def sizes(root: Path) -> list[str]:
    """Names of the folders that hold a transformer, `dynamic` first, then the largest size."""
    found = [graph.parent.parent.name for graph in (root / NORMAL / "transformer").glob(f"*/{_DD}")]
    numbers = {name: int("0" + re.findall(r"^\d*", name)[0]) for name in found}
    flat = [""] if (root / NORMAL / "transformer" / _DD).is_file() else []
    return sorted(found, key=lambda name: (name != "dynamic", -numbers[name], name)) + flat


def _room(root: Path, asked: Path) -> str:
    """The folder under `transformer` whose graph is taken."""
    have = sizes(root)
    if not have:
        raise BundleError(
            f"{root / NORMAL / 'transformer'}: no */{_DD} in it; AMD's folder is not whole, download it again"
        )
    below = asked.absolute().relative_to(root.absolute()).parts  # not resolved: it may be a link
    if len(below) < 3:
        if len(have) > 1:
            others = ", ".join(str(root / NORMAL / "transformer" / name) for name in have[1:])
            log.warning("%s: its graphs of %s are taken; for others give --model %s", root.name, have[0], others)
        return have[0]
    if below[2] not in have:
        raise BundleError(f"{asked}: no {_DD} in it; choose from {', '.join(have)}")
    return below[2]


def _clip_tokens(root: Path) -> int:
    tokenizers = (_config(root / COMMON / name, {}, "tokenizer_config.json") for name in ("tokenizer", "tokenizer_2"))
    limits: list[int] = [one.get("model_max_length", _CLIP_TOKENS) for one in tokenizers]
    return min(_CLIP_TOKENS, *limits)


def _others(root: Path, room: str, side: int | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Component -> its graph and row counts; of T5 only where there is one for ONNX Runtime."""
    sized = [f"vae_decoder/{side}/{_DD}"] if side else []
    decoders = [*sized, f"vae_decoder/dynamic/{_DD}", f"vae_decoder/{_DD}"]
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae_decoder"):
        places = decoders if name == "vae_decoder" else [f"{name}/{plain.format(name)}" for plain in _PLAIN]
        path = next((path for path in places if (root / COMMON / path).is_file()), None)
        if path is not None:
            found[name] = f"{COMMON}/{path}", () if name == "vae_decoder" else (1,)
        elif name == "text_encoder_3":
            log.warning(
                "%s: no T5 for ONNX Runtime in it (releases before 1.8 have one for torch): its tokens are zeros, "
                "and the pictures are not those of AMD's own program", root.name,
            )  # fmt: skip
        else:
            raise BundleError(f"{root / COMMON / name}: none of {', '.join(places)}; AMD's folder is not whole")
    return found


def _config(folder: Path, known: Mapping[str, Any], name: str = "config.json") -> dict[str, Any]:
    """A configuration; what it does not say, or where there is none, is as `known`."""
    found = load_json(folder / name) if (folder / name).is_file() else {}
    return {**known, **{key: value for key, value in found.items() if value is not None}}
