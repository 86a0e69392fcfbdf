"""The lint's rules for QNN against Qualcomm's x86 emulator of its NPU: they agree on every graph."""

from pathlib import Path

import onnx
import pytest

from export.lint import lint
from tests.export.lint_graphs import QNN

qnn = pytest.importorskip("onnxruntime_qnn", reason="needs onnxruntime-qnn beside onnxruntime")
ort = pytest.importorskip("onnxruntime")

# A node that went to the CPU; one that QNN asked for in its own layout and then did not take.
REFUSALS = ("fallback to CPU EP has been explicitly disabled", "was not selected by that EP")


@pytest.fixture(scope="module")
def device():
    """The emulated NPU, which is registered once a process."""
    ort.set_default_logger_severity(4)
    ort.register_execution_provider_library("lint_qnn", qnn.get_library_path())
    yield next(one for one in ort.get_ep_devices() if one.ep_name == "lint_qnn")
    ort.unregister_execution_provider_library("lint_qnn")


def runs(model: onnx.ModelProto, device: object) -> bool:
    """Whether every node of the graph is compiled for the NPU."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    backend = {"backend_path": qnn.get_qnn_htp_path(), "soc_model": "60", "htp_arch": "73"}
    options.add_provider_for_devices([device], backend)
    try:
        ort.InferenceSession(model.SerializeToString(), options)
    except ort.capi.onnxruntime_pybind11_state.Fail as error:
        if not any(told in str(error) for told in REFUSALS):
            raise
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", QNN)
def test_emulator_and_lint_agree(name: str, device: object, tmp_path: Path):
    build, rule = QNN[name]
    model = build()
    onnx.save(model, tmp_path / "model.onnx")
    findings = {one.rule for one in lint([tmp_path / "model.onnx"], "qnn") if not one.advice}
    assert runs(model, device) == (rule is None)
    assert (rule in findings) if rule else not findings
