import concurrent.futures
import dataclasses
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import onnx
import pytest
import tiny_bundle
from onnx import TensorProto

from runtime import session as sessions
from runtime.bundle import Bundle
from runtime.errors import BundleError, NotFiniteError, ProviderError, RequestError
from runtime.interrupt import Hand
from runtime.ort import onnxruntime
from runtime.pipeline import Pipeline
from runtime.providers import CPU, PROVIDERS
from runtime.session import Session


def feeds(rows=2):
    return {
        "sample": np.ones((rows, 4, 4, 4)),
        "timestep": np.arange(rows),
        "encoder_hidden_states": np.zeros((rows, 8, tiny_bundle.WIDTH)),
    }


@pytest.fixture
def unet(bundles):
    with Session(Bundle.open(bundles["sd15"]), "unet") as session:
        yield session


def test_loads_when_called_and_unloads(bundles):
    session = Session(Bundle.open(bundles["sd15"]), "unet", provider="CPUexecutionProvider")
    assert not session.loaded
    first = session(**feeds())["out_sample"]
    assert session.loaded
    session.unload()
    assert not session.loaded
    assert np.array_equal(session(**feeds())["out_sample"], first)
    assert session.calls == 2
    assert session.run_seconds > 0
    assert session.assignment is None or set(session.assignment.nodes) == {"CPUExecutionProvider"}


def test_no_session_waits_busily_after_its_run():
    """Its threads would take the processors from the next session's: pictures of small models took a tenth longer."""
    options = sessions.default_options(onnxruntime(), CPU)
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_calls_at_once_load_it_once(bundles, monkeypatch):
    session, made, create = Session(Bundle.open(bundles["sd15"]), "unet"), [], Session._create

    def slowly(self, ort):
        made.append(self)
        time.sleep(0.3)
        return create(self, ort)

    monkeypatch.setattr(Session, "_create", slowly)
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        answers = [future.result() for future in [threads.submit(session, **feeds()) for _ in range(3)]]
    assert made == [session]
    assert session.calls == len(answers) == 3


