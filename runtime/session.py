"""One component of a bundle as an ONNX Runtime session: load, call with every tensor checked, unload.

Knows nothing of pipelines or solvers. Imports onnxruntime when the first session is loaded, never before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import amd_session, assignment, cache, vitisai
from .assignment import Assignment, Fallback
from .binding import Binding
from .bundle import Bundle
from .errors import BundleError, NotFiniteError, ProviderError, RequestError
from .facts import Tensor
from .interrupt import Hand
from .ort import failures, one_line, onnxruntime, require
from .providers import CPU, Provider, check_options, provider_of
from .rows import calls_of, cut, few, in_turn, join, rows_of
from .tensors import declared, fit, not_finite

log = logging.getLogger(__name__)

LEAN_ROWS = 2  # of a call with low memory: a guided pair, for what a call takes grows with its rows


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
        What the provider and `fallback` need is added to them; a provider that they name themselves is left. With
        them nothing that is compiled is kept (see `runtime.cache`).
    fallback : {"limited", "allowed", "never"}
        What may run on the CPU in place of another provider: of the backbone up to 10 % of the compute (of the other
        components anything), anything, or no node of any component. Whatever does is a warning.
    low_memory : bool
        fp32 weights stay in their files, mapped into memory; calls of many rows run as calls of LEAN_ROWS. CPU only.
    rows : int, optional
        Of a component with one graph per row count: the graph of so many rows alone. None: each call runs the graph
        of its rows, or, where there is none, several calls of fewer rows (see `runtime.rows`), which is told.

    Attributes
    ----------
    load_seconds, compile_seconds, run_seconds, calls
        Totals over the life of this object, over all loads; releasing counts as loading. What was compiled and kept
        (see `runtime.cache`) does not.
    retries
        Calls among them that were made again, for NaN or infinity on a provider that is known to give them by chance.
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
        low_memory: bool = False,
        rows: int | None = None,
    ) -> None:
        self.bundle, self.component = bundle, component
        self.path = bundle.graph(component, rows)
        self._row, options, self.fallback = amd_session.settle(
            bundle, component, provider_of(provider), provider_options, fallback
        )
        self.provider, self._lean = self._row.ort, low_memory
        if low_memory:
            check_low_memory(self._row)
        check_options(self._row, options)
        self.load_seconds = self.compile_seconds = self.run_seconds = 0.0
        self.calls = self.retries = 0
        self.assignment: Assignment | None = None
        self._rows = rows
        self._provider_options = {  # a CUDA graph is for what is called again and again
            name: value for name, value in options.items() if name != self._row.graphs or component == bundle.backbone
        }
        self._session_options = session_options
        self._session: Any = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()
        self._binding: Binding | None = None
        self._hand = Hand()
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
                low_memory=low_memory,
                rows=count,
            )
            for count in counts
        }
        self._lock = threading.Lock()  # for what concurrent calls write
        self._loading = threading.Lock()  # of calls at once, the first of a graph
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
        if self._parts:
            self._first().load()
            self._tally()
            return self
        with self._loading:
            if self._session is None:
                self._load()
        return self

    def _load(self) -> None:
        ort = onnxruntime()
        started = time.perf_counter()
        try:
            made = self._create(ort)
        except ProviderError:
            raise
        except failures(ort) as error:
            raise self._unreadable(error) from None
        self.compile_seconds += made.seconds
        self.load_seconds += time.perf_counter() - started - made.seconds
        session = made.session
        ran = session.get_providers()
        if ran[0] != self.provider:
            raise ProviderError(
                f"{self.component}: asked for {self.provider}, onnxruntime would run it on {ran[0]}; "
                "check the provider's options and driver, or give --provider cpu"
            )
        session.disable_fallback()
        self._assign(made.nodes)
        self._bind(ort, session)
        self._inputs, self._outputs = declared(session.get_inputs()), declared(session.get_outputs())
        self._session = session

    def _bind(self, ort: ModuleType, session: Any) -> None:
        """Has the backbone's tensors stay on a device with memory of its own, and those that a CUDA graph captures."""
        options = self._provider_options | session.get_provider_options().get(self.provider, {})
        self._hand.alone = captures = self._row.captures(options)
        if captures or (self._row.device and self.component == self.bundle.backbone):
            index = int(options.get("device_id", "0"))
            self._binding = Binding(ort, session, self._row.device, index, captures)

    def _create(self, ort: ModuleType) -> cache.Started:
        """An onnxruntime session of the graph; raises what that raises."""
        given = self._session_options is not None
        if self.bundle.facts.target == amd_session.LIGHT.name:
            options = self._options(ort, True)
            row, chosen = self._row, self._provider_options
            session: Any = amd_session.create(ort, self.bundle, self.path, options, row, chosen, given)
            return cache.Started(session, assignment.recorded(session))
        require(ort, self._row)  # before anything is made for it
        wanted = cache.Wanted(
            self.bundle,
            self.component,
            self._rows,
            self.path,
            self._row,
            vitisai.completed(self._row, self.bundle, self.component, self._provider_options),
            options=lambda strict: self._options(ort, strict),
            given=given,
        )
        return cache.compiled(ort, wanted)

    def _assign(self, told: list[assignment.Node] | None) -> None:
        """Keeps where the nodes run, tells it (once) and refuses what may not be."""
        macs = self.bundle.facts.components[self.component].macs
        nodes = None if told is None else assignment.completed(told, self.provider, macs)
        if nodes is None:
            if self._row is not CPU and not self._strict(onnxruntime()):
                log.warning("%s: this release of onnxruntime cannot tell which nodes run on the CPU", self.component)
            return
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
                options.terminate = True
        for part in self._parts.values():
            part.stop()

    def unload(self) -> None:
        """Releases the session and its memory; it can be loaded again."""
        started = time.perf_counter()
        self._session = self._binding = None
        self.load_seconds += time.perf_counter() - started
        for part in self._parts.values():
            part.unload()
        if self._parts:
            self._tally()

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
        self.load()
        return self._inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What the graph itself declares; loads it. Of several graphs what they share, the row axis named."""
        if self._parts:
            return self.bundle.facts.components[self.component].outputs or _any_rows(self._first().outputs)
        self.load()
        return self._outputs

    @property
    def captures(self) -> bool:
        """Whether its calls are captured as CUDA graphs: they are then made one at a time."""
        return self._hand.alone or any(part.captures for part in self._parts.values())

    def fit(self, arrays: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        """Copies of inputs, as the graph takes them and not to be written to.

        In calls that are given these very arrays again they are not copied to a device that has them already.

        Raises
        ------
        RequestError, NotFiniteError
            As a call with them.
        """
        tensors = {tensor.name: tensor for tensor in self.inputs}
        fitted = {}
        for name, value in arrays.items():
            array = np.asarray(value)
            array = fit(self.component, tensors[name], array) if name in tensors else array
            fitted[name] = array.copy() if array is value else array
            fitted[name].flags.writeable = False
        return fitted

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
        self.load()
        feeds, names = self._checked(arrays), self._names(want)
        if not self._lean or not all(tensor.shape and isinstance(tensor.shape[0], str) for tensor in self._inputs):
            return self._answer(names, feeds)
        count = max(map(len, feeds.values()))
        parts = cut(few(count, LEAN_ROWS))

        def of(rows: NDArray[np.intp]) -> dict[str, NDArray[Any]]:  # one entry may stand for all rows
            return {name: value[rows] if len(value) == count else value for name, value in feeds.items()}

        return join([self._answer(names, of(rows)) for rows in parts], parts)

    def _answer(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs of one run, all of them finite."""
        results = self._run(names, feeds)
        wrong = not_finite(names, results)
        if wrong and self._row.flaky:
            self._tell_again(wrong)
            results = self._run(names, feeds)
            wrong = not_finite(names, results)
        if wrong:
            raise NotFiniteError(f"{self.component}: NaN or infinity in its output {wrong}; {self._remedy()}")
        return dict(zip(names, results, strict=True))

    def _names(self, want: Collection[str] | None) -> list[str]:
        """The outputs to compute, in the graph's order."""
        names = [output.name for output in self.outputs if want is None or output.name in want]
        if want is not None and len(names) != len(want):
            missing = ", ".join(sorted(set(want) - set(names)))
            raise BundleError(f"{self.path}: no output {missing} in this graph; export it again")
        return names

    def _run(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """One run of the graph, which Ctrl-C and `stop` end."""
        ort = onnxruntime()
        options = ort.RunOptions()
        run = partial(self._binding or self._session.run, names, feeds, options)
        with self._lock:
            self._running.add(options)
        started = time.perf_counter()
        try:
            results: list[NDArray[Any]] = self._hand(run, partial(setattr, options, "terminate", True))
        except KeyboardInterrupt:
            self._drop()
            raise
        except failures(ort) as error:
            self._drop()
            raise RequestError(f"{self.component}: onnxruntime could not run it: {one_line(error)}") from None
        finally:
            with self._lock:
                self._running.remove(options)
        with self._lock:
            self.run_seconds += time.perf_counter() - started
            self.calls += 1
        return results

    def _drop(self) -> None:
        """A CUDA graph may be half captured: the next call makes the session anew."""
        if self.captures:
            self.unload()

    def _tell_again(self, wrong: str) -> None:
        with self._lock:
            self.retries += 1
            first = self.retries == 1
        if first:
            log.warning(
                "%s: NaN or infinity in its output %s, which %s is known to give by chance: the call is made again",
                self.component, wrong, self.provider,
            )  # fmt: skip

    def _in_calls(self, feeds: dict[str, NDArray[Any]], want: Collection[str] | None) -> dict[str, NDArray[Any]]:
        """One call of the graph of these rows, or several of the graphs there are."""
        calls = calls_of(self.bundle, self.component, rows_of(self.component, feeds))
        if len(calls) > 1 and calls not in self._told and self.component == self.bundle.backbone:
            self._told.add(calls)
            log.warning("%s", in_turn(self.bundle, self.component, calls))
        parts = cut(calls)
        whole = len(parts) == 1  # the very arrays, then: no copy of them
        answers = [
            self._parts[len(rows)](
                want=want, **(feeds if whole else {name: value[rows] for name, value in feeds.items()})
            )
            for rows in parts
        ]
        self._tally()
        return answers[0] if whole else join(answers, parts)

    def _tally(self) -> None:
        """The totals of the parts, as this session's."""
        parts = self._parts.values()
        self.load_seconds = sum(part.load_seconds for part in parts)
        self.compile_seconds = sum(part.compile_seconds for part in parts)
        self.run_seconds = sum(part.run_seconds for part in parts)
        self.calls = sum(part.calls for part in parts)
        self.retries = sum(part.retries for part in parts)
        placed = [part.assignment for part in parts if part.assignment is not None]
        self.assignment = min(placed, key=lambda one: one.share, default=None)  # of several graphs the worst

    def _first(self) -> Session:
        return next(iter(self._parts.values()))

    def _remedy(self) -> str:
        if self.bundle.facts.components[self.component].precision == "fp32":
            return "it is in full precision: see with `python -m runtime inspect --verify` whether it is damaged"
        return "if it is half precision, export it with --dtype fp32"

    def _options(self, ort: ModuleType, strict: bool) -> Any:
        options = self._session_options
        if options is None:
            options = default_options(ort, self._row)
        if self._lean:
            _make_lean(ort, options)
        _configure(options, assignment.RECORD)
        if strict and self._strict(ort):
            _configure(options, assignment.STRICT)
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
        if self._row.captures(self._provider_options):  # which wants every node on the provider
            remedy = f"leave {self._row.graphs} out, {remedy}"
        return ProviderError(
            f"{self.component}: {self.provider} cannot run it ({one_line(error)}); {remedy}, or give --provider cpu"
        )

    def _checked(self, arrays: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        tensors = {tensor.name: tensor for tensor in self.inputs}
        if arrays.keys() != tensors.keys():
            raise RequestError(f"{self.component}: expected the inputs {', '.join(tensors)}; got {', '.join(arrays)}")
        return {name: fit(self.component, tensors[name], np.asarray(value)) for name, value in arrays.items()}


def default_options(ort: ModuleType, row: Provider, threads: int = 0) -> Any:
    """onnxruntime's session options where the caller gives none; 0 threads: its own choice, one per physical core."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if row is CPU:  # a plan for each row count is new memory, kept; reuse ties tensors that could go
        options.enable_mem_pattern = options.enable_mem_reuse = False
        # Threads of a session that wait busily after its run, for some 50 ms, slow down the next session's.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _configure(options: Any, entry: str) -> None:
    """Sets an entry to 1, but once: of options that several sessions share onnxruntime prints that it is there."""
    try:
        there = options.get_session_config_entry(entry) == "1"
    except RuntimeError:
        there = False
    if not there:
        options.add_session_config_entry(entry, "1")


def check_low_memory(row: Provider) -> None:
    """ProviderError for a provider whose sessions have no use for it."""
    if row is not CPU:
        raise ProviderError(
            f"{row.ort}: --low-memory keeps weights in mapped files, which is for the CPU provider; "
            "leave it out, or give --provider cpu"
        )


def _make_lean(ort: ModuleType, options: Any) -> None:
    """Has weights stay in the file that onnxruntime maps into memory; those in half precision it keeps in fp32, too."""
    options.add_session_config_entry("session.disable_prepacking", "1")  # which copies those of products
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # one more copies convolutions'


def _any_rows(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As declared by one of several graphs of fixed rows that the bundle's facts say nothing of."""
    return tuple(replace(tensor, shape=("rows", *tensor.shape[1:])) for tensor in tensors)
