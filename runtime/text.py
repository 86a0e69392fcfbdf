"""Prompts to conditioning: tokens, text encoders, and how each family puts their outputs together.

Knows nothing of solvers or pictures. Tokenizers come from the bundle's own folders, never from the network.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors

from .bundle import Bundle
from .errors import BundleError
from .parse import load_json
from .session import Session

Floats = NDArray[Any]  # float32 or float16, as the graph gives them
log = logging.getLogger(__name__)

_START, _END = "<|startoftext|>", "<|endoftext|>"  # where the settings name no others
_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
# Words of CLIP's byte-pair encoding: contractions, runs of letters, single digits, runs of anything else.
_CLIP_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def conditioning(bundle: Bundle, open_session: Callable[[str], Session], prompts: Sequence[str]) -> dict[str, Floats]:
    """What the backbone is told of B prompts, by the name of its input. Each text encoder is released once it has run.

    Returns
    -------
    dict
        SD1.5: `encoder_hidden_states` (B, clip_tokens, width).
        SD3: `encoder_hidden_states` (B, clip_tokens + t5_tokens, joint_width) and `pooled_projections` (B, width).

    Raises
    ------
    BundleError
        A tokenizer or text encoder is missing or damaged.
    """
    return (_sd3 if bundle.facts.family == "sd3" else _sd15)(bundle, open_session, prompts)


def _sd15(bundle: Bundle, open_session: Callable[[str], Session], prompts: Sequence[str]) -> dict[str, Floats]:
    ids = tokenize(bundle.tokenizer(""), prompts, bundle.facts.text.clip_tokens)
    with open_session("text_encoder") as encoder:
        return {"encoder_hidden_states": encoder(input_ids=ids, want=["last_hidden_state"])["last_hidden_state"]}


def _sd3(bundle: Bundle, open_session: Callable[[str], Session], prompts: Sequence[str]) -> dict[str, Floats]:
    text = bundle.facts.text
    states, pooled = [], []
    for suffix in ("", "_2"):
        ids = tokenize(bundle.tokenizer(suffix), prompts, text.clip_tokens)
        with open_session(f"text_encoder{suffix}") as encoder:
            state = _second_to_last(encoder)
            outputs = encoder(input_ids=ids, want=["text_embeds", state])
        states.append(outputs[state])
        pooled.append(outputs["text_embeds"])
    clip = np.concatenate(states, axis=2)  # (B, clip_tokens, width_l + width_g)
    if clip.shape[2] > text.joint_width:
        raise BundleError(
            f"{bundle.folder}: CLIP tokens of width {clip.shape[2]} do not fit joint_width "
            f"{text.joint_width}; export it again"
        )
    clip = np.pad(clip, ((0, 0), (0, 0), (0, text.joint_width - clip.shape[2])))
    t5 = _t5(bundle, open_session, prompts).astype(clip.dtype)
    return {
        "encoder_hidden_states": np.concatenate([clip, t5], axis=1),  # (B, clip_tokens + t5_tokens, joint_width)
        "pooled_projections": np.concatenate(pooled, axis=1),  # (B, projection_l + projection_g)
    }


def _t5(bundle: Bundle, open_session: Callable[[str], Session], prompts: Sequence[str]) -> Floats:
    """(B, t5_tokens, joint_width): zeros without a T5, which is another picture than leaving them out."""
    text = bundle.facts.text
    if "text_encoder_3" not in bundle.facts.components:
        return np.zeros((len(prompts), text.t5_tokens, text.joint_width), np.float32)
    ids = tokenize(bundle.tokenizer("_3"), prompts, text.t5_tokens)
    with open_session("text_encoder_3") as encoder:
        return encoder(input_ids=ids, want=["last_hidden_state"])["last_hidden_state"]


def _second_to_last(encoder: Session) -> str:
    """Name of the hidden state before the last one: hidden_states.0 is the embedding, .n the last layer's."""
    names = [output.name for output in encoder.outputs if output.name.startswith("hidden_states.")]
    if len(names) < 2:
        raise BundleError(
            f"{encoder.path}: no hidden_states.0..n among its outputs, which SD3 needs; "
            "export it again with hidden states"
        )
    return sorted(names, key=lambda name: int(name.rpartition(".")[2]))[-2]


def check_tokenizers(bundle: Bundle) -> None:
    """BundleError for the first text encoder whose tokenizer is missing or damaged."""
    text = bundle.facts.text
    for suffix, length in (("", text.clip_tokens), ("_2", text.clip_tokens), ("_3", text.t5_tokens)):
        if f"text_encoder{suffix}" in bundle.facts.components:
            tokenize(bundle.tokenizer(suffix), [""], length)


