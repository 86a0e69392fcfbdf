"""Calls of a session whose tensors stay on its device (ONNX Runtime's IO binding), and CUDA graphs of them.

A call of new shapes makes itself a set of buffers on the device, and later calls of these shapes use it again: inputs
are copied into the same memory, outputs written to the same memory and copied back once. An input that is the very
array of the call before, and may not be written to, is not copied: so the conditioning of a picture goes to the device
once for every number of rows. Two calls at once have a set each.

What still crosses in every call is the latent, there and back. It is kept in float64 on the host, where the solver does
its sums: doing them on the device would take a second copy of every solver, or torch, and the copies are small. A row
of SD3 Medium at 1024 pixels is 512 KiB in half precision each way, its conditioning 2.6 MiB. With the CPU as the device
both copies of shapes-sd3 (4 rows, 32 KiB each way) took 0.05 ms of a call of 39 ms; on a GPU they have not been timed.
Pinned host memory, which would hasten them, is out of reach: ONNX Runtime's Python package makes none for its CUDA
provider.

CUDA graphs: a captured graph reads and writes the addresses that it was captured with, whatever is bound later. So each
set of buffers has a `gpu_graph_id` that no other ever gets; its first call runs as usual and has ONNX Runtime make the
outputs, its second is captured, further ones replay that. They must all come from one thread, which the caller sees to.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

KEPT = 8  # sets of buffers that wait for the next call of their shapes; the one that waited longest goes
GRAPH = "gpu_graph_id"  # run option: which CUDA graph; -1: none
Key = tuple[tuple[str, ...], tuple[tuple[str, tuple[int, ...]], ...]]  # outputs, then inputs with their shapes


@dataclass
class Buffers:
    """Memory on the device for one call at a time of one shape."""

    key: Key
    bound: Any  # onnxruntime.IOBinding
    inputs: dict[str, Any]  # name -> onnxruntime.OrtValue
    graph: int  # this set's own
    given: dict[str, weakref.ref[NDArray[Any]]] = field(default_factory=dict)  # what they hold, if that cannot change
    outputs: tuple[Any, ...] = ()  # OrtValues, once ONNX Runtime has made them


class Binding:
    """Runs an onnxruntime.InferenceSession on tensors that stay on its device.

    Parameters
    ----------
    ort : the onnxruntime package
    session : onnxruntime.InferenceSession
    device : str
        ONNX Runtime's name of where its memory is: "cuda", or "cpu".
    index : int
        Which of these devices.
    graphs : bool
        The session captures CUDA graphs: calls come from one thread, one at a time.

    Attributes
    ----------
    copied : int
        Inputs copied to the device so far.
    """

    def __init__(self, ort: ModuleType, session: Any, device: str, index: int = 0, graphs: bool = False) -> None:
        self._ort, self._session, self._where, self._graphs = ort, session, (device, index), graphs
        self.copied = 0
        self._waiting: list[Buffers] = []  # the one that waited longest first
        self._lock = threading.Lock()
        self._ids = count(1)

    def __call__(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]], options: Any) -> list[NDArray[Any]]:
        """As `InferenceSession.run`, of arrays in the graph's own types; the answers are the caller's to keep."""
        buffers = self._take((tuple(names), tuple((name, value.shape) for name, value in feeds.items())), feeds)
        self._fill(buffers, feeds)
        if self._graphs:
            options.add_run_config_entry(GRAPH, str(buffers.graph if buffers.outputs else -1))
        self._session.run_with_iobinding(buffers.bound, options)
        buffers.bound.synchronize_outputs()
        if not buffers.outputs:
            buffers.outputs = tuple(buffers.bound.get_outputs())
            for name, value in zip(names, buffers.outputs, strict=True):
                buffers.bound.bind_ortvalue_output(name, value)
        answers: list[NDArray[Any]] = buffers.bound.copy_outputs_to_cpu()
        with self._lock:  # not after an error, which may have left anything in them
            self._waiting = [*self._waiting, buffers][-KEPT:]
        return answers

    def _take(self, key: Key, feeds: Mapping[str, NDArray[Any]]) -> Buffers:
        """A set of buffers of these shapes that no other call has; a new one, if need be."""
        with self._lock:
            for i in reversed(range(len(self._waiting))):
                if self._waiting[i].key == key:
                    return self._waiting.pop(i)
        bound, make = self._session.io_binding(), self._ort.OrtValue.ortvalue_from_shape_and_type
        inputs = {name: make(value.shape, value.dtype.type, *self._where) for name, value in feeds.items()}
        for name, value in inputs.items():
            bound.bind_ortvalue_input(name, value)
        for name in key[0]:
            bound.bind_output(name, *self._where)
        return Buffers(key, bound, inputs, next(self._ids))

    def _fill(self, buffers: Buffers, feeds: Mapping[str, NDArray[Any]]) -> None:
        for name, value in feeds.items():
            known = buffers.given.pop(name, None)
            if known is None or known() is not value:
                buffers.inputs[name].update_inplace(value)
                with self._lock:
                    self.copied += 1
            if not value.flags.writeable:
                buffers.given[name] = weakref.ref(value)
        buffers.bound.synchronize_inputs()
