"""Reads a published predictor snapshot, a pickle of torch tensors, as plain data: executes nothing, needs no torch.

A pickle is a program for a small stack machine. Python's Unpickler, even with `find_class` narrowed, is built to call
what the program names; so it is not used at all. Here the opcodes are decoded by `pickletools.genops`, which only
reads, and interpreted by a machine that knows a closed list of opcodes and of names. A name in the file is nothing but
a key into that list; it is never looked up, imported or called. What comes out is dicts, lists, numbers, strings and
float arrays. Everything else is refused, by its name.

The files were written by `torch_utils.persistence` (StyleGAN, EDM): an object is stored as the source of its module and
its state. The source is left alone, the state is taken as a dict. Every tensor's storage is a file of its own inside
the pickle, in torch's old format or in its zip format; the same machine reads those, with another closed list.

Knows nothing of solvers; `epd.importer` makes a table of what is read.
"""

import io
import math
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 1 << 20  # of a file; the published ones have 8 thousand
MAX_OPCODES = 50_000  # of a file and all pickles in it; the published ones have 600
MAX_ELEMENTS = 1 << 16  # of one tensor; the published ones have 20
MAX_COPIED = 1 << 18  # in all: numbers of tensors and storages, entries of copied dicts; the published need far less

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch's format before zip
STORAGES = {
    f"{module}.{kind}Storage": np.dtype(code)
    for module in ("torch", "torch.cuda")
    for kind, code in (("Float", "<f4"), ("Double", "<f8"), ("Half", "<f2"))
}


class Module(dict[str, Any]):
    """The state of an object of the file, as plain data."""


def read(data: bytes) -> Any:
    """The content of a snapshot file: dicts, lists, scalars, float arrays, `Module`.

    Raises
    ------
    ValueError
        One line that names what was refused: an opcode, a constructor, a size, or a file that is cut off or no pickle.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"refused: {len(data)} bytes, a snapshot has at most {MAX_BYTES}")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of odd escapes in a hostile name
        return _run(io.BytesIO(data), _Budget(), calls=CALLS, objects=OBJECTS)


@dataclass
class _Budget:
    """What a file may still cost: a few bytes of it can ask for the same copy over and over."""

    opcodes: int = MAX_OPCODES
    copied: int = MAX_COPIED

    def spend(self, opcodes: int = 0, copied: int = 0) -> None:
        self.opcodes -= opcodes
        self.copied -= copied
        _rule(self.opcodes >= 0, f"more than {MAX_OPCODES} opcodes")
        _rule(self.copied >= 0, f"more than {MAX_COPIED} numbers and dict entries in all")


@dataclass(frozen=True)
class _Name:
    """A name the file mentions, from the closed list."""

    path: str


@dataclass(frozen=True)
class _Stored:
    """A storage whose bytes lie elsewhere in the same file."""

    kind: np.dtype[Any]
    key: str
    count: int

    def decode(self, raw: bytes) -> NDArray[Any]:
        _rule(len(raw) == self.count * self.kind.itemsize, "a tensor's storage is cut off or too long")
        return np.frombuffer(raw, self.kind)


def _run(stream: io.BytesIO, budget: _Budget, **names: Any) -> Any:
    """What the pickle at the stream's position builds; leaves the stream behind its end."""
    machine = _Machine(budget, **names)
    opcodes = pickletools.genops(stream)
    while True:
        budget.spend(opcodes=1)
        try:
            opcode, argument, _position = next(opcodes)
        except ValueError as error:  # cut off, an unknown opcode, text that is none
            raise ValueError(f"no pickle, or cut off ({error})") from error
        if opcode.name == "STOP":
            return machine.pop()
        if opcode.name in VALUES:
            machine.stack.append(argument)
        elif opcode.name in ACTIONS:
            ACTIONS[opcode.name](machine, argument)
        else:
            _refuse(f"opcode {opcode.name}")


