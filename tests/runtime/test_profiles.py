"""Timings and where they are kept: sittings, busy machines, damaged files."""

import json
import os
import subprocess
import sys
import time

import pytest

from epd.catalogue import cache_folder
from runtime.profiles import BUSY, Others, Profile, Timing, measure, timing


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    return cache_folder() / "directions"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """On a machine that does nothing else."""
    monkeypatch.setattr(Others, "share", lambda self: None)


class Clock:
    def __init__(self):
        self.now, self.done = 0.0, []

    def __call__(self):
        return self.now

    def task(self, name, *seconds):
        """Takes those seconds, run by run; the last for ever."""
        left = list(seconds)

        def run():
            self.done.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_the_median_after_a_warm_up_in_turns():
    clock = Clock()
    tasks = {"a": clock.task("a", 99, 1, 2, 50, 3, 4), "b": clock.task("b", 99, 7)}
    assert measure(tasks, clock) == {"a": Timing(3, 2, 4), "b": Timing(7, 7, 7)}
    assert clock.done == ["a", "b"] * 6


def test_a_short_task_is_done_several_times_in_a_turn():
    """As a drawing makes its calls, in a row; what counts is their mean."""
    clock = Clock()
    tasks = {"short": clock.task("short", 9, 0.03, 0.01, 0.02), "long": clock.task("long", 9, 1), "none": lambda: None}
    short, long, none = measure(tasks, clock, 2).values()
    assert short == pytest.approx((0.02, 0.02, 0.02))  # (30 + 10 + 20) / 3 ms, then 20 ms three times
    assert (long, none) == ((1, 1, 1), (0, 0, 0))
    assert clock.done == ["short", "long"] + (["short"] * 3 + ["long"]) * 2


def test_busy_is_told_by_the_quartiles_not_by_one_slow_run():
    assert not timing([1, 1.1, 1.2, 1.3, 9]).busy
    assert not timing([1, 1, 1, BUSY, BUSY]).busy
    assert timing([1, 1, 1.3, BUSY + 0.1, 2]).busy


def test_what_is_known_is_not_measured_again(cache):
    clock = Clock()
    tasks = {"a": clock.task("a", 3), "b": clock.task("b", 4)}
    first = Profile({"of": 1}, clock)
    assert first.need(tasks) == {"a": (3, 3, 3), "b": (4, 4, 4)}
    assert (first.anew, first.kept) == (True, True)
    again = Profile({"of": 1}, clock)
    assert again.need({"b": clock.task("b", 9)}) == {"b": (4, 4, 4)}
    assert not again.anew
    assert len(clock.done) == 12
    assert Profile({"of": 2}, clock).sittings == []
    assert list(cache.iterdir()) == [first.file]


def test_costs_of_two_sittings_are_never_compared():
    """One of two is known: both are measured, for the machine may have been slower then."""
    clock = Clock()
    profile = Profile({}, clock)
    profile.need({"a": clock.task("a", 3)})
    assert profile.need({"a": clock.task("a", 6), "b": clock.task("b", 8)}) == {"a": (6, 6, 6), "b": (8, 8, 8)}
    profile.need({"a": clock.task("a", 1), "c": clock.task("c", 2)})
    assert [sorted(sitting) for sitting in profile.sittings] == [["a", "c"], ["a", "b"]]
    assert profile.known(["a", "b"]) == {"a": (6, 6, 6), "b": (8, 8, 8)}
    assert profile.known(["a"]) == {"a": (1, 1, 1)}
    assert profile.known(["b", "c"]) is None
    profile.sit({"d": clock.task("d", 5)}, alone=True)
    assert Profile({}).sittings == [{"d": (5, 5, 5)}]