def test_casts_to_the_declared_type(unet):
    assert unet(**feeds())["out_sample"].dtype == np.float32
    assert {tensor.name: tensor.shape for tensor in unet.inputs}["timestep"] == ("rows",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample": np.ones((2, 3, 4, 4))}, ["unet", "sample", "[rows, 4, height, width]", "[2, 3, 4, 4]"]),
        ({"timestep": np.float32(3)}, ["unet", "timestep", "float32 [rows]", "float32 []"]),
        ({"timestep": np.array(["a", "b"])}, ["timestep", "float32 [rows]", "<U1 [2]"]),
        ({"extra": np.ones(2)}, ["unet", "expected the inputs sample, timestep", "extra"]),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(unet, change, words):
    with pytest.raises(RequestError) as refused:
        unet(**feeds() | change)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert "\n" not in str(refused.value)


def test_rows_that_disagree_are_told_in_one_line(unet):
    with pytest.raises(RequestError, match="unet: onnxruntime could not run it") as refused:
        unet(**feeds() | {"encoder_hidden_states": np.zeros((3, 8, tiny_bundle.WIDTH))})
    assert "\n" not in str(refused.value)


def test_an_integer_input_takes_whole_numbers_only(bundles):
    with Session(Bundle.open(bundles["sd15"]), "text_encoder") as encoder:
        assert encoder(input_ids=np.array([[1.0, 2.00001]]))["last_hidden_state"].shape == (1, 2, tiny_bundle.WIDTH)
        with pytest.raises(RequestError, match=r"input_ids must be int64 .* that is not whole"):
            encoder(input_ids=np.array([[1.0, 2.5]]))


def test_only_wanted_outputs_are_returned(bundles):
    with Session(Bundle.open(bundles["sd3"]), "text_encoder") as encoder:
        ids = np.zeros((1, 8), np.int64)
        assert list(encoder(input_ids=ids, want=["text_embeds"])) == ["text_embeds"]
        assert list(encoder(input_ids=ids))[:2] == ["text_embeds", "last_hidden_state"]
        with pytest.raises(BundleError, match="no output other"):
            encoder(input_ids=ids, want=["other"])


def test_nan_names_the_component_and_the_output(tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", breaks_above=0.5)
    with (
        Session(Bundle.open(folder), "unet") as unet,
        pytest.raises(NotFiniteError, match=r"unet.*out_sample.*inspect --verify"),
    ):
        unet(**feeds())


def test_a_truncated_graph_is_one_line(tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", bare=True)
    graph = folder / "unet" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:200])
    with pytest.raises(BundleError, match=r"model\.onnx: onnxruntime cannot load it") as refused:
        Session(Bundle.open(folder), "unet").load()
    assert "\n" not in str(refused.value)


def test_missing_external_data_is_one_line(tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", bare=True)
    graph = folder / "unet" / "model.onnx"
    onnx.save(onnx.load(graph), graph, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    (folder / "unet" / "model.onnx_data").unlink()
    with pytest.raises(BundleError, match="cannot load it"):
        Session(Bundle.open(folder), "unet").load()


def test_half_precision_goes_in_and_out(tmp_path):
    component = tiny_bundle.graph(
        tmp_path / "half" / "unet" / "model.onnx",
        [("Add", ["sample", "sample"], ["out_sample"], {})],
        {"sample": (TensorProto.FLOAT16, ["rows"])},
        {"out_sample": (TensorProto.FLOAT16, ["rows"])},
    )
    assert component.inputs[0].dtype == "float16"
    tiny_bundle.bundle(tmp_path / "other", "sd15", bare=True)
    (tmp_path / "half" / "unet" / "model.onnx").replace(tmp_path / "other" / "unet" / "model.onnx")
    doubled = Session(Bundle.open(tmp_path / "other"), "unet")(sample=np.array([1.0, 2.5]))["out_sample"]
    assert doubled.dtype == np.float16
    assert doubled.tolist() == [2.0, 5.0]


def test_unknown_and_absent_providers(bundles):
    bundle = Bundle.open(bundles["sd15"])
    with pytest.raises(ProviderError, match=r"unknown provider 'npu'; choose from cpu, cuda"):
        Session(bundle, "unet", provider="npu")
    with pytest.raises(ProviderError, match=r"CUDAExecutionProvider is not in .*pip install \"onnxruntime-gpu"):
        Session(bundle, "unet", provider="CUDA").load()


INTERRUPTED = """
import sys
from runtime.bundle import Bundle
from runtime.session import Session
import numpy as np

with Session(Bundle.open(sys.argv[1]), "unet") as unet:
    print("calls", flush=True)
    unet(times=np.array(2**62))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a console's Ctrl-C is sent to its whole group")
def test_ctrl_c_ends_a_call_that_would_not_end(tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", bare=True)
    onnx.save(endless(), folder / "unet" / "model.onnx")
    program = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    try:
        assert program.stdout.readline() == "calls\n"
        time.sleep(0.5)
        assert program.poll() is None, program.communicate()[1]
        program.send_signal(signal.SIGINT)
        told = program.communicate(timeout=30)[1]
    finally:
        program.kill()
    assert told.rstrip().endswith("KeyboardInterrupt")


def endless():
    """Counts to `times`."""
    body = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Identity", ["go"], ["goes"]),
            onnx.helper.make_node("Add", ["sum", "one"], ["next"]),
        ],
        "body",
        [onnx.helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", 7), ("go", 9), ("sum", 1))],
        [onnx.helper.make_tensor_value_info(name, kind, []) for name, kind in (("goes", 9), ("next", 1))],
        [onnx.numpy_helper.from_array(np.float32(1), "one")],
    )
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Loop", ["times", "", "zero"], ["out_sample"], body=body)],
        "endless",
        [onnx.helper.make_tensor_value_info("times", TensorProto.INT64, [])],
        [onnx.helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, [])],
        [onnx.numpy_helper.from_array(np.float32(0), "zero")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def test_stop_ends_a_call_of_another_thread(tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", bare=True)
    onnx.save(endless(), folder / "unet" / "model.onnx")
    session, told = Session(Bundle.open(folder), "unet").load(), []

    def call():
        with pytest.raises(RequestError) as refused:
            session(times=np.array(2**62))
        told.append(str(refused.value))

    thread = threading.Thread(target=call)
    thread.start()
    while thread.is_alive():
        session.stop()
        thread.join(0.05)
    assert "terminate" in told[0]


def test_the_main_threads_calls_share_a_thread_and_others_are_made_where_they_are():
    hand, made = Hand(), []

    def note():
        made.append(threading.get_ident())

    for _ in range(3):
        hand(note, lambda: None)
    other = threading.Thread(target=hand, args=(note, lambda: None))
    other.start()
    other.join()
    assert len(set(made[:3])) == 1
    assert made[0] != threading.main_thread().ident
    assert made[3] == other.ident


def test_a_calls_own_time_out_is_passed_on():
    with pytest.raises(TimeoutError, match="its own"):
        Hand()(lambda: (_ for _ in ()).throw(TimeoutError("its own")), lambda: None)


def test_ctrl_c_waits_until_the_call_has_ended(monkeypatch):
    ended, stopped = [], threading.Event()

    def call():
        stopped.wait(30)
        ended.append(True)

    hand = Hand()
    waits = []

    def pressed(future, timeout=None):
        waits.append(timeout)
        raise KeyboardInterrupt

    monkeypatch.setattr(concurrent.futures.Future, "result", pressed)
    with pytest.raises(KeyboardInterrupt):
        hand(call, stopped.set)
    assert len(waits) == 1
    assert ended == [True]


class Flips:
    """An onnxruntime.InferenceSession whose first answers are NaN."""

    def __init__(self, session, wrong):
        self.session, self.wrong, self.given = session, wrong, []

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run(self, names, feeds, options):
        self.given.append(feeds)
        answers = self.session.run(names, feeds, options)
        return [answer * np.nan for answer in answers] if len(self.given) <= self.wrong else answers


FLAKY = dataclasses.replace(CPU, flaky=True)


def flaky(monkeypatch, folder, wrong=0, row=FLAKY):
    monkeypatch.setattr(sessions, "provider_of", lambda name: row)
    monkeypatch.setattr(sessions, "CPU", row)
    session = Session(Bundle.open(folder), "unet").load()
    session._session = Flips(session._session, wrong)
    return session


def test_nan_by_chance_is_tried_once_more_and_told_once(bundles, unet, monkeypatch, caplog):
    expected = unet(**feeds())["out_sample"]
    session = flaky(monkeypatch, bundles["sd15"], wrong=1)
    assert np.array_equal(session(**feeds())["out_sample"], expected)
    first, again = session._session.given
    assert first is again, "not the very same call"
    assert (session.retries, session.calls) == (1, 2)
    assert caplog.text.count("NaN or infinity in its output out_sample, which CPUExecutionProvider is known") == 1
    session._session = Flips(session._session, wrong=1)
    session(**feeds())
    assert session.retries == 2
    assert len(caplog.records) == 1


def test_nan_twice_is_an_error(bundles, monkeypatch):
    session = flaky(monkeypatch, bundles["sd15"], wrong=2)
    with pytest.raises(NotFiniteError, match=r"unet: NaN or infinity in its output out_sample"):
        session(**feeds())
    assert len(session._session.given) == 2


def test_a_graph_that_always_gives_nan_is_tried_twice_on_a_flaky_provider_and_once_on_another(tmp_path, monkeypatch):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", breaks_above=0.5)
    for row, runs in ((FLAKY, 2), (CPU, 1)):
        session = flaky(monkeypatch, folder, row=row)
        with pytest.raises(NotFiniteError):
            session(**feeds())
        assert (session.calls, session.retries) == (runs, runs - 1)


def test_a_picture_tells_its_own_retries(bundles, monkeypatch):
    monkeypatch.setattr(sessions, "provider_of", lambda name: FLAKY)
    monkeypatch.setattr(sessions, "CPU", FLAKY)
    pipe, asked = Pipeline.from_pretrained(bundles["sd15"]), {"seed": 1, "num_inference_steps": 2}
    backbone = pipe._session("unet").load()
    backbone._session = Flips(backbone._session, wrong=1)
    reports = [pipe("red", **asked).report for _ in range(2)]
    assert [report.provider["retries"] for report in reports] == [1, 0]
    assert reports[0].sequential_calls == reports[1].sequential_calls


def test_which_providers_flip_is_told_with_its_source():
    assert {row.name for row in PROVIDERS.values() if row.flaky} == {"coreml", "directml", "openvino", "ryzenai"}


def test_the_cpu_takes_no_options(bundles):
    with pytest.raises(ProviderError, match="CPUExecutionProvider takes no provider options"):
        Session(Bundle.open(bundles["sd15"]), "unet", provider_options={"device_id": "1"})
