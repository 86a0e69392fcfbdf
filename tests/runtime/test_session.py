import numpy as np
import pytest
import tiny_bundle
from onnx import TensorProto

from runtime.bundle import Bundle
from runtime.errors import BundleError, NotFiniteError, ProviderError, RequestError
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
    import onnx

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


def test_the_cpu_takes_no_options(bundles):
    with pytest.raises(ProviderError, match="CPUExecutionProvider takes no provider options"):
        Session(Bundle.open(bundles["sd15"]), "unet", provider_options={"device_id": "1"})
