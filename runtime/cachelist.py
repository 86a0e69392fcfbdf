"""`python -m runtime cache list|clear`: what this program keeps in the user's cache, and how to be rid of it.

Kinds: `compiled` (graphs, see `runtime.cache`), `directions` (what was measured, see `runtime.profiles`), `vitisai`
(configurations, written anew when needed, see `runtime.vitisai`), `tables` (fetched ones). Whether a compiled model
still fits is told for providers that are here and for this machine; of another machine's, or with another
environment's provider, nothing is said to be stale.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .shelf import Entry

State = Literal["fits", "stale", "broken", "unfinished", "elsewhere"]


@dataclass(frozen=True)
class Item:
    """One thing that is kept."""

    kind: str
    path: str
    bytes: int
    used: str  # last, ISO 8601, UTC
    state: State = "fits"
    why: str = ""  # it does not fit
    name: str = ""  # of the bundle or table
    component: str = ""
    rows: int | None = None
    provider: str = ""  # ONNX Runtime's names
    made: str = ""  # as `used`


def items(kinds: Sequence[str] = ()) -> list[Item]:
    """What is kept of these kinds, or of all; ProviderError if there is no cache folder or no onnxruntime to ask."""
    return [item for kind, found in KINDS.items() if not kinds or kind in kinds for item in found(_home())]


def clear(chosen: Sequence[Item]) -> None:
    """Removes them; OSError names the first that cannot be."""
    from .shelf import remove

    for item in chosen:
        path = Path(item.path)
        if path.is_dir():
            remove(path)
        else:
            path.unlink(missing_ok=True)


def add_commands(commands: Any) -> None:
    """`cache list` and `cache clear`, for the command line of this package."""
    cache = commands.add_parser("cache", help="list or clear what is kept: compiled models, measurements, tables")
    actions = cache.add_subparsers(required=True, metavar="list|clear")
    told = {
        "list": (_list, "list what is kept, and whether it still fits"),
        "clear": (_clear, "remove what is named: kinds, --provider, --stale or --all"),
    }
    for name, (run, words) in told.items():
        command = actions.add_parser(name, help=words)
        command.set_defaults(run=run)
        command.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} (default: all of them)")
        command.add_argument("--provider", metavar="NAME", help="only what is of this execution provider")
        command.add_argument("--stale", action="store_true", help="only what fits no more, is broken or unfinished")
        command.add_argument("--json", action="store_true", help="print one object on stdout")
    command.add_argument("--all", action="store_true", help="everything, fetched tables too")


def _list(options: argparse.Namespace) -> None:
    found = _chosen(options)
    if options.json:
        print(json.dumps({"folder": str(_home()), "items": [asdict(item) for item in found]}))
        return
    print(f"{_home()}: {_told(found)}")
    for item in found:
        rows = "" if item.rows is None else f" rows {item.rows}"
        what = " ".join(filter(None, (f"{item.name} {item.component}{rows}".strip(), item.provider)))
        when = f"made {item.made[:16]}, used {item.used[:16]}" if item.made else f"used {item.used[:16]}"
        why = f": {item.why}" if item.why else ""
        print(f"{item.kind:11}{item.state + why}; {what}, {size(item.bytes)}, {when}, {Path(item.path).name}")


def _clear(options: argparse.Namespace) -> None:
    from .errors import RequestError

    if not (options.kinds or options.provider or options.stale or options.all):
        raise RequestError(f"say what to remove: {', '.join(KINDS)}, --provider NAME, --stale or --all")
    found = _chosen(options)
    clear(found)
    if options.json:
        print(json.dumps({"removed": [asdict(item) for item in found], "bytes": sum(item.bytes for item in found)}))
    else:
        print(f"removed {_told(found)}")


def _chosen(options: argparse.Namespace) -> list[Item]:
    from .errors import RequestError
    from .providers import provider_name

    if unknown := set(options.kinds) - KINDS.keys():
        raise RequestError(f"unknown kind {sorted(unknown)[0]!r}; choose from {', '.join(KINDS)}")
    found = items(options.kinds)
    if options.provider is not None:
        name = provider_name(options.provider)
        found = [item for item in found if name in item.provider.split(",")]
    return [item for item in found if item.state not in ("fits", "elsewhere")] if options.stale else found


def _told(found: Sequence[Item]) -> str:
    if not found:
        return "nothing"
    counts = {kind: [item.bytes for item in found if item.kind == kind] for kind in KINDS}
    return ", ".join(f"{len(sizes)} {kind} ({size(sum(sizes))})" for kind, sizes in counts.items() if sizes)


def size(count: float) -> str:
    """Bytes, for a reader."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _home() -> Path:
    from epd.catalogue import cache_folder

    from .errors import RequestError

    try:
        return cache_folder()
    except ValueError as error:
        raise RequestError(str(error)) from None


