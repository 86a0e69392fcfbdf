"""Execution providers as data: one row each, its options checked, and the one way to add one to a session.

Knows nothing of bundles, graphs or what ran where. Imports onnxruntime when asked for it, never before.

An option's default is what this program passes where the user says nothing; None leaves it to the provider. What the
options mean is in the providers' own documentation; the tables were checked against the packages named here (the
option headers and strings in them), those that run on Linux without hardware by running them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any, Literal

from .errors import ProviderError

OLDEST, NEWEST = (1, 23), (1, 32)  # releases of onnxruntime that this program was written against
SYSTEMS = {"linux": "Linux", "win32": "Windows", "darwin": "macOS"}
_SUFFIX = "executionprovider"
_kept: list[Any] = []  # for as long as the process
_plugged: dict[str, tuple[Any, ...]] = {}  # ONNX Runtime's name -> devices of its registered library


@dataclass(frozen=True)
class Option:
    """What one provider option takes: `values` if there are any, else anything of its kind."""

    kind: Literal["whole", "number", "switch", "text", "path"] = "text"
    values: tuple[str, ...] = ()
    default: str | None = None

    def takes(self, text: str) -> bool:
        if self.values:
            return text in self.values
        if self.kind in ("whole", "number"):
            try:
                return int(text) >= 0 if self.kind == "whole" else float(text) == float(text)
            except ValueError:
                return False
        return bool(text)

    def __str__(self) -> str:
        kinds = {"whole": "a whole number", "number": "a number", "text": "text", "path": "a path"}
        return " or ".join(self.values) if self.values else kinds[self.kind]


@dataclass(frozen=True)
class Plugin:
    """A provider in a library of its own, beside plain onnxruntime.

    Every such package has `get_library_path()`; `fills` names the provider options that other functions of it answer.
    """

    package: str
    module: str
    fills: Mapping[str, str] = field(default_factory=dict)


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
    plugins, catalogue
        Libraries of their own that may hold it; whether Windows ML has it, too.
    libraries
        `sys.platform` -> libraries of the driver, without which it cannot start.
    emulated
        Options on a machine of another kind than the device's (QNN on x86: a Snapdragon 8 Gen 2 is emulated).
    session
        Attributes of the session options that it wants.
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
    plugins: tuple[Plugin, ...] = ()
    catalogue: bool = False
    libraries: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    emulated: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, Any] = field(default_factory=dict)
    remedy: str = ""

    @property
    def install(self) -> str:
        """The line to type, or where it comes from if pip has it not."""
        if not self.packages:
            return self.remedy
        words = [f'"{package}"' if "[" in package else package for package in self.packages]
        return f"pip install {' '.join(words)} (or the extra [{self.extra}])"


def _switches(*names: str, **defaults: str) -> dict[str, Option]:
    values = {name: Option("switch", ("0", "1")) for name in names}
    return values | {name: Option("switch", ("0", "1"), default) for name, default in defaults.items()}


def _of(kind: Literal["whole", "number", "text", "path"], *names: str) -> dict[str, Option]:
    return {name: Option(kind) for name in names}


def _bools(*names: str) -> dict[str, Option]:
    return {name: Option("switch", ("False", "True", "false", "true", "0", "1")) for name in names}


_NVIDIA = {"linux": ("libcuda.so.1",), "win32": ("nvcuda.dll",)}
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
        libraries=_NVIDIA,
    ),
    Provider(
        "tensorrt",
        "TensorrtExecutionProvider",
        ("onnxruntime-gpu[cuda,cudnn]", "tensorrt"),
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
            "trt_cuda_graph_enable",
            "trt_context_memory_sharing_enable",
            "trt_dump_ep_context_model",
            "trt_layer_norm_fp32_fallback",
            "trt_sparsity_enable",
            "trt_weight_stripped_engine_enable",
        ),
        cache="trt_engine_cache_path",
        libraries=_NVIDIA,
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
            "enable_cuda_graph",
            "nv_detailed_build_log",
            "nv_dump_subgraphs",
            "nv_enable_profiling",
            "nv_multi_profile_enable",
            "nv_use_external_data_initializer",
        ),
        cache="nv_runtime_cache_path",
        plugins=(Plugin("onnxruntime-ep-nv-tensorrt-rtx", "onnxruntime_ep_nv_tensorrt_rtx"),),
        catalogue=True,
        libraries=_NVIDIA,
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
        _of("path", "config_file", "cache_dir", "xclbin")
        | _of("text", "cache_key", "encryption_key")
        | _of("whole", "num_of_dpu_runners")
        | {
            "target": Option(values=("X2", "X1", "VAIML")),
            "log_level": Option(values=("info", "warning", "error", "fatal")),
            "enable_cache_file_io_in_mem": Option("switch", ("0", "1"), "0"),  # else nothing is kept in cache_dir
        }
        | _bools("ai_analyzer_visualization", "ai_analyzer_profiling", "xlnx_enable_py3_round"),
        opset=17,
        cache="cache_dir",
        catalogue=True,
        remedy="install AMD's Ryzen AI software and use its environment, or on Windows 11: "
        'pip install "windowsml[with-ort]" (or the extra [windowsml])',
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
            "offload_graph_io_quantization",
            "skip_qnn_version_check",
        ),
        opset=21,
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
            "device_type": Option(default="CPU"),  # CPU, GPU, GPU.1, NPU, AUTO:NPU,CPU, HETERO:...
            "precision": Option(values=("FP32", "FP16", "ACCURACY")),
            "model_priority": Option(values=("LOW", "MEDIUM", "HIGH", "DEFAULT")),
        }
        | _of("whole", "num_of_threads", "num_streams")
        | _of("path", "cache_dir", "load_config")
        | _of("text", "layout", "reshape_input")
        | _bools("disable_dynamic_shapes", "enable_opencl_throttling", "enable_qdq_optimizer", "enable_causallm"),
        cache="cache_dir",
        plugins=(Plugin("onnxruntime-ep-openvino", "onnxruntime_ep_openvino"),),
        catalogue=True,
        session={"graph_optimization_level": "ORT_DISABLE_ALL"},  # OpenVINO optimises the whole graph itself
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
        catalogue=True,
        libraries={"linux": ("libamdhip64.so",), "win32": ("amdhip64_7.dll",)},
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
        | _switches("enableGraphCapture", "enableInt64", "preserveDevice"),
        libraries={"linux": ("libvulkan.so.1",), "win32": ("d3d12.dll",)},
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


def onnxruntime() -> ModuleType:
    """The onnxruntime package; ProviderError if there is none, or if two wheels of it overwrote each other."""
    wheels = base_wheels()
    if len(wheels) > 1:
        raise ProviderError(
            f"two onnxruntime packages break each other: {', '.join(wheels)}; "
            f"pip uninstall -y {' '.join(wheels)}, then install the one you want"
        )
    try:
        import onnxruntime as ort
    except ImportError as error:  # not there, or there and broken
        raise ProviderError(f"onnxruntime cannot be imported ({one_line(error)}); {CPU.install}") from None
    if not hasattr(ort, "SessionOptions"):  # an empty folder of that name, as a removed wheel leaves it
        raise ProviderError(f"onnxruntime is not whole; pip uninstall -y {' '.join(wheels)}, then {CPU.install}")
    return ort  # type: ignore[no-any-return]


def require(ort: ModuleType, row: Provider) -> tuple[Any, ...]:
    """The devices of a provider that comes as a library of its own, none of one that onnxruntime itself has.

    Raises
    ------
    ProviderError
        It is not here: why, and the line to type.
    """
    if row.ort in ort.get_available_providers() and row.ort not in _plugged:  # where a plugin comes in, too
        return ()
    if sys.platform not in row.systems:
        homes = " and ".join(SYSTEMS[system] for system in row.systems)
        raise ProviderError(
            f"{row.ort} runs on {homes}, this is {SYSTEMS.get(sys.platform, sys.platform)}; {_others()}"
        )
    if row.name == "windowsml":
        raise ProviderError(_catalogue_told(row))
    library = _library(row)
    if library is None:
        plugin = row.plugins and row.packages[0] == "onnxruntime" and list(base_wheels()) == ["onnxruntime"]
        where = "" if plugin or not row.packages else "in an environment of its own: "
        has = ", ".join(ort.get_available_providers())
        raise ProviderError(f"{row.ort} is not in the installed onnxruntime (it has {has}); {where}{row.install}")
    devices = _registered(ort, row.ort, library)
    if not devices:
        raise ProviderError(
            f"{row.ort}: its library is installed and finds no device; install or update the device's driver, "
            "and see `python -m runtime doctor`"
        )
    return devices


def add_provider(ort: ModuleType, options: Any, row: Provider, chosen: Mapping[str, str]) -> None:
    """Makes the provider the one that session options `options` run on; nothing if they name theirs already.

    Raises
    ------
    ProviderError
        It is not here, or refuses the options.
    RuntimeError, ValueError, or onnxruntime's own
        Its library or driver does not start.
    """
    devices = require(ort, row)
    if options.has_providers():  # the caller's own, or these options made a session before
        return
    for name, value in row.session.items():
        current = getattr(options, name)
        setattr(options, name, getattr(type(current), value) if isinstance(value, str) else value)
    passed = settled(row, chosen)
    if not devices:
        if row.libraries is _NVIDIA and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN out of NVIDIA's wheels
        options.add_provider(row.ort, passed)
        return
    options.add_provider_for_devices([_device(row, devices, passed)], passed)


def settled(row: Provider, chosen: Mapping[str, str]) -> dict[str, str]:
    """The options that are passed: our defaults, what the plugin's package answers, then the `chosen` ones."""
    passed = {name: option.default for name, option in row.options.items() if option.default is not None}
    if row.emulated and platform.machine().lower() in ("x86_64", "amd64"):
        passed |= row.emulated
    if "backend_type" not in chosen:
        for plugin in row.plugins:
            if importlib.util.find_spec(plugin.module):
                module = importlib.import_module(plugin.module)
                passed |= {name: str(getattr(module, answer)()) for name, answer in plugin.fills.items()}
    return passed | dict(chosen)