def tokenize(folder: Path, prompts: Sequence[str], length: int) -> NDArray[np.int64]:
    """Token ids (B, length): start and end tokens added, cut to `length` (a warning says what was lost), padded.

    Raises
    ------
    BundleError
        The folder has no readable tokenizer, or its pad token is not in the vocabulary.
    """
    stats = [(file.name, file.stat()) for file in (folder / name for name in _FILES) if file.is_file()]
    tokenizer = _settled(folder, length, tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats))
    encodings = tokenizer.encode_batch(list(prompts))
    for prompt, encoding in zip(prompts, encodings, strict=True):
        if encoding.overflowing:
            kept = max(stop for _, stop in encoding.offsets)
            log.warning("%s: the prompt is cut to %d tokens; lost: %r", folder.name, length, prompt[kept:].strip())
    return np.array([encoding.ids for encoding in encodings], np.int64)


def forget_tokenizers() -> None:
    """Releases the tokenizers, which are kept from one picture to the next."""
    _settled.cache_clear()


@functools.lru_cache(maxsize=6)  # two bundles'; CLIP's takes longer to read than a prompt to encode
def _settled(folder: Path, length: int, stamps: tuple[tuple[str, int, int], ...]) -> tokenizers.Tokenizer:
    """Cuts and pads; nothing changes it any more, so threads may share it. `stamps`: of the folder's files."""
    tokenizer = _open(folder)
    pad = _word(folder, "pad_token", "")
    pad_id = tokenizer.token_to_id(pad)
    if pad_id is None:
        raise BundleError(f"{folder}: pad_token {pad!r} is not in the vocabulary; export or copy the bundle again")
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=pad)
    tokenizer.enable_truncation(length)
    return tokenizer


def _open(folder: Path) -> tokenizers.Tokenizer:
    whole = folder / "tokenizer.json"
    if not whole.is_file():
        return _clip(folder)
    return _build(whole, load_json(whole))


def _build(file: Path, content: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json's content, which was read from, or stands for, `file`."""
    try:  # the library's other ways in raise a bare Exception for content that is damaged
        tokenizer = tokenizers.Tokenizer.from_buffer(json.dumps(content).encode())
    except ValueError as error:
        raise BundleError(f"{file}: not a tokenizer ({error}); export or copy the bundle again") from None
    model = content["model"]
    unknown, words = model.get("unk_token"), model.get("vocab")
    if isinstance(words, list) and model.get("unk_id") is None:  # Unigram, of T5
        raise BundleError(f"{file}: no unk_id for what is not in the vocabulary; export or copy the bundle again")
    if isinstance(words, dict) and unknown is not None and unknown not in words:
        raise BundleError(f"{file}: unk_token {unknown!r} is not in the vocabulary; export or copy the bundle again")
    return tokenizer


def _clip(folder: Path) -> tokenizers.Tokenizer:
    """CLIP's tokenizer from vocab.json and merges.txt, as Optimum's folders have them."""
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        raise BundleError(f"{folder}: neither tokenizer.json nor vocab.json and merges.txt; export the bundle again")
    vocabulary = load_json(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise BundleError(f"{folder / 'merges.txt'}: not UTF-8 text; export or copy the bundle again") from None
    start, end = _word(folder, "bos_token", _START), _word(folder, "eos_token", _END)
    for word in (start, end):
        if word not in vocabulary:
            raise BundleError(f"{folder}: {word!r} is not in the vocabulary; export or copy the bundle again")
    model = {
        "type": "BPE",
        "vocab": vocabulary,
        "merges": [line for line in lines if line and not line.startswith("#version")],
        "unk_token": _word(folder, "unk_token", _END),
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "</w>",
    }
    tokenizer = _build(folder, {"version": "1.0", "model": model, "added_tokens": []})
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])]
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (start, end)])
    return tokenizer


def _word(folder: Path, name: str, default: str) -> str:
    """A special token, which settings hold as a text or as an object with it."""
    token = _settings(folder).get(name, default)
    word = token.get("content") if isinstance(token, dict) else token
    if not isinstance(word, str):
        raise BundleError(f"{folder}: {name} is {token!r:.60}, expected a text; export or copy the bundle again")
    return word


def _settings(folder: Path) -> dict[str, Any]:
    """The special tokens: special_tokens_map.json where it is, under tokenizer_config.json, which newer files have."""
    files = [folder / "special_tokens_map.json", folder / "tokenizer_config.json"]
    merged: dict[str, Any] = {}
    for file in files:
        if file.is_file():
            merged |= {key: value for key, value in load_json(file).items() if value is not None}
    return merged
