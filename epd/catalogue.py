"""Tables by name: those shipped in `epd/tables`, and the authors' published ones, fetched into the user's cache.

`tables/catalogue.json` lists the published files: where they are, their SHA-256 and bytes, and what their own
description says wrongly or not at all. It holds none of their numbers: their repository states no licence, so every
user downloads them from there.

The cache is the folder `epd` of the platform's cache folder (XDG_CACHE_HOME or ~/.cache; ~/Library/Caches on macOS;
%LOCALAPPDATA% on Windows), or EPD_CACHE if that is set.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Any

from .importer import import_table
from .table import Table

SHIPPED = Path(__file__).parent / "tables"
CATALOGUE = SHIPPED / "catalogue.json"
TIMEOUT = 30.0  # seconds without an answer or a byte

Progress = Callable[[int, int], None]  # bytes so far, bytes in all


@dataclass(frozen=True)
class Published:
    """One published file."""

    name: str
    url: str
    sha256: str
    bytes: int
    about: str  # how it was trained
    corrections: dict[str, Any]  # fields of `Table` the file has wrongly or not
    note: str  # why


@cache
def published() -> dict[str, Published]:
    """The published tables by name, in the order they are listed to users."""
    data = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    return {
        name: Published(name, f"{data['url']}/{entry.pop('path')}", **entry) for name, entry in data["tables"].items()
    }


def source() -> str:
    """The public repository of the published tables."""
    return str(json.loads(CATALOGUE.read_text(encoding="utf-8"))["source"])


def names() -> list[str]:
    """The tables `find` finds now: shipped, then fetched ones."""
    shipped = [file.stem for file in sorted(SHIPPED.glob("*.json")) if file != CATALOGUE]
    return shipped + [name for name in published() if (cache_folder() / f"{name}.json").is_file()]


def find(name: str) -> Path:
    """The file of a table by name: shipped, or published and fetched.

    Raises
    ------
    ValueError
        No such table, with the known names; or a published one not yet fetched, with the command that fetches it.
    """
    if name in published():
        file = cache_folder() / f"{name}.json"
        if not file.is_file():
            raise ValueError(f"the table {name} is not fetched yet: python -m epd fetch {name}")
        return file
    if name not in names():
        to_fetch = ", ".join(published())
        raise ValueError(f"no table {name!r}; here: {', '.join(names()) or 'none'}; to fetch: {to_fetch}; or a file")
    return SHIPPED / f"{name}.json"


def correct(table: Table) -> Table:
    """The table of a published file, told by its SHA-256, with what the file says wrongly put right; others unchanged.

    What was changed, and why, is kept in provenance["corrected"].
    """
    digest = (table.provenance or {}).get("sha256")
    for entry in published().values():
        if entry.sha256 == digest:
            told = {"source": source(), "about": entry.about, "corrected": entry.corrections, "why": entry.note}
            return replace(table, **entry.corrections, provenance={**(table.provenance or {}), **told})
    return table


def fetch(name: str, base: str | None = None, timeout: float = TIMEOUT, progress: Progress | None = None) -> Path:
    """Download a published table from its authors' repository, check it, import it; the path of its JSON in the cache.

    Nothing is downloaded if it is there. A download that stops is resumed by the next call. The file is kept only as
    its table: no file appears under its own name before its SHA-256 is found right.

    Parameters
    ----------
    name : str
        A name of `published`.
    base : str, optional
        Where to look for the file instead: a mirror's folder, http or https.
    timeout : float
        Seconds to wait for an answer or for the next bytes.

    Raises
    ------
    ValueError
        Unknown name; or the file there is another one (size or SHA-256).
    OSError
        Refused, not found, timed out, cut off: one line that names the address.
    """
    if name not in published():
        raise ValueError(f"no published table {name!r}; choose one of {', '.join(published())}")
    entry = published()[name]
    file = cache_folder() / f"{name}.json"
    if file.is_file() and _is(file, entry):
        return file
    url = entry.url if base is None else f"{base.rstrip('/')}/{entry.url.rpartition('/')[2]}"
    if not re.match(r"https?://", url):
        raise ValueError(f"{url}: an address must begin with https:// or http://")
    file.parent.mkdir(parents=True, exist_ok=True)
    rest = file.with_suffix(".pkl.part")  # of a download that stopped
    part = rest.with_suffix(f".{os.getpid()}.part")  # nobody else writes to it
    with contextlib.suppress(FileNotFoundError):
        rest.replace(part)
    try:
        _download(url, part, entry.bytes, timeout, progress)
    except BaseException:
        if part.is_file():
            part.replace(rest)
        raise
    try:
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        if digest != entry.sha256:
            raise ValueError(f"{url}: not the file it was: SHA-256 {digest}, expected {entry.sha256}; nothing is kept")
        table = correct(import_table(part))
        kept = {**(table.provenance or {}), "file": entry.url.rpartition("/")[2], "url": url}
        replace(table, provenance=kept).save(file)
    finally:
        part.unlink(missing_ok=True)
    return file


def cache_folder() -> Path:
    """Where fetched tables are kept (the folder need not exist yet).

    Raises
    ------
    ValueError
        There is no home directory, and none of EPD_CACHE, LOCALAPPDATA (Windows) and XDG_CACHE_HOME says where.
    """
    given = os.environ.get("EPD_CACHE")
    if given:
        return Path(given) / "tables"
    variable = {"win32": "LOCALAPPDATA", "darwin": ""}.get(sys.platform, "XDG_CACHE_HOME")
    if base := os.environ.get(variable):
        return Path(base) / "epd" / "tables"
    try:
        home = Path.home()
    except RuntimeError:
        raise ValueError("no home directory to keep files in; set EPD_CACHE to a folder") from None
    below = {"win32": home / "AppData" / "Local", "darwin": home / "Library" / "Caches"}
    return below.get(sys.platform, home / ".cache") / "epd" / "tables"


def _is(file: Path, entry: Published) -> bool:
    """Whether the cached table is whole and comes from the published file."""
    try:
        return (Table.load(file).provenance or {}).get("sha256") == entry.sha256
    except ValueError:  # a table of another version of this program, or damaged: fetched anew
        return False


def _download(url: str, part: Path, size: int, timeout: float, progress: Progress | None) -> None:
    """Fill `part` up to `size` bytes, going on where it ends. OSError in one line; what came is kept for next time."""
    have = part.stat().st_size if part.is_file() else 0
    if have >= size:  # of no use unless whole; its SHA-256 is compared next
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            first, total = _sent(answer)
            if total not in (None, size):
                part.unlink(missing_ok=True)
                raise ValueError(f"{url}: not the file it was: {total} bytes, expected {size}; nothing is kept")
            have = have if first == have else 0  # a server without ranges sends the whole
            with part.open("ab" if have else "wb") as file:
                _copy(answer, file, have, size, progress)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # it ends before what we have
            part.unlink(missing_ok=True)
            raise ValueError(f"{url}: not the file it was: shorter than {have} bytes; nothing is kept") from error
        raise OSError(f"{url}: the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise OSError(f"{url}: not reached ({error.reason}); try again, or give a mirror with --url") from error
    except TimeoutError as error:
        raise OSError(f"{url}: nothing came for {timeout:g} s; the same command goes on") from error
    except http.client.InvalidURL as error:
        raise ValueError(f"{url!a}: no address ({error}); give a mirror as https://HOST/FOLDER") from error
    except (http.client.HTTPException, ConnectionError) as error:
        raise OSError(f"{url}: the connection broke ({error}); the same command goes on") from error
    have = part.stat().st_size
    if have < size:
        raise OSError(f"{url}: cut off after {have} of {size} bytes; the same command goes on")


def _sent(answer: http.client.HTTPResponse) -> tuple[int, int | None]:
    """The position of the first byte that comes, and the bytes of the whole file if the server tells."""
    match = re.match(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if answer.status == 206 and match:
        return int(match[1]), int(match[2])
    return 0, answer.length


def _copy(answer: http.client.HTTPResponse, file: IO[bytes], have: int, size: int, progress: Progress | None) -> None:
    """Append what the server sends; one byte beyond `size` is enough to know a wrong file."""
    while have <= size and (block := answer.read(min(1 << 16, size + 1 - have))):
        file.write(block)
        have += len(block)
        if progress is not None:
            progress(min(have, size), size)
