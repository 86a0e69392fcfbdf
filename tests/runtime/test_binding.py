"""IO binding on the device "cpu", where ONNX Runtime does for real what it does on others; CUDA itself: test_cuda."""

import dataclasses
import gc
import threading
import weakref

import numpy as np
import pytest
import tiny_bundle

import epd
from runtime import pipeline as pipelines
from runtime import session as sessions
from runtime.binding import GRAPH, KEPT, Binding
from runtime.bundle import Bundle
from runtime.errors import ProviderError, RequestError
from runtime.ort import onnxruntime
from runtime.pipeline import Pipeline
from runtime.providers import CPU, PROVIDERS, Option
from runtime.session import Session

ON_DEVICE = dataclasses.replace(CPU, device="cpu", graphs="enable_cuda_graph", options={"enable_cuda_graph": Option()})
CAPTURE = {"enable_cuda_graph": "1"}


def feeds(rows=2, seed=0):
    random = np.random.default_rng([seed, rows])
    return {
        "sample": random.standard_normal((rows, 4, 4, 4)).astype(np.float32),
        "timestep": np.arange(rows, dtype=np.float32),
        "encoder_hidden_states": random.standard_normal((rows, 8, tiny_bundle.WIDTH)).astype(np.float32),
    }


class Watched:
    """A session of onnxruntime's that notes what is run: (rows, graph id, thread, addresses of inputs and outputs)."""

    def __init__(self, binding):
        self.session, self.runs, self.together = binding._session, [], None
        self.fill, self.filled = binding._fill, threading.local()
        binding._session, binding._fill = self, self.note

    def __getattr__(self, name):
        return getattr(self.session, name)

    def note(self, buffers, feeds):
        self.filled.inputs = list(buffers.inputs.values())
        self.fill(buffers, feeds)

    def run_with_iobinding(self, bound, options):
        if self.together is not None:
            self.together.wait(20)  # until the other thread's call is under way too
        self.session.run_with_iobinding(bound, options)
        addresses = tuple(value.data_ptr() for value in [*self.filled.inputs, *bound.get_outputs()])
        try:
            graph = options.get_run_config_entry(GRAPH)
        except RuntimeError:
            graph = None
        self.runs.append((self.filled.inputs[0].shape()[0], graph, threading.get_ident(), addresses))


@pytest.fixture
def on_device(monkeypatch):
    """The CPU as a provider with memory of its own."""
    for module in (sessions, pipelines):
        monkeypatch.setattr(module, "provider_of", lambda name: ON_DEVICE)
    monkeypatch.setattr(sessions, "CPU", ON_DEVICE)


@pytest.fixture
def plain(bundles):
    with Session(Bundle.open(bundles["sd15"]), "unet") as session:
        yield session


def bound(bundles, options=None, component="unet"):
    session = Session(Bundle.open(bundles["sd15"]), component, provider_options=options).load()
    if session._binding is not None:
        Watched(session._binding)
    return session


def test_binding_gives_what_run_gives(bundles, plain, on_device):
    session = bound(bundles)
    for rows, seed in ((2, 0), (2, 1), (3, 2), (2, 3), (1, 4), (3, 5)):
        given = feeds(rows, seed)
        assert np.array_equal(session(**given)["out_sample"], plain(**given)["out_sample"])
    assert session.calls == 6


def test_an_answer_is_the_callers_to_keep(bundles, plain, on_device):
    session = bound(bundles)
    answers = [session(**feeds(seed=seed))["out_sample"] for seed in range(3)]
    for seed, answer in enumerate(answers):
        assert np.array_equal(answer, plain(**feeds(seed=seed))["out_sample"])
        answer[:] = 0  # and to write to


def test_what_may_not_change_is_copied_once_for_its_rows(bundles, plain, on_device):
    session = bound(bundles)
    told = {rows: session.fit({"encoder_hidden_states": feeds(rows)["encoder_hidden_states"]}) for rows in (2, 4)}
    for call, rows in enumerate((2, 4, 2, 4, 2, 4), 1):
        given = feeds(rows, seed=call) | told[rows]
        assert np.array_equal(session(**given)["out_sample"], plain(**given)["out_sample"])
        assert session._binding.copied == 2 * call + min(call, 2)  # sample and timestep always
    other = session.fit({"encoder_hidden_states": 2 * told[2]["encoder_hidden_states"]})
    given = feeds(2) | other
    assert np.array_equal(session(**given)["out_sample"], plain(**given)["out_sample"])
    assert session._binding.copied == 2 * 7 + 3


def test_what_can_change_is_always_copied(bundles, plain, on_device):
    session, given = bound(bundles), feeds()
    for _ in range(3):
        assert np.array_equal(session(**given)["out_sample"], plain(**given)["out_sample"])
        given["encoder_hidden_states"] += 1  # the same array, other numbers
    assert session._binding.copied == 9


def test_fitted_inputs_are_copies(bundles, plain):
    mine = feeds()["encoder_hidden_states"]
    fitted = plain.fit({"encoder_hidden_states": mine})["encoder_hidden_states"]
    mine[:] = 7
    assert fitted.max() < 7
    with pytest.raises(ValueError, match="read-only"):
        fitted[:] = 0
    assert np.array_equal(plain.fit({"encoder_hidden_states": mine.astype(np.float64)})["encoder_hidden_states"], mine)