@dataclass
class _Machine:
    """The stack machine of a pickle, for data alone."""

    budget: _Budget
    calls: Mapping[str, Callable[..., Any]] = field(
        default_factory=dict
    )  # our own builder for each name: (budget, *arguments)
    objects: tuple[str, ...] = ()  # names whose objects are taken as a `Module`
    storages: Mapping[str, np.dtype[Any]] = field(default_factory=dict)
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)  # heights of the stack
    memo: dict[int, Any] = field(default_factory=dict)

    def pop(self) -> Any:
        _rule(len(self.stack) > (self.marks[-1] if self.marks else 0), "the stack runs empty")
        return self.stack.pop()

    def top(self, kind: type[Any]) -> Any:
        value = self.pop()
        _rule(isinstance(value, kind), f"a {kind.__name__} is expected, the file has another thing there")
        self.stack.append(value)
        return value

    def since_mark(self) -> list[Any]:
        _rule(bool(self.marks), "a mark is missing")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def last(self, count: int) -> tuple[Any, ...]:
        return tuple([self.pop() for _ in range(count)][::-1])

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.top(object)

    def get(self, index: int) -> None:
        _rule(index in self.memo, "something is used before it is stored")
        self.stack.append(self.memo[index])

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def add(self, items: list[Any]) -> None:
        self.top(set).update(map(_scalar, items))

    def set(self, items: list[Any]) -> None:
        _rule(len(items) % 2 == 0, "a dict's key without a value")
        self.top(dict).update(zip(map(_scalar, items[::2]), items[1::2], strict=True))

    def name(self, path: str) -> None:
        if not (path in self.calls or path in self.objects or path in self.storages):
            _refuse(ascii(path[:100]))
        self.stack.append(_Name(path))

    def stack_name(self, _: Any) -> None:
        module, name = self.last(2)
        _rule(isinstance(module, str) and isinstance(name, str), "a name is expected, the file has another thing there")
        self.name(f"{module}.{name}")

    def call(self, _: Any) -> None:
        name, arguments = self.last(2)
        _rule(isinstance(name, _Name) and isinstance(arguments, tuple), "a call of what is no name")
        if name.path not in self.calls:
            _refuse(f"a call of {name.path}")
        try:
            self.stack.append(self.calls[name.path](self.budget, *arguments))
        except TypeError as error:
            raise ValueError(f"refused: {name.path} with {len(arguments)} arguments") from error

    def new(self, _: Any) -> None:
        name, arguments = self.last(2)
        if not (isinstance(name, _Name) and name.path in self.objects and arguments == ()):
            _refuse("a new object of " + (name.path if isinstance(name, _Name) else "what is no name"))
        self.stack.append(Module())

    def build(self, _: Any) -> None:
        state = self.pop()
        _rule(isinstance(state, dict), "the state of an object is no dict")
        self.budget.spend(copied=len(state))
        self.top(Module).update(state)

    def stored(self, _: Any) -> None:
        told = self.pop()
        known = isinstance(told, tuple) and len(told) in (5, 6) and told[0] == "storage" and told[5:] in ((), (None,))
        _rule(known, "what is stored elsewhere is no tensor's storage")
        _, name, key, _, count = told[:5]
        known = isinstance(name, _Name) and name.path in self.storages and isinstance(key, str)
        _rule(known, "what is stored elsewhere is no tensor's storage")
        _rule(type(count) is int and 0 <= count <= MAX_ELEMENTS, f"a storage of more than {MAX_ELEMENTS} numbers")
        self.stack.append(_Stored(self.storages[name.path], key, count))


def _protocol(_: _Machine, version: int) -> None:
    _rule(version <= 5, f"pickle protocol {version}")


def _ignore(_: _Machine, argument: Any) -> None:
    """FRAME: a hint for readers."""


Action = Callable[[_Machine, Any], None]
VALUES = (  # opcodes that push their argument
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINBYTES", "BINBYTES8", "SHORT_BINBYTES"),
    *("BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"),
)
ACTIONS: Mapping[str, Action] = {
    "PROTO": _protocol,
    "FRAME": _ignore,
    "MARK": _Machine.mark,
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_SET": lambda m, _: m.stack.append(set()),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "TUPLE1": lambda m, _: m.stack.append(m.last(1)),
    "TUPLE2": lambda m, _: m.stack.append(m.last(2)),
    "TUPLE3": lambda m, _: m.stack.append(m.last(3)),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.since_mark()),
    "ADDITEMS": lambda m, _: m.add(m.since_mark()),
    "SETITEM": lambda m, _: m.set(list(m.last(2))),
    "SETITEMS": lambda m, _: m.set(m.since_mark()),
    "MEMOIZE": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": lambda m, path: m.name(path.replace(" ", ".", 1)),
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.stored,
}


