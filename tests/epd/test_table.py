"""`Table`: every rule refuses, and files come back exactly or not at all."""

import json
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

import epd

GOOD = {"times": [3.0, 1.0, 0.5], "r": [[0.3, 0.6], [0.4, 0.7]], "w": [[0.5, 0.5], [0.25, 0.75]]}
PLACE = np.zeros((2, 2, 3))
PLACE[:, :, 0] = 1
HISTORY = {**GOOD, "start": "history", "place": PLACE}


def at(array, index, value):
    array = np.array(array, dtype=np.float64)
    array[index] = value
    return array


BROKEN = {
    "too few times": ({"times": [1.0]}, "times must be N"),
    "times rise": ({"times": [1.0, 3.0, 0.5]}, "strictly decreasing"),
    "times repeat": ({"times": [3.0, 3.0, 0.5]}, "strictly decreasing"),
    "times end at 0": ({"times": [3.0, 1.0, 0.0]}, "times must be > 0"),
    "times negative": ({"times": [3.0, 1.0, -1.0], "midpoint": "arithmetic"}, "negative"),
    "times NaN": ({"times": [3.0, np.nan, 0.5]}, "times must be finite"),
    "times infinite": ({"times": [np.inf, 1.0, 0.5]}, "times must be finite"),
    "times words": ({"times": ["3", "1", ".5"]}, "times must be numbers"),
    "r of another N": ({"r": [[0.3, 0.6]]}, "r must have shape"),
    "r flat": ({"r": [0.3, 0.6]}, "r must have shape"),
    "r empty": ({"r": [[], []], "w": [[], []]}, "r must have shape"),
    "r ragged": ({"r": [[0.3, 0.6], [0.4]]}, "rows of one length"),
    "r 0": ({"r": at(GOOD["r"], (0, 0), 0)}, r"r must be in \(0, 1\)"),
    "r 1 geometric": ({"r": at(GOOD["r"], (0, 0), 1)}, r"r must be in \(0, 1\)"),
    "r 0 arithmetic": ({"r": at(GOOD["r"], (0, 0), 0), "midpoint": "arithmetic"}, r"r must be in \(0, 1\]"),
    "r above 1": ({"r": at(GOOD["r"], (0, 0), 1.1), "midpoint": "arithmetic"}, r"r must be in \(0, 1\]"),
    "r 1 at time 0": (
        {"r": at(GOOD["r"], (1, 1), 1), "times": [3.0, 1.0, 0.0], "midpoint": "arithmetic"},
        "no slope is asked at 0",
    ),
    "r NaN": ({"r": at(GOOD["r"], (0, 0), np.nan)}, "r must be finite"),
    "w of another K": ({"w": [[1.0], [1.0]]}, "w must have shape"),
    "w negative": ({"w": [[-0.5, 1.5], [0.5, 0.5]]}, "w must be >= 0"),
    "w off the simplex": ({"w": [[0.5, 0.50001], [0.5, 0.5]]}, "w must sum to 1"),
    "w infinite": ({"w": at(GOOD["w"], (0, 0), np.inf)}, "w must be finite"),
    "w all zero": ({"w": at(GOOD["w"], 0, 0), "weights": "free"}, "at least one point"),
    "scale_dir 0": ({"scale_dir": [[0.0, 1], [1, 1]]}, "scale_dir must be > 0"),
    "scale_time negative": ({"scale_time": [[-1.0, 1], [1, 1]]}, "scale_time must be > 0"),
    "scale_time of another shape": ({"scale_time": [1.0, 1]}, "scale_time must have shape"),
    "order 0": ({"order": 0}, "order must be"),
    "order 5": ({"order": 5}, "order must be"),
    "order 2.0": ({"order": 2.0}, "order must be"),
    "start": ({"start": "cold"}, "start must be one of call, afs, history"),
    "midpoint": ({"midpoint": "harmonic"}, "midpoint must be one of geometric, arithmetic"),
    "weights": ({"weights": "any"}, "weights must be one of simplex, free"),
    "place without history": ({"place": PLACE}, "need start"),
    "carry without history": ({"carry": np.zeros((2, 1))}, "need start"),
    "history without place": ({"start": "history"}, "place is required"),
    "history with order": ({**HISTORY, "order": 2}, "order must be 1"),
    "place shape": ({**HISTORY, "place": PLACE[:, :1]}, r"place must have shape \(2, 2, J\), got \(2, 1, 3\)"),
    "place no column": ({**HISTORY, "place": PLACE[:, :, :0]}, r"place must have shape \(2, 2, J\)"),
    "carry shape": ({**HISTORY, "carry": np.zeros(2)}, r"carry must have shape \(2, Q\)"),
    "place NaN": ({**HISTORY, "place": at(PLACE, (0, 0, 0), np.nan)}, "place must be finite"),
    "place before there is history": ({**HISTORY, "place": at(PLACE, (0, 0, 1), 1)}, r"place of interval 0 .*\[1\]"),
    "carry beyond the history": ({**HISTORY, "carry": at(np.zeros((2, 4)), (1, 3), 1)}, r"carry of interval 1 .*\[3\]"),
    "place by a point not asked": ({**HISTORY, "w": [[0.0, 1.0], [0.5, 0.5]]}, r"place of interval 1 .*\[0\]"),
    "family": ({"family": 3}, "family must be a string"),
    "guidance": ({"guidance": float("nan")}, "guidance must be"),
    "guidance no float holds": ({"guidance": 10**400}, "guidance must be"),
    "guidance word": ({"guidance": "7"}, "guidance must be"),
    "size": ({"size": [512]}, "size must be"),
    "t5 word": ({"t5": "yes"}, "t5 must be"),
    "t5 number": ({"t5": 1}, "t5 must be"),
    "size fraction": ({"size": [512, 512.5]}, "size must be"),
    "provenance": ({"provenance": "me"}, "provenance must be"),
    "provenance no JSON": ({"provenance": {"a": object()}}, "provenance must be"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_rule_refuses_and_the_file_is_named(name, tmp_path):
    changes, message = BROKEN[name]
    numbers = {**GOOD, **changes}
    with pytest.raises(ValueError, match=message):
        epd.Table(**numbers)
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in numbers.items()}
    path = tmp_path / "broken.json"
    if name != "provenance no JSON":
        path.write_text(json.dumps({"format": "epd-table", "version": 1, **plain}), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"broken\.json: .*{message}") as error:
            epd.Table.load(path)
        assert "\n" not in str(error.value)


def test_good_tables_are_accepted_frozen_and_counted():
    table = epd.Table(**GOOD)
    assert (table.steps, table.directions, table.sequential_calls, table.total_evaluations) == (2, 2, 4, 6)
    np.testing.assert_array_equal(table.scale_dir, np.ones((2, 2)))
    with pytest.raises(AttributeError):
        table.order = 2
    with pytest.raises(ValueError, match="read-only"):
        table.r[0, 0] = 0.5
    times = np.array(GOOD["times"])
    table = epd.Table(**{**GOOD, "times": times})
    times[0] = 99
    assert table.times[0] == 3.0
    afs = epd.Table(**GOOD, start="afs")
    assert (afs.sequential_calls, afs.total_evaluations) == (3, 5)
    history = epd.Table(**HISTORY)
    assert (history.sequential_calls, history.total_evaluations) == (3, 5)
    epd.Table(**{**HISTORY, "place": at(PLACE, (1, 0, 2), 1), "carry": at(np.zeros((2, 3)), (1, 2), 1)})
    epd.Table(**{**GOOD, "times": [3.0, 1.0, 0.0], "r": [[0.5, 1.0], [0.4, 0.9]]}, midpoint="arithmetic")
    zero = epd.Table(**{**GOOD, "w": [[0.0, 1.0], [1.5, -0.5]]}, weights="free")
    assert (zero.sequential_calls, zero.total_evaluations) == (4, 5)


def full():
    rng = np.random.default_rng(0)
    place = rng.normal(size=(2, 2, 3))
    place[0, :, 1:] = 0
    return epd.Table(
        times=[np.pi, 1 / 3, 0.0],
        r=rng.uniform(0.1, 0.9, (2, 2)),
        w=rng.normal(size=(2, 2)),
        scale_dir=rng.uniform(0.9, 1.1, (2, 2)),
        scale_time=rng.uniform(0.9, 1.1, (2, 2)),
        start="history",
        midpoint="arithmetic",
        weights="free",
        place=place,
        carry=np.array([[0.1], [1e-17]]),
        family="sd3",
        model="shapes-sd3",
        grid="flow_euler, shift 3",
        guidance=4.5,
        size=(512, 768),
        t5=True,
        provenance={"seed": 1, "note": "größer"},
    )


@pytest.mark.parametrize("table", [epd.Table(**GOOD), full(), epd.start_table([2.0, 1.0], 3)])
def test_a_file_comes_back_exactly(table, tmp_path):
    path = tmp_path / "table.json"
    table.save(path)
    again = epd.Table.load(path)
    assert again.to_json() == table.to_json()
    assert again.size == table.size
    assert again.t5 == table.t5
    assert again.provenance == table.provenance
    for name in ("times", "r", "w", "scale_dir", "scale_time", "place", "carry"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path):
    path = tmp_path / "cut.json"
    full().save(path)
    text = path.read_bytes().rstrip()
    for length in range(0, len(text), 37):
        path.write_bytes(text[:length])
        with pytest.raises(ValueError, match=r"cut\.json: not a table, no valid JSON"):
            epd.Table.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "unknown table version 2; this program reads version 1"),
        ({"version": None}, "unknown table version None"),
        ({"format": "bundle"}, "not a table"),
        ({"colour": 1, "age": 2}, "unknown keys: age, colour"),
    ],
)
def test_another_format_is_refused(tmp_path, change, message):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**epd.Table(**GOOD).to_json(), **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"other\.json: {message}"):
        epd.Table.load(path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"format": "epd-table", "version": 1, "r": [], "w": []}'])
