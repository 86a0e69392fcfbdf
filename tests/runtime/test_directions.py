"""Ways to run the points of a request: the same slopes and pictures in all of them, and the choice among them."""

import itertools
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_bundle
from onnx import TensorProto, helper

import epd
from epd.catalogue import cache_folder
from runtime import directions, profiles
from runtime.__main__ import main
from runtime.bundle import Bundle
from runtime.directions import LANES, Speed, at_once, check, settle, share
from runtime.errors import ProviderError, RequestError
from runtime.pipeline import Pipeline
from runtime.profiles import Profile
from runtime.session import Session
from runtime.slopes import Slopes, directions_of
from runtime.text import conditioning

DRAWING = {"seed": 3, "solver": "epd", "k": 3, "num_inference_steps": 3, "num_images_per_prompt": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("runtime.profiles.Others.share", lambda self: None)  # as on a machine that does nothing else
    return cache_folder() / "directions"


class Device:
    """A session whose calls take `cost(rows)` seconds of a clock that nothing else moves. The answers are real."""

    def __init__(self, session, cost, clock):
        self.session, self.cost, self.clock = session, cost, clock
        self.rows = []  # of every call

    def __getattr__(self, name):
        return getattr(self.session, name)

    def load(self):
        self.session.load()
        return self

    def __call__(self, **feeds):
        answer = self.session(**feeds)
        with self.clock.lock:
            self.clock.now += self.cost(len(feeds["encoder_hidden_states"]))
            self.rows.append(len(feeds["encoder_hidden_states"]))
        return answer


class Clock:
    def __init__(self):
        self.now, self.lock = 0.0, threading.Lock()

    def __call__(self):
        return self.now


def slopes(folder, *costs, clock=None, how=None, guided=True, interval=None):
    """On a device per cost; None: as fast as it is."""
    bundle = Bundle.open(folder)
    told = conditioning(bundle, lambda name: Session(bundle, name), ["", "red"] if guided else ["red"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # threads that wait for work are in each other's way on two cores
    sessions = [Session(bundle, bundle.backbone, session_options=options) for _ in costs]
    devices = [Device(s, cost, clock) if cost else s for s, cost in zip(sessions, costs, strict=True)]
    return Slopes(devices[0], bundle.facts, told, 4.0, how or directions_of(sessions[0]), interval, devices[1:])


@pytest.fixture
def equal_speeds(monkeypatch):
    """As if measured: real calls of so small a graph may differ by anything, and one session then gets all of them."""
    monkeypatch.setattr(directions, "_speeds", lambda trial, points, profile: (Speed(),) * len(trial.sessions))


def points(count=2, images=1):
    x = np.random.default_rng(count).standard_normal((count, images, tiny_bundle.CHANNELS, 4, 4))
    return epd.Points(x, np.linspace(0.9, 0.2, count))


@pytest.mark.parametrize("seed", range(20))
def test_a_share_is_the_best_there_is(seed):
    dice = np.random.default_rng(seed)
    speeds = [Speed(one, one * dice.uniform(0.9, 5), 5) for one in dice.uniform(0.1, 2, 3)]

    def ends(shares):
        return max(speed.seconds(n) for speed, n in zip(speeds, shares, strict=True) if n)

    best = min(ends(s) for s in itertools.product(range(6), repeat=3) if sum(s) == 5)
    shares = share(5, speeds)
    assert sum(shares) == 5
    assert ends(shares) == best
    assert share(5, speeds) == shares


@pytest.mark.parametrize(
    ("units", "speeds", "shares"),
    [
        (4, [Speed(), Speed()], [2, 2]),
        (3, [Speed(), Speed()], [2, 1]),
        (1, [Speed(2.0, 2.0), Speed(1.0, 1.0)], [0, 1]),
        (4, [Speed(1.0, 4.0, 4), Speed(3.0, 12.0, 4)], [3, 1]),
        (8, [Speed(1.0, 1.0, 8), Speed(0.9, 7.2, 8)], [7, 1]),  # the first takes no longer for many than for one
    ],
)
def test_shares_of_two(units, speeds, shares):
    assert share(units, speeds) == shares


@pytest.mark.parametrize("way", LANES)
@pytest.mark.parametrize(("count", "images"), [(1, 1), (3, 1), (1, 3), (3, 2)])
def test_every_unit_is_in_one_call(way, count, images):
    lanes = LANES[way](count, images, [Speed(), Speed(2.0, 2.0)])
    calls = [call for lane in lanes for call in lane.calls]
    assert [unit for call in calls for unit in range(call.start, call.stop)] == list(range(count * images))


@pytest.mark.parametrize("way", ["calls", "async", "spread"])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("guided", "interval"), [(True, None), (False, None), (True, (0.3, 0.8))])
def test_all_ways_give_the_slopes_of_one_batch(bundles, family, way, images, guided, interval):
    request = points(3, images)
    batch = slopes(bundles[family], None, guided=guided, interval=interval)
    other = slopes(bundles[family], None, None, how=way, guided=guided, interval=interval)
    expected = batch(request)
    np.testing.assert_allclose(other(request), expected, rtol=1e-5, atol=1e-6)
    assert batch.guided_forwards == other.guided_forwards
    assert [s.calls for s in other.sessions] == ([1, 1] if way == "spread" else [3, 0])


@pytest.mark.parametrize("way", ["batch", "calls", "async", "spread"])
def test_all_ways_draw_the_same_pictures(bundles, family, way, equal_speeds):
    batch = Pipeline.from_pretrained(bundles[family])("red", **DRAWING, output_type="latent")
    provider = "cpu, cpu" if way == "spread" else "cpu"
    pipe = Pipeline.from_pretrained(bundles[family], provider=provider, directions=way)
    result = pipe("red", **DRAWING, output_type="latent")
    np.testing.assert_allclose(result.images, batch.images, rtol=1e-5, atol=1e-5 * abs(batch.images).max())
    assert result.report.directions == way
    for name in ("sequential_calls", "total_evaluations", "guided_forwards"):
        assert getattr(result.report, name) == getattr(batch.report, name)
    ran = ["CPUExecutionProvider"] * (2 if way == "spread" else 1)
    assert result.report.provider["ran"] == ",".join(ran)


@pytest.mark.parametrize(
    ("cost", "way", "told"),
    [
        (
            lambda rows: rows**2,
            "calls",
            "calls: 2 directions cost 2.00 calls here; batch 4.00, async 2.00 (a call: 4 s",
        ),
        (lambda rows: 8 + rows, "batch", "batch: 2 directions cost 1.20 calls here; calls 2.00, async 2.00"),
        (lambda rows: rows, "batch", "batch: 2 directions cost 2.00 calls here"),  # nothing to win: the simplest
    ],
)
def test_auto_picks_what_the_device_is_good_at(bundles, cost, way, told, caplog, cache):
    clock = Clock()
    first = slopes(bundles["sd3"], cost, clock=clock)
    settle(first, "auto", points(), Profile({"rows": 4}, clock))
    assert first.directions == way
    assert told in caplog.text
    assert "measured now" in caplog.text
    (tried,) = first.sessions
    assert sorted(tried.rows) == [2] * 6 * 3 + [4] * 6  # a point, two points at once; one batch: six runs of each
    assert first.guided_forwards == 0
    for asked in ("auto", None):  # once is enough, and is then the default
        again = slopes(bundles["sd3"], cost, clock=clock)
        settle(again, asked, points(), Profile({"rows": 4}, clock))
        assert (again.directions, again.sessions[0].rows) == (way, [])
    assert "measured before" in caplog.text
    assert [file.suffix for file in cache.iterdir()] == [".json"]


def test_what_was_not_measured_stays_as_it_was(bundles, caplog, cache):
    clock = Clock()
    unknown = slopes(bundles["sd3"], lambda rows: rows**2, clock=clock)
    settle(unknown, None, points(), Profile({"rows": 4}, clock))
    assert (unknown.directions, unknown.sessions[0].rows, caplog.text) == ("batch", [], "")
    settle(unknown, "auto", points(), Profile({"rows": 4}, clock))
    settle(unknown, None, points(), Profile({"rows": 6}, clock))  # another question
    assert not Profile({"rows": 6}).sittings
    assert len(list(cache.iterdir())) == 1


def test_one_point_leaves_no_choice(bundles, caplog, cache):
    one = slopes(bundles["sd3"], lambda rows: rows, clock=Clock())
    settle(one, "auto", points(1, 2), Profile({}))
    assert (one.directions, one.sessions[0].rows, caplog.text) == ("batch", [], "")
    assert not cache.exists()


def test_spread_divides_by_measured_speed(bundles, family, caplog):
    """The second device is three times as slow: of four points it gets one, and the pair of a point stays together."""
    clock, request = Clock(), points(4)
    fast, slow = lambda rows: rows, lambda rows: 3 * rows
    for _ in range(2):  # measured, then remembered
        divided = slopes(bundles[family], fast, slow, clock=clock)
        settle(divided, None, request, Profile({}, clock))
        assert divided.directions == "spread"
        assert divided.speeds == (Speed(2, 8, 4), Speed(6, 24, 4))
        for session in divided.sessions:
            session.rows.clear()
        answer = divided(request)
        assert [session.rows for session in divided.sessions] == [[6], [2]]
        np.testing.assert_allclose(answer, slopes(bundles[family], None)(request), rtol=1e-5, atol=1e-6)
    assert caplog.text.count("measuring") == 1
    assert "3 on CPUExecutionProvider (2 s alone), 1 on CPUExecutionProvider (6 s alone)" in caplog.text


def test_auto_leaves_out_a_device_that_does_not_help(bundles):
    clock = Clock()  # which adds up what runs at once: nothing is won by a second device
    request = points(4)
    helped = slopes(bundles["sd3"], lambda rows: 10 + rows, lambda rows: 10 + rows, clock=clock)
    settle(helped, "auto", request, Profile({}, clock))
    assert helped.directions == "batch"


def test_one_unit_is_measured_once(bundles):
    clock = Clock()
    divided = slopes(bundles["sd3"], lambda rows: 2 * rows, lambda rows: rows, clock=clock)
    settle(divided, None, points(1), Profile({}, clock))
    assert divided.speeds == (Speed(4, 4, 1), Speed(2, 2, 1))
    assert [session.rows for session in divided.sessions] == [[2] * 6] * 2
    divided(points(1))
    assert divided.ran == {1}  # the first has nothing to do


def test_the_report_names_the_sessions_that_ran(bundles, monkeypatch):
    """Of one point each, the faster session has them all; the other one is not told to have run."""
    monkeypatch.setattr(directions, "_speeds", lambda *arguments: (Speed(3.0, 3.0), Speed(1.0, 1.0)))
    pipe = Pipeline.from_pretrained(bundles["sd3"], provider="cpu,cpu")
    for solver, ran in (("euler", 1), ("dpm2", 1)):
        report = pipe("red", solver=solver, num_inference_steps=2, seed=1, output_type="latent").report
        assert report.provider["ran"] == ",".join(["CPUExecutionProvider"] * ran)
    monkeypatch.setattr(directions, "_speeds", lambda *arguments: (Speed(), Speed()))
    report = pipe("red", solver="epd", k=2, num_inference_steps=2, seed=1, output_type="latent").report
    assert report.provider["ran"] == "CPUExecutionProvider,CPUExecutionProvider"


@pytest.mark.parametrize("picks", ["batch", "calls"])
def test_generate_auto_on_a_simulated_device(bundles, picks, monkeypatch, caplog):
    """A device on which four rows cost three calls of two, and one on which they cost a call and a half."""
    clock = Clock()
    seconds = {2: 1.0, 4: 3.0 if picks == "calls" else 1.5}
    monkeypatch.setattr("runtime.pipeline.Profile", lambda key: Profile(key, clock))
    pipe = Pipeline.from_pretrained(bundles["sd15"], directions="auto")
    backbone = pipe._session("unet").load()
    pipe._sessions["unet"] = Device(backbone, seconds.__getitem__, clock)
    asked = {"solver": "epd", "k": 2, "num_inference_steps": 3, "seed": 3, "output_type": "latent"}
    result = pipe("red", **asked)
    assert result.report.directions == picks
    assert f"{picks}: 2 directions cost {'2.00' if picks == 'calls' else '1.50'} calls here" in caplog.text
    as_one_batch = Pipeline.from_pretrained(bundles["sd15"])("red", **asked)
    np.testing.assert_allclose(result.images, as_one_batch.images, rtol=1e-5, atol=1e-5)


def profiled(bundle, prefix):
    """A session that writes ONNX Runtime's profile of its runs, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling, options.profile_file_prefix = True, str(prefix)
    return Session(bundle, bundle.backbone, session_options=options)


def runs_of(session):
    """Start and end of each run by ONNX Runtime's own clock, in ns of the machine's."""
    inner = session._session
    origin = inner.get_profiling_start_time_ns()
    events = json.loads(Path(inner.end_profiling()).read_text(encoding="utf-8"))
    runs = [event for event in events if event["name"] == "model_run"]
    return [(origin + 1000 * run["ts"], origin + 1000 * (run["ts"] + run["dur"])) for run in runs]


@pytest.mark.slow
def test_profiles_of_spread_calls_overlap(tmp_path, caplog, monkeypatch):
    """The shipped model on two CPU sessions: the same pictures, divided as measured, its calls at once."""
    monkeypatch.setattr(profiles, "BUSY", 1e9)  # measured once, whatever else the machine does
    drawing = {"seed": 3, "solver": "epd", "k": 2, "num_inference_steps": 3, "num_images_per_prompt": 2}
    expected = Pipeline.from_pretrained("shapes-sd3")("a red circle", **drawing, output_type="np").images
    pipe = Pipeline.from_pretrained("shapes-sd3", provider="cpu,cpu")
    for index, name in enumerate(("transformer", "transformer 1")):
        pipe._sessions[name] = profiled(pipe.bundle, tmp_path / str(index)).load()
    result = pipe("a red circle", **drawing, output_type="np")
    np.testing.assert_allclose(result.images, expected, atol=1e-4)
    assert (result.report.directions, result.report.provider["ran"].count("CPU")) == ("spread", 2)
    told = re.search(r"spread: 2 x 2 points and images: (\d) on .* alone\), (\d) on ", caplog.text)
    assert sorted(map(int, told.groups())) in ([1, 3], [2, 2])
    first, second = (runs_of(pipe._sessions[name]) for name in ("transformer", "transformer 1"))
    drawn = result.report.sequential_calls
    both = zip(first[-drawn:], second[-drawn:], strict=True)
    overlaps = [min(a[1], b[1]) - max(a[0], b[0]) for a, b in both]
    assert sum(overlap > 0 for overlap in overlaps) >= drawn / 2, overlaps  # a first call may be over before another


@pytest.mark.parametrize(("way", "count"), [("spread", 2), ("async", 3)])
def test_calls_overlap_in_time(bundles, family, way, count):
    """Each call waits inside for all others, which would never come if calls were made in turn."""
    met, spans = threading.Barrier(count), []

    class Recorded(Device):
        def __call__(self, **feeds):
            started = time.perf_counter()
            met.wait(timeout=30)
            answer = self.session(**feeds)
            met.wait(timeout=30)
            spans.append((self, started, time.perf_counter()))
            return answer

    at = slopes(bundles[family], None, None, how=way)
    at.sessions = tuple(Recorded(session, None, None) for session in at.sessions)
    request = points(3)
    answer = at(request)
    assert len(spans) == count
    assert max(started for _, started, _ in spans) < min(ended for *_, ended in spans)
    assert len({id(session) for session, *_ in spans}) == (2 if way == "spread" else 1)
    np.testing.assert_allclose(answer, slopes(bundles[family], None)(request), rtol=1e-5, atol=1e-6)


def test_results_keep_their_order_whoever_ends_first():
    second = threading.Event()
    tasks = [lambda: second.wait(30) and "first", lambda: second.set() or "second"]
    assert at_once(tasks, lambda: None) == ["first", "second"]


def test_an_error_ends_the_other_calls(tmp_path):
    """A real call of an endless graph, which would never come back; the error that came first is told, not its end."""
    session = endless(tmp_path)

    def fail():
        time.sleep(0.3)
        raise RequestError("the cause")

    with pytest.raises(RequestError, match="the cause"):
        at_once([lambda: session(trips=2**62), fail], session.stop)
    assert session.calls == 0
    assert session(trips=3)["count"] == 3  # it can be called again


def test_ctrl_c_ends_all_calls(tmp_path, monkeypatch):
    """Real calls of an endless graph on one session, from two threads."""
    session, wait, waits = endless(tmp_path), directions.concurrent.futures.wait, []

    def interrupted(*arguments, **options):
        if threading.current_thread() is not threading.main_thread():
            return wait(*arguments, **options)
        waits.append(arguments)
        if len(waits) == 1:
            while len(session._running) < 2:
                time.sleep(0.01)
            raise KeyboardInterrupt
        return wait(*arguments, **options)

    monkeypatch.setattr(directions.concurrent.futures, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        at_once([lambda: session(trips=2**62)] * 2, session.stop)
    assert session._running == set()
    assert session.calls == 0
    assert session(trips=3)["count"] == 3  # it can be called again


def endless(folder):
    """A session that counts to `trips`."""
    kind = TensorProto.INT64
    body = helper.make_graph(
        [
            helper.make_node("Add", ["before", "one"], ["after"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [helper.make_tensor_value_info(n, k, []) for n, k in (("i", kind), ("go", TensorProto.BOOL), ("before", kind))],
        [helper.make_tensor_value_info(n, k, []) for n, k in (("go_on", TensorProto.BOOL), ("after", kind))],
    )
    folder = tiny_bundle.bundle(folder / "endless")
    bundle = Bundle.open(folder)
    constants = [helper.make_tensor("zero", kind, [], [0]), helper.make_tensor("one", kind, [], [1])]
    loop = helper.make_node("Loop", ["trips", "", "zero"], ["count"], body=body)
    told = [[helper.make_tensor_value_info(name, kind, [])] for name in ("trips", "count")]
    model = helper.make_model(
        helper.make_graph([loop], "endless", *told, initializer=constants),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    session = Session(bundle, bundle.backbone)
    onnx.save(model, session.path)
    return session.load()


def test_one_timestep_for_all_rows(bundles):
    """Such a graph has no batch; it is called once a time in every other way."""
    request, scalar = points(3, 2), bundles["optimum"]
    expected = slopes(bundles["sd15"], None)(request)
    for way in ("calls", "async", "spread"):
        other = slopes(scalar, None, None, how=way)
        np.testing.assert_allclose(other(request), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RequestError, match=r"one timestep for all rows.*give --directions calls or auto"):
        settle(slopes(scalar, None), "batch", request, Profile({}))
    clock = Clock()
    chosen = slopes(scalar, lambda rows: 8 + rows, clock=clock)
    settle(chosen, "auto", request, Profile({}, clock))
    assert chosen.directions == "calls"


def test_a_provider_of_one_call_at_a_time(bundles, monkeypatch):
    monkeypatch.setattr(directions, "_ONE_AT_A_TIME", ("CPUExecutionProvider",))
    clock = Clock()
    alone = slopes(bundles["sd3"], lambda rows: rows**2, clock=clock)
    with pytest.raises(RequestError, match="one call at a time on a session; give --directions batch or auto"):
        settle(alone, "async", points(), Profile({}))
    profile = Profile({}, clock)
    settle(alone, "auto", points(), profile)
    assert alone.directions == "calls"
    assert [sitting.keys() for sitting in profile.sittings] == [{"2 rows", "4 rows"}]


@pytest.mark.parametrize(
    ("asked", "providers", "message"),
    [
        ("fast", 1, "directions must be one of auto, batch, calls, async, spread; got 'fast'"),
        ("spread", 1, "give them as in --provider webgpu,cpu"),
        ("batch", 2, "batch is for one provider"),
    ],
)
def test_what_cannot_be_asked_for(asked, providers, message):
    with pytest.raises(RequestError, match=message):
        check(asked, providers)


def test_a_profile_is_of_one_device_and_model(bundles, monkeypatch):
    def key(pipe, **asked):
        return json.dumps(pipe._key(pipe.plan("red", **asked)), sort_keys=True)

    pipe = Pipeline.from_pretrained(bundles["sd3"])
    keys = [key(pipe)]
    assert key(pipe, seed=5, solver="epd", k=3, guidance_scale=1.0, num_images_per_prompt=2) == keys[0]
    fewer = onnxruntime.SessionOptions()
    fewer.intra_op_num_threads = 1
    keys += [
        key(Pipeline.from_pretrained(bundles["sd15"])),
        key(Pipeline.from_pretrained(bundles["sd3"], provider="cpu,cpu")),
        key(Pipeline.from_pretrained(bundles["sd3"], session_options=fewer)),
    ]
    changes = [
        lambda: monkeypatch.setattr(profiles.cachekey.platform, "node", lambda: "another"),
        lambda: monkeypatch.setenv("OMP_NUM_THREADS", "3"),
        lambda: monkeypatch.setattr(profiles, "usable_cores", lambda: 1000),
        lambda: monkeypatch.setattr("runtime.pipeline.drivers", lambda row: {"npu": "2.7.0"}),
        lambda: monkeypatch.setattr("runtime.pipeline.base_wheels", lambda: {"onnxruntime": "1.99"}),
    ]
    for change in changes:
        change()
        keys.append(key(pipe))
    assert len(set(keys)) == len(keys)


def test_generate_measures_once_and_says_why(bundles, tmp_path, capsys, caplog, cache, monkeypatch):
    monkeypatch.setattr(profiles, "BUSY", 1e9)  # the calls of so small a graph are never alike
    draw = ["generate", "red", "--model", str(bundles["sd3"]), "-s", "3", "--solver", "epd", "-k", "2", "--json"]
    draw += ["-o", str(tmp_path / "a.png")]

    def report(*more):
        assert main([*draw, *more]) == 0
        return json.loads(capsys.readouterr().out)

    assert report()["directions"] == "batch"
    assert not cache.exists()
    first = report("--directions", "auto")
    assert "2 directions cost" in caplog.text
    assert first["seconds"]["measure"] > 0
    (file,) = cache.iterdir()
    kept = file.read_bytes()
    second = report()
    assert second["directions"] == first["directions"]
    assert "measure" not in second["seconds"]
    assert file.read_bytes() == kept


def test_generate_on_two_providers(bundles, tmp_path, capsys, caplog, equal_speeds):
    out = tmp_path / "a.png"
    model = ["--model", str(bundles["sd3"])]
    draw = ["generate", "red", *model, "-s", "3", "--solver", "epd", "-k", "2", "--json", "-o", str(out)]
    assert main([*draw, "--provider", "cpu,cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["directions"], report["provider"]["asked"]) == ("spread", "cpu,cpu")
    assert "spread: 2 x 1 points and images: " in caplog.text
    caplog.clear()
    again = ["generate", "--from-metadata", str(out), *model, "-o", str(tmp_path / "b.png")]
    assert main([*again, "--provider", "cpu,cpu"]) == 0
    assert "may differ" not in caplog.text
    assert (tmp_path / "b.png").is_file()
    for wrong in (["--provider", "cpu,npu"], ["--directions", "spread"], ["--directions", "fast"]):
        assert main([*draw, *wrong]) == 2
    assert main(["fit", *model[1:], "--provider", "cpu,cpu"]) == 2
    assert "fitting runs on one provider" in capsys.readouterr().err


def test_session_options_are_for_one_provider():
    with pytest.raises(ProviderError, match="one provider"):
        Pipeline.from_pretrained("shapes-sd3", provider="cpu,cpu", session_options=onnxruntime.SessionOptions())