def base_wheels() -> dict[str, str]:
    """The base wheels that are here -> version; onnxruntime-qnn is none since 2.0, but a plugin."""
    wheels = installed(WHEELS)
    if not wheels.get("onnxruntime-qnn", "2").startswith(("0.", "1.")):
        wheels.pop("onnxruntime-qnn", None)
    return wheels


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Those of the packages that are here -> version."""
    versions = {package: _version(package) for package in packages}
    return {package: version for package, version in versions.items() if version is not None}


def one_line(error: BaseException) -> str:
    """The message of an error, without line breaks; of a long one the ends, for the cause is often told last."""
    text = " ".join(str(error).split())
    return text if len(text) <= 320 else f"{text[:120]} ... {text[-200:]}"


def failures(ort: ModuleType) -> tuple[type[Exception], ...]:
    """What onnxruntime raises, beside its own classes, which share no base and differ between releases."""
    state = ort.capi.onnxruntime_pybind11_state
    classes = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*classes, RuntimeError, ValueError)


def _plain(name: str) -> str:
    return name.lower().removesuffix(_SUFFIX).replace("-", "").replace("_", "")


def _others() -> str:
    return f"here choose from {', '.join(row.name for row in _ROWS if sys.platform in row.systems)}"


@functools.cache  # milliseconds, and asked at every call
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _library(row: Provider) -> str | None:
    """The file that holds the provider: of its own package, else of Windows ML; None where neither is here."""
    for plugin in row.plugins:
        if importlib.util.find_spec(plugin.module):
            try:
                return str(importlib.import_module(plugin.module).get_library_path())
            except (ImportError, OSError, RuntimeError) as error:
                raise ProviderError(
                    f"{row.ort}: {plugin.package} is damaged ({one_line(error)}); "
                    f"pip install --force-reinstall {plugin.package}"
                ) from None
    entry = _catalogued().get(row.ort.lower()) if row.catalogue else None
    if entry is None:
        return None
    try:
        entry.ensure_ready()  # Windows downloads it where it has it not yet
    except (OSError, RuntimeError) as error:
        raise ProviderError(f"{row.ort}: Windows ML cannot make it ready ({one_line(error)}); update Windows") from None
    return str(entry.library_path)


@functools.cache
def _catalogued() -> dict[str, Any]:
    """Windows ML's providers that this machine can have: ONNX Runtime's name in lower case -> its entry."""
    if not importlib.util.find_spec("windowsml"):
        return {}
    _kept.append(importlib.import_module("windowsml").EpCatalog())  # closing it has crashed with some drivers
    return {entry.name.lower(): entry for entry in _kept[-1].find_all_providers()}


def _catalogue_told(row: Provider) -> str:
    if not importlib.util.find_spec("windowsml"):
        return f"Windows ML is not installed; in an environment of its own: {row.install}"
    held = [other.name for other in _ROWS if other.ort.lower() in _catalogued()]
    if not held:
        return "Windows ML has no provider for this machine; update Windows and the device's driver"
    return f"Windows ML is a catalogue of providers; name one that it has here: {', '.join(held)}"


def _registered(ort: ModuleType, name: str, library: str) -> tuple[Any, ...]:
    """The devices that a library gives the provider, registered once in a process."""
    if name in _plugged:
        return _plugged[name]
    if not hasattr(ort, "register_execution_provider_library"):
        raise ProviderError(f"this onnxruntime {ort.__version__} takes no plugin providers; pip install -U onnxruntime")
    try:
        ort.register_execution_provider_library(name, library)
    except failures(ort) as error:
        raise ProviderError(
            f"{name}: its library {library} does not load ({one_line(error)}); install it again, "
            "in the release that fits this onnxruntime"
        ) from None
    _plugged[name] = tuple(device for device in ort.get_ep_devices() if device.ep_name.lower() == name.lower())
    return _plugged[name]


def _device(row: Provider, devices: tuple[Any, ...], passed: dict[str, str]) -> Any:
    """Of the kind that `device_type` asks for (else NPU before GPU before CPU) the `device_id`-th."""
    asked = passed.pop("device_type", "NPU").partition(".")
    order = {"NPU": 0, "GPU": 1, "CPU": 2}
    kinds = [device.device.type.name for device in devices]
    kind = asked[0] if "device_type" in row.options else min(kinds, key=lambda kind: order.get(kind, 3))
    found = [device for device, its in zip(devices, kinds, strict=True) if its == kind]
    index = int(passed.pop("device_id", asked[2] or "0"))
    if index >= len(found):
        raise ProviderError(f"{row.ort} has no device {kind} {index} here; it has {', '.join(kinds)}")
    return found[index]
