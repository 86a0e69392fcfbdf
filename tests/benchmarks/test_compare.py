"""`python -m benchmarks compare`: numbers worked out by hand, real turns, what is told when one fails."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from benchmarks import compare, compare_process, compare_report, peers
from benchmarks.__main__ import main
from benchmarks.compare_process import turn_of
from benchmarks.compare_work import backbone_work, picture_work
from benchmarks.machine import machine
from runtime import memory, profiles
from runtime.bundle import Bundle
from runtime.errors import RequestError
from runtime.pipeline import find

SHARED = {"dtype": "fp32", "runs": 1, "threads": 2}
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def shapes():
    return Bundle.open(find("shapes-sd3"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An interpreter that has no packages at all."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))


def side(name, seconds, peak, error=None, **changes):
    turns = tuple(compare.Turn(i, 10.0 * i, 2.0, (one,), peak, "0" * 64) for i, one in enumerate(seconds, 1))
    made = compare.Side(name, "", "same", "fp32", 2, {"thing": "1.0"}, (), error, turns)
    return dataclasses.replace(made, **changes)


def comparison(*sides):
    runs = len(sides[0].turns[0].runs)
    work = ("backbone", "one call of its unet, 4 rows")
    return compare.Comparison("m", "f" * 64, *work, False, 4, 2, len(sides[0].turns), runs, sides, 0.01, machine())


OURS = side("ours", [1.0, 2.0, 4.0], 100_000_000, weights="none")
SLOW = side("slow", [2.0, 2.0, 12.0], 250_000_000, 3e-6)


def test_ratios_are_of_a_round():
    """By hand: 2/1, 2/2, 12/4."""
    told = comparison(OURS, SLOW).to_json()["summary"]["slow"]
    assert told["seconds"] == {"seconds": 2.0, "low": 2.0, "high": 7.0}
    assert told["ratio"] == {"seconds": 2.0, "low": 1.5, "high": 2.5}
    assert (told["load"], told["first"]) == (20.0, 2.0)
    assert (told["peak_rss_bytes"], told["memory_ratio"]) == (250_000_000, 2.5)
    assert OURS.summary(OURS)["ratio"] == {"seconds": 1.0, "low": 1.0, "high": 1.0}


def test_several_runs_of_a_turn_count_as_their_median():
    """By hand: medians 2 and 3 against 1 and 2; all six runs have the median 2.5."""
    pairs = ((1, (9.0, 2.0, 1.0)), (2, (3.0, 3.0, 0.5)))
    many = dataclasses.replace(OURS, turns=tuple(compare.Turn(i, None, None, runs, None, None) for i, runs in pairs))
    two = dataclasses.replace(OURS, turns=OURS.turns[:2])
    assert many.ratio(two) == profiles.Timing(1.75, 1.625, 1.875)
    assert many.seconds.seconds == 2.5
    assert many.memory(two) is None
    assert many.median("load") is None


def test_report():
    level = side("level", [1.1, 1.9, 4.4], None, weights="other", notes=("odd",), precision="bf16")
    method = side("method", [1.0, 1.0, 1.0], 1, weights="other", does="Euler's method")
    told = compare_report.markdown(comparison(OURS, SLOW, level, method))
    assert "- slow (fp32) takes 2.00 times as long as ours (quartiles 1.50 to 2.50) and 2.50 times the memory." in told
    assert "- level (bf16) takes 1.10 times as long as ours (quartiles 1.02 to 1.10)." in told
    lines = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in told.splitlines() if line.startswith("| ")}
    cells = {name: [cell.strip() for cell in line] for name, line in lines.items()}
    assert cells["slow"] == [
        "fp32", "20", "2", "2", "2 to 7", "2.00", "1.50 to 2.50", "250 MB", "2.50", "3.0e-06",
    ]  # fmt: skip
    assert cells["ours"][-1] == ""
    assert cells["level"][-3:] == ["", "", "other weights"]
    assert cells["method"][-1] == "another method"
    assert "NOT ALL OF ONE PRECISION: bf16, fp32" in told
    assert "- level: thing 1.0; threads 2; odd" in told
    assert "other programs took 1% of the processors meanwhile" in told
    within = side("within", [1.1, 1.8, 4.0], 1)
    assert compare_report.verdict(comparison(OURS, within)) == [
        "within (fp32) takes as long as ours, within the spread (1.00 times, quartiles 0.95 to 1.05) and 0.00 times "
        "the memory."
    ]
    drawn = side("drawn", [1.0, 2.0, 4.0], 1, 2e-6, weights="drawn alike")
    random = dataclasses.replace(comparison(OURS, drawn), random_weights=True)
    assert "RANDOM WEIGHTS" in compare_report.markdown(random)
    assert "2.0e-06 (weights drawn alike)" in compare_report.markdown(random)


def test_only_our_own_processes_are_no_others(monkeypatch):
    times = os.times_result((1.0, 2.0, 30.0, 4.0, 5.0))  # user, system, children's user and system, elapsed
    monkeypatch.setattr(profiles.Others, "_seconds", staticmethod(lambda: 100.0))
    monkeypatch.setattr(os, "times", lambda: times)
    assert compare_process.Others._seconds() == 66.0
    monkeypatch.setattr(profiles.Others, "_seconds", staticmethod(lambda: None))
    assert compare_process.Others._seconds() is None


def test_the_call_of_all(shapes, tmp_path):
    """The K = 2 guided call: two points, in both halves the same two times."""
    work = backbone_work(shapes, 4, tmp_path, **SHARED)
    feeds = dict(np.load(work.feeds))
    assert feeds["timestep"].tolist() == [901.25, 31.5] * 2
    assert feeds["hidden_states"].shape == (4, 8, 16, 16)
    assert feeds["encoder_hidden_states"].shape == (4, 32, 192)
    assert work.macs == 4 * 125_227_008  # of bundle.json
    assert np.load(backbone_work(shapes, 3, tmp_path, **SHARED).feeds)["timestep"].tolist() == [
        901.25,
        466.375,
        31.5,
    ]


def test_a_call_that_the_bundle_has_no_graph_of(shapes, bundles, tmp_path):
    part = dataclasses.replace(shapes.facts.components["transformer"], rows=(2, 4))
    parts = dict(shapes.facts.components) | {"transformer": part}
    static = dataclasses.replace(shapes, facts=dataclasses.replace(shapes.facts, components=parts))
    with pytest.raises(RequestError, match="no graph of 6 rows; give --rows 2 or 4"):
        backbone_work(static, 6, tmp_path, **SHARED)
    with pytest.raises(RequestError, match="no fixed size"):
        backbone_work(Bundle.open(bundles["sd3"]), 4, tmp_path, **SHARED)


def test_the_picture_of_all(shapes):
    """K = 2, N = 3: 2 N calls, N (1 + K) evaluations, twice as many rows; both encoders twice, one picture decoded."""
    asked = {"solver": "epd", "k": 2, "num_inference_steps": 3}
    work = picture_work(shapes, "red", asked, **SHARED)
    assert (work.picture["sequential_calls"], work.picture["steps"], work.forwards) == (6, 9, 18)
    assert work.macs == 2 * (2_510_848 + 5_538_816) + 18 * 125_227_008 + 252_510_208
    assert "64x64, guidance 3: 3 steps of epd, K = 2: 6 sequential calls, 9 total evaluations, 18 guided" in work.told
    first, euler = peers.ours(work)
    assert (first.forwards, euler.forwards) == (18, 12)
    assert euler.job["picture"]["ours"] == {"solver": "euler", "num_inference_steps": 6}
    (lean,) = peers.against(dataclasses.replace(work, threads_given=False), ["low-memory"], {})
    assert (lean.job["low_memory"], lean.job["picture"], lean.forwards) == (True, first.job["picture"], 18)
    with pytest.raises(RequestError, match="openvino draws no whole pictures here"):
        peers.against(work, ["openvino"], {})


def test_ours_and_another_bundle(shapes, tmp_path, capsys):
    """The command itself, every file of it; the other bundle is the same one in another place."""
    other = tmp_path / "other"
    other.symlink_to(shapes.folder, target_is_directory=True)
    files = {name: tmp_path / f"a.{name}" for name in ("csv", "md", "png")}
    options = ["--csv", str(files["csv"]), "--markdown", str(files["md"]), "--plot", str(files["png"]), "--json"]
    asked = ["--against", f"bundle={other},low-memory", "--rounds", "2", "--runs", "2", "--rows", "4", "--threads", "1"]
    assert main(["compare", "shapes-sd3", *asked, *options]) == 0
    told = json.loads(capsys.readouterr().out)
    first, second, lean = told["sides"]
    assert (first["name"], second["name"], lean["name"]) == ("ours", "bundle other", "ours, low memory")
    assert (first["error"], second["error"]) == (None, 0.0)
    assert lean["error"] < 0.01  # fp16 weights, other kernels
    answers = {turn["sha256"] for one in (first, second) for turn in one["turns"]}
    assert len(answers) == 1
    for one in (first, second):
        assert [(turn["round"], len(turn["runs"])) for turn in one["turns"]] == [(1, 2), (2, 2)]
        assert all(0 < turn["peak_rss_bytes"] < 1e9 and turn["load"] > 0 for turn in one["turns"])
        assert (one["precision"], one["threads"], one["notes"]) == ("fp16", 1, [])
        assert one["versions"]["onnxruntime"] == onnxruntime.__version__
    assert told["summary"]["bundle other"]["ratio"]["seconds"] > 0
    with files["csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["contender"], row["round"], row["run"]) for row in rows] == [
        (name, str(turn), str(run))
        for name in ("ours", "bundle other", "ours, low memory")
        for turn in (1, 2)
        for run in (1, 2)
    ]
    assert "| bundle other " in files["md"].read_text(encoding="utf-8")
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def job(tmp_path, **more):
    feeds, output = tmp_path / "feeds.npz", tmp_path / "answer.npy"
    told = {
        "work": "backbone",
        "runs": 2,
        "threads": 1,
        "threads_given": True,
        "dtype": "fp32",
        "memory": memory.__file__,
    }
    return told | {"feeds": str(feeds), "output": str(output)} | more


def test_a_graph_of_one_time(bundles, tmp_path):
    """Optimum's way: all rows get the first one's time, and only those that asked for it are compared."""
    graph = bundles["optimum"] / "unet" / "model.onnx"
    random = np.random.default_rng(0)
    sample, states = random.standard_normal((4, 4, 8, 8), np.float32), random.standard_normal((4, 8, 6), np.float32)
    times = np.array([900, 100, 900, 100], np.float32)
    asked = job(tmp_path, graph=str(graph))
    np.savez(asked["feeds"], sample=sample, encoder_hidden_states=states, timestep=times)
    said = turn_of(peers.Contender("optimum", "with_optimum.py", asked), asked, tmp_path, "now")
    feeds = {"sample": sample, "encoder_hidden_states": states, "timestep": np.array(times[0])}
    expected = onnxruntime.InferenceSession(graph).run(None, feeds)[0]
    assert np.array_equal(np.load(asked["output"]), expected)
    assert said["one_time"] is True
    assert said["versions"]["onnxruntime"] == onnxruntime.__version__
    work = types.SimpleNamespace(feeds=asked["feeds"])
    ours = expected.copy()
    ours[[1, 3]] += 9
    ours[0, 0, 0, 0] += 0.5
    np.save(tmp_path / "answer-0.npy", ours)
    np.save(tmp_path / "answer-1.npy", expected)
    one = peers.Contender("optimum", "with_optimum.py", asked)
    assert compare._error(work, one, said, tmp_path, 1) == pytest.approx(0.5 / np.abs(ours[[0, 2]]).max())
    assert compare._error(work, dataclasses.replace(one, weights="other"), said, tmp_path, 1) is None


def test_what_must_be_known_is_noted():
    one = peers.Contender("peer", "x.py", {}, forwards=18)
    said = {"guided_forwards": 12, "one_time": True, "finite": False, "precision": "fp32", "threads": 1, "versions": {}}
    turns = [compare.Turn(i, 1.0, 1.0, (1.0,), 1, sha256=str(i)) for i in (1, 2)]
    told = " ".join(compare._side(one, said, turns, None).notes)
    assert "ITS BACKBONE SAW 12 ROWS A PICTURE where 18 were asked for" in told
    assert "K directions would be K calls" in told
    assert "NOT FINITE" in told
    assert "not the same in every round" in told


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("raise ValueError('of its own')", r"peer failed in round 2 \(exit status 1\): ValueError: of its own"),
        ("import sys; sys.exit(3)", r"peer failed in round 2 \(exit status 3\): it said nothing"),
        ("raise MemoryError", "peer ran out of memory in round 2, or was killed for it"),
        ("raise RuntimeError('Failed to allocate 9 GB')", "peer ran out of memory .*Failed to allocate 9 GB"),
        pytest.param(
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "peer ran out of memory",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="no such signal"),
        ),
    ],
)
def test_a_peer_that_fails(script, message, tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text(script, encoding="utf-8")
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path)
    asked = job(tmp_path)
    with pytest.raises(RequestError, match=message) as told:
        turn_of(peers.Contender("peer", "peer.py", asked), asked, tmp_path, "in round 2")
    assert "\n" not in str(told.value)


WAITS = """
    import os, sys, time
    sys.path.append({scripts!r})
    from turn import Parent
    parent = Parent()
    print("not for the parent")
    with open("process", "w", encoding="utf-8") as file:
        file.write(str(os.getpid()))
    parent.tell(load=1.0)
    time.sleep(60)
