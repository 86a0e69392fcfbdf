import json
import logging
import os
import shutil

import numpy as np
import pytest
import tiny_bundle

from runtime import text
from runtime.bundle import Bundle
from runtime.errors import BundleError
from runtime.session import Session
from runtime.text import conditioning, tokenize

PROMPTS = ["a red ring", "", "red  RED\tred", "don't: it's 42 of 7", "Ünïcödé 東京 !?", "a <|endoftext|> b"]


def test_known_tokens(tmp_path):
    tiny_bundle.tokenizer(tmp_path / "tokenizer", pad="!")
    words = tiny_bundle.vocabulary()
    start, end, pad = words["<|startoftext|>"], words["<|endoftext|>"], words["!"]
    expected = [[start, words["red</w>"], words["a</w>"], end, pad, pad], [start, end, pad, pad, pad, pad]]
    assert tokenize(tmp_path / "tokenizer", ["Red A", ""], 6).tolist() == expected


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_equals_transformers(tmp_path, pad):
    transformers = pytest.importorskip("transformers")
    models = pytest.importorskip("shapes.models")
    models.write_tokenizer(tmp_path / "bare")
    theirs = transformers.CLIPTokenizerFast.from_pretrained(
        tmp_path / "bare", pad_token=pad
    )  # 4.x: the slow one needs ftfy
    theirs.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "bare" / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "bare" / "tokenizer_config.json").write_text(
        json.dumps(settings | {"pad_token": pad}), encoding="utf-8"
    )
    expected = theirs(PROMPTS, padding="max_length", max_length=24, truncation=True, return_tensors="np").input_ids
    assert np.array_equal(tokenize(tmp_path / "bare", PROMPTS, 24), expected)
    if (tmp_path / "saved" / "tokenizer.json").exists():
        assert np.array_equal(tokenize(tmp_path / "saved", PROMPTS, 24), expected)


