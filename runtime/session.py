"""One component of a bundle as an ONNX Runtime session: load, call with every tensor checked, unload.

Knows nothing of pipelines or solvers. Imports onnxruntime when the first session is loaded, never before.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.metadata
import threading
import time
from collections.abc import Callable, Collection, Mapping
from types import ModuleType, TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bundle import Bundle, Tensor
from .errors import BundleError, NotFiniteError, ProviderError, RequestError

Value = TypeVar("Value")

# Name typed -> (ONNX Runtime's name, wheel that has it). Exactly one of the wheels may be installed.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "directml": ("DmlExecutionProvider", "onnxruntime-directml"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
    "webgpu": ("WebGpuExecutionProvider", "onnxruntime-webgpu"),
    "migraphx": ("MIGraphXExecutionProvider", "onnxruntime-migraphx"),
}
_TYPES = {  # ONNX Runtime's type names -> numpy's
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}
_WHOLE = 1e-4  # how far a float may be from the whole number an integer input takes


class Session:
    """A component that can be called with arrays by input name. Loaded at the first call, by `load`, or as a context.

    Parameters
    ----------
    bundle, component
        Which graph.
    provider : str
        `cpu`, another key of `PROVIDERS`, or ONNX Runtime's own name of one; any case. Nothing else runs: a node that
        the provider cannot take is an error, not a silent fallback to the CPU.
    provider_options : mapping of str to str, optional
        For another provider than the CPU, which ignores them without a word.
    session_options : onnxruntime.SessionOptions, optional
        Not changed unless the provider is another than the CPU, whose fallback is then switched off in them.

    Attributes
    ----------
    load_seconds, run_seconds, calls
        Totals over the life of this object, over all loads.
    """

    def __init__(
        self,
        bundle: Bundle,
        component: str,
        *,
        provider: str = "cpu",
        provider_options: Mapping[str, str] | None = None,
        session_options: Any = None,
    ) -> None:
        self.bundle, self.component = bundle, component
        self.path = bundle.graph(component)
        self.provider = provider_name(provider)
        if provider_options and self.provider == PROVIDERS["cpu"][0]:
            raise ProviderError(f"{self.provider} takes no provider options; leave them out, or name another provider")
        self.load_seconds = self.run_seconds = 0.0
        self.calls = 0
        self.nodes: dict[str, int] | None = None  # provider -> nodes of the graph; None: this onnxruntime cannot tell
        self._provider_options = dict(provider_options or {})
        self._session_options = session_options
        self._session: Any = None
        self._lock = threading.Lock()  # for what concurrent calls write
        self._running: set[Any] = set()  # run options of the calls under way

    @property
    def loaded(self) -> bool:
        return self._session is not None

    def load(self) -> Session:
        """Creates the session; does nothing if there is one.

        Raises
        ------
        ProviderError
            No onnxruntime, two of them, or one that has not the provider or cannot run the graph on it.
        BundleError
            The graph or its data is missing, truncated or damaged.
        """
        if self._session is not None:
            return self
        ort = onnxruntime()
        require_provider(ort, self.provider)
        failures: tuple[type[Exception], ...] = (*_failures(ort), RuntimeError, ValueError)
        started = time.perf_counter()
        try:
            session = ort.InferenceSession(
                self.path,
                self._options(ort),
                providers=[(self.provider, self._provider_options)],
                enable_fallback=0,  # else a provider that cannot start is replaced by the CPU
            )
        except failures as error:
            raise self._unreadable(error) from None
        self.load_seconds += time.perf_counter() - started
        ran = session.get_providers()
        if ran[0] != self.provider:
            raise ProviderError(
                f"{self.component}: asked for {self.provider}, onnxruntime would run it on {ran[0]}; "
                "check the provider's options and driver, or give --provider cpu"
            )
        session.disable_fallback()
        self._session, self.nodes = session, _nodes(session)
        return self

    def stop(self) -> None:
        """Ends the calls under way, which other threads have made: they raise RequestError."""
        with self._lock:
            for options in self._running:
                _terminate(options)

    def unload(self) -> None:
        """Releases the session and its memory; it can be loaded again."""
        self._session = None

    def __enter__(self) -> Session:
        return self.load()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unload()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the graph itself declares; loads it."""
        return tuple(_tensor(argument) for argument in self._loaded().get_inputs())

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What the graph itself declares; loads it."""
        return tuple(_tensor(argument) for argument in self._loaded().get_outputs())

    def __call__(self, *, want: Collection[str] | None = None, **arrays: ArrayLike) -> dict[str, NDArray[Any]]:
        """Runs the graph once.

        Parameters
        ----------
        want : output names, optional
            Only these are computed and returned; all of them if None.
        **arrays
            One array per declared input, of its rank and fixed sizes; cast to its dtype (to an integer only if whole).

        Returns
        -------
        dict
            Output name -> array, in the dtype the graph declares.

        Raises
        ------
        RequestError
            A tensor that does not fit; the message names component and input, what was expected and what came.
        NotFiniteError
            NaN or infinity in an output.
        KeyboardInterrupt
            Ctrl-C stops the call in its midst.
        """
        session = self._loaded()
        feeds = self._checked(arrays)
        names = [output.name for output in self.outputs]
        names = names if want is None else [name for name in names if name in want]
        if want is not None and len(names) != len(want):
            missing = ", ".join(sorted(set(want) - set(names)))
            raise BundleError(f"{self.path}: no output {missing} in this graph; export it again")
        ort = onnxruntime()
        options = ort.RunOptions()
        with self._lock:
            self._running.add(options)
        started = time.perf_counter()
        try:
            results = _interruptible(lambda: session.run(names, feeds, options), lambda: _terminate(options))
        except _failures(ort) as error:
            raise RequestError(f"{self.component}: onnxruntime could not run it: {_one_line(error)}") from None
        finally:
            with self._lock:
                self._running.remove(options)
        with self._lock:
            self.run_seconds += time.perf_counter() - started
            self.calls += 1
        for name, result in zip(names, results, strict=True):
            if result.dtype.kind == "f" and not np.isfinite(result).all():
                raise NotFiniteError(f"{self.component}: NaN or infinity in its output {name}; {self._remedy()}")
        return dict(zip(names, results, strict=True))

    def _loaded(self) -> Any:
        self.load()
        return self._session

    def _remedy(self) -> str:
        if self.bundle.facts.components[self.component].precision == "fp32":
            return "it is in full precision: see with `python -m runtime inspect --verify` whether it is damaged"
        return "if it is half precision, export it with --dtype fp32"

    def _options(self, ort: ModuleType) -> Any:
        options = self._session_options
        if options is None:  # threads are left to onnxruntime: one per physical core
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if self.provider != PROVIDERS["cpu"][0]:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return options

    def _unreadable(self, error: BaseException) -> BundleError | ProviderError:
        if self.provider == PROVIDERS["cpu"][0]:
            return BundleError(
                f"{self.path}: onnxruntime cannot load it ({_one_line(error)}); export or copy the bundle again"
            )
        return ProviderError(
            f"{self.component}: {self.provider} cannot run all of it ({_one_line(error)}); give --provider cpu"
        )

    def _checked(self, arrays: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        declared = {tensor.name: tensor for tensor in self.inputs}
        if arrays.keys() != declared.keys():
            raise RequestError(f"{self.component}: expected the inputs {', '.join(declared)}; got {', '.join(arrays)}")
        return {name: self._fit(declared[name], np.asarray(value)) for name, value in arrays.items()}

    def _fit(self, tensor: Tensor, value: NDArray[Any]) -> NDArray[Any]:
        fixed = all(
            isinstance(want, str) or want == have for want, have in zip(tensor.shape, value.shape, strict=False)
        )
        dtype = np.dtype(tensor.dtype)
        whole = dtype.kind == "f" or value.dtype.kind in "iu" or bool((abs(value - np.rint(value)) <= _WHOLE).all())
        if len(tensor.shape) != value.ndim or not fixed or value.dtype.kind not in "fiu" or not whole:
            shape = ", ".join(map(str, tensor.shape))
            what = f"{value.dtype} {list(value.shape)}" + ("" if whole else " that is not whole")
            raise RequestError(f"{self.component}: input {tensor.name} must be {tensor.dtype} [{shape}]; got {what}")
        if dtype.kind in "iu" and value.dtype.kind == "f":
            value = np.rint(value)
        try:
            with np.errstate(over="raise"):
                return np.ascontiguousarray(value, dtype).reshape(value.shape)  # ascontiguousarray makes scalars 1-D
        except FloatingPointError:
            raise NotFiniteError(
                f"{self.component}: input {tensor.name} is beyond what {tensor.dtype} holds; "
                "give a smaller guidance scale"
            ) from None


def onnxruntime() -> ModuleType:
    """The onnxruntime package; ProviderError if there is none, or if two wheels of it overwrote each other."""
    wheels = sorted({wheel for _, wheel in PROVIDERS.values()} & _installed())
    if len(wheels) > 1:
        raise ProviderError(
            f"two onnxruntime packages break each other: {', '.join(wheels)}; "
            f"pip uninstall -y {' '.join(wheels)}, then install the one you want"
        )
    try:
        import onnxruntime as ort
    except ImportError as error:  # not there, or there and broken
        raise ProviderError(
            f"onnxruntime cannot be imported ({_one_line(error)}); pip install onnxruntime (or the extra [cpu])"
        ) from None
    return ort  # type: ignore[no-any-return]


def provider_name(name: str) -> str:
    """ONNX Runtime's name of a provider, from any spelling of it; ProviderError gives the choices."""
    for short, (full, _) in PROVIDERS.items():
        if name.lower() in (short, full.lower()):
            return full
    raise ProviderError(f"unknown provider {name!r}; choose from {', '.join(PROVIDERS)}")