"""


def waiting(tmp_path):
    """A script that would wait for a minute, once it has written down its process's number."""
    text = textwrap.dedent(WAITS).format(scripts=str(Path(peers.__file__).parent))
    (tmp_path / "peer.py").write_text(text, encoding="utf-8")


def gone(process):
    for _ in range(100):
        try:
            os.kill(process, 0)
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a process there")
def test_ctrl_c_ends_the_contender(tmp_path, monkeypatch):
    waiting(tmp_path)
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path)
    file = tmp_path / "process"

    def press():
        while not file.exists() or not file.read_text(encoding="utf-8"):
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    asked = job(tmp_path)
    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        turn_of(peers.Contender("peer", "peer.py", asked), asked, tmp_path, "now")
    assert gone(int(file.read_text(encoding="utf-8")))


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a process there")
def test_a_contender_ends_with_its_parent(tmp_path):
    waiting(tmp_path)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "peer.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    ) as process:
        process.stdin.write(b"{}\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"load": 1.0}
        started = time.perf_counter()
        process.stdin.close()
        assert process.wait(10) == 1
        assert time.perf_counter() - started < 5
        assert process.stderr.read().strip() == b"not for the parent"


def test_ctrl_c_ends_the_command(monkeypatch, capsys):
    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "measure", stopped)
    assert main(["compare", "shapes-sd3", "--against", "floor"]) == 130