def test_a_busy_machine_is_measured_again_and_not_kept(caplog, cache):
    clock = Clock()
    once = clock.task("a", 1, 1, 1, 1, 9, 9, 1)
    assert Profile({}, clock).need({"a": once}) == {"a": (1, 1, 1)}
    assert "the machine was busy with something else (a: 1 to 9 s); measuring again" in caplog.text
    assert "still busy" not in caplog.text
    kept = next(cache.iterdir()).read_bytes()
    always = Profile({}, clock)
    found = always.sit({"a": clock.task("a", *[1, 1, 1, 1, 9, 9] * 2)}, alone=True)
    assert found["a"] == Timing(1, 1, 9)
    assert (always.anew, always.kept) == (True, False)
    assert always.known(["a"]) == {"a": (1, 1, 1)}  # what was kept before comes first
    other = Profile({"of": 2}, clock)
    other.sit({"a": clock.task("a", *[1, 1, 1, 1, 9, 9] * 2)})
    assert other.known(["a"]) == {"a": (1, 1, 9)}  # this object does not measure it again
    assert Profile({"of": 2}).known(["a"]) is None
    assert "still busy (a: 1 to 9 s): what was measured is used now, not kept" in caplog.text
    assert [file.read_bytes() for file in cache.iterdir()] == [kept]


def test_a_steady_load_is_seen_too(caplog, cache, monkeypatch):
    """All calls are alike, and slower than they would be."""
    shares = iter([0.8, 0.1, 0.8, 0.9])
    monkeypatch.setattr(Others, "share", lambda self: next(shares))
    clock = Clock()
    first, second = Profile({"of": 1}, clock), Profile({"of": 2}, clock)
    first.need({"a": clock.task("a", 1)})
    assert "other programs took 80% of the processors); measuring again" in caplog.text
    assert (first.kept, first.others) == (True, 0.1)
    second.need({"a": clock.task("a", 1)})
    assert (second.kept, second.others) == (False, 0.9)
    assert list(cache.iterdir()) == [first.file]


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_what_others_take(monkeypatch):
    """This process's own work is not counted, another one's is."""
    monkeypatch.undo()
    ends = time.perf_counter() + 0.3
    alone = Others()
    while time.perf_counter() < ends:
        pass
    own = alone.share()
    together = Others()
    busy = "import time; ends = time.process_time() + 0.3\nwhile time.process_time() < ends: pass"
    others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in os.sched_getaffinity(0)]
    for other in others:
        other.wait()
    assert 0 <= own <= 1
    assert 0.4 < together.share() <= 1
    assert Others().share() is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "\0",
        lambda text: text.replace('"rows": 4', '"rows": 8'),
        lambda text: json.dumps(json.loads(text) | {"sittings": [{"a": [-1, 1, 1]}]}),
        lambda text: json.dumps(json.loads(text) | {"sittings": [{"a": [1, 1]}]}),
        lambda text: json.dumps(json.loads(text) | {"sittings": [{"a": "soon"}]}),
        lambda text: json.dumps(json.loads(text) | {"sittings": [None]}),
        lambda text: json.dumps(json.loads(text) | {"format": 1}),
    ],
)
def test_a_damaged_file_is_measured_anew(damage, cache):
    clock = Clock()
    profile = Profile({"rows": 4}, clock)
    profile.need({"a": clock.task("a", 3)})
    whole = profile.file.read_text(encoding="utf-8")
    profile.file.write_text(damage(whole), encoding="utf-8")
    anew = Profile({"rows": 4}, clock)
    assert anew.sittings == []
    assert anew.need({"a": clock.task("a", 3)}) == {"a": (3, 3, 3)}
    assert anew.file.read_text(encoding="utf-8") == whole
    assert list(cache.iterdir()) == [anew.file]


def test_a_cache_that_cannot_be_written_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("runtime.profiles.BUSY", 1e9)
    (tmp_path / "cache").write_text("in the way", encoding="utf-8")
    profile = Profile({})
    assert profile.need({"a": lambda: time.sleep(0.001)})["a"].seconds > 0
    assert "what was measured is not kept" in caplog.text
    assert not profile.kept