def test_what_the_device_has_is_not_kept_on_the_host(bundles, plain, on_device):
    session = bound(bundles)
    fitted = session.fit({"encoder_hidden_states": feeds()["encoder_hidden_states"]})
    session(**feeds() | fitted)
    there = weakref.ref(fitted.pop("encoder_hidden_states"))
    gc.collect()
    assert there() is None
    for seed in range(3):  # arrays that may well lie where it lay
        given = feeds(seed=seed)
        given |= session.fit({"encoder_hidden_states": given["encoder_hidden_states"]})
        assert np.array_equal(session(**given)["out_sample"], plain(**given)["out_sample"])


def test_memory_is_used_again_for_the_same_rows(bundles, on_device):
    session = bound(bundles)
    for rows in (2, 4, 2, 4, 2):
        session(**feeds(rows))
    addresses = {rows: {run[3] for run in session._binding._session.runs if run[0] == rows} for rows in (2, 4)}
    assert [len(each) for each in addresses.values()] == [1, 1]
    assert not set(*addresses[2]) & set(*addresses[4])


def test_few_buffers_are_kept(bundles, on_device):
    session = bound(bundles)
    for rows in range(1, 2 * KEPT):
        session(**feeds(rows))
    assert [buffers.key[1][0][1][0] for buffers in session._binding._waiting] == list(range(KEPT, 2 * KEPT))


def test_two_calls_at_once_have_buffers_of_their_own(bundles, plain, on_device):
    session = bound(bundles)
    watched = session._binding._session
    watched.together = threading.Barrier(2)
    answers = {}

    def lane(number):
        for seed in (number, number + 2):
            answers[seed] = session(**feeds(seed=seed))["out_sample"]

    lanes = [threading.Thread(target=lane, args=(number,)) for number in range(2)]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join(30)
    assert len(watched.runs) == 4
    assert len({run[3] for run in watched.runs}) == 2
    for seed, answer in answers.items():
        assert np.array_equal(answer, plain(**feeds(seed=seed))["out_sample"])


def test_only_wanted_outputs_are_bound(bundles):
    ort = onnxruntime()
    encoder = Session(Bundle.open(bundles["sd3"]), "text_encoder").load()
    raw, ids = encoder._session, {"input_ids": np.zeros((1, 8), np.int64)}
    binding = Binding(ort, raw, "cpu")
    for names in (["text_embeds"], ["last_hidden_state", "text_embeds"], ["text_embeds"]):
        answers = binding(names, ids, ort.RunOptions())
        for answer, expected in zip(answers, raw.run(names, ids), strict=True):
            assert np.array_equal(answer, expected)


def test_a_failed_call_is_told_and_its_buffers_are_not_used_again(bundles, on_device):
    session = bound(bundles)
    with pytest.raises(RequestError, match="unet: onnxruntime could not run it"):
        session(**feeds(2) | {"encoder_hidden_states": feeds(3)["encoder_hidden_states"]})
    assert session._binding._waiting == []
    session(**feeds(2))


def test_it_can_be_unloaded(bundles, on_device):
    session = bound(bundles)
    first = session(**feeds())["out_sample"]
    session.unload()
    assert session._binding is None
    assert np.array_equal(session(**feeds())["out_sample"], first)


def test_only_the_backbone_is_bound(bundles, on_device):
    assert bound(bundles, CAPTURE, "text_encoder")._binding is None
    assert bound(bundles, CAPTURE)._binding is not None


