"""Published tables by name: fetched from a server on loopback, checked, corrected, kept; nothing half done."""

import hashlib
import json
import socket
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from epd import Table, catalogue
from epd.__main__ import main

from .snapshots import snapshot

NAME = "sd3-medium-512"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the test's own; loopback without a proxy."""
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache" / "tables"


@pytest.fixture
def data(monkeypatch):
    """The bytes of a made-up file that the catalogue lists under the published name."""
    made = snapshot()
    entries = dict(catalogue.published())
    entries[NAME] = replace(entries[NAME], sha256=hashlib.sha256(made).hexdigest(), bytes=len(made))
    monkeypatch.setattr(catalogue, "published", lambda: entries)
    return made


@contextmanager
def serving(data, *, status=None, ranges=True, stop_after=None, silent=False, tell_length=True):
    """A server of one file; yields its address and the list of (path, Range) it was asked."""
    asked = []
    wait = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            asked.append((self.path, wanted))
            if silent:
                wait.wait(10)
                return
            first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and ranges else 0
            if first >= len(data) or status:
                self.send_error(status or 416)
                return
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            if tell_length:
                self.send_header("Content-Length", str(len(data) - first))
            self.end_headers()
            self.wfile.write(data[first:stop_after])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # so that closing waits for their sockets
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        wait.set()
        server.shutdown()
        server.server_close()
        thread.join()


def kept(cache):
    return sorted(file.name for file in cache.iterdir()) if cache.exists() else []


def test_fetch(cache, data):
    seen = []
    with serving(data) as (base, asked):
        file = catalogue.fetch(NAME, base, progress=lambda have, size: seen.append((have, size)))
        again = catalogue.fetch(NAME, base)
    assert asked == [("/sd3-512-best.pkl", None)]
    assert file == again == catalogue.find(NAME) == cache / f"{NAME}.json"
    assert kept(cache) == [f"{NAME}.json"]
    assert seen[-1] == (len(data), len(data))
    table = Table.load(file)
    assert table.t5 is True
    told = table.provenance
    assert told["sha256"] == hashlib.sha256(data).hexdigest()
    assert told["url"] == f"{base}/sd3-512-best.pkl"
    assert told["source"] == "https://github.com/BeierZhu/EPD"
    assert told["corrected"] == {"t5": True}
    assert (told["file"], told["bytes"]) == ("sd3-512-best.pkl", len(data))


def test_cut_off_then_resumed(cache, data):
    message = f"cut off after 1000 of {len(data)} bytes|connection broke"
    with serving(data, stop_after=1000) as (base, _), pytest.raises(OSError, match=message):
        catalogue.fetch(NAME, base)
    assert kept(cache) == [f"{NAME}.pkl.part"]
    with serving(data) as (base, asked):
        catalogue.fetch(NAME, base)
    assert asked == [("/sd3-512-best.pkl", "bytes=1000-")]
    assert kept(cache) == [f"{NAME}.json"]


def test_two_at_once_do_not_disturb_each_other(cache, data):
    """Another process fetches, and is done, in the middle of this one: each has a file of its own to write to."""
    with serving(data) as (base, asked):

        def other(have, size):
            if len(asked) == 1:
                (cache / f"{NAME}.pkl.part").unlink(missing_ok=True)  # what a finished one does to the shared name
                (cache / f"{NAME}.pkl.part").write_bytes(data[:500])  # and a third starts again

        assert Table.load(catalogue.fetch(NAME, base, progress=other)).steps == 3
    assert kept(cache) == [f"{NAME}.json", f"{NAME}.pkl.part"]


def test_resumed_from_a_server_without_ranges(cache, data):
    cache.mkdir(parents=True)
    (cache / f"{NAME}.pkl.part").write_bytes(data[:1000])
    with serving(data, ranges=False) as (base, asked):
        catalogue.fetch(NAME, base)
    assert asked == [("/sd3-512-best.pkl", "bytes=1000-")]
    assert kept(cache) == [f"{NAME}.json"]


def test_a_whole_part_is_only_checked(cache, data):
    cache.mkdir(parents=True)
    (cache / f"{NAME}.pkl.part").write_bytes(data)
    catalogue.fetch(NAME, "http://127.0.0.1:9")
    assert kept(cache) == [f"{NAME}.json"]


def test_a_damaged_table_is_fetched_anew(cache, data):
    cache.mkdir(parents=True)
    (cache / f"{NAME}.json").write_text("{", encoding="utf-8")
    with serving(data) as (base, asked):
        Table.load(catalogue.fetch(NAME, base))
    assert len(asked) == 1


