"""One component of a bundle as an ONNX Runtime session: load, call with every tensor checked, unload.

Knows nothing of pipelines or solvers. Imports onnxruntime when the first session is loaded, never before.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import ModuleType, TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import amd_session, assignment, vitisai
from .assignment import Assignment, Fallback
from .bundle import Bundle
from .errors import BundleError, NotFiniteError, ProviderError, RequestError
from .facts import Tensor
from .ort import add_provider, failures, one_line, onnxruntime
from .providers import CPU, check_options
from .rows import calls_of, cut, in_turn, join, rows_of

Value = TypeVar("Value")
log = logging.getLogger(__name__)

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
        `cpu`, another key of `runtime.providers.PROVIDERS`, or ONNX Runtime's own name of one; any case.
    provider_options : mapping of str to str, optional
        Those of its row, and no others; see `runtime.providers`.
    session_options : onnxruntime.SessionOptions, optional
        What the provider and `fallback` need is added to them; a provider that they name themselves is left.
    fallback : {"limited", "allowed", "never"}
        What may run on the CPU in place of another provider: of the backbone less than 10 % of the compute (of the
        other components anything), anything, or no node of any component. Whatever does is a warning.
    rows : int, optional
        Of a component with one graph per row count: the graph of so many rows alone. None: each call runs the graph
        of its rows, or, where there is none, several calls of fewer rows (see `runtime.rows`), which is told.

    Attributes
    ----------
    load_seconds, run_seconds, calls
        Totals over the life of this object, over all loads.
    assignment
        Where its nodes run; None before it is loaded, or where onnxruntime, older than 1.24, cannot tell.
    """

    def __init__(
        self,
        bundle: Bundle,
        component: str,
        *,
        provider: str = "cpu",
        provider_options: Mapping[str, str] | None = None,
        session_options: Any = None,
        fallback: Fallback = "limited",
        rows: int | None = None,
    ) -> None:
        self.bundle, self.component = bundle, component
        self.path = bundle.graph(component, rows)
        settled = amd_session.settle(bundle, component, provider, provider_options, fallback)
        self._row, self._provider_options, self.fallback = settled
        self.provider = self._row.ort
        check_options(self._row, self._provider_options)
        self.load_seconds = self.run_seconds = 0.0
        self.calls = 0
        self.assignment: Assignment | None = None
        self._session_options = session_options
        self._session: Any = None
        counts = bundle.facts.components[component].rows if rows is None else ()
        self._told: set[tuple[int, ...]] = set()
        self._parts = {  # row count -> the session of that graph
            count: Session(
                bundle,
                component,
                provider=provider,
                provider_options=provider_options,
                session_options=session_options,
                fallback=fallback,
                rows=count,
            )
            for count in counts
        }
        self._lock = threading.Lock()  # for what concurrent calls write
        self._running: set[Any] = set()  # run options of the calls under way

    @property
    def loaded(self) -> bool:
        return self._session is not None or any(part.loaded for part in self._parts.values())

    def load(self) -> Session:
        """Creates the session; does nothing if there is one. Of several graphs the first: others wait for their rows.

        Raises
        ------
        ProviderError
            No onnxruntime, two of them, or one that has not the provider or cannot run the graph on it, or not as much
            of it as `fallback` wants.
        BundleError
            The graph or its data is missing, truncated or damaged.
        """
        if self._session is not None:
            return self
        if self._parts:
            self._first().load()
            self._tally()
            return self
        ort = onnxruntime()
        options = self._options(ort)
        started = time.perf_counter()
        try:
            shared = self._session_options is not None
            if self.bundle.facts.target == amd_session.LIGHT.name:
                given = self._row, self._provider_options, shared
                session: Any = amd_session.create(ort, self.bundle, self.path, options, *given)
            else:
                chosen = vitisai.completed(self._row, self.bundle, self.component, self.path, self._provider_options)
                named = add_provider(ort, options, self._row, chosen, shared=shared)
                session = ort.InferenceSession(self.path, options, named, enable_fallback=0)  # else the CPU stands in
        except ProviderError:
            raise
        except failures(ort) as error:
            raise self._unreadable(error) from None
        self.load_seconds += time.perf_counter() - started
        ran = session.get_providers()
        if ran[0] != self.provider:
            raise ProviderError(
                f"{self.component}: asked for {self.provider}, onnxruntime would run it on {ran[0]}; "
                "check the provider's options and driver, or give --provider cpu"
            )
        session.disable_fallback()
        self._assign(session)
        self._session = session
        return self

    def _assign(self, session: Any) -> None:
        """Records where the nodes run, tells it (once) and refuses what may not be."""
        nodes = assignment.recorded(session)
        if nodes is None:
            if self._row is not CPU and not self._strict(onnxruntime()):
                log.warning("%s: this onnxruntime cannot tell which nodes run on the CPU; 1.24 can", self.component)
            return
        macs = self.bundle.facts.components[self.component].macs
        placed = assignment.assign(self.component, self.provider, nodes, macs)
        if self.component == self.bundle.backbone or self.fallback == "never":
            assignment.check(placed, self.fallback)
        if self.assignment is None and placed.fallbacks:
            log.warning("%s", placed)
        self.assignment = placed

    def stop(self) -> None:
        """Ends the calls under way, which other threads have made: they raise RequestError."""
        with self._lock:
            for options in self._running:
                _terminate(options)
        for part in self._parts.values():
            part.stop()

    def unload(self) -> None:
        """Releases the session and its memory; it can be loaded again."""
        self._session = None
        for part in self._parts.values():
            part.unload()

    def __enter__(self) -> Session:
        return self.load()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unload()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the graph itself declares; loads it. Of several graphs what they share, the row axis named."""
        if self._parts:
            return self.bundle.facts.components[self.component].inputs or _any_rows(self._first().inputs)
        return tuple(_tensor(argument) for argument in self._loaded().get_inputs())

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What the graph itself declares; loads it. Of several graphs what they share, the row axis named."""
        if self._parts:
            return self.bundle.facts.components[self.component].outputs or _any_rows(self._first().outputs)
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
            Rows that the bundle's graphs cannot make up; the message gives the export line.
        NotFiniteError
            NaN or infinity in an output.
        KeyboardInterrupt
            Ctrl-C stops the call in its midst.
        """
        if self._parts:
            return self._in_calls(self._checked(arrays), want)
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
        except failures(ort) as error:
            raise RequestError(f"{self.component}: onnxruntime could not run it: {one_line(error)}") from None
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

    def _in_calls(self, feeds: dict[str, NDArray[Any]], want: Collection[str] | None) -> dict[str, NDArray[Any]]:
        """One call of the graph of these rows, or several of the graphs there are."""
        calls = calls_of(self.bundle, self.component, rows_of(self.component, feeds))
        if len(calls) > 1 and calls not in self._told and self.component == self.bundle.backbone:
            self._told.add(calls)
            log.warning("%s", in_turn(self.bundle, self.component, calls))
        parts = cut(calls)
        answers = [
            self._parts[len(rows)](want=want, **{name: value[rows] for name, value in feeds.items()}) for rows in parts
        ]
        self._tally()
        return join(answers, parts)

    def _tally(self) -> None:
        """The totals of the parts, as this session's."""
        parts = self._parts.values()
        self.load_seconds = sum(part.load_seconds for part in parts)
        self.run_seconds = sum(part.run_seconds for part in parts)
        self.calls = sum(part.calls for part in parts)
        self.assignment = next((part.assignment for part in parts if part.assignment is not None), None)

    def _first(self) -> Session:
        return next(iter(self._parts.values()))

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
        options.add_session_config_entry(assignment.RECORD, "1")
        if self._strict(ort):
            options.add_session_config_entry(assignment.STRICT, "1")
        return options

    def _strict(self, ort: ModuleType) -> bool:
        """Whether onnxruntime itself is to refuse nodes on the CPU: all of them, for one too old to tell how many."""
        if self._row is CPU:
            return False
        limited = self.fallback == "limited" and self.component == self.bundle.backbone
        return self.fallback == "never" or (limited and not assignment.tells(ort))

    def _unreadable(self, error: BaseException) -> BundleError | ProviderError:
        if self._row is CPU:
            return BundleError(
                f"{self.path}: onnxruntime cannot load it ({one_line(error)}); export or copy the bundle again"
            )
        remedy = "leave --strict out" if self.fallback == "never" else "export it for this provider"
        return ProviderError(
            f"{self.component}: {self.provider} cannot run it ({one_line(error)}); {remedy}, or give --provider cpu"
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


def _any_rows(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As declared by one of several graphs of fixed rows that the bundle's facts say nothing of."""
    return tuple(replace(tensor, shape=("rows", *tensor.shape[1:])) for tensor in tensors)


def _tensor(argument: Any) -> Tensor:
    shape = tuple(size if isinstance(size, int) else str(size or "any") for size in argument.shape)
    return Tensor(argument.name, _TYPES.get(argument.type, argument.type), shape)