@pytest.mark.parametrize(("directions", "sets"), [("batch", 2), ("calls", 1), ("async", 2)])
def test_a_picture_is_the_same_and_its_conditioning_goes_there_once(bundles, request, directions, sets):
    """`sets` of buffers, for as many row counts, or calls at once."""
    asked = {"seed": 3, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np", "k": 2, "solver": "epd"}
    expected = Pipeline.from_pretrained(bundles["sd3"], directions=directions)("red", **asked).images
    request.getfixturevalue("on_device")
    pipe = Pipeline.from_pretrained(bundles["sd3"], directions=directions)
    assert np.array_equal(pipe("red", **asked).images, expected)
    session = pipe._sessions["transformer"]
    times_there = (session._binding.copied - 2 * session.calls) / 2  # of the two that do not change
    assert times_there == sets or (directions == "async" and times_there == 1)


# CUDA graphs: what is run under which id, in which memory, from which thread


def test_each_number_of_rows_has_a_graph_of_its_own(bundles, plain, on_device):
    session = bound(bundles, CAPTURE)
    for seed, rows in enumerate((2, 4, 2, 4, 2, 2)):
        given = feeds(rows, seed)
        assert np.array_equal(session(**given)["out_sample"], plain(**given)["out_sample"])
    runs = session._binding._session.runs
    assert [run[:2] for run in runs] == [(2, "-1"), (4, "-1"), (2, "1"), (4, "2"), (2, "1"), (2, "1")]
    for graph in ("1", "2"):
        assert len({run[3] for run in runs if run[1] == graph}) == 1, "a captured graph has lost its memory"


def test_an_id_never_comes_back_with_other_memory(bundles, on_device):
    session = bound(bundles, CAPTURE)
    for _ in range(2):
        for rows in range(1, KEPT + 2):  # one more than are kept: all are gone when they are asked for again
            session(**feeds(rows))
            session(**feeds(rows))
    memory = {}
    for _, graph, _, addresses in session._binding._session.runs:
        if graph != "-1":
            assert memory.setdefault(graph, addresses) == addresses
    assert len(memory) == 2 * (KEPT + 1)


def test_captured_calls_come_from_one_thread(bundles, plain, on_device):
    session = bound(bundles, CAPTURE)
    assert session.captures
    answers = {}

    def lane(seed):
        answers[seed] = session(**feeds(seed=seed))["out_sample"]

    lanes = [threading.Thread(target=lane, args=(seed,)) for seed in range(4)]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join(30)
    lane(4)
    assert len({run[2] for run in session._binding._session.runs}) == 1
    for seed, answer in answers.items():
        assert np.array_equal(answer, plain(**feeds(seed=seed))["out_sample"])


def test_after_a_failed_capture_the_session_is_made_anew(bundles, on_device):
    session = bound(bundles, CAPTURE)
    with pytest.raises(RequestError, match="could not run it"):
        session(**feeds(2) | {"encoder_hidden_states": feeds(3)["encoder_hidden_states"]})
    assert not session.loaded
    session(**feeds(2))


def test_after_ctrl_c_in_a_capture_too(bundles, on_device, monkeypatch):
    session = bound(bundles, CAPTURE)

    def pressed(run, stop):
        raise KeyboardInterrupt

    pressed.alone = True
    monkeypatch.setattr(session, "_hand", pressed)
    with pytest.raises(KeyboardInterrupt):
        session(**feeds())
    assert not session.loaded


def test_async_directions_are_refused(bundles, on_device):
    pipe = Pipeline.from_pretrained(bundles["sd3"], provider_options=CAPTURE, directions="async")
    with pytest.raises(RequestError, match=r"a CUDA graph, allows one call at a time.*--directions batch") as refused:
        pipe("red", k=2, solver="epd", num_inference_steps=2)
    assert "\n" not in str(refused.value)


def test_callers_session_options_capture_too(bundles, on_device):
    """Where the provider tells its options, those are believed: a caller's session options may have set them."""

    session = bound(bundles, component="vae_decoder")
    assert session._binding is None

    class Telling:
        def get_provider_options(self):
            return {"CPUExecutionProvider": CAPTURE | {"device_id": "0"}}

    session._bind(onnxruntime(), Telling())
    assert session.captures
    assert session._binding is not None


def test_a_node_elsewhere_is_refused_in_one_line(bundles, on_device, monkeypatch):
    told = "This session cannot use the CUDA Graph feature as requested by the user\nas all the graph nodes have not"
    ort = onnxruntime()
    monkeypatch.setattr(sessions, "CPU", CPU)  # a graph that the CPU refuses is damaged

    def refuses(*_, **__):
        raise RuntimeError(told)

    monkeypatch.setattr(ort, "InferenceSession", refuses)
    with pytest.raises(ProviderError, match=r"cannot use the CUDA Graph.*leave enable_cuda_graph out") as refused:
        bound(bundles, CAPTURE)
    assert "\n" not in str(refused.value)


def test_no_other_option_captures():
    """Of the options that hold tensors fast, only that which gets memory of its own is let through."""
    options = {(row.name, option) for row in PROVIDERS.values() for option in row.options}
    assert {
        (name, option) for name, option in options if "graph" in option.lower() and "capture" in option.lower()
    } == set()
    assert {pair for pair in options if pair[1].endswith(("cuda_graph", "cuda_graph_enable"))} == {
        ("cuda", "enable_cuda_graph")
    }
    assert all(row.graphs in row.options and row.device for row in PROVIDERS.values() if row.graphs)


def test_requests_of_the_same_rows_get_the_same_arrays(bundles):
    pipe = Pipeline.from_pretrained(bundles["sd3"])
    slopes, seen = pipe.slopes(["red", "re"], 3.0), []
    call = slopes.backbone.__call__
    points = epd.Points(np.ones((2, 2, 4, 4, 4)), np.array([0.5, 0.6]))

    class Noting:
        def __getattr__(self, name):
            return getattr(pipe._sessions["transformer"], name)

        def __call__(self, **given):
            seen.append(given["encoder_hidden_states"])
            return call(**given)

    slopes.sessions = (Noting(),)
    first = slopes(points)
    assert np.array_equal(slopes(points), first)
    one = slopes.part(slice(1, 2), 3.0)
    assert np.allclose(one(epd.Points(points.x[:, 1:], points.t)), first[:, 1:], atol=1e-12)
    assert seen[0] is seen[1]
    assert len(seen[2]) == 4
    assert np.array_equal(seen[2], seen[0][[1, 3, 5, 7]])