def require_provider(ort: ModuleType, provider: str) -> None:
    """ProviderError, with the line to type, if the installed onnxruntime has not the provider."""
    available = ort.get_available_providers()
    if provider not in available:
        extra, wheel = next((short, wheel) for short, (full, wheel) in PROVIDERS.items() if full == provider)
        raise ProviderError(
            f"{provider} is not in the installed onnxruntime (it has {', '.join(available)}); in an "
            f"environment of its own: pip install {wheel} (or the extra [{extra}])"
        )


@functools.cache  # milliseconds, and asked at every call
def _installed() -> frozenset[str]:
    def there(wheel: str) -> bool:
        try:
            return bool(importlib.metadata.version(wheel))
        except importlib.metadata.PackageNotFoundError:
            return False

    return frozenset(wheel for _, wheel in PROVIDERS.values() if there(wheel))


def _failures(ort: ModuleType) -> tuple[type[Exception], ...]:
    """What onnxruntime raises: its own classes share no base."""
    state = ort.capi.onnxruntime_pybind11_state
    names = (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
        "EPFail",
    )
    return tuple(getattr(state, name) for name in names)


def _interruptible(call: Callable[[], Value], stop: Callable[[], None]) -> Value:
    """The result of `call`, run in a thread so that Ctrl-C is seen at once; `stop` then ends it."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        future = thread.submit(call)
        try:
            while not concurrent.futures.wait([future], timeout=0.2).done:  # Windows sees Ctrl-C between two waits
                pass
        except KeyboardInterrupt:
            stop()
            raise
        return future.result()


def _terminate(options: Any) -> None:
    options.terminate = True


def _nodes(session: Any) -> dict[str, int] | None:
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None  # an onnxruntime before 1.24
    failures = _failures(onnxruntime())
    try:
        parts = session.get_provider_graph_assignment_info()
    except failures:
        return None  # options of the caller's that do not record it
    nodes: dict[str, int] = {}
    for part in parts:
        nodes[part.ep_name] = nodes.get(part.ep_name, 0) + len(part.get_nodes())
    return nodes


def _tensor(argument: Any) -> Tensor:
    shape = tuple(size if isinstance(size, int) else str(size or "any") for size in argument.shape)
    return Tensor(argument.name, _TYPES.get(argument.type, argument.type), shape)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " ..."