def test_json_that_is_no_table_is_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json: (not a table|missing keys: times)"):
        epd.Table.load(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "bytes.json"
    path.write_bytes(b"\x80\x04\x95")
    with pytest.raises(ValueError, match=r"bytes\.json: not a table"):
        epd.Table.load(path)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    epd.Table(**GOOD).save(path)
    old = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        full().save(path)
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


def test_start_table():
    table = epd.start_table([4.0, 2.0, 1.0], 3)
    np.testing.assert_allclose(table.r, [[0.25, 0.5, 0.75]] * 2)
    np.testing.assert_allclose(table.w, np.full((2, 3), 1 / 3))
    assert (table.start, table.midpoint, table.order) == ("call", "geometric", 1)
    assert epd.start_table([4.0, 2.0, 0.0], 1).midpoint == "arithmetic"
    with pytest.raises(ValueError, match="at least one direction"):
        epd.start_table([2.0, 1.0], 0)


def test_all_is_sorted_true_and_needs_numpy_only():
    assert epd.__all__ == sorted(epd.__all__)
    public = {
        name for name, value in vars(epd).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public <= set(epd.__all__) <= set(vars(epd))  # modules imported elsewhere are names of the package, too
    code = "import sys, epd; print(*{'torch', 'diffusers', 'transformers', 'onnxruntime'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("text", ['{"a":' * 100_000, '{"times": [' + "1" * 5000 + "]}"])
def test_endless_json_is_no_table(tmp_path, text):
    (tmp_path / "endless.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"endless\.json: not a table, no valid JSON"):
        epd.Table.load(tmp_path / "endless.json")