def refused(capsys, *arguments):
    assert main(["compare", *arguments]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    return told[0]


@pytest.mark.parametrize(
    ("name", "lacks", "installs"),
    [
        ("openvino", "openvino and no numpy", "openvino numpy"),
        ("diffusers", "torch and no diffusers and no transformers", "torch diffusers transformers"),
    ],
)
def test_a_missing_environment(name, lacks, installs, bare, capsys):
    told = refused(capsys, "shapes-sd3", "--against", name, "--python", f"{name}={bare}")
    program = f"{name}-env\\Scripts\\python" if sys.platform == "win32" else f"{name}-env/bin/python"
    assert told == (
        f"error: {name}: {bare} has no {lacks}; make it an environment of its own: python -m venv {name}-env && "
        f"{program} -m pip install {installs} ; then add --python {name}={program}"
    )


def test_optimum_needs_more_to_export_than_to_run(shapes, bundles, bare, tmp_path):
    work = dataclasses.replace(backbone_work(shapes, 4, tmp_path, **SHARED), bundle=Bundle.open(bundles["sd3"]))
    folder = bundles["sd3"]
    (one,) = peers.against(work, [f"optimum={folder}"], {})  # ONNX Runtime is here
    assert (one.weights, one.exports) == ("unknown", None)
    assert one.job["graph"] == str(folder / "transformer" / "model.onnx")
    with pytest.raises(RequestError, match="has no onnxruntime and no optimum-onnx and no torch"):
        peers.against(backbone_work(shapes, 4, tmp_path, **SHARED), ["optimum"], {"optimum": bare})


def test_optimums_graphs_are_made_once(shapes, tmp_path, cache, monkeypatch):
    work = backbone_work(shapes, 4, tmp_path, **SHARED)
    monkeypatch.setattr(peers, "_missing", lambda one, needs: [])
    (one,) = peers.against(work, ["optimum"], {})
    folder = Path(one.exports["export"])
    assert folder.parent == cache / "optimum"
    assert one.job["graph"] == str(folder / "transformer" / "model.onnx")
    assert (one.weights, one.exports["folder"]) == ("same", one.exports["folder"])
    (tmp_path / "with_optimum.py").write_text(
        f"import sys; sys.path.append({str(Path(peers.__file__).parent)!r})\n"
        "from pathlib import Path\nfrom turn import Parent\n"
        "place = Path(Parent().job['export'], 'transformer')\nplace.mkdir(parents=True)\n"
        "(place / 'model.onnx').write_text('graph')\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path)
    compare_process.export(one, tmp_path)
    assert Path(one.job["graph"]).read_text(encoding="utf-8") == "graph"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    (again,) = peers.against(work, ["optimum"], {})
    assert again.exports is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "tensorflow"], "--against 'tensorflow' is not known; choose from diffusers, optimum, openvino"),
        (["--against", "floor,floor"], "--against names floor twice"),
        (["--against", "floor=here"], "give it no folder"),
        (["--against", "low-memory=here"], "give it no folder"),
        (["--against", "low-memory", "--work", "picture", "--threads", "1"], "leave --threads out"),
        (["--against", "bundle"], "bundle=FOLDER"),
        (["--against", "bundle=nowhere"], "no such folder"),
        (["--against", "diffusers=."], "no transformer/config.json in it"),
        (["--against", "floor", "--python", "floor=python"], "runs in this program's own environment"),
        (["--against", "floor", "--python", "openvino=python"], "not among --against"),
        (["--against", "floor", "--python", "openvino"], "KEY=VALUE"),
        (["--against", "openvino", "--python", "openvino=nowhere/python"], "cannot be started"),
        (["--against", "floor", "--rounds", "1"], "--rounds must be 2 or more"),
        (["--against", "floor", "--threads", "0"], "--threads and --rows 1 or more"),
        (["--against", "floor", "--steps", "3"], "--steps is for --work picture"),
        (["--against", "floor", "--work", "picture", "--rows", "4"], "--rows is for --work backbone"),
        (["--against", "floor", "--work", "picture", "--steps", "0"], "got 0"),
        (["--against", "floor", "--plot", "nowhere/a.png"], "no such folder"),
    ],
)
def test_what_cannot_be_compared(arguments, message, capsys):
    assert message in refused(capsys, "shapes-sd3", *arguments)


