"""What is kept of a compile: on the CPU, whose optimised model stands in for a compiled one. See tests/providers."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tiny_bundle

from runtime import Pipeline, assignment, cache, cachekey, cachelist, shelf, watched
from runtime.__main__ import main
from runtime.bundle import Bundle
from runtime.errors import ProviderError
from runtime.ort import settled
from runtime.providers import CPU, PROVIDERS, Kept, Option
from runtime.session import Session

tells = pytest.mark.skipif(not assignment.tells(onnxruntime), reason="this onnxruntime cannot tell of nodes")
FEEDS = {
    "sample": np.ones((2, 4, 4, 4)),
    "timestep": np.arange(2),
    "encoder_hidden_states": np.zeros((2, 8, tiny_bundle.WIDTH)),
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of the test's own, and lines that are told once told again."""
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "cache"))
    cache._tell_once.cache_clear()
    return tmp_path / "cache" / "tables" / "compiled"


@pytest.fixture
def compiles(monkeypatch):
    """The CPU keeps what onnxruntime optimises as another provider keeps what it compiles; what was given is told."""
    row = dataclasses.replace(CPU, kept=Kept("context"), options={"level": Option(values=("1", "2"))})
    monkeypatch.setattr("runtime.session.provider_of", lambda name: row)
    monkeypatch.setattr(Session, "_strict", lambda session, ort: False)  # which the CPU cannot be
    monkeypatch.setattr("runtime.session.log.disabled", True)  # what onnxruntime 1.23 cannot tell
    monkeypatch.setattr("runtime.providers.provider_of", lambda name: row)

    def write(options, folder):
        options.optimized_model_filepath = str(folder / shelf.MODEL)

    seen = []

    def add(ort, options, row, chosen, *, shared):
        seen.append(dict(chosen))
        options.add_provider(row.ort, {})

    monkeypatch.setattr(cache, "_write_context", write)
    monkeypatch.setattr(cache, "add_provider", add)
    return seen


@pytest.fixture
def keeps(compiles, monkeypatch):
    """The CPU keeps files of its own in a folder that an option names."""

    def row(late=False):
        options = {"folder": Option("path"), "on": Option(), "level": Option()}
        row = dataclasses.replace(CPU, cache="folder", kept=Kept("option", {"on": "1"}, late=late), options=options)
        for place in ("runtime.session.provider_of", "runtime.providers.provider_of"):
            monkeypatch.setattr(place, lambda name: row)

        def add(ort, options, row, chosen, *, shared):
            compiles.append(dict(chosen))
            blob = Path(chosen["folder"]) / "blob"
            if not blob.exists():
                blob.write_bytes(b"compiled")
            options.add_provider(row.ort, {})

        monkeypatch.setattr(cache, "add_provider", add)
        return compiles

    return row


def run(folder, **options):
    """A session of the backbone, used once."""
    session = Session(Bundle.open(folder), "unet", **options)
    return session(**FEEDS)["out_sample"], session


def folders(home):
    return sorted(path.name for path in home.iterdir()) if home.is_dir() else []


def test_the_second_start_takes_what_the_first_one_kept(home, compiles, bundles, caplog):
    first, session = run(bundles["sd15"])
    assert session.compile_seconds > 0
    (name,) = folders(home)
    told = json.loads((home / name / "key.json").read_text(encoding="utf-8"))
    assert (told["bundle"], told["component"], told["rows"]) == ("tiny-sd15", "unet", None)
    assert told["key"]["onnxruntime"] == onnxruntime.__version__
    (stored,) = Bundle.open(bundles["sd15"]).facts.components["unet"].files
    assert told["key"]["graph"] == {stored.path: stored.sha256}
    assert told["files"]["model.onnx"]["bytes"] == (home / name / "model.onnx").stat().st_size
    before = time.time() - 1000
    os.utime(home / name / "key.json", (before, before))

    second, again = run(bundles["sd15"])
    assert np.array_equal(first, second)
    assert again.compile_seconds == 0 < again.load_seconds
    assert folders(home) == [name]
    assert (home / name / "key.json").stat().st_mtime > before + 900  # when it was last used
    assert again.assignment == session.assignment
    assert not caplog.records


