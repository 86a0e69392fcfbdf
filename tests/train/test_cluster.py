"""Ray: the same numbers as here, also when a worker is killed. In an environment that has Ray."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import epd
from benchmarks.__main__ import main as benchmarks
from benchmarks.bench import Drawing
from epd.train.__main__ import main
from epd.train.cluster import spread
from epd.train.optimise import read_log
from epd.train.rollout import Recipe
from runtime.errors import RequestError
from tests.runtime import tiny_bundle

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


@dataclass(frozen=True)
class Squares:
    """Tasks are numbers; the worker that is told `deadly` dies, the first time."""

    folder: str
    deadly: int = -1
    wrong: int = -1
    threads: int = 1

    def open(self):
        Path(self.folder, f"opened-{os.getpid()}").touch()
        return self.answer

    def answer(self, number):
        if number == self.deadly and not Path(self.folder, "died").exists():
            Path(self.folder, "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.wrong:
            raise RequestError(f"{number} is wrong")
        return number * number


@pytest.fixture(scope="module", autouse=True)
def cluster():
    yield
    ray.shutdown()


def test_answers_come_in_order_from_workers_that_get_ready_once(tmp_path):
    assert list(spread(Squares(str(tmp_path)), range(40), "local")) == [n * n for n in range(40)]
    workers = list(tmp_path.glob("opened-*"))
    assert 1 <= len(workers) < 20
    assert f"opened-{os.getpid()}" not in [worker.name for worker in workers]


def test_a_task_whose_worker_was_killed_is_done_again(tmp_path):
    assert list(spread(Squares(str(tmp_path), deadly=7), range(12), "local")) == [n * n for n in range(12)]
    assert (tmp_path / "died").exists()


def test_an_error_of_a_task_is_raised_as_it_is(tmp_path):
    answers = spread(Squares(str(tmp_path), wrong=3), range(6), "local")
    assert [next(answers) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(RequestError, match=r"^3 is wrong$"):
        next(answers)


def test_a_training_on_a_cluster_is_the_one_here(tmp_path):
    bundle = tiny_bundle.bundle(tmp_path / "bundle", "sd3", size=32)
    epd.start_table(epd.schedule.flow(3), 2).save(tmp_path / "start.json")
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red {c}" for c in "abcdefghijkl"), encoding="utf-8")
    for name, more in (("here", []), ("there", ["--ray", "local"])):
        options = ["--table", tmp_path / "start.json", "--prompts", tmp_path / "prompts.txt", "--reward", "psnr"]
        options += ["--iterations", 2, "--every", 1, "--batch", 4, "--group", 3, "--validation", 3]
        options += ["-o", tmp_path / f"{name}.json", *more]
        assert main([str(one) for one in ["rdpo", bundle, *options]]) == 0
    here, there = (epd.Table.load(tmp_path / f"{name}.json") for name in ("here", "there"))
    np.testing.assert_array_equal(here.r, there.r)
    np.testing.assert_array_equal(here.w, there.w)
    logs = [[{**line, "seconds": 0} for line in read_log(tmp_path / name)] for name in ("here", "there")]
    assert logs[0] == logs[1]


@pytest.fixture
def one_thread():
    """As a worker's torch has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_teacher_on_a_cluster_is_the_one_here(tiny_checkpoints, tmp_path):
    """The same trajectories to the last bit, in files of the same names; so the same table."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red {c}" for c in "abcdefghijkl"), encoding="utf-8")
    for name, more in (("here", []), ("there", ["--ray", "local"])):
        options = ["-n", 3, "-k", 2, "--trajectories", 16, "--teacher-calls", 40, "--steps", 2, "--every", 1]
        options += ["--prompts", tmp_path / "prompts.txt", "--candidates", 2, "--work", tmp_path / name]
        command = ["distill", tiny_checkpoints["sd3"], *options, "-o", tmp_path / f"{name}.json", *more]
        assert main([str(one) for one in command]) == 0
    files = [sorted((tmp_path / name).glob("teacher-*.npz")) for name in ("here", "there")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert len(files[0]) >= 3
    for here, there in zip(*files, strict=True):
        one, other = np.load(here), np.load(there)
        assert all(np.array_equal(one[name], other[name]) for name in ("times", "x", "d"))
    here, there = (epd.Table.load(tmp_path / f"{name}.json") for name in ("here", "there"))
    np.testing.assert_array_equal(here.r, there.r)
    np.testing.assert_array_equal(here.w, there.w)


def test_a_cluster_that_is_not_there_is_told(tmp_path):
    ray.shutdown()
    with pytest.raises(RequestError, match="no cluster is reached there") as error:
        list(spread(Squares(str(tmp_path)), range(2), "127.0.0.1:1"))
    assert "\n" not in str(error.value)


def test_the_pictures_that_are_judged_are_those_drawn_here(tmp_path, capsys):
    """Of a stopped run only what is missing is drawn."""
    bundle = tiny_bundle.bundle(tmp_path / "bundle", "sd3", size=32)
    (tmp_path / "prompts.txt").write_text("red\nblue cat\nsquare\n", encoding="utf-8")
    asked = ["quality", str(bundle), "--prompts", str(tmp_path / "prompts.txt"), "--seeds", "2", "--batch", "4"]
    asked += ["--calls", "3", "--solvers", "heun", "paradigms", "--reference-steps", "60", "--json"]
    found = {}
    for name, more in (("here", []), ("there", ["--ray", "local"]), ("kept", ["--ray", "local"])):
        if name != "there":
            more = [*more, "--work", str(tmp_path / "work")]
        assert benchmarks([*asked, *more]) == 0
        found[name] = json.loads(capsys.readouterr().out)
        if name == "here":
            next((tmp_path / "work").glob("*-4-6.npz")).unlink()
    more = ["--teacher", str(bundle), "--ray", "local"]
    assert benchmarks([*asked, *more]) == 0
    found["taught"] = json.loads(capsys.readouterr().out)
    for result in found.values():
        for row in result["rows"]:
            row["seconds"] = None
    assert found["here"]["rows"] == found["there"]["rows"] == found["kept"]["rows"] == found["taught"]["rows"]


def test_another_bundle_on_a_machine_of_the_cluster_is_refused(tmp_path):
    bundle = tiny_bundle.bundle(tmp_path / "bundle", "sd3", size=32)
    with pytest.raises(RequestError, match="another model on a machine of the cluster"):
        Drawing(str(bundle), "cpu", ("red",), 4.0, 1, 1, 0, "that of another").open()
    with pytest.raises(RequestError, match="another model on a machine of the cluster"):
        Recipe(str(bundle), "psnr", network="that of another").open()
