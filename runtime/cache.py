"""Sessions whose compiled form is kept: a provider that takes minutes to compile a graph does so once.

Under `compiled` in the user's cache there is one folder per key (`runtime.cachekey`), in it either an EP-context model,
which onnxruntime writes, or what the provider itself keeps in a folder that one of its options names: the provider's
row says which. Nothing in it is trusted (`runtime.shelf`): what is not as it was written, or does not load, is removed
and made anew, and that is told. A provider that was given one of its cache options by the user is left alone, and so
are session options of the caller's, for what they hold cannot be read.

Tells by log lines. Knows nothing of pipelines.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from epd.catalogue import cache_folder

from . import assignment, shelf
from .assignment import Node
from .bundle import Bundle
from .cachekey import Key, changes, digest, key_of
from .errors import ProviderError
from .ort import add_provider, failures, one_line, settled
from .providers import Provider
from .shelf import BrokenError, Entry
from .watched import watched

log = logging.getLogger(__name__)
_late: set[Path] = set()  # folders whose files are recorded when the process ends


@dataclass(frozen=True)
class Wanted:
    """A session that is asked for."""

    bundle: Bundle
    component: str
    rows: int | None  # of a graph that has them fixed
    graph: Path
    row: Provider
    chosen: Mapping[str, str]  # provider options
    options: Callable[[bool], Any]  # fresh session options; True: onnxruntime refuses what may not run on the CPU
    given: bool  # those are the caller's own

    @property
    def short(self) -> str:
        """The provider, for a reader."""
        return self.row.ort.removesuffix("ExecutionProvider")

    def __str__(self) -> str:
        rows = "" if self.rows is None else f" (rows {self.rows})"
        return f"{self.component} for {self.short}{rows}"


@dataclass(frozen=True)
class Started:
    """A session."""

    session: Any
    nodes: list[Node] | None  # where the nodes of its graph run; None: this onnxruntime cannot tell
    seconds: float = 0.0  # of compiling what is kept now; none where it came from the cache


def compiled(ort: ModuleType, wanted: Wanted) -> Started:
    """A session from the cache, or one compiled and kept, where the provider can and there is a cache.

    Raises
    ------
    ProviderError
        The provider is not here, or refuses the options.
    failures(onnxruntime)
        It cannot run the graph.
    KeyboardInterrupt
        Ctrl-C: compiling ends at the provider's next stage, a second one does not wait; nothing is left behind.
    """
    if not _kept(wanted):
        return _plain(ort, wanted)
    try:
        folders = cache_folder() / "compiled"
    except ValueError as error:
        _tell_once(f"{error}; compiled models are not kept")
        return _plain(ort, wanted)
    key = key_of(ort, wanted.row, wanted.chosen, wanted.bundle, wanted.graph)
    folder = folders / digest(key)
    try:
        started = _found(ort, wanted, key, folder)
        return _compile(ort, wanted, key, folder) if started is None else started
    except OSError as error:
        _tell_once(f"{folders}: {error.strerror or error}; compiled models are not kept")
        return _plain(ort, wanted)
    except ProviderError:
        raise
    except failures(ort) as error:
        started = _plain(ort, wanted)  # which raises, if it is not for being kept that it failed
        log.warning("%s: cannot be kept compiled (%s)", wanted, one_line(error))
        return started


def _kept(wanted: Wanted) -> bool:
    kept = wanted.row.kept
    if kept is None or wanted.given or wanted.row.cache in wanted.chosen:
        return False
    passed = settled(wanted.row, wanted.chosen)
    return not any(passed.get(name) == value for name, value in kept.unless.items())


def _plain(ort: ModuleType, wanted: Wanted) -> Started:
    options = wanted.options(True)

    def create() -> Any:
        return _session(ort, wanted, wanted.graph, options, {})

    compiles = wanted.row.kept is not None and not wanted.given  # a flag in the caller's options would stay
    session = watched(create, lambda: _cancel(options), f"compiling {wanted}") if compiles else create()
    return Started(session, assignment.recorded(session))


def _session(ort: ModuleType, wanted: Wanted, model: Path, options: Any, own: Mapping[str, str]) -> Any:
    named = add_provider(ort, options, wanted.row, {**own, **wanted.chosen}, shared=wanted.given)
    return ort.InferenceSession(model, options, named, enable_fallback=0)  # else the CPU would stand in


def _own(row: Provider, folder: Path) -> dict[str, str]:
    """The provider's options that have it keep in a folder what it compiles; none if onnxruntime writes that."""
    assert row.kept is not None
    return {str(row.cache): str(folder), **row.kept.fills} if row.kept.how == "option" else {}


def _write_context(options: Any, folder: Path) -> None:
    """Has onnxruntime write the compiled model: the provider's part beside it, for a protobuf holds 2 GB at most."""
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_file_path", str(folder / shelf.MODEL))
    options.add_session_config_entry("ep.context_embed_mode", "0")
    options.add_session_config_entry("ep.context_model_external_initializers_file_name", f"{shelf.MODEL}_data")


def _found(ort: ModuleType, wanted: Wanted, key: Key, folder: Path) -> Started | None:
    """The session in the cache. None where there is none or a broken one, which is removed; told, as a change is."""
    assert wanted.row.kept is not None
    if not folder.is_dir():
        _tell_changes(wanted, key, folder.parent)
        return None
    try:
        entry = shelf.look(folder, wanted.row.kept.how, key)
        return _cached(ort, wanted, folder, entry)
    except ProviderError:
        raise
    except BrokenError as error:
        why = str(error)
    except failures(ort) as error:
        why = f"does not load ({one_line(error)})"
    log.warning("%s: the compiled model %s %s; it is removed and compiled anew", wanted, folder, why)
    shelf.remove(folder)
    return None