def test_it_is_the_kept_model_that_runs(home, compiles, bundles, tmp_path):
    """Another graph put in its place, with a key.json that fits it, gives the other graph's answer."""
    first, _ = run(bundles["sd15"])
    other = tiny_bundle.bundle(tmp_path / "other", "sd15", bare=True)
    (name,) = folders(home)
    graph = tiny_bundle.graph(
        other / "unet" / "model.onnx",
        [("Mul", ["sample", "two"], ["out_sample"], {}), ("Identity", ["timestep"], ["t"], {}),
         ("Identity", ["encoder_hidden_states"], ["e"], {})],
        {"sample": (1, ["rows", 4, "h", "w"]), "timestep": (1, ["rows"]), "encoder_hidden_states": (1, ["rows", 8, 6])},
        {"out_sample": (1, ["rows", 4, "h", "w"]), "t": (1, ["rows"]), "e": (1, ["rows", 8, 6])},
        {"two": np.float32(2)},
    )  # fmt: skip
    assert graph.outputs[0].name == "out_sample"
    (other / "unet" / "model.onnx").replace(home / name / "model.onnx")
    entry = dataclasses.replace(shelf.read(home / name), files=shelf.files(home / name))
    shelf.write(home / name, entry)
    second, _ = run(bundles["sd15"])
    assert (second == 2).all()
    assert not (first == 2).all()


def test_a_change_is_told_and_compiled_beside(home, compiles, bundles, caplog, monkeypatch):
    run(bundles["sd15"])
    assert not caplog.messages
    run(bundles["sd15"], provider_options={"level": "2"})
    assert caplog.messages == ["unet for CPU is compiled anew: options.level none -> 2"]
    assert len(folders(home)) == 2
    caplog.clear()
    monkeypatch.setattr(onnxruntime, "__version__", "1.99.0")
    monkeypatch.setattr(cachekey, "drivers", lambda row: {"nvidia": "570.1"})
    run(bundles["sd15"], provider_options={"level": "2"})
    assert caplog.messages == [
        f"unet for CPU is compiled anew: onnxruntime {json.loads(json.dumps(onnxruntime.__version__))} -> 1.99.0"
    ] or caplog.messages[0].endswith("-> 1.99.0, driver.nvidia none -> 570.1")
    caplog.clear()
    assert run(bundles["sd15"], provider_options={"level": "2"})[1].compile_seconds == 0
    assert not caplog.messages


def test_a_bundle_made_anew_is_compiled_anew(home, compiles, tmp_path, caplog):
    run(tiny_bundle.bundle(tmp_path / "b", "sd15"))
    first = folders(home)
    run(tiny_bundle.bundle(tmp_path / "b", "sd15", breaks_above=900))
    assert len(folders(home)) == 2
    assert "unet for CPU is compiled anew: graph.unet/model.onnx" in caplog.text
    states = {Path(item.path).name: item.state for item in cachelist.items(["compiled"])}
    assert states.pop(first[0]) == "stale"
    assert set(states.values()) == {"fits"}