def test_what_is_cut_is_told(tmp_path, caplog):
    tiny_bundle.tokenizer(tmp_path / "tokenizer")
    ids = tokenize(tmp_path / "tokenizer", ["red red red red Blue sky", "red"], 6)
    assert ids.shape == (2, 6)
    assert ids[0, -1] == tiny_bundle.vocabulary()["<|endoftext|>"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages == ["tokenizer: the prompt is cut to 6 tokens; lost: 'Blue sky'"]


def test_a_tokenizer_is_read_once_and_again_when_its_files_change(tmp_path, monkeypatch):
    folder, read = tmp_path / "tokenizer", []
    tiny_bundle.tokenizer(folder)
    opened = text._open
    monkeypatch.setattr(text, "_open", lambda path: read.append(path) or opened(path))
    before = [tokenize(folder, ["red"], 6).tolist() for _ in range(2)]
    assert (len(read), before[0]) == (1, before[1])
    os.utime(folder / "vocab.json", ns=(0, 0))  # of the same size
    assert tokenize(folder, ["red"], 6).tolist() == before[0]
    assert len(read) == 2
    shutil.rmtree(folder)
    tiny_bundle.tokenizer(folder, pad="!")
    (folder / ".#vocab.json").symlink_to("nowhere")  # an editor's
    assert tokenize(folder, ["red"], 6).tolist() != before[0]
    text.forget_tokenizers()
    tokenize(folder, ["red"], 6)
    assert len(read) == 4


UNIGRAM = {"type": "Unigram", "vocab": [["!", 0.0]], "unk_id": None}


def write(name, content):
    """A damage: other bytes or text in a file of the folder."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), r"neither tokenizer\.json nor vocab\.json"),
        (lambda folder: (folder / "vocab.json").write_text("{", encoding="utf-8"), "not valid JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("{", encoding="utf-8"), "not valid JSON"),
        (lambda folder: (folder / "tokenizer_config.json").write_text('{"pad_token": "?"}', encoding="utf-8"), "'\\?'"),
        (write("tokenizer_config.json", '{"pad_token": 5}'), "pad_token is 5, expected a text"),
        (write("tokenizer_config.json", '{"pad_token": {"x": 1}}'), "pad_token is .*, expected a text"),
        (write("tokenizer_config.json", '{"pad_token": "!", "unk_token": "?"}'), "unk_token '\\?' is not in"),
        (write("tokenizer_config.json", '{"pad_token": "!", "bos_token": "?"}'), "'\\?' is not in the vocabulary"),
        (write("tokenizer.json", '{"version": "1.0"}'), "not a tokenizer .*Model missing"),
        (write("tokenizer.json", '{"version": "1.0", "model": 5}'), "not a tokenizer"),
        (write("tokenizer.json", json.dumps({"version": "1.0", "added_tokens": [], "model": UNIGRAM})), "no unk_id"),
        (write("merges.txt", "#version: 0.2\nre\n"), "not a tokenizer .*Merges"),
        (write("merges.txt", "r e\nre q\n"), "not a tokenizer .*out of vocabulary"),
        (write("merges.txt", b"r \xff\n"), "merges.txt: not UTF-8"),
        (write("vocab.json", '{"<|startoftext|>": "0", "<|endoftext|>": 1}'), "not a tokenizer"),
        (write("vocab.json", '{"<|startoftext|>": -1, "<|endoftext|>": 1}'), "not a tokenizer"),
        (write("vocab.json", "{}"), "'<.startoftext.>' is not in the vocabulary"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(tmp_path, damage, words):
    tiny_bundle.tokenizer(tmp_path / "tokenizer")
    damage(tmp_path / "tokenizer")
    with pytest.raises(BundleError, match=words) as refused:
        tokenize(tmp_path / "tokenizer", ["red"], 6)
    assert "\n" not in str(refused.value)


def sessions(bundle):
    opened = {}

    def open_session(name):
        opened[name] = Session(bundle, name)
        return opened[name]

    return open_session, opened


def test_sd3_layout(bundles):
    """[CLIP-L | CLIP-G | zeros] tokens, then T5's zero vectors; the pooled outputs side by side."""
    bundle = Bundle.open(bundles["sd3"])
    open_session, opened = sessions(bundle)
    told = conditioning(bundle, open_session, ["red", ""])
    tokens, pooled = told["encoder_hidden_states"], told["pooled_projections"]
    width, clip = tiny_bundle.WIDTH, tiny_bundle.TOKENS
    assert tokens.shape == (2, clip + tiny_bundle.T5_TOKENS, tiny_bundle.JOINT)
    assert pooled.shape == (2, 2 * width)
    assert not tokens[:, clip:].any()
    assert not tokens[:, :, 2 * width :].any()
    for index, suffix in enumerate(("", "_2")):
        part = slice(index * width, (index + 1) * width)
        ids = tokenize(bundle.folder / f"tokenizer{suffix}", ["red", ""], clip)
        words = tiny_bundle.random(len(tiny_bundle.vocabulary()), width, seed=index)
        np.testing.assert_allclose(tokens[:, :clip, part], 2 * words[ids], rtol=1e-6)  # hidden_states[-2]
        np.testing.assert_allclose(pooled[:, part], np.sin(2 * words[ids]).mean(1), rtol=1e-4, atol=1e-6)
    assert not any(session.loaded for session in opened.values())


def test_sd15_takes_the_last_hidden_state(bundles):
    bundle = Bundle.open(bundles["sd15"])
    open_session, opened = sessions(bundle)
    told = conditioning(bundle, open_session, ["red"])
    words = tiny_bundle.random(len(tiny_bundle.vocabulary()), tiny_bundle.WIDTH)
    ids = tokenize(bundle.folder / "tokenizer", ["red"], tiny_bundle.TOKENS)
    assert told.keys() == {"encoder_hidden_states"}
    expected = np.sin(np.sin(2 * words[ids]))
    np.testing.assert_allclose(told["encoder_hidden_states"], expected, rtol=1e-5, atol=1e-6)
    assert list(opened) == ["text_encoder"]