REFUSED = {
    "wrong hash": ({"change": lambda data: data[:-1] + b"!"}, ValueError, "not the file it was: SHA-256", []),
    "longer": ({"change": lambda data: data + b"!"}, ValueError, "not the file it was: .* expected", []),
    "shorter": ({"change": lambda data: data[:-1]}, ValueError, "not the file it was: .* expected", []),
    "longer, untold": (
        {"change": lambda data: data * 2, "tell_length": False},
        ValueError,
        "not the file it was: SHA-256",
        [],
    ),
    "404": ({"status": 404}, OSError, "sd3-512-best.pkl: the server answers 404 Not Found", []),
    "500": ({"status": 500}, OSError, "the server answers 500", []),
    "silent": ({"silent": True}, OSError, "(nothing came for|not reached)", []),
    "cut off": ({"stop_after": 10}, OSError, "(cut off after 10|connection broke)", [f"{NAME}.pkl.part"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(cache, data, case):
    how, kind, message, left = REFUSED[case]
    how = dict(how)
    served = how.pop("change", bytes)(data)
    with serving(served, **how) as (base, _), pytest.raises(kind, match=message) as error:
        catalogue.fetch(NAME, base, timeout=0.5)
    assert "\n" not in str(error.value)
    assert base in str(error.value)
    assert kept(cache) == left
    with pytest.raises(ValueError, match=f"python -m epd fetch {NAME}"):
        catalogue.find(NAME)


def test_part_beyond_a_shorter_file(cache, data):
    cache.mkdir(parents=True)
    (cache / f"{NAME}.pkl.part").write_bytes(data[:-1])
    with serving(data[:1000]) as (base, _), pytest.raises(ValueError, match="shorter than"):
        catalogue.fetch(NAME, base)
    assert kept(cache) == []


def test_refused_connection(cache, data):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(OSError, match=r"not reached \(.*refused"):
        catalogue.fetch(NAME, f"http://127.0.0.1:{port}")
    assert kept(cache) == []


@pytest.mark.parametrize("base", ["http://127.0.0.1:port", "http://two words", "http://two\nlines"])
def test_no_address(cache, base):
    with pytest.raises(ValueError, match="no address") as refused:
        catalogue.fetch("sd15", base)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("base", ["file:///etc", "ftp://127.0.0.1", "/etc"])
def test_no_other_scheme(cache, data, base):
    with pytest.raises(ValueError, match="must begin with https"):
        catalogue.fetch(NAME, base)


def test_names(cache, tmp_path, monkeypatch):
    assert list(catalogue.published()) == [
        "sd15", "sd15-distilled", "sd3-medium-512", "sd3-medium-512-distilled", "sd3-medium-1024",
        "sd3-medium-1024-distilled",
    ]  # fmt: skip
    for name in ("no-such", "catalogue", "../sd15", "sd15.json", ""):
        with pytest.raises(ValueError, match=r"no table .*to fetch: sd15, "):
            catalogue.find(name)
    with pytest.raises(ValueError, match="no published table 'no-such'; choose one of sd15, "):
        catalogue.fetch("no-such")
    for name in catalogue.names():
        assert Table.load(catalogue.find(name)).steps > 0


def test_shipped_tables_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "SHIPPED", tmp_path)
    Table(times=[2, 1], r=[[0.5]], w=[[1]]).save(tmp_path / "mine.json")
    assert catalogue.find("mine") == tmp_path / "mine.json"
    assert catalogue.names() == ["mine"]


def test_the_catalogue_holds_no_numbers():
    told = json.loads(catalogue.CATALOGUE.read_text(encoding="utf-8"))
    for entry in told["tables"].values():
        assert set(entry) == {"path", "sha256", "bytes", "about", "corrections", "note"}
        assert set(entry["corrections"]) <= {"size", "t5"}


def test_correct():
    entry = catalogue.published()["sd15"]
    table = Table(times=[2, 1], r=[[0.5]], w=[[1]], size=(1024, 1024), provenance={"sha256": entry.sha256})
    assert catalogue.correct(table).size == (512, 512)
    assert catalogue.correct(table).provenance["why"] == entry.note
    other = Table(times=[2, 1], r=[[0.5]], w=[[1]], size=(1024, 1024))
    assert catalogue.correct(other) is other


@pytest.mark.parametrize(
    ("platform", "variable", "parts"),
    [
        ("linux", "XDG_CACHE_HOME", ("epd", "tables")),
        ("win32", "LOCALAPPDATA", ("epd", "tables")),
        ("linux", None, (".cache", "epd", "tables")),
        ("darwin", None, ("Library", "Caches", "epd", "tables")),
        ("win32", None, ("AppData", "Local", "epd", "tables")),
    ],
)
def test_cache_folder(tmp_path, monkeypatch, platform, variable, parts):
    for name in ("EPD_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(catalogue.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(catalogue.sys, "platform", platform)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    assert catalogue.cache_folder() == tmp_path.joinpath(*parts)


def test_command(cache, data, capsys, monkeypatch):
    with serving(data) as (base, _):
        assert main(["fetch", NAME, "--url", base, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["path"] == str(cache / f"{NAME}.json")
        monkeypatch.setenv("EPD_TABLES_URL", base)
        (cache / f"{NAME}.json").unlink()
        assert main(["fetch", NAME]) == 0
    out = capsys.readouterr()
    assert out.out == f"{cache / f'{NAME}.json'}\n"
    assert out.err == "3 steps, K = 2, 6 sequential calls, 9 total evaluations; corrected: t5 True\n"
    assert main(["show", NAME]) == 0
    assert "corrected: " in capsys.readouterr().out
    with serving(b"<html>") as (base, _):
        assert main(["fetch", "sd15", "--url", base]) == 2
    assert capsys.readouterr().err.startswith(f"error: {base}/sd15-best.pkl: not the file it was: 6 bytes, expected ")


def test_help_says_that_nothing_is_redistributed(capsys):
    with pytest.raises(SystemExit):
        main(["fetch", "--help"])
    assert "do not redistribute" in " ".join(capsys.readouterr().out.split())


def test_without_a_home_the_folder_must_be_named(monkeypatch):
    for variable in ("EPD_CACHE", "LOCALAPPDATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(catalogue.Path, "home", homeless)
    with pytest.raises(ValueError, match="EPD_CACHE"):
        catalogue.cache_folder()
