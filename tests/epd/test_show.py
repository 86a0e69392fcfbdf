"""`python -m epd show|import`: the numbers, their origin, the work, weak directions, a plot; mistakes in one line."""

import json
import sys

import numpy as np
import pytest

import epd
from epd import show
from epd.__main__ import main

from .snapshots import raw_parameters, snapshot

TABLE = epd.Table(
    times=[1.0, 0.6, 0.2],
    r=[[0.3, 0.6], [0.4, 0.7]],
    w=[[0.97, 0.03], [1.0, 0.0]],
    family="sd3",
    guidance=4.5,
    size=(512, 512),
    t5=False,
    grid="by hand",
    provenance={"made by": "a test " + "of many words " * 20, "metadata": {"hidden": 1}},
)


@pytest.fixture
def file(tmp_path):
    TABLE.save(tmp_path / "mine.json")
    return tmp_path / "mine.json"


def test_text(file, capsys):
    assert main(["show", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for told in (
        "sd3, guidance 4.5, 512 x 512, without T5",
        "by hand; 2 intervals, 1 to 0.2",
        "K = 2 directions, geometric points, simplex weights, start by call",
        "4 sequential calls, 5 total evaluations, 10 forwards with guidance",
        "made by: a test of many words",
        "less than 5% of the weight: interval 0 k = 1 (3.0%)",
    ):
        assert told in text
    assert "hidden" not in text
    (row,) = [line for line in lines if line.endswith("weak")]
    numbers = row.split()
    t_k = 0.6**0.6 * 1.0**0.4
    assert numbers[1:-1] == ["1", "0.60000", f"{t_k:.5g}", "0.03000", "1.0000", "1.0000"]
    assert sum(line.endswith("off") for line in lines) == 1


def test_json(file, capsys):
    assert main(["show", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(file)
    assert (told["steps"], told["directions"]) == (2, 2)
    assert (told["sequential_calls"], told["total_evaluations"], told["guided_forwards"]) == (4, 5, 10)
    assert told["weak_directions"] == [{"interval": 0, "direction": 1, "share": pytest.approx(0.03)}]
    assert epd.Table.from_json(told["table"]).t5 is False


@pytest.mark.parametrize(
    ("guidance", "family", "forwards"), [(4.5, "sd3", 5 * 2), (1.0, "sd3", 5), (None, None, 5), (3.5, "flux", 5)]
)
def test_guided_forwards(guidance, family, forwards):
    table = epd.Table(times=TABLE.times, r=TABLE.r, w=TABLE.w, guidance=guidance, family=family)
    assert show.describe(table)["guided_forwards"] == forwards


def history():
    place, carry = np.zeros((2, 1, 2)), np.zeros((2, 2))
    place[:, :, 0], carry[:, 0] = 1, 9.0
    arithmetic = {"midpoint": "arithmetic", "weights": "free", "start": "history"}
    return epd.Table(times=[1, 0.5, 0], r=[[0.5], [0.5]], w=[[-0.3], [8.0]], place=place, carry=carry, **arithmetic)


def test_history(tmp_path, capsys):
    history().save(tmp_path / "h.json")
    assert main(["show", str(tmp_path / "h.json"), "--plot", str(tmp_path / "h.png")]) == 0
    text = capsys.readouterr().out
    assert "3 sequential calls, 3 total evaluations" in text
    assert "interval 0 k = 0 (3.2%)" in text  # 0.3 of 0.3 + 9
    assert "place 1 0 1 0\ncarry 0   9 0\n" in text
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_plot(file, tmp_path):
    from PIL import Image

    assert main(["show", str(file), "--plot", str(tmp_path / "points.png")]) == 0
    with Image.open(tmp_path / "points.png") as image:
        colours = len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))
    assert colours > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "points.png"]


def test_plot_without_matplotlib(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["show", str(file), "--plot", str(tmp_path / "points.png")]) == 2
    assert capsys.readouterr().err == "error: --plot needs matplotlib: pip install 'epd-toolkit[plot]'\n"


def test_control_characters_do_not_reach_the_terminal():
    table = epd.Table(times=[2, 1], r=[[0.5]], w=[[1]], family="\x1b[2J\nsd3", provenance={"a": "\x07"})
    assert not {"\x1b", "\x07"} & set(show.text(table, "name\r"))


def test_import(tmp_path, capsys):
    (tmp_path / "a.pkl").write_bytes(snapshot(raw_parameters(), {"scale_dir": 0.05}))
    output = tmp_path / "a.json"
    assert main(["import", str(tmp_path / "a.pkl"), "-o", str(output)]) == 0
    out = capsys.readouterr()
    assert out.out == f"{output}\n"
    assert out.err == "3 steps, K = 2, 6 sequential calls, 9 total evaluations; corrected: nothing\n"
    assert main(["import", str(tmp_path / "a.pkl"), "-o", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["table"] == json.loads(output.read_text(encoding="utf-8"))


MISTAKES = {
    "no such file": (["show", "{}/none.json"], "none.json: No such file or directory"),
    "no such name": (["show", "none"], "no table 'none'"),
    "no table": (["show", "{}/a.pkl"], "a.pkl: not a table"),
    "no such pickle": (["import", "{}/none.pkl", "-o", "{}/t.json"], "none.pkl: No such file or directory"),
    "hostile": (["import", "{}/a.pkl", "-o", "{}/t.json"], "a.pkl: refused: 'os.system'"),
    "no folder": (["import", "{}/b.pkl", "-o", "{}/none/t.json"], "{}/none/t.json: No such file or directory"),
    "no folder for a plot": (
        ["show", "{}/b.json", "--plot", "{}/none/t.png"],
        "{}/none/t.png: No such file or directory",
    ),
    "no such published": (["fetch", "none"], "no published table 'none'; choose one of sd15, "),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(tmp_path, capsys, case):
    arguments, message = MISTAKES[case]
    (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n(Vecho\ntR.")
    (tmp_path / "b.pkl").write_bytes(snapshot())
    TABLE.save(tmp_path / "b.json")
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("error: ")
    assert message.format(tmp_path) in out.err
    assert out.err.count("\n") == 1
    assert out.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pkl", "b.json", "b.pkl"]