def _cached(ort: ModuleType, wanted: Wanted, folder: Path, entry: Entry) -> Started:
    """Raises what onnxruntime raises, or BrokenError, where the compiled model cannot be used."""
    assert wanted.row.kept is not None
    if wanted.row.kept.how == "option":
        return _own_cached(ort, wanted, folder, entry)
    # what may run on the CPU is judged by the record, if there is one
    session = _session(ort, wanted, folder / shelf.MODEL, wanted.options(entry.nodes is None), {})
    now = assignment.recorded(session)
    if now and not any(node.provider.lower() == wanted.row.ort.lower() for node in now):
        raise BrokenError(f"does not run on {wanted.row.ort}")
    shelf.touch(folder)
    return Started(session, None if entry.nodes is None else [_node(line) for line in entry.nodes])


def _own_cached(ort: ModuleType, wanted: Wanted, folder: Path, entry: Entry) -> Started:
    """With what the provider keeps itself; it may compile again all the same, which its files show."""
    for name in shelf.unlisted(folder, entry):
        log.warning("%s: %s was left by a process that was killed; it is removed", wanted, folder / name)
        with suppress(OSError):  # another process has it open
            (folder / name).unlink()
    began, before = time.perf_counter(), shelf.stamps(folder)
    _record_at_end(wanted, folder)
    session = _session(ort, wanted, wanted.graph, wanted.options(True), _own(wanted.row, folder))
    nodes, seconds = assignment.recorded(session), time.perf_counter() - began
    if (now := shelf.stamps(folder)) != before or now.keys() != entry.files.keys():
        with suppress(OSError):  # a cache that is only read
            shelf.write(folder, replace(entry, files=shelf.files(folder)))
    shelf.touch(folder)
    if now == before:
        return Started(session, nodes)
    log.warning("%s: %s compiled it again, though what it keeps in %s was whole", wanted, wanted.short, folder)
    return Started(session, nodes, seconds)


def _node(line: str) -> Node:
    operator, provider, name = line.split(" ", 2)
    return Node(name, operator, provider)


def _compile(ort: ModuleType, wanted: Wanted, key: Key, folder: Path) -> Started:
    """Compiles and keeps; OSError where there is no place for it."""
    assert wanted.row.kept is not None
    began = time.perf_counter()
    late = wanted.row.kept.late
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    home = str(wanted.bundle.folder.resolve())
    entry = Entry(key, wanted.bundle.facts.name, home, wanted.component, wanted.rows, made, 0.0, {}, None)
    options = wanted.options(True)
    with shelf.aside(folder) as aside:
        if late:
            shelf.write(aside, entry)
            shelf.publish(aside, folder)
        place = folder if late else aside
        if wanted.row.kept.how == "context":
            _write_context(options, place)
        try:
            session = watched(
                lambda: _session(ort, wanted, wanted.graph, options, _own(wanted.row, place)),
                lambda: _cancel(options),
                f"compiling {wanted}",
            )
        except BaseException:
            if late:
                shelf.remove(folder)
            raise
        nodes = assignment.recorded(session)
        told = None if nodes is None else [f"{node.operator} {node.provider} {node.name}" for node in nodes]
        entry = replace(entry, seconds=max(0.001, round(time.perf_counter() - began, 3)), nodes=told)  # 0: half-made
        _keep(wanted, entry, place, folder)
    _record_at_end(wanted, folder)
    return Started(session, nodes, time.perf_counter() - began)


def _keep(wanted: Wanted, entry: Entry, place: Path, folder: Path) -> None:
    """Records the files in `place` and gives it its name; where that fails, or there are none, it is told."""
    try:
        entry = replace(entry, files=shelf.files(place))
        if not entry.files and place != folder:
            log.warning("%s: %s wrote no compiled model; the next start compiles anew", wanted, wanted.short)
            return
        shelf.write(place, entry)
        if place != folder:
            shelf.publish(place, folder)
    except OSError as error:
        _tell_once(f"{folder.parent}: {error.strerror or error}; compiled models are not kept")


def _record_at_end(wanted: Wanted, folder: Path) -> None:
    """Has the files that a provider adds in calls recorded when the process ends: unrecorded ones are not trusted."""
    if wanted.row.kept is not None and wanted.row.kept.how == "option" and folder not in _late:
        _late.add(folder)
        atexit.register(record, folder)


def record(folder: Path) -> None:
    """Records the files of a folder as they are now, if there are new ones."""
    with suppress(BrokenError, OSError):
        entry = shelf.read(folder)
        if shelf.unlisted(folder, entry):
            shelf.write(folder, replace(entry, files=shelf.files(folder)))


def _tell_changes(wanted: Wanted, key: Key, folders: Path) -> None:
    """If there is a compiled model of the same graph that does not fit: the last used one's differences."""
    home = str(wanted.bundle.folder.resolve())
    older: list[tuple[float, Entry]] = []
    for folder in shelf.whole(folders):
        with suppress(BrokenError, OSError):
            entry = shelf.read(folder)
            same = (entry.folder, entry.component, entry.rows) == (home, wanted.component, wanted.rows)
            if entry.key["provider"] == key["provider"] and (same or entry.key["graph"] == key["graph"]):
                older.append(((folder / shelf.FILE).stat().st_mtime, entry))
    if older:
        last = max(older, key=lambda one: one[0])[1]
        log.warning("%s is compiled anew: %s", wanted, ", ".join(changes(last.key, key)))


def _cancel(options: Any) -> None:
    if hasattr(options, "set_load_cancellation_flag"):  # from 1.21 on
        options.set_load_cancellation_flag(True)


@functools.cache
def _tell_once(text: str) -> None:
    log.warning("%s", text)
