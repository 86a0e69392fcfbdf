"""What each target's provider takes, as data: a rule is a check, its limit, who says so, and what to do.

Rules of qnn were measured with the graphs of tests/export/lint_graphs.py: session.disable_cpu_ep_fallback=1,
onnxruntime-qnn 2.7.0 with ONNX Runtime 1.32 on Qualcomm's x86 emulator of HTP v73; operators that are in none of those
graphs are taken from its documentation. Of openvino and webgpu, what is said to be measured was run on the CPU and on a
software Vulkan device. All else is what vendors publish, not tried on a device here; where they publish nothing there
is no rule, so that no finding means "nothing known against it". AMD publishes no whole list of operators. Advice is
told and not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import checks
from .graph import Graph

_ORT = "https://onnxruntime.ai/docs/execution-providers/"
_EMULATOR = "measured: onnxruntime-qnn 2.7.0, x86 emulator of HTP v73"
_QNN = "ONNX Runtime QNN documentation, github.com/onnxruntime/onnxruntime-qnn, docs/execution_providers"
_VITIS = "AMD Vitis AI 6.2, https://vitisai.docs.amd.com/projects/gen2/en/latest/docs/additional_information/"
_RYZEN = "AMD Ryzen AI, https://ryzenai.docs.amd.com/en/latest/modelcompat.html"
_NPU = "Intel OpenVINO, https://docs.openvino.ai/2025/documentation/compatibility-and-support/supported-devices.html"
_INTEL = "measured: onnxruntime-openvino 1.24.1, device CPU"
_WEBGPU = "measured: onnxruntime-webgpu 1.27.0 on a software Vulkan device"
_OPENVINO = f"ONNX Runtime OpenVINO documentation, {_ORT}OpenVINO-ExecutionProvider.html"
_COREML = f"ONNX Runtime CoreML documentation, {_ORT}CoreML-ExecutionProvider.html"
_COREML_CODE = "ONNX Runtime, onnxruntime/core/providers/coreml/builders/helper.cc"
_KERNELS = "ONNX Runtime, docs/OperatorKernels.md, DmlExecutionProvider"
_DIRECTML = f"ONNX Runtime DirectML documentation, {_ORT}DirectML-ExecutionProvider.html"
_DML = "Microsoft DirectML constants, https://learn.microsoft.com/windows/ai/directml/directml-constants"

_EXPORT = "`python -m export ... --target {target}`"
_STATIC = f"export it with {_EXPORT}, or fix its sizes with `python -m onnxruntime.tools.make_dynamic_shape_fixed`"
_OPSET = f"export it with {_EXPORT}, or with --opset in that range"
_OPERATOR = f"export it with {_EXPORT}, or write it with other operators before the export"
_BRANCH = "give the choice before the export, so that the graph has no branch and no loop"
_RANK = "split it by Reshape into tensors of fewer axes"
_DTYPE = "export with --dtype fp16 or fp32, and cast at the graph's border"
_FREE = "nothing, or fix the rows in the session's free_dimension_overrides"
_BODIES = ("If", "Loop", "Scan", "SequenceMap")


@dataclass(frozen=True)
class Rule:
    """One constraint of a target. `remedy` may name {target}."""

    id: str
    check: Callable[[Graph, Any], checks.Found]
    limit: Any
    source: str
    remedy: str
    advice: bool = False  # told, but no reason to fail


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What the QNN provider lists, less what the emulator refused or (RMSNormalization) got wrong, and more that it took
# though it is not listed.
_QNN_OPERATORS = {
    "": _names(
        """Abs Add And ArgMax ArgMin ArrayFeatureExtractor Atan Attention AveragePool BatchNormalization Cast Ceil
        Clip Concat Conv ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div Einsum Elu Equal Erf Exp Expand
        Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual
        GridSample GroupNormalization GRU HardSigmoid HardSwish Identity InstanceNormalization Inverse IsInf IsNaN
        LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool LRN LSTM MatMul Max
        MaxPool MaxRoiPool Mean Min Mish Mod Mul Neg NonMaxSuppression Not OneHot Or Pad Pow PRelu QLinearConv
        QLinearMatMul QuantizeLinear RandomNormalLike RandomUniformLike Reciprocal ReduceL2 ReduceLogSumExp ReduceMax
        ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Resize RoiAlign RotaryEmbedding Round
        ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Slice Softmax Softplus SpaceToDepth Split Sqrt Squeeze
        STFT Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Unsqueeze Upsample Where Xor"""
    ),
    "com.microsoft": _names(
        """DequantizeLinear FusedMatMul Gelu QuantizeLinear QuickGelu RotaryEmbedding
        SimplifiedLayerNormalization"""
    ),
}
_COREML_OPERATORS = {  # of an ML Program
    "": _names(
        """Add ArgMax AveragePool Cast Ceil Clip Concat Conv ConvTranspose Cos DepthToSpace Div Elu Erf Exp GatherND
        Gelu Gemm GlobalAveragePool GlobalMaxPool GridSample GroupNormalization HardSigmoid Identity
        InstanceNormalization LayerNormalization LeakyRelu MatMul Max MaxPool Mul Pow PRelu Range Reciprocal ReduceMax
        ReduceMean ReduceSum Relu Reshape Resize Round Shape Sigmoid Sin Slice Softmax Softplus Split Sqrt Squeeze Sub
        Tanh Tile Transpose Unsqueeze"""
    ),
    "com.microsoft": _names("FusedConv QuickGelu"),
}
# Of those that it leaves to the CPU, what transformers have a few light nodes of: lookups, masks, a permutation.
_COREML_LEFT = _names("Einsum Equal Gather IsNaN Where")
_COREML_TAKEN = _COREML_OPERATORS | {"": _COREML_OPERATORS[""] | _COREML_LEFT}
# Operators that have a kernel for CPU alone, of those that transformers and convolution nets are made of.
_DIRECTML_DENIED = _names(
    "Attention Det Gelu HardSwish RMSNormalization RotaryEmbedding Unique "
    "com.microsoft:FusedConv com.microsoft:GatherBlockQuantized com.microsoft:NhwcMaxPool"
)
_OPENVINO_DENIED = _names("Attention GatherElements com.microsoft:MultiHeadAttention")
_WEBGPU_DENIED = _names("Attention")
# Tokens to pixels and back, with 6 axes between two Reshapes: an Einsum is known at any rows, a Transpose at one.
_TO_PIXELS, _TO_TOKENS = (0, 5, 1, 3, 2, 4), (0, 2, 4, 1, 3, 5)
_QNN_SHUFFLES = {("Einsum", _TO_PIXELS): 2**31, ("Transpose", _TO_PIXELS): 1, ("Transpose", _TO_TOKENS): 1}
_QNN_DTYPES = {"": _names("bool float float16 int32 int64")}
_QNN_DTYPES |= dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _names("int8 uint8 int16 uint16 int4 uint4"))
_QNN_DTYPES["Cast"] = _names("uint8 uint32")
_NUMBERS = _names("bool float float16 int8 int16 int32 int64 uint8 uint16 uint32 uint64 int4 uint4")

# Rules that a graph must keep to be worth having on the target: `python -m export` ends where one is broken.
OPERATORS = ("operators", "control-flow", "static-shapes")

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
        "ONNX: a protobuf message holds 2 GiB, docs/ExternalData.md of onnx",
        "save the weights as external data: export it with `python -m export`",
    ),
)

TARGETS: dict[str, tuple[Rule, ...]] = {
    "qnn": (
        *_ALWAYS,
        Rule("static-shapes", checks.static, None, f"{_EMULATOR}; {_QNN}", _STATIC),
        Rule("operators", checks.operators, _QNN_OPERATORS, f"{_EMULATOR}; {_QNN}", _OPERATOR),
        Rule("gelu", checks.feeds, {"Erf": ("Add", "Mul")}, f"{_EMULATOR}; {_QNN}: Erf in a Gelu alone", _OPERATOR),
        Rule("control-flow", checks.control_flow, _names("Loop Scan SequenceMap"), f"{_EMULATOR}; {_QNN}", _BRANCH),
        Rule(
            "versions", checks.since, {"GroupNormalization": 21}, _EMULATOR, "export it with opset 21, or 20 and below"
        ),
        Rule("rank", checks.rank_but_shuffles, (5, _QNN_SHUFFLES), _EMULATOR, f"{_RANK}, or permute by Einsum"),
        Rule("dtypes", checks.dtypes, _QNN_DTYPES, _EMULATOR, _DTYPE),
        Rule(
            "attention-mask",
            checks.input_dtypes,
            {("Attention", 3): ("bool",)},
            _EMULATOR,
            "give the mask as floats that are added, or export with opset 20 and below",
        ),
        Rule(
            "output-casts",
            checks.output_casts,
            {("float", "int64"), ("float16", "int64"), ("bool", "int64")},
            _EMULATOR,
            "give it out as int32",
        ),
        Rule(
            "shared-rows",
            checks.shared_by_rows,
            (_names("Add Mul"), {"LayerNormalization"}),
            f"{_EMULATOR}: wrong in all rows but the first, from 16 tokens and 32 channels on",
            "subtract its negative, as an export for {target} does",
        ),
    ),
    "vitisai": (
        *_ALWAYS,
        Rule("static-shapes", checks.static, None, f"{_VITIS}operators.html: dynamic shapes run on the CPU", _STATIC),
        Rule(
            "opset", checks.opset, (7, 20), f"{_VITIS}operators.html: 21 and 22 in part, later ones on the CPU", _OPSET
        ),
        Rule("control-flow", checks.control_flow, _BODIES, f"{_VITIS}ops_support.html lists none", _BRANCH),
        Rule("opset-advised", checks.opset, (17, 17), f"{_RYZEN}: opset 17 is recommended", _OPSET, advice=True),
        Rule(
            "rows-advised",
            checks.rows,
            1,
            "AMD Ryzen AI documentation, November 2026: batch 1; AMD's own Stable Diffusion 3 takes 2 rows",
            "nothing, if it compiles; else fix it to one row, and run guidance as two calls",
            advice=True,
        ),
        Rule(
            "outputs-advised",
            checks.outputs,
            1,
            "https://github.com/amd/RyzenAI-SW/issues/369: wrong values in some graphs of several outputs",
            "compare the outputs with those of --provider cpu before you trust them",
            advice=True,
        ),
    ),
    "openvino": (
        *_ALWAYS,
        Rule("static-shapes", checks.static, None, f"{_NPU}: the NPU takes no dynamic shapes", _STATIC),
        Rule("operators", checks.denied, _OPENVINO_DENIED, f"{_INTEL}; {_OPENVINO}: on no device", _OPERATOR),
    ),
    "coreml": (
        *_ALWAYS,
        Rule("static-shapes", checks.static, None, f"{_COREML}: RequireStaticInputShapes, for speed", _STATIC),
        Rule("axis", checks.axis, 16384, f"{_COREML_CODE}: no axis of an input above 16384", "export a smaller size"),
        Rule("operators", checks.operators, _COREML_TAKEN, f"{_COREML}: operators of an ML Program", _OPERATOR),
        Rule(
            "cpu-advised",
            checks.denied,
            _COREML_LEFT,
            f"{_COREML}: none of the operators of an ML Program, so that the CPU runs it",
            "nothing, where it is a lookup, a mask or a permutation; see `python -m runtime inspect --provider coreml`",
            advice=True,
        ),
        Rule("control-flow", checks.control_flow, _BODIES, f"{_COREML}: bodies run on the CPU by default", _BRANCH),
        Rule(
            "constants",
            checks.constant_inputs,
            {"Gemm": (1,), "Conv": (2,), "ConvTranspose": (1, 2), "Slice": (1, 2, 3, 4), "Split": (1,)},
            f"{_COREML}: inputs that must be constant",
            "make it a weight of the graph before the export",
        ),
        Rule(
            "rank",
            checks.node_rank,
            {"Conv": 4, "AveragePool": 4, "MaxPool": 4, "GlobalAveragePool": 4, "GlobalMaxPool": 4, "GridSample": 4}
            | {"Tile": 5},
            f"{_COREML}: 1D and 2D only",
            _RANK,
        ),
        Rule("dtypes", checks.dtypes, {"": _NUMBERS}, f"{_COREML}: float, float16 and whole numbers", _DTYPE),
    ),
    "directml": (
        *_ALWAYS,
        Rule("opset", checks.opset, (7, 21), f"{_KERNELS}: the newest kernels are of opset 21", _OPSET),
        Rule("operators", checks.denied, _DIRECTML_DENIED, f"{_KERNELS}: no kernel", _OPERATOR),
        Rule("control-flow", checks.control_flow, _names("Loop Scan"), f"{_KERNELS}: no kernel", _BRANCH),
        Rule("rank", checks.rank, 8, f"{_DML}: DML_TENSOR_DIMENSION_COUNT_MAX1", _RANK),
        Rule("dtypes", checks.dtypes, {"": _NUMBERS}, f"{_KERNELS}: no arithmetic on other types", _DTYPE),
        Rule(
            "tensor-size",
            checks.tensor_bytes,
            2**31,
            "Microsoft Direct3D 12, D3D12_REQ_RESOURCE_SIZE_IN_MEGABYTES_EXPRESSION_C_TERM: 2048 MB a resource",
            "split the weight, or export a smaller size or fewer rows",
        ),
        Rule("shapes-advised", checks.static, None, f"{_DIRECTML}: fastest with sizes known", _FREE, advice=True),
    ),
    "webgpu": (
        *_ALWAYS,
        Rule("operators", checks.denied, _WEBGPU_DENIED, f"{_WEBGPU}: on the CPU", _OPERATOR),
    ),
}