def damage(kind, folder):
    model = folder / "model.onnx"
    content = model.read_bytes()
    if kind == "cut":
        model.write_bytes(content[:-1])
    elif kind == "changed":
        model.write_bytes(content[:-10] + bytes(10))
    elif kind == "gone":
        model.unlink()
    elif kind == "more":
        (folder / "more.bin").write_bytes(b"x")
    elif kind == "no key":
        (folder / "key.json").unlink()
    elif kind == "half a key":
        (folder / "key.json").write_text((folder / "key.json").read_text(encoding="utf-8")[:100], encoding="utf-8")
    elif kind == "a key of another kind":
        (folder / "key.json").write_text('{"format": 1, "files": []}', encoding="utf-8")
    else:
        entry = shelf.read(folder)
        if kind == "no model":  # whole, as far as its key tells
            model.write_bytes(b"no model")
            shelf.write(folder, dataclasses.replace(entry, files=shelf.files(folder)))
        else:
            shelf.write(folder, dataclasses.replace(entry, key={**entry.key, "onnxruntime": "1.0"}))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut", "bytes in model.onnx where"),
        ("changed", "has a changed model.onnx"),
        ("gone", "lacks model.onnx"),
        ("more", "does not hold the files that were written"),
        ("no key", "lacks its key.json"),
        ("half a key", "has a damaged key.json"),
        ("a key of another kind", "has a damaged key.json"),
        ("no model", "does not load"),
        ("another key", "is of another key than its name says"),
    ],
)
def test_a_broken_one_is_told_removed_and_made_anew(kind, words, home, compiles, bundles, caplog):
    first, _ = run(bundles["sd15"])
    (name,) = folders(home)
    damage(kind, home / name)
    second, session = run(bundles["sd15"])
    assert np.array_equal(first, second)
    assert session.compile_seconds > 0
    (line,) = caplog.messages
    assert words in line
    assert "it is removed and compiled anew" in line
    assert folders(home) == [name]
    caplog.clear()
    assert run(bundles["sd15"])[1].compile_seconds == 0
    assert not caplog.messages


def test_a_flipped_bit_is_seen_wherever_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "_PART", 1000)
    monkeypatch.setattr(shelf, "_BLOCK", 300)
    content = np.random.default_rng(0).bytes(3456)
    (tmp_path / "f").write_bytes(content)
    prints = {shelf.fingerprint(tmp_path / "f")}
    for at in (0, 299, 300, 999, 1000, 2999, 3000, 3455):
        changed = bytearray(content)
        changed[at] ^= 1
        (tmp_path / "f").write_bytes(changed)
        prints.add(shelf.fingerprint(tmp_path / "f"))
    assert len(prints) == 9


@tells
def test_where_nodes_ran_is_judged_by_the_record(home, compiles, bundles):
    run(bundles["sd15"])
    (name,) = folders(home)
    entry = shelf.read(home / name)
    lines = [line.split(" ", 2) for line in entry.nodes]
    elsewhere = [f"{operator} OtherExecutionProvider {node}" for operator, _, node in lines]
    shelf.write(home / name, dataclasses.replace(entry, nodes=elsewhere))
    with pytest.raises(ProviderError, match=r"only 0 % of .* would run on CPUExecutionProvider, 90 % is wanted"):
        run(bundles["sd15"])
    with pytest.raises(ProviderError, match="leave --strict out"):
        run(bundles["sd15"], fallback="never")
    _, allowed = run(bundles["sd15"], fallback="allowed")
    assert allowed.assignment.share == 0
    assert len(allowed.assignment.fallbacks) > 0


def test_a_cache_that_cannot_be_written_is_told_once(tmp_path, compiles, bundles, caplog, monkeypatch):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    monkeypatch.setenv("EPD_CACHE", str(tmp_path / "file"))
    cache._tell_once.cache_clear()
    for _ in range(2):
        assert run(bundles["sd15"])[1].loaded
    (line,) = caplog.messages
    assert "compiled models are not kept" in line


def test_a_full_disk_is_told_and_what_was_compiled_runs(home, compiles, bundles, caplog, monkeypatch):
    def full(folder, entry):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shelf, "write", full)
        assert run(bundles["sd15"])[1].loaded
    assert "No space left on device; compiled models are not kept" in caplog.text
    assert folders(home) == []