def _compiled(home: Path) -> Iterator[Item]:
    from . import shelf

    now = _Now()
    for folder in shelf.whole(home / "compiled"):
        try:
            entry = shelf.read(folder)
            state, why = now.state(folder, entry)
        except shelf.BrokenError as error:
            yield Item("compiled", str(folder), _bytes(folder), _used(folder), "broken", str(error))
            continue
        yield Item(
            "compiled",
            str(folder),
            _bytes(folder),
            _used(folder / shelf.FILE),
            state,
            why,
            entry.bundle,
            entry.component,
            entry.rows,
            entry.key["provider"],
            entry.made,
        )
    for folder in shelf.unfinished(home / "compiled"):
        why = "being compiled now, or left by a process that was killed"
        yield Item("compiled", str(folder), _bytes(folder), _used(folder), "unfinished", why)


class _Now:
    """What the parts of a key that may change are now; asks each provider once."""

    def __init__(self) -> None:
        self._here: dict[str, dict[str, Any] | None] = {}

    def state(self, folder: Path, entry: Entry) -> tuple[State, str]:
        """BrokenError for a folder that is not as it was written."""
        from . import shelf
        from .cachekey import changes, machine
        from .providers import provider_of

        row = provider_of(entry.key["provider"])
        if row.kept is None:
            return "stale", "no longer kept"
        shelf.look(folder, row.kept.how, entry.key)
        if entry.key["machine"] != machine():
            return "elsewhere", f"of the machine {entry.key['machine'].get('node')}"
        if differs := _graph_differs(entry):
            return "stale", differs
        here = self._environment(row.ort)
        if here is None:
            return "elsewhere", "its provider is not here"
        differing = changes({name: entry.key.get(name) for name in here}, here)
        return ("stale", ", ".join(differing)) if differing else ("fits", "")

    def _environment(self, name: str) -> dict[str, Any] | None:
        from .cachekey import environment
        from .errors import ProviderError
        from .ort import onnxruntime
        from .providers import provider_of

        if name not in self._here:
            try:
                self._here[name] = environment(onnxruntime(), provider_of(name))
            except ProviderError:
                self._here[name] = None
        return self._here[name]


def _graph_differs(entry: Entry) -> str:
    """Why the bundle where it was is not the one it was made of, any more; empty if it is."""
    from .bundle import Bundle
    from .cachekey import graph_key
    from .errors import BundleError

    try:
        bundle = Bundle.open(entry.folder)
        now = graph_key(bundle, bundle.graph(entry.component, entry.rows))
    except (BundleError, OSError):
        return f"its bundle is no longer in {entry.folder}"
    return "" if now == entry.key["graph"] else "its bundle has been made anew"


def _directions(home: Path) -> Iterator[Item]:
    for file in sorted((home / "directions").glob("*.json")):
        try:
            key = json.loads(file.read_text(encoding="utf-8"))["key"]
            providers, state, why = ",".join(map(str, key["providers"])), *_measured(key)
        except (OSError, ValueError, KeyError, TypeError):
            yield Item("directions", str(file), _bytes(file), _used(file), "broken", "is damaged")
            continue
        yield Item("directions", str(file), _bytes(file), _used(file), state, why, provider=providers)


def _measured(key: dict[str, Any]) -> tuple[State, str]:
    from .cachekey import machine
    from .errors import ProviderError
    from .ort import onnxruntime

    try:
        release = onnxruntime().__version__
    except ProviderError:
        return "elsewhere", "there is no onnxruntime here"
    then = key.get("packages", key)["onnxruntime"]
    if key["machine"]["node"] != machine()["node"]:
        return "elsewhere", f"of the machine {key['machine']['node']}"
    return ("fits", "") if then == release else ("stale", f"onnxruntime {then} -> {release}")


def _vitisai(home: Path) -> Iterator[Item]:
    for file in sorted((home / "vitisai").glob("*.json")):
        yield Item("vitisai", str(file), _bytes(file), _used(file), provider="VitisAIExecutionProvider")


def _tables(home: Path) -> Iterator[Item]:
    for file in sorted(home.glob("*.json")):
        yield Item("tables", str(file), _bytes(file), _used(file), name=file.stem)
    for file in sorted(home.glob("*.part")):
        yield Item("tables", str(file), _bytes(file), _used(file), "unfinished", "a download that stopped", file.stem)


def _bytes(path: Path) -> int:
    parts = path.rglob("*") if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts if part.is_file())


def _used(path: Path) -> str:
    return datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")


KINDS: dict[str, Callable[[Path], Iterator[Item]]] = {
    "compiled": _compiled,
    "directions": _directions,
    "vitisai": _vitisai,
    "tables": _tables,
}