def test_bundles_that_do_not_fit(bundles, capsys):
    assert "not a bundle of the family sd3" in refused(capsys, "shapes-sd3", "--against", f"bundle={bundles['sd15']}")
    assert "takes other shapes" in refused(capsys, "shapes-sd3", "--against", f"bundle={bundles['sd3']}")
    assert "a foreign folder" in refused(capsys, str(bundles["optimum"]), "--against", "floor")


def test_the_floor(monkeypatch):
    """The best try of the best product counts."""
    monkeypatch.syspath_prepend(str(peers.SCRIPTS))
    import floor

    clock = iter(np.cumsum([0, 3, 1, 5, 1, 4, 1, 2, 1, 3, 1, 6, 1, 9, 1, 2.5, 1, 7, 1, 8]).tolist())
    monkeypatch.setattr(floor.time, "perf_counter", lambda: next(clock))
    assert floor.best([lambda: None, lambda: None]) == 2


@pytest.mark.slow  # for all that it imports
def test_random_weights_are_those_of_the_exporter(monkeypatch, shapes):
    pytest.importorskip("diffusers")
    import torch
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    from export.components import _draw

    monkeypatch.syspath_prepend(str(peers.SCRIPTS))
    import models

    kinds = {"transformer": SD3Transformer2DModel, "text_encoder": CLIPTextModelWithProjection, "vae": AutoencoderKL}
    for name, kind in kinds.items():
        folder = models._place(shapes.folder, name)
        for dtype in (torch.float32, torch.float16):
            made = models.drawn(kind, folder, dtype).state_dict()
            expected = _draw(kind, folder, dtype).state_dict()
            assert made.keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in made.items())


