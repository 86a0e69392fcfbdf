"""What each target's provider takes, as data: a rule is a check, its limit, who says so, and what to do.

Rules of qnn were measured: session.disable_cpu_ep_fallback=1, onnxruntime-qnn 2.7.0 with ONNX Runtime 1.32 on
Qualcomm's x86 emulator of HTP v73. The others are what vendors publish, none of them tried on a device here; where they
publish nothing there is no rule, so that no finding means "nothing known against it". Advice is told and not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import checks

_ORT = "https://onnxruntime.ai/docs/execution-providers/"
_EMULATOR = "measured: onnxruntime-qnn 2.7.0, x86 emulator of HTP v73"
_QNN = "ONNX Runtime QNN documentation, github.com/onnxruntime/onnxruntime-qnn, docs/execution_providers"
_VITIS = "AMD Vitis AI 6.2, https://vitisai.docs.amd.com/projects/gen2/en/latest/docs/additional_information/"
_RYZEN = "AMD Ryzen AI, https://ryzenai.docs.amd.com/en/latest/modelcompat.html"
_NPU = "Intel OpenVINO, https://docs.openvino.ai/2025/documentation/compatibility-and-support/supported-devices.html"
_OPENVINO = f"ONNX Runtime OpenVINO documentation, {_ORT}OpenVINO-ExecutionProvider.html"
_COREML = f"ONNX Runtime CoreML documentation, {_ORT}CoreML-ExecutionProvider.html"
_COREML_CODE = "ONNX Runtime, onnxruntime/core/providers/coreml/builders/helper.cc"
_DIRECTML = f"ONNX Runtime DirectML documentation, {_ORT}DirectML-ExecutionProvider.html"
_DML = "Microsoft DirectML constants, https://learn.microsoft.com/windows/ai/directml/directml-constants"

_STATIC = "export it with fixed rows: `python -m export MODEL --target {target}`"
_OPSET = "export it with an opset in that range: `python -m export MODEL --target {target}`"
_OPERATOR = "export with `--target {target}`, or write it with other operators before the export"


@dataclass(frozen=True)
class Rule:
    """One constraint of a target. `remedy` may name {target}."""

    id: str
    check: Callable[[checks.Graph, Any], checks.Found]
    limit: Any
    source: str
    remedy: str
    advice: bool = False  # told, but no reason to fail


# What the QNN provider lists, less what the emulator refused, and more that it took though it is not listed.
_QNN_OPERATORS = {
    "": frozenset(
        """Abs Add And ArgMax ArgMin ArrayFeatureExtractor Asin Atan Attention AveragePool BatchNormalization Cast Ceil
        Clip Concat Conv ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div DynamicQuantizeLinear ConvInteger
        Einsum Elu Equal Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
        GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization GRU HardSigmoid HardSwish Identity If
        InstanceNormalization Inverse IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
        LpNormalization LpPool MatMul MatMulInteger Max MaxPool MaxRoiPool Mean Min Mod Mul Neg NonMaxSuppression Not
        OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear RMSNormalization RandomNormalLike
        RandomUniformLike Reciprocal ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu
        Reshape Resize RoiAlign RotaryEmbedding Round STFT ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Slice
        Softmax Softplus SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose
        Unsqueeze Upsample Where Xor""".split()
    ),
    "com.microsoft": frozenset(
        "DequantizeLinear FusedMatMul Gelu MatMulNBits QuantizeLinear QuickGelu RotaryEmbedding "
        "SimplifiedLayerNormalization".split()
    ),
}
_COREML_OPERATORS = {  # of an ML Program
    "": frozenset(
        """Add ArgMax AveragePool Cast Ceil Clip Concat Conv ConvTranspose Cos DepthToSpace Div Elu Erf Exp GatherND
        Gelu Gemm GlobalAveragePool GlobalMaxPool GridSample GroupNormalization HardSigmoid Identity
        InstanceNormalization LayerNormalization LeakyRelu MatMul Max MaxPool Mul PRelu Pow Range Reciprocal ReduceMax
        ReduceMean ReduceSum Relu Reshape Resize Round Shape Sigmoid Sin Slice Softmax Softplus Split Sqrt Squeeze Sub
        Tanh Tile Transpose Unsqueeze""".split()
    ),
    "com.microsoft": frozenset({"FusedConv", "QuickGelu"}),
}

# True of every target: ONNX Runtime and ONNX themselves.
_ALWAYS = (
    Rule(
        "external-data",
        checks.external_data,
        None,
        "ONNX Runtime 1.32: links and paths that leave the model's folder are refused",
        "copy the bundle again, as files, with cp -rL where it holds links",
    ),
    Rule(
        "file-size",
        checks.file_bytes,
        2**31 - 1,
        "ONNX: a protobuf message holds 2 GiB, https://onnx.ai/onnx/repo-docs/ExternalData.html",
        "save the weights as external data: export it with `python -m export`",
    ),
)

TARGETS: dict[str, tuple[Rule, ...]] = {
    "qnn": (
        *_ALWAYS,
        Rule("static-shapes", checks.static, None, f"{_EMULATOR}; {_QNN}", _STATIC),
        Rule("operators", checks.operators, _QNN_OPERATORS, f"{_EMULATOR}; {_QNN}", _OPERATOR),
    ),
    "vitisai": (
        *_ALWAYS,
        Rule("static-shapes", checks.static, None, f"{_VITIS}operators.html: dynamic shapes run on the CPU", _STATIC),
        Rule(
            "opset", checks.opset, (11, 20), f"{_VITIS}operators.html: 21 and 22 in part, later ones on the CPU", _OPSET
        ),
        Rule("opset-advised", checks.opset, (17, 17), f"{_RYZEN}: opset 17 is recommended", _OPSET, advice=True),
    ),
    "openvino": (
        *_ALWAYS,
        Rule("static-shapes", checks.static, None, f"{_NPU}: the NPU takes no dynamic shapes", _STATIC),
    ),
    "coreml": (
        *_ALWAYS,
        Rule("operators", checks.operators, _COREML_OPERATORS, f"{_COREML}: operators of an ML Program", _OPERATOR),
    ),
    "directml": (
        *_ALWAYS,
        Rule("rank", checks.rank, 8, f"{_DML}: DML_TENSOR_DIMENSION_COUNT_MAX1", "split it by Reshape into fewer axes"),
    ),
}