def test_a_provider_that_cannot_write_its_model_runs_without(home, compiles, bundles, caplog, monkeypatch):
    def refuse(options, folder):
        raise RuntimeError("no EP context here")

    monkeypatch.setattr(cache, "_write_context", refuse)
    assert run(bundles["sd15"])[1].loaded
    assert caplog.messages == ["unet for CPU: cannot be kept compiled (no EP context here)"]
    caplog.clear()
    monkeypatch.setattr(cache, "_write_context", lambda options, folder: None)
    assert run(bundles["sd15"])[1].loaded
    assert caplog.messages == ["unet for CPU: CPU wrote no compiled model; the next start compiles anew"]
    assert folders(home) == []


def test_a_graph_that_does_not_load_is_one_error(home, compiles, tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", bare=True)
    (folder / "unet" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="CPUExecutionProvider cannot run it"):
        Session(Bundle.open(folder), "unet").load()
    assert folders(home) == []


def test_several_at_once(home, compiles, bundles, caplog):
    """As processes do it: all compile, one wins, its folder is whole."""
    start = threading.Barrier(4)
    answers, wait = [], cache.shelf.publish

    def publish(made, folder):
        start.wait(30)
        wait(made, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shelf, "publish", publish)
        threads = [threading.Thread(target=lambda: answers.append(run(bundles["sd15"])[0])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 4
    assert all(np.array_equal(answer, answers[0]) for answer in answers)
    (name,) = folders(home)
    shelf.look(home / name, "context")
    assert not caplog.messages


def test_a_folder_with_an_open_file_is_copied(home, tmp_path, monkeypatch):
    """Windows renames no folder in which a file is open."""
    rename = Path.rename

    def locked(path, target):
        if path.name == "open.partial":
            raise PermissionError(13, "in use", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", locked)
    made = home / "open.partial"
    made.mkdir(parents=True)
    (made / "f").write_text("x", encoding="utf-8")
    shelf.publish(made, home / "name")
    assert (home / "name" / "f").read_text(encoding="utf-8") == "x"


def test_what_a_killed_process_left_is_removed_a_day_later(home, compiles, bundles):
    for name, age in (("old.partial", 2), ("new.partial", 0)):
        (home / name).mkdir(parents=True)
        os.utime(home / name, (time.time() - age * 86400,) * 2)
    run(bundles["sd15"])
    assert [name for name in folders(home) if name.endswith(".partial")] == ["new.partial"]


def test_ctrl_c_leaves_nothing_and_a_second_one_does_not_wait(home, compiles, bundles, monkeypatch):
    ended, presses = threading.Event(), iter([1])
    real = watched.concurrent.futures.wait

    def once(futures, timeout):
        if next(presses, None):
            raise KeyboardInterrupt
        ended.set()
        return real(futures, timeout)

    def always(futures, timeout):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_cancel", lambda options: None)
    with monkeypatch.context() as patch:
        patch.setattr(watched.concurrent.futures, "wait", once)
        with pytest.raises(KeyboardInterrupt):
            run(bundles["sd15"])
    assert ended.is_set()
    assert folders(home) == []

    held = threading.Event()
    began = time.perf_counter()
    with monkeypatch.context() as patch:
        patch.setattr(watched.concurrent.futures, "wait", always)
        with pytest.raises(KeyboardInterrupt):
            watched.watched(lambda: held.wait(30), lambda: None, "compiling")
    held.set()
    assert time.perf_counter() - began < 10


def test_a_process_that_leaves_a_provider_compiling_ends_at_once():
    lines = (
        "import atexit, threading, time; from runtime import __main__, watched",
        "atexit.register(print, 'the usual end')",
        "threading.Thread(target=time.sleep, args=(30,), name=watched.THREAD, daemon=True).start()",
        "__main__.leave(130)",
    )
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=25)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_errors_of_the_work_are_the_callers():
    with pytest.raises(ZeroDivisionError):
        watched.watched(lambda: 1 / 0, lambda: None, "compiling")


def test_progress_on_a_terminal_only(monkeypatch, capsys):
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        watched.watched(lambda: time.sleep(0.5), lambda: None, "compiling unet for CPU")
        told = capsys.readouterr().err
        assert told.startswith("\rcompiling unet for CPU: 0 s" if terminal else "")
        assert bool(told) == terminal
    assert told.endswith("\r")


def test_the_cpu_keeps_nothing(home, bundles):
    assert run(bundles["sd15"])[1].compile_seconds == 0
    assert not home.parent.exists()


def test_nothing_is_kept_with_session_options_of_the_callers(home, compiles, bundles):
    run(bundles["sd15"], session_options=onnxruntime.SessionOptions())
    assert folders(home) == []


@pytest.mark.parametrize("late", [False, True])
def test_a_providers_own_cache(late, home, keeps, bundles, caplog):
    seen = keeps(late)
    first, session = run(bundles["sd15"])
    assert session.compile_seconds > 0
    (name,) = folders(home)
    assert Path(seen[-1]["folder"]).suffix == ("" if late else shelf.PARTIAL)
    assert shelf.read(home / name).files.keys() == {"blob"}
    (home / name / "added").write_bytes(b"when it was called")
    cache.record(home / name)  # as at the process's end
    (home / name / "half").write_bytes(b"by a process that was killed")
    second, again = run(bundles["sd15"])
    assert seen[-1] == {"folder": str(home / name), "on": "1"}
    assert again.compile_seconds == 0
    assert np.array_equal(first, second)
    assert "half was left by a process that was killed; it is removed" in caplog.text
    assert shelf.sizes(home / name).keys() == shelf.read(home / name).files.keys() == {"blob", "added"}
    (home / name / "added").write_bytes(b"otherwise")
    run(bundles["sd15"])
    assert "it is removed and compiled anew" in caplog.text
    assert shelf.read(home / name).files.keys() == {"blob"}


def test_one_that_a_killed_process_left_half_made_is_made_anew(home, keeps, bundles, caplog):
    seen = keeps(late=True)
    run(bundles["sd15"])
    (name,) = folders(home)
    shelf.write(home / name, dataclasses.replace(shelf.read(home / name), seconds=0.0, files={}))
    assert run(bundles["sd15"])[1].compile_seconds > 0
    assert "was left half-made; it is removed and compiled anew" in caplog.text
    assert len(seen) == 2


def test_a_provider_that_compiles_again_is_told(home, keeps, bundles, caplog):
    seen = keeps()
    run(bundles["sd15"])
    add = cache.add_provider

    def anew(ort, options, row, chosen, *, shared):
        (Path(chosen["folder"]) / "blob").write_bytes(b"compiled another time")
        return add(ort, options, row, chosen, shared=shared)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "add_provider", anew)
        assert run(bundles["sd15"])[1].compile_seconds > 0
    (name,) = folders(home)
    assert caplog.messages == [f"unet for CPU: CPU compiled it again, though what it keeps in {home / name} was whole"]
    assert run(bundles["sd15"])[1].compile_seconds == 0  # its new file has been recorded
    assert len(seen) == 3
    assert len(caplog.messages) == 1


def test_a_folder_of_the_users_is_left_to_him(home, keeps, bundles, tmp_path):
    seen = keeps()
    run(bundles["sd15"], provider_options={"folder": str(tmp_path)})
    assert seen == [{"folder": str(tmp_path)}]
    assert folders(home) == []


def test_a_late_one_that_fails_leaves_nothing(home, keeps, bundles, monkeypatch):
    keeps(late=True)

    def fail(*arguments, **options):
        raise RuntimeError("no")

    monkeypatch.setattr(cache, "add_provider", fail)
    with pytest.raises(ValueError, match="CPUExecutionProvider cannot run it"):
        run(bundles["sd15"])
    assert folders(home) == []


@pytest.mark.parametrize("row", [row for row in PROVIDERS.values() if row.kept], ids=lambda row: row.name)
def test_the_table_names_options_that_there_are(row):
    fills = {**row.kept.fills, **row.kept.unless}
    assert all(row.options[name].takes(value) for name, value in fills.items())
    assert row.kept.how == "context" or row.cache in row.options


def test_openvino_on_the_cpu_keeps_nothing(bundles):
    def wanted(**chosen):
        return cache.Wanted(None, "unet", None, None, PROVIDERS["openvino"], chosen, None, False)

    assert not cache._kept(wanted())
    assert cache._kept(wanted(device_type="NPU"))
    assert not cache._kept(wanted(device_type="NPU", cache_dir="mine"))
    assert settled(PROVIDERS["openvino"], {})["device_type"] == "CPU"


def test_a_foreign_folder_goes_by_sizes_and_times(bundles, tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15", bare=True)
    graph = folder / "unet" / "model.onnx"
    before = cachekey.graph_key(Bundle.open(folder), graph)
    assert list(before) == ["unet/model.onnx"]
    assert f"{graph.stat().st_size} bytes of" in before["unet/model.onnx"]
    os.utime(graph, (1, 1))
    assert cachekey.graph_key(Bundle.open(folder), graph) != before


def test_of_a_configuration_file_the_content_counts(bundles, tmp_path):
    bundle = Bundle.open(bundles["sd15"])
    row = dataclasses.replace(PROVIDERS["cpu"], options={"config_file": Option("path")})
    config = tmp_path / "config.json"
    keys = []
    for content in ("{}", "[]", "{}"):
        config.write_text(content, encoding="utf-8")
        keys.append(cachekey.key_of(onnxruntime, row, {"config_file": str(config)}, bundle, bundle.graph("unet")))
    assert keys[0] == keys[2] != keys[1]
    assert cachekey.changes(keys[0], keys[1])[0].startswith("options.config_file config.json ")


def test_drivers(tmp_path, monkeypatch):
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "version").write_text("570.1\n", encoding="utf-8")
    (tmp_path / "amdxdna").mkdir()
    assert dict(cachekey._modules(PROVIDERS["cuda"], tmp_path)) == {"nvidia": "570.1"}
    assert dict(cachekey._modules(PROVIDERS["vitisai"], tmp_path)) == {"amdxdna": platform.release()}
    assert dict(cachekey._modules(PROVIDERS["webgpu"], tmp_path)) == {}

    class Opened:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    def open_key(root, path):
        if not path.endswith("0001"):
            raise FileNotFoundError(path)
        return Opened()

    values = {"DriverDesc": "NPU Compute Accelerator Device", "DriverVersion": "32.0.203.280"}
    registry = types.SimpleNamespace(
        OpenKey=open_key, QueryValueEx=lambda key, name: (values[name], 1), HKEY_LOCAL_MACHINE=0
    )
    monkeypatch.setitem(sys.modules, "winreg", registry)
    assert dict(cachekey._adapters()) == {"NPU Compute Accelerator Device": "32.0.203.280"}


def test_the_report_tells_compiling_from_loading(home, compiles, bundles, monkeypatch):
    row = sys.modules["runtime.session"].provider_of("cpu")
    monkeypatch.setattr("runtime.pipeline.provider_of", lambda name: row)
    seconds = []
    for _ in range(2):
        pipe = Pipeline.from_pretrained(bundles["sd3"])
        seconds.append(pipe("red", seed=1, num_inference_steps=2, guidance_scale=2).report.seconds)
    assert seconds[0]["compile"] > 0
    assert seconds[1]["compile"] == 0
    assert seconds[1]["load"] > 0
    for each in seconds:
        stages = [each[name] for name in ("load", "compile", "encode", "denoise", "decode")]
        assert min(stages) >= 0
        assert sum(stages) == pytest.approx(each["total"], abs=0.05)


def told(capsys, *arguments):
    assert main(["cache", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_and_clear(home, compiles, bundles, capsys, tmp_path):
    run(bundles["sd15"])
    run(bundles["sd15"], provider_options={"level": "1"})
    whole, broken = folders(home)
    (home / broken / "model.onnx").write_bytes(b"")
    (home / "left.partial").mkdir()
    (home.parent / "directions").mkdir()
    measured = {
        "providers": ["CPUExecutionProvider"],
        "machine": {"node": "other"},
        "packages": {"onnxruntime": "1.20.0"},
    }
    profile = home.parent / "directions" / "a.json"
    profile.write_text(json.dumps({"key": measured}), encoding="utf-8")
    (home.parent / "directions" / "b.json").write_text("{}", encoding="utf-8")
    (home.parent / "vitisai").mkdir()
    (home.parent / "vitisai" / "config-0.json").write_text("{}", encoding="utf-8")
    (home.parent / "table.json").write_text("{}", encoding="utf-8")

    listed = told(capsys, "list")["items"]
    states = {Path(item["path"]).name: (item["kind"], item["state"]) for item in listed}
    assert states == {
        whole: ("compiled", "fits"),
        broken: ("compiled", "broken"),
        "left.partial": ("compiled", "unfinished"),
        "a.json": ("directions", "elsewhere"),
        "b.json": ("directions", "broken"),
        "config-0.json": ("vitisai", "fits"),
        "table.json": ("tables", "fits"),
    }
    (entry,) = [item for item in listed if Path(item["path"]).name == whole]
    size = sum(path.stat().st_size for path in (home / whole).iterdir())
    assert (entry["bytes"], entry["component"], entry["provider"]) == (size, "unet", "CPUExecutionProvider")
    assert entry["made"] <= entry["used"]
    assert main(["cache", "list"]) == 0
    text = capsys.readouterr().out
    assert "3 compiled (" in text
    assert f"compiled   fits; tiny-sd15 unet CPUExecutionProvider, {cachelist.size(size)}" in text

    assert {Path(item["path"]).name for item in told(capsys, "clear", "--stale")["removed"]} == {
        broken, "left.partial", "b.json"
    }  # fmt: skip
    assert main(["cache", "clear", "compiled"]) == 0
    assert capsys.readouterr().out == f"removed 1 compiled ({cachelist.size(size)})\n"
    assert folders(home) == []
    assert profile.exists()
    assert told(capsys, "clear", "--all")["bytes"] > 0
    assert told(capsys, "list")["items"] == []


def test_what_fits_no_more_is_listed_as_stale(home, compiles, bundles, capsys, monkeypatch, tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd15")
    run(folder)
    before = onnxruntime.__version__
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "__version__", "1.99.0")
        (item,) = told(capsys, "list", "compiled")["items"]
        assert (item["state"], item["why"]) == ("stale", f"onnxruntime {before} -> 1.99.0")
    with monkeypatch.context() as patch:
        patch.setattr(cachekey, "machine", lambda: {"node": "other"})
        assert told(capsys, "list")["items"][0]["state"] == "elsewhere"
    assert told(capsys, "list", "--stale")["items"] == []
    (folder / "unet" / "model.onnx").unlink()
    (item,) = told(capsys, "list", "--stale")["items"]
    assert "its bundle is no longer in" in item["why"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["clear"], "say what to remove: compiled, directions, vitisai, tables, --provider NAME, --stale or --all"),
        (["clear", "all"], "unknown kind 'all'; choose from compiled, directions, vitisai, tables"),
        (["list", "--provider", "npu"], "unknown provider 'npu'; choose from cpu, cuda"),
    ],
)
def test_refusals(arguments, words, home, capsys):
    assert main(["cache", *arguments]) == 2
    assert words in capsys.readouterr().err


@tells
def test_recorded_nodes_are_what_the_session_told(home, compiles, bundles):
    _, session = run(bundles["sd15"])
    _, again = run(bundles["sd15"])
    assert again.assignment == session.assignment
