"""Execution providers as data: one row each, found by any spelling of its name, its options checked.

Knows nothing of what is installed here: see `runtime.ort`.

An option's default is what this program passes where the user says nothing; None leaves it to the provider. What the
options mean is in the providers' own documentation; those of CUDA, TensorRT, Vitis AI and CoreML are from it alone. The
others were checked against strings in their packages; of QNN's, OpenVINO's and WebGPU's a few by running them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from .errors import ProviderError

SYSTEMS = {"linux": "Linux", "win32": "Windows", "darwin": "macOS"}
_SUFFIX = "executionprovider"


@dataclass(frozen=True)
class Option:
    """What one provider option takes: `values` if there are any, what fits `pattern`, else anything of its kind."""

    kind: Literal["whole", "number", "switch", "text", "path"] = "text"
    values: tuple[str, ...] = ()
    default: str | None = None
    pattern: str = ""  # whole text, as a regular expression
    example: str = ""

    def takes(self, text: str) -> bool:
        if self.values:
            return text in self.values
        if self.pattern:
            return re.fullmatch(self.pattern, text) is not None
        if self.kind in ("whole", "number"):
            try:
                return int(text) >= 0 if self.kind == "whole" else float(text) == float(text)
            except ValueError:
                return False
        return bool(text)

    def __str__(self) -> str:
        kinds = {"whole": "a whole number", "number": "a number", "text": "text", "path": "a path"}
        return " or ".join(self.values) if self.values else self.example or kinds[self.kind]


@dataclass(frozen=True)
class Plugin:
    """A provider in a library of its own, beside plain onnxruntime.

    Every such package has `get_library_path()`; `fills` names the provider options that other functions of it answer.
    """

    package: str
    module: str
    fills: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """How what a provider compiles is kept for the next start.

    Attributes
    ----------
    how
        `context`: an EP-context model, which onnxruntime writes. `option`: by the provider, in the folder that the
        row's option `cache` names.
    fills
        Further options that this takes.
    late
        It compiles when it is called, too, and writes then.
    unless
        Options with which nothing is kept: it would be no faster.
    """

    how: Literal["context", "option"]
    fills: Mapping[str, str] = field(default_factory=dict)
    late: bool = False
    unless: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Provider:
    """One row of the table.

    Attributes
    ----------
    name, ort
        As typed, and as ONNX Runtime calls it.
    packages
        What pip installs, onnxruntime's base wheel first; none: `remedy` says where it comes from.
    extra
        Ours, that installs them.
    systems
        Values of `sys.platform`.
    rows
        Of its graphs: `dynamic` (any number), `static` (one graph per row count) or `profiles` (a range, told before).
    opset
        The highest that it reads; None: as onnxruntime's own.
    precisions
        That it computes in, best first.
    cache
        The option that names its compile cache; None: it has none of its own.
    kept
        How what it compiles is kept; None: it compiles nothing worth that.
    plugins, catalogue
        Libraries of their own that may hold it; whether Windows ML has it, too.
    libraries
        `sys.platform` -> libraries of the driver, without which it cannot start.
    emulated
        Options on a machine of another kind than the device's (QNN on x86: a Snapdragon 8 Gen 2 is emulated).
    session
        Attributes of the session options that it wants.
    prefix
        Options are entries of the session's configuration under it: the provider, where it is built in, reads those
        and drops provider options without a word (seen with WebGPU 1.27).
    device
        ONNX Runtime's name of its memory, where calls keep their tensors (`runtime.binding`); none: with the caller.
    graphs
        The option that captures CUDA graphs. Those of TensorRT (`trt_cuda_graph_enable`: one graph for a session,
        whatever its rows), TensorRT-RTX and WebGPU (`enableGraphCapture`) are no options here: without the same care,
        which they have not had, they would answer with the tensors of another call.
    flaky
        It is known to give NaN in one call and not in the same call again, which is then made; where that was read is
        told in its row. Not Vitis AI: a session that a second one has spoilt stays so (amd/RyzenAI-SW#402), a wrong
        compilation is wrong in every call (#369). Not QNN, WebGPU, MIGraphX: no such report of them was found.
    """

    name: str
    ort: str
    packages: tuple[str, ...]
    extra: str
    systems: tuple[str, ...]
    rows: Literal["dynamic", "static", "profiles"]
    precisions: tuple[str, ...]
    options: Mapping[str, Option] = field(default_factory=dict)
    opset: int | None = None
    cache: str | None = None
    kept: Kept | None = None
    plugins: tuple[Plugin, ...] = ()
    catalogue: bool = False
    libraries: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    emulated: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    device: str = ""
    graphs: str = ""
    flaky: bool = False
    remedy: str = ""

    @property
    def install(self) -> str:
        """The line to type, or where it comes from if pip has it not."""
        if not self.packages:
            return self.remedy
        words = [f'"{package}"' if set(package) & set("[<>") else package for package in self.packages]
        return f"pip install {' '.join(words)} (or the extra [{self.extra}])"

    def captures(self, options: Mapping[str, str]) -> bool:
        """Whether these options have it capture CUDA graphs."""
        return options.get(self.graphs, "0").lower() in ("1", "true")


def _switches(*names: str, **defaults: str) -> dict[str, Option]:
    values = {name: Option("switch", ("0", "1")) for name in names}
    return values | {name: Option("switch", ("0", "1"), default) for name, default in defaults.items()}


def _of(kind: Literal["whole", "number", "text", "path"], *names: str) -> dict[str, Option]:
    return {name: Option(kind) for name in names}


def _bools(*names: str) -> dict[str, Option]:
    return {name: Option("switch", ("False", "True", "false", "true", "0", "1")) for name in names}


NVIDIA = {"linux": ("libcuda.so.1",), "win32": ("nvcuda.dll",)}
_INTEL = r"(CPU|GPU|NPU)(\.\d+)?"
_EVERYWHERE = tuple(SYSTEMS)

_ROWS = (
    Provider("cpu", "CPUExecutionProvider", ("onnxruntime",), "cpu", _EVERYWHERE, "dynamic", ("fp32", "int8", "int4")),
    Provider(
        "cuda",
        "CUDAExecutionProvider",
        ("onnxruntime-gpu[cuda,cudnn]",),
        "cuda",
        ("linux", "win32"),
        "dynamic",
        ("fp16", "bf16", "fp32"),
        _of("whole", "device_id", "gpu_mem_limit", "gpu_external_alloc", "sdpa_kernel")
        | {
            "arena_extend_strategy": Option(values=("kNextPowerOfTwo", "kSameAsRequested"), default="kSameAsRequested"),
            "cudnn_conv_algo_search": Option(values=("EXHAUSTIVE", "HEURISTIC", "DEFAULT"), default="HEURISTIC"),
        }
        | _switches(
            "do_copy_in_default_stream",
            "cudnn_conv_use_max_workspace",
            "cudnn_conv1d_pad_to_nc1d",
            "enable_cuda_graph",
            "enable_skip_layer_norm_strict_mode",
            "fuse_conv_bias",
            "prefer_nhwc",
            "use_ep_level_unified_stream",
            "use_tf32",
        ),
        libraries=NVIDIA,
        device="cuda",
        graphs="enable_cuda_graph",
    ),
    Provider(
        "tensorrt",
        "TensorrtExecutionProvider",
        ("onnxruntime-gpu[cuda,cudnn]", "tensorrt<11"),
        "tensorrt",
        ("linux", "win32"),
        "profiles",
        ("fp16", "bf16", "fp32", "int8"),
        _of(
            "whole",
            "device_id",
            "trt_max_workspace_size",
            "trt_max_partition_iterations",
            "trt_min_subgraph_size",
            "trt_auxiliary_streams",
        )
        | _of("text", "trt_profile_min_shapes", "trt_profile_max_shapes", "trt_profile_opt_shapes")
        | _of("path", "trt_engine_cache_path", "trt_timing_cache_path", "trt_ep_context_file_path")
        | {"trt_builder_optimization_level": Option("whole", tuple("012345"))}
        | _bools(
            "trt_fp16_enable",
            "trt_bf16_enable",
            "trt_int8_enable",
            "trt_engine_cache_enable",
            "trt_timing_cache_enable",
            "trt_context_memory_sharing_enable",
            "trt_dump_ep_context_model",
            "trt_layer_norm_fp32_fallback",
            "trt_sparsity_enable",
            "trt_weight_stripped_engine_enable",
        ),
        cache="trt_engine_cache_path",
        kept=Kept("option", {"trt_engine_cache_enable": "True"}, late=True),
        libraries=NVIDIA,
        device="cuda",
    ),
    Provider(
        "tensorrt-rtx",
        "NvTensorRTRTXExecutionProvider",
        ("onnxruntime", "onnxruntime-ep-nv-tensorrt-rtx"),
        "tensorrt-rtx",
        ("linux", "win32"),
        "profiles",
        ("fp16", "bf16", "fp32"),
        _of(
            "whole",
            "device_id",
            "nv_max_workspace_size",
            "nv_max_shared_mem_size",
            "nv_weight_streaming_budget",
            "nv_profile_index",
        )
        | _of("text", "nv_profile_min_shapes", "nv_profile_max_shapes", "nv_profile_opt_shapes")
        | _of("text", "nv_op_types_to_exclude", "nv_target_sm")
        | _of("path", "nv_runtime_cache_path", "nv_profiling_output_file")
        | _bools(
            "nv_detailed_build_log",
            "nv_dump_subgraphs",
            "nv_enable_profiling",
            "nv_multi_profile_enable",
            "nv_use_external_data_initializer",
        ),
        cache="nv_runtime_cache_path",
        kept=Kept("context"),
        plugins=(Plugin("onnxruntime-ep-nv-tensorrt-rtx", "onnxruntime_ep_nv_tensorrt_rtx"),),
        catalogue=True,
        libraries=NVIDIA,
    ),
    Provider(
        "directml",
        "DmlExecutionProvider",
        ("onnxruntime-directml",),
        "directml",
        ("win32",),
        "dynamic",
        ("fp16", "fp32"),
        _of("whole", "device_id")
        | {
            "performance_preference": Option(values=("default", "high_performance", "minimum_power")),
            "device_filter": Option(values=("gpu", "npu", "any")),
        }
        | _bools("disable_metacommands"),
        opset=21,
        libraries={"win32": ("d3d12.dll",)},
        session={"enable_mem_pattern": False},
        flaky=True,  # microsoft/DirectML#270: NaN "not always observed", and in other runs of the same seed
    ),
    Provider(
        "windowsml",
        "WindowsML",
        ("windowsml[with-ort]",),
        "windowsml",
        ("win32",),
        "static",
        (),
        catalogue=True,
    ),
    Provider(
        "vitisai",
        "VitisAIExecutionProvider",
        (),
        "",
        ("win32", "linux"),
        "static",
        ("bf16", "int8"),
        _of("path", "config_file", "cache_dir", "xclbin")  # config_file of float graphs, xclbin of Phoenix: see vitisai
        | _of("text", "cache_key")
        | _of("whole", "num_of_dpu_runners")  # up to Ryzen AI 1.5
        | {
            "target": Option(values=("X2", "X1")),  # of integer graphs: X2 is for Strix and newer
            "opt_level": Option("whole", ("0", "1", "2", "3", "65536")),  # of integer graphs
            "encryption_key": Option(pattern="[0-9A-Fa-f]{64}", example="64 hexadecimal digits"),
            "log_level": Option(values=("info", "warning", "error", "fatal")),  # Ryzen AI 1.8 calls it out of use
            "enable_cache_file_io_in_mem": Option("switch", ("0", "1"), "0"),  # else nothing is kept in cache_dir
        }
        | _bools("ai_analyzer_visualization", "ai_analyzer_profiling", "xlnx_enable_py3_round"),
        opset=17,
        cache="cache_dir",
        kept=Kept("option", {"cache_key": "model"}),
        catalogue=True,
        remedy="install AMD's Ryzen AI software and use its environment, or on Windows 11: "
        'pip install "windowsml[with-ort]" (or the extra [windowsml])',
    ),
    Provider(  # a plugin within Ryzen AI, for AMD's prebuilt graphs alone: of ordinary ones it takes no node
        "ryzenai",
        "RyzenAILightExecutionProvider",
        (),
        "",
        ("win32", "linux"),
        "static",
        ("bf16",),
        _of("path", "dd_cache", "dd_root", "external_data_file")
        | _of("text", "onnx_custom_ops_const_key")
        | _of("whole", "fusion_opt_stack_size")
        | _switches(
            "hybrid_opt_enable_npu_preemption", compile_fusion_rt="0"
        ),  # 1 compiles over the folder's own pieces
        flaky=True,  # AMD's own programs make a call of these graphs again on NaN
        catalogue=True,
        remedy="install AMD's Ryzen AI software and use its environment (conda activate ryzen-ai-1.8.0), "
        'or on Windows 11: pip install "windowsml[with-ort]" (or the extra [windowsml])',
    ),
    Provider(
        "qnn",
        "QNNExecutionProvider",
        ("onnxruntime", "onnxruntime-qnn"),
        "qnn",
        ("win32", "linux"),
        "static",
        ("fp16", "int8", "w8a16"),
        _of("path", "backend_path", "profiling_file_path", "qnn_saver_path", "json_qnn_graph_dir")
        | _of("whole", "device_id", "soc_model", "vtcm_mb", "rpc_control_latency")
        | _of("text", "op_packages")
        | {
            "backend_type": Option(values=("htp", "gpu", "cpu", "saver", "ir")),
            "profiling_level": Option(values=("off", "basic", "detailed", "optrace")),
            "qnn_context_priority": Option(values=("low", "normal", "normal_high", "high")),
            "htp_arch": Option(values=("0", "68", "69", "73", "75", "79", "81")),
            "htp_graph_finalization_optimization_mode": Option("whole", tuple("0123")),
            "htp_performance_mode": Option(
                values=(
                    "burst",
                    "balanced",
                    "default",
                    "high_performance",
                    "high_power_saver",
                    "low_balanced",
                    "low_power_saver",
                    "power_saver",
                    "extreme_power_saver",
                    "sustained_high_performance",
                ),
                default="burst",
            ),
        }
        | _switches(
            "dump_json_qnn_graph",
            "enable_htp_fp16_precision",
            "enable_htp_shared_memory_allocator",
            "enable_htp_spill_fill_buffer",
            "extended_udma",
            "skip_qnn_version_check",
            offload_graph_io_quantization="0",  # else QuantizeLinear of its inputs goes to the CPU
        ),
        opset=21,
        kept=Kept("context"),
        plugins=(Plugin("onnxruntime-qnn", "onnxruntime_qnn", {"backend_path": "get_qnn_htp_path"}),),
        catalogue=True,
        emulated={"soc_model": "60", "htp_arch": "73"},
    ),
    Provider(
        "openvino",
        "OpenVINOExecutionProvider",
        ("onnxruntime-openvino",),
        "openvino",
        ("linux", "win32"),
        "dynamic",
        ("fp16", "bf16", "fp32", "int8"),
        {
            "device_type": Option(  # another is taken for a device, and the CPU used
                default="CPU",
                pattern=rf"{_INTEL}|(AUTO|MULTI|HETERO|BATCH):{_INTEL}(,{_INTEL})*|AUTO",
                example="CPU, GPU, GPU.1, NPU, AUTO or such as AUTO:NPU,CPU",
            ),
            "precision": Option(values=("FP32", "FP16", "ACCURACY")),
            "model_priority": Option(values=("LOW", "MEDIUM", "HIGH", "DEFAULT")),
        }
        | _of("whole", "num_of_threads", "num_streams")
        | _of("path", "cache_dir", "load_config")
        | _of("text", "layout", "reshape_input")
        | _bools("disable_dynamic_shapes", "enable_opencl_throttling", "enable_qdq_optimizer", "enable_causallm"),
        cache="cache_dir",
        kept=Kept("option", unless={"device_type": "CPU"}),  # 1.24 reads no EP-context model that it wrote
        plugins=(Plugin("onnxruntime-ep-openvino", "onnxruntime_ep_openvino"),),
        catalogue=True,
        session={"graph_optimization_level": "ORT_DISABLE_ALL"},  # OpenVINO optimises the whole graph itself
        flaky=True,  # openvinotoolkit/openvino#36328: of one compiled model and one input, NaN in some runs only
    ),
    Provider(
        "coreml",
        "CoreMLExecutionProvider",
        ("onnxruntime",),
        "cpu",
        ("darwin",),
        "static",
        ("fp16", "fp32"),
        {
            "ModelFormat": Option(values=("MLProgram", "NeuralNetwork"), default="MLProgram"),
            "MLComputeUnits": Option(values=("ALL", "CPUAndNeuralEngine", "CPUAndGPU", "CPUOnly"), default="ALL"),
            "SpecializationStrategy": Option(values=("Default", "FastPrediction")),
        }
        | _of("path", "ModelCacheDirectory")
        | _switches(
            "RequireStaticInputShapes",
            "EnableOnSubgraphs",
            "ProfileComputePlan",
            "AllowLowPrecisionAccumulationOnGPU",
        ),
        cache="ModelCacheDirectory",
        kept=Kept("option"),
        flaky=True,  # ggml-org/whisper.cpp#979: NaN now and then with macOS 13.5
    ),
    Provider(
        "migraphx",
        "MIGraphXExecutionProvider",
        ("onnxruntime-migraphx",),
        "migraphx",
        ("linux", "win32"),
        "static",
        ("fp16", "bf16", "fp32", "int8"),
        _of("whole", "device_id", "migraphx_mem_limit")
        | _of("path", "migraphx_model_cache_dir", "migraphx_int8_calibration_table_name")
        | {"migraphx_arena_extend_strategy": Option(values=("kNextPowerOfTwo", "kSameAsRequested"))}
        | _bools(
            "migraphx_fp16_enable",
            "migraphx_bf16_enable",
            "migraphx_fp8_enable",
            "migraphx_int8_enable",
            "migraphx_int8_use_native_calibration_table",
            "migraphx_exhaustive_tune",
        ),
        cache="migraphx_model_cache_dir",
        kept=Kept("option", late=True),
        catalogue=True,
        libraries={"linux": ("libmigraphx_c.so.3",), "win32": ("amdhip64_7.dll",)},
    ),
    Provider(
        "webgpu",
        "WebGpuExecutionProvider",
        ("onnxruntime-webgpu",),
        "webgpu",
        _EVERYWHERE,
        "dynamic",
        ("fp16", "fp32"),
        {
            "preferredLayout": Option(values=("NCHW", "NHWC")),
            "dawnBackendType": Option(values=("D3D12", "Vulkan")),
            "powerPreference": Option(values=("high-performance", "low-power")),
            "validationMode": Option(values=("disabled", "wgpuOnly", "basic", "full")),
        }
        | {
            f"{use}BufferCacheMode": Option(values=("disabled", "lazyRelease", "simple", "bucket"))
            for use in ("storage", "uniform", "queryResolve", "default")
        }
        | _of("whole", "deviceId")
        | _of("text", "forceCpuNodeNames")
        | _switches("enableInt64", "preserveDevice"),
        libraries={"linux": ("libvulkan.so.1",), "win32": ("d3d12.dll",)},
        prefix="ep.webgpuexecutionprovider.",
        plugins=(Plugin("onnxruntime-ep-webgpu", "onnxruntime_ep_webgpu"),),
    ),
)
PROVIDERS: Mapping[str, Provider] = MappingProxyType({row.name: row for row in _ROWS})
CPU = PROVIDERS["cpu"]

# Base wheels: each installs the same import package `onnxruntime`, so there may be one of them. onnxruntime-qnn was
# one of them before 2.0.
WHEELS = tuple(
    sorted(
        {row.packages[0].partition("[")[0] for row in _ROWS if row.packages} - {"windowsml"}
        | {
            "onnxruntime-windowsml",
            "onnxruntime-vitisai",
            "onnxruntime-qnn",
            "onnxruntime-rocm",
            "onnxruntime-training",
        }
    )
)


def provider_of(name: str) -> Provider:
    """The row of a provider, from any spelling of its name; ProviderError gives the choices."""
    plain = _plain(name)
    for row in PROVIDERS.values():
        if plain in (_plain(row.name), _plain(row.ort)):
            return row
    raise ProviderError(f"unknown provider {name!r}; choose from {', '.join(PROVIDERS)}")


def provider_name(name: str) -> str:
    """ONNX Runtime's name of a provider, from any spelling of it; ProviderError gives the choices."""
    return provider_of(name).ort


def check_options(row: Provider, options: Mapping[str, str]) -> None:
    """ProviderError, with what there is, for an option or a value that ONNX Runtime would take without a word."""
    if options and not row.options:
        raise ProviderError(f"{row.ort} takes no provider options; leave them out, or name another provider")
    for name, value in options.items():
        if name not in row.options:
            raise ProviderError(f"{row.ort} has no option {name!r}; it has {', '.join(sorted(row.options))}")
        if not row.options[name].takes(value):
            raise ProviderError(f"{row.ort}: {name} must be {row.options[name]}, got {value!r}")


def _plain(name: str) -> str:
    return name.lower().removesuffix(_SUFFIX).replace("-", "").replace("_", "")