def _storage(budget: _Budget, blob: Any) -> NDArray[Any]:
    """The numbers of one tensor's storage, itself a file that torch wrote."""
    _rule(isinstance(blob, bytes), "a tensor's storage is no bytes")
    budget.spend(copied=len(blob) // 4)
    return _zipped(budget, blob) if blob.startswith(b"PK") else _legacy(budget, blob)


def _legacy(budget: _Budget, blob: bytes) -> NDArray[Any]:
    """Four pickles (magic, version, system, object), the keys of the storages, then for each its count and numbers."""
    stream = io.BytesIO(blob)
    magic, _, system = (_run(stream, budget) for _ in range(3))
    _rule(magic == LEGACY_MAGIC, "a tensor's storage is in no format of torch")
    _rule(isinstance(system, dict) and system.get("little_endian") is True, "a storage that is not little-endian")
    stored = _run(stream, budget, storages=STORAGES)
    _rule(isinstance(stored, _Stored) and _run(stream, budget) == [stored.key], "a tensor's storage is not one storage")
    _rule(int.from_bytes(stream.read(8), "little") == stored.count, "a tensor's storage counts its numbers wrongly")
    numbers: NDArray[Any] = stored.decode(stream.read())
    return numbers


def _zipped(budget: _Budget, blob: bytes) -> NDArray[Any]:
    """A zip, uncompressed, of data.pkl (the object) and data/KEY (its numbers), under a folder of any name.

    zipfile only reads; a file that is damaged, encrypted or incomplete makes it raise any of the errors below.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            files = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            plain = all(info.compress_type == zipfile.ZIP_STORED for info in files.values())
            _rule(plain and sum(info.file_size for info in files.values()) <= len(blob), "a compressed storage")
            stored = _run(io.BytesIO(archive.read(files["data.pkl"])), budget, storages=STORAGES)
            _rule(isinstance(stored, _Stored), "a tensor's storage is not one storage")
            order = archive.read(files["byteorder"]) if "byteorder" in files else b"little"
            _rule(order == b"little", "a storage that is not little-endian")
            numbers: NDArray[Any] = stored.decode(archive.read(files[f"data/{stored.key}"]))
            return numbers
    except (zipfile.BadZipFile, RuntimeError, EOFError, KeyError, OverflowError) as error:
        raise ValueError(f"a tensor's storage is a broken zip ({error})") from error


def _tensor(
    budget: _Budget,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _requires_grad: Any,
    _hooks: Any,
    _metadata: Any = None,
) -> NDArray[Any]:
    _rule(isinstance(storage, np.ndarray) and storage.ndim == 1, "a tensor without a storage")
    _rule(isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 4, "a tensor's shape")
    whole = all(type(number) is int and number >= 0 for number in (offset, *size, *stride))
    _rule(whole and 0 < math.prod(size) <= MAX_ELEMENTS, f"a tensor of none or more than {MAX_ELEMENTS} numbers")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    _rule(last < len(storage), "a tensor that reaches beyond its storage")
    budget.spend(copied=math.prod(size))
    index = np.full(size, offset)
    for axis, step in zip(np.indices(size), stride, strict=True):
        if axis.any():  # an axis of one entry may have any stride
            index += axis * step
    return np.asarray(storage[index])


def _parameter(_: _Budget, data: Any, _requires_grad: Any, _hooks: Any) -> Any:
    _rule(isinstance(data, np.ndarray), "a parameter that is no tensor")
    return data


def _persistent(budget: _Budget, meta: Any) -> Module:
    known = isinstance(meta, dict) and meta.get("type") == "class" and isinstance(meta.get("state"), dict)
    _rule(known, "a persistent object without a state")
    budget.spend(copied=len(meta["state"]))
    return Module(meta["state"])


def _ordered(_: _Budget) -> dict[str, Any]:
    return {}


CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
}
OBJECTS = ("dnnlib.util.EasyDict", "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.activation.Softmax")


def _scalar(key: Any) -> Any:
    """A dict's key or a set's member: no tuple, whose hash can take forever."""
    _rule(key is None or isinstance(key, str | int | float), "a dict's key that is no string or number")
    return key


def _rule(holds: bool, text: str) -> None:
    if not holds:
        _refuse(text)


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"refused: {what}")