@pytest.mark.slow
def test_real_peers(capsys):
    """torch's own answer on the same weights; a floor that nothing is below."""
    pytest.importorskip("diffusers")
    assert main(["compare", "shapes-sd3", "--against", "diffusers,floor", "--rounds", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    ours, diffusers, floor = told["sides"]
    assert (ours["name"], diffusers["name"], floor["name"]) == ("ours", "diffusers", "floor")
    assert diffusers["weights"] == "same"
    assert 0 < diffusers["error"] < 5e-3  # fp16 against fp32
    assert ours["notes"] == diffusers["notes"] == []
    assert told["summary"]["floor"]["ratio"]["seconds"] < 1
    assert told["summary"]["floor"]["peak_rss_bytes"] is None


@pytest.mark.slow
def test_real_pictures(capsys):
    """Of as many guided forwards, or sequential calls; both were counted, or it would be noted."""
    pytest.importorskip("diffusers")
    asked = ["--work", "picture", "--steps", "2", "--against", "diffusers", "--json"]
    assert main(["compare", "shapes-sd3", *asked]) == 0
    ours, euler, diffusers = json.loads(capsys.readouterr().out)["sides"]
    assert "Euler's method, 4 steps: as many sequential calls" in euler["does"]
    assert "Euler's method, 6 steps: as many guided forwards" in diffusers["does"]
    assert ours["notes"] == euler["notes"] == diffusers["notes"] == []
    assert ours["error"] is euler["error"] is diffusers["error"] is None
