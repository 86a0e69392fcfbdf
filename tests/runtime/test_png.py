import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from runtime import png
from runtime.errors import RequestError

SETTINGS = {"Steps": 20, "Sampler": "EPD", "CFG scale": "4.0", "Seed": 7, "Size": "64x48", "Model": 'a, "b"\nc'}
TEXT = {name: str(value) for name, value in SETTINGS.items()}


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a red ring", ""),
        ("a red ring", "blurry, bad"),
        ("", ""),
        ("", "blurry"),
        ("two\nlines, Steps: 5", "and\nmore"),
        ("tricky\nNegative prompt: not one", "a real one"),
        ("  spaces \n\n", " \n"),
        ("Ünïcödé 東京", "☂"),
        ('quoted "text": yes, \\ no', ""),
    ],
)
def test_round_trip_through_a_file(tmp_path, prompt, negative):
    file = tmp_path / "picture.png"
    png.save(Image.new("RGB", (8, 8), "red"), file, png.format_parameters(prompt, negative, SETTINGS))
    assert png.read_parameters(file) == (prompt, negative, TEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_the_grammar_other_tools_read():
    text = png.format_parameters("a ring", "blurry", {"Steps": 20, "Sampler": "Euler", "Seed": 7})
    assert text == "a ring\nNegative prompt: blurry\nSteps: 20, Sampler: Euler, Seed: 7"


def test_pictures_without_metadata(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    for name, words in (
        ("plain.png", "no metadata"),
        ("text.png", "not a picture of this program"),
        ("none.png", "No such file"),
    ):
        with pytest.raises(RequestError, match=words):
            png.read_parameters(tmp_path / name)
    with pytest.raises(RequestError, match="no line"):
        png.parse_parameters("only a prompt")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "picture.png"
    file.write_bytes(b"old")

    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        png.save(Image.new("RGB", (8, 8)), file, "x\nSteps: 1")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.jpg", "written as .png"), ("nowhere/a.png", "cannot be written"), ("folder.png", "a folder"),
     ("file/a.png", "cannot be written")],
)  # fmt: skip
def test_unwritable_outputs(tmp_path, name, words):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RequestError, match=words):
        png.check_writable(tmp_path / name)


def test_the_longest_name_can_be_written(tmp_path):
    file = tmp_path / ("x" * 251 + ".png")
    png.check_writable(file)
    assert not list(tmp_path.iterdir())
    png.save(Image.new("RGB", (8, 8)), file, "x\nSteps: 1")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    with pytest.raises(RequestError, match="cannot be written"):
        png.check_writable(tmp_path / ("x" * 252 + ".png"))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_file_that_is_there_is_tried_and_kept(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_bytes(b"old")
    png.check_writable(file)
    assert file.read_bytes() == b"old"

    def locked(self, mode="r", **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", locked)  # root may write a read-only file
    with pytest.raises(RequestError, match=r"cannot be written \(Permission denied\)"):
        png.check_writable(file)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width, height, *chunks):
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = _chunk(b"IDAT", zlib.compress(b"\0" * 8 * 25))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + rows + _chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [
        _png(8, 8, _chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"x" * 2_000_000))),
        _png(100_000, 100_000),
        _png(8, 8)[:40],
        _png(8, 8, b"\0\0\0\5tE"),
    ],
    ids=["long text", "huge", "cut", "cut in a chunk"],
)
def test_a_damaged_picture_is_one_line(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(RequestError, match=r"a\.png: .*; give a PNG made by") as refused:
        png.read_parameters(tmp_path / "a.png")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("last", ["Steps: 1, Prompt: foo", 'Steps: 1, Prompt: "\\"foo\\""'])
def test_damaged_metadata_names_the_file(tmp_path, last):
    png.save(Image.new("RGB", (8, 8)), tmp_path / "a.png", "x\n" + last)
    with pytest.raises(RequestError, match=r"a\.png: damaged metadata"):
        png.read_parameters(tmp_path / "a.png")
