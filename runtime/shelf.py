"""The folders of the compile cache: made aside and renamed when whole, looked at with distrust, removed.

A folder is one compiled model: its files, and `key.json`, which tells what they were made from and what they were when
written. Its time is that of its last use. Knows nothing of sessions; see `runtime.cache`.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from epd.table import write_whole

from .cachekey import Key

FORMAT = 1
FILE, MODEL = "key.json", "model.onnx"
PARTIAL = ".partial"  # ends the name of a folder that is not whole
_PART, _BLOCK = 2**26, 2**20  # bytes that one thread hashes, and reads at a time
_OLD = 86_400.0  # seconds after which a folder that is not whole was left by a process that was killed


@dataclass(frozen=True)
class Entry:
    """A compiled model, as `key.json` tells it."""

    key: Key
    bundle: str  # its name
    folder: str  # where it was
    component: str
    rows: int | None  # of a graph that has them fixed
    made: str  # ISO 8601, UTC
    seconds: float  # of compiling
    files: Mapping[str, Mapping[str, Any]]  # path in the folder -> bytes and `fingerprint`
    nodes: list[str] | None  # `operator provider name` of each node when it was compiled; None: not known

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())


class BrokenError(ValueError):
    """A folder that is not as it was written; the message goes on after its name."""


def look(folder: Path, how: Literal["context", "option"], key: Key | None = None) -> Entry:
    """What a folder holds, every file in it compared with what was written; BrokenError tells what is wrong.

    Parameters
    ----------
    how
        Of the provider's row. One that keeps its files itself may have added some since: see `unlisted`.
    key
        That it must be of.
    """
    entry = read(folder)
    if key is not None and entry.key != key:
        raise BrokenError("is of another key than its name says")
    if not entry.seconds:
        raise BrokenError("was left half-made")
    have = sizes(folder)
    if missing := sorted(entry.files.keys() - have.keys()):
        raise BrokenError(f"lacks {missing[0]}")
    if how == "context" and (MODEL not in have or have.keys() - entry.files.keys()):
        raise BrokenError("does not hold the files that were written")
    for name, file in entry.files.items():
        if have[name] != file["bytes"]:
            raise BrokenError(f"has {have[name]} bytes in {name} where {file['bytes']} were written")
        if fingerprint(folder / name) != file["sha256"]:
            raise BrokenError(f"has a changed {name}")
    return entry


def unlisted(folder: Path, entry: Entry) -> list[str]:
    """Files that no process has recorded: half-written ones, it may be, of one that was killed."""
    return sorted(sizes(folder).keys() - entry.files.keys())


def read(folder: Path) -> Entry:
    """The entry of a folder, its files not looked at; BrokenError if `key.json` is not as this program writes it."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise BrokenError("is of another version of this program")
        entry = Entry(**content)
        right = [set(file) == {"bytes", "sha256"} and type(file["bytes"]) is int for file in entry.files.values()]
        nodes = entry.nodes or []
        if not all(right) or not isinstance(entry.key["graph"], dict) or any(node.count(" ") < 2 for node in nodes):
            raise BrokenError(f"has a damaged {FILE}")
    except BrokenError:
        raise
    except FileNotFoundError:
        raise BrokenError(f"lacks its {FILE}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BrokenError(f"has a damaged {FILE}") from None
    return entry


def write(folder: Path, entry: Entry) -> None:
    """Writes `key.json`."""
    write_whole(folder / FILE, json.dumps({"format": FORMAT, **asdict(entry)}, indent=1).encode())


def touch(folder: Path) -> None:
    """Says that it is used now."""
    with suppress(OSError):  # a cache that is only read
        os.utime(folder / FILE)


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """What is recorded of the files in a folder."""
    return {name: {"bytes": size, "sha256": fingerprint(folder / name)} for name, size in sizes(folder).items()}


def sizes(folder: Path) -> dict[str, int]:
    """Path in the folder -> bytes, of all files but `key.json`."""
    return {name: size for name, (size, _) in stamps(folder).items()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Path in the folder -> bytes and time of the last change, of all files but `key.json`."""
    found = {path.relative_to(folder).as_posix(): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items() if name != FILE}


def fingerprint(file: Path) -> str:
    """SHA-256 of a file; of one larger than a part, that of its parts' SHA-256s, which threads work out at once."""
    starts = range(0, max(1, file.stat().st_size), _PART)
    with concurrent.futures.ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as threads:
        parts = list(threads.map(partial(_part, file), starts))
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def _part(file: Path, start: int) -> str:
    sha256 = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(start)
        for at in range(0, _PART, _BLOCK):
            sha256.update(opened.read(min(_BLOCK, _PART - at)))
    return sha256.hexdigest()


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to fill and `publish`; what is left of it in the end is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in unfinished(folder.parent):
        with suppress(FileNotFoundError):  # another process has just finished it
            if time.time() - left.stat().st_mtime > _OLD:
                shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=PARTIAL, dir=folder.parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)  # Windows keeps what is open


def publish(made: Path, folder: Path) -> None:
    """Gives a whole folder its name, unless another process was faster: then that one's stays. OSError."""
    try:
        made.rename(folder)
    except OSError:
        if folder.is_dir():
            return
        with aside(folder) as copy:  # Windows renames none in which a file is open
            shutil.copytree(made, copy, dirs_exist_ok=True)
            copy.rename(folder)


def unfinished(shelf: Path) -> list[Path]:
    """Folders that a process fills now, or left when it was killed."""
    return sorted(shelf.glob(f"*{PARTIAL}"))


def whole(shelf: Path) -> list[Path]:
    """Folders of compiled models."""
    return sorted(path for path in shelf.glob("*") if path.is_dir() and path.suffix != PARTIAL)


def remove(folder: Path) -> None:
    """Removes a folder at once for all who look for it; OSError if it cannot."""
    gone = folder.with_name(f"{folder.name}.{os.getpid()}-{time.time_ns()}{PARTIAL}")
    with suppress(FileNotFoundError):  # another process was faster
        folder.rename(gone)
        shutil.rmtree(gone)
