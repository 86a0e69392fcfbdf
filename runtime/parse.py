"""JSON files as frozen dataclasses, read and checked field by field; options of KEY=VALUE. Knows nothing of bundles."""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import BundleError, RequestError

_EXACT = 2**53  # whole numbers below it are floats, too


def load_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; BundleError if it holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, an endless integer; nested without end
        raise BundleError(f"{file}: not valid JSON ({error}); the file is damaged, export or copy it again") from None
    if not isinstance(content, dict):
        raise BundleError(
            f"{file}: holds {type(content).__name__}, not an object; the file is damaged, export or copy it again"
        )
    return content


def pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """What KEY=VALUE texts of an option say, the last of one key; RequestError for one that is none."""
    split = [(text, *text.partition("=")) for text in texts]
    for text, key, equals, _ in split:
        if not key or not equals:
            raise RequestError(f"{option} {text!r} is not KEY=VALUE")
    return {key: value for _, key, _, value in split}


def parse(kind: Any, value: Any, file: Path, where: str = "") -> Any:
    """`value`, as read from JSON, as a `kind`: a dataclass, tuple, mapping, union, literal or plain type.

    BundleError names the file and the field `where` something else stands.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _object(kind, _expect(dict, value, file, where), file, where)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(value, f"one of {', '.join(map(str, arguments))}", file, where)
        return value
    if origin in (Union, types.UnionType):
        return _union(arguments, value, file, where)
    if origin is tuple:
        items = _expect(list, value, file, where)
        return tuple(parse(arguments[0], item, file, f"{where}[{index}]") for index, item in enumerate(items))
    if origin is not None:  # Mapping[str, X]
        items = _expect(dict, value, file, where)
        return {key: parse(arguments[1], item, file, f"{where}.{key}") for key, item in items.items()}
    if kind is float and type(value) is int and abs(value) < _EXACT:
        return float(value)
    return value if kind is Any else _expect(kind, value, file, where)


def _object(kind: Any, value: dict[str, Any], file: Path, where: str) -> Any:
    hints = get_type_hints(kind)
    unknown = set(value) - set(hints)
    needed = {entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING}
    if unknown or needed - set(value):
        what = f"unknown field {min(unknown)!r}" if unknown else f"missing field {min(needed - set(value))!r}"
        raise BundleError(f"{file}: {what} in {where or 'the file'}")
    return kind(**{name: parse(hints[name], item, file, f"{where}.{name}".lstrip(".")) for name, item in value.items()})


def _union(options: tuple[Any, ...], value: Any, file: Path, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    *others, last = [option for option in options if option is not type(None)]
    for option in others:
        try:
            return parse(option, value, file, where)
        except BundleError:
            continue
    return parse(last, value, file, where)


def _expect(kind: Any, value: Any, file: Path, where: str) -> Any:
    if type(value) is not kind:
        raise _wrong(value, {dict: "an object", list: "a list"}.get(kind, kind.__name__), file, where)
    return value


def _wrong(value: Any, expected: str, file: Path, where: str) -> BundleError:
    return BundleError(f"{file}: {where or 'content'} is {value!r:.60}, expected {expected}")
