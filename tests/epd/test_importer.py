"""The importer: the authors' files come out as the authors' code uses them, and hostile ones execute nothing."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import epd
from epd import catalogue
from epd import snapshot as reader
from epd.__main__ import main
from epd.importer import import_table

from .snapshots import METADATA, PARAMETERS, dumps, lookalikes, predictor, raw_parameters, reduce_to_zip, snapshot

ROOT = Path(__file__).parents[2]
PUBLISHED = sorted((ROOT.parent / "shared" / "tables").glob("*.json"))


@pytest.fixture
def read(tmp_path):
    """Import bytes as a file."""

    def run(data):
        file = tmp_path / "predictor.pkl"
        file.write_bytes(data)
        return import_table(file)

    return run


@pytest.fixture
def canary(tmp_path):
    """A file that exists only if something of a hostile file was executed."""
    file = tmp_path / "canary"
    yield file
    assert not file.exists(), "the file was executed"


@pytest.mark.skipif(not PUBLISHED, reason="the contents of the published files are not beside this repository")
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_tables(read, file):
    told = json.loads(file.read_text(encoding="utf-8"))
    raw = {name: np.array(value, dtype=np.float32) for name, value in told["raw"].items()}
    table = read(snapshot(raw, told["metadata"]))
    assert abs(table.r - told["r"]).max() < 1e-12
    assert abs(table.w - told["w"]).max() < 1e-12
    np.testing.assert_array_equal(table.scale_dir, 1)
    np.testing.assert_array_equal(table.scale_time, 1)
    recorded = table.provenance["metadata"]
    assert {name: recorded[name] for name in told["metadata"]} == told["metadata"]
    assert (table.start, table.order, table.midpoint) == ("call", 1, "geometric")
    assert table.guidance == told["metadata"]["guidance_rate"]
    assert table.sequential_calls == 2 * table.steps == 2 * (told["metadata"]["num_steps"] - 1)


@pytest.mark.skipif(not PUBLISHED, reason="the contents of the published files are not beside this repository")
def test_published_catalogue():
    known = {told["file"]: told for told in (json.loads(file.read_text(encoding="utf-8")) for file in PUBLISHED)}
    for entry in catalogue.published().values():
        told = known[entry.url.rpartition("/")[2]]
        assert (entry.sha256, entry.bytes) == (told["sha256"], told["bytes"])


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("form", ["cpu", "cuda", "zip"])
def test_numbers(read, monkeypatch, form, protocol):
    if form == "cuda":
        monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    if form == "zip":
        monkeypatch.setattr(torch.storage.TypedStorage, "__reduce__", reduce_to_zip)
    raw = raw_parameters()
    data = snapshot(raw, {"scale_dir": 0.05, "scale_time": 0.2}, protocol)
    assert (b"cuda:0" in data) == (form == "cuda")
    assert (b"PK" in data) == (form == "zip")
    table = read(data)
    p = {name: torch.tensor(value, dtype=torch.float64) for name, value in raw.items()}
    expected = {
        "r": torch.sigmoid(p["r_params"]),
        "w": torch.softmax(p["weight_s"], -1),
        "scale_dir": 2 * torch.sigmoid(0.5 * p["scale_dir_params"]) * 0.05 + (1 - 0.05),
        "scale_time": 2 * torch.sigmoid(0.5 * p["scale_time_params"]) * 0.2 + (1 - 0.2),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(table, name), value.numpy(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions(read, dtype):
    raw = {name: torch.tensor(value).to(dtype).numpy() for name, value in raw_parameters().items()}
    expected = 1 / (1 + np.exp(-raw["r_params"].astype(np.float64)))
    np.testing.assert_allclose(read(snapshot(raw)).r, expected, atol=1e-15)


def test_strides_and_shared_storages(read):
    both = torch.arange(12, dtype=torch.float32).reshape(2, 6) / 10
    model = predictor({}, METADATA)
    for i, name in enumerate(PARAMETERS):
        model.register_parameter(name, torch.nn.Parameter(both[:, i : i + 3].T))  # column-major, with an offset
    table = read(dumps({"model": model}))
    np.testing.assert_allclose(table.r, 1 / (1 + np.exp(-both[:, :3].T.numpy().astype(np.float64))), atol=1e-15)


def test_what_it_belongs_to(read):
    table = read(snapshot())
    assert (table.family, table.model, table.size, table.guidance) == ("sd3", "a/model", (512, 512), 4.5)
    assert (table.start, table.order, table.t5) == ("call", 1, None)
    np.testing.assert_array_equal(table.times, epd.schedule.flow(3))
    assert table.provenance["file"] == "predictor.pkl"
    assert table.provenance["metadata"] == METADATA
    assert len(table.provenance["sha256"]) == 64


EDM = {"backend": "ldm", "dataset_name": "cifar10", "guidance_type": None, "backend_config": {}, "img_resolution": 32}
SD15 = {"backend": "ldm", "schedule_type": "discrete"}
FLUX = {"backend": "flux", "flowmatch_mu": 1.15, "flowmatch_shift": 3.0}
GRIDS = {
    "discrete, rho 1.0": (SD15, epd.schedule.discrete(3)),
    "flowmatch, shift 3.0": ({}, epd.schedule.flow(3)),
    "flowmatch, shift 5.0": ({"flowmatch_shift": 5.0}, epd.schedule.flow(3, 5.0)),
    "flowmatch, shift e^1.15": (FLUX, epd.schedule.flow_dynamic(3, 1.15)),
    "polynomial, rho 7": (EDM | {"schedule_type": "polynomial", "schedule_rho": 7}, epd.schedule.polynomial(3)),
    "logsnr": (EDM | {"schedule_type": "logsnr"}, epd.schedule.logsnr(3)),
    "time_uniform, rho 1.0": (EDM | {"schedule_type": "time_uniform"}, epd.schedule.time_uniform(3)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids(read, name):
    metadata, times = GRIDS[name]
    table = read(snapshot(metadata=metadata))
    np.testing.assert_array_equal(table.times, times)
    assert table.grid == name
    backend, edm = metadata.get("backend", "sd3"), "dataset_name" in metadata
    assert table.family == ("edm" if edm else "sd15" if backend == "ldm" else backend)
    assert table.guidance == (None if edm else 4.5)


def test_a_grid_with_sigmas_of_its_own(read):
    table = read(snapshot(metadata=EDM | {"schedule_type": "logsnr", "sigma_min": 0.01, "sigma_max": 50.0}))
    np.testing.assert_array_equal(table.times, epd.schedule.logsnr(3, 0.01, 50.0))


def test_flux_grid_is_that_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.set_timesteps(9, mu=1.15)
    np.testing.assert_allclose(epd.schedule.flow_dynamic(8, 1.15), scheduler.sigmas.numpy()[:-1], rtol=1e-6)


def test_plugin_and_analytic_start(read):
    table = read(
        snapshot(metadata=EDM | {"schedule_type": "logsnr", "sampler_stu": "ipndm", "max_order": 3, "afs": True})
    )
    assert (table.start, table.order, table.guidance) == ("afs", 3, None)
    assert table.sequential_calls == 2 * 3 - 1


def test_easydict_is_a_dict(read):
    with lookalikes():
        easy = sys.modules["dnnlib.util"].EasyDict(METADATA["backend_config"] | {"resolution": 1024})
        data = pickle.dumps({"model": predictor(raw_parameters(), METADATA | {"backend_config": easy})}, 4)
    assert read(data).size == (1024, 1024)


def test_needs_no_torch(tmp_path):
    file = tmp_path / "predictor.pkl"
    file.write_bytes(snapshot())
    code = "import sys; from epd.importer import import_table; import_table(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


# -- files that are no table ------------------------------------------------------------------------------------------


def without(name):
    return {key: value for key, value in raw_parameters().items() if key != name}


WRONG = {
    "no r_params": (lambda: snapshot(without("r_params")), "lacks r_params"),
    "no weight_s": (lambda: snapshot(without("weight_s")), "lacks weight_s"),
    "no scales": (lambda: snapshot(without("scale_dir_params"), {"scale_dir": 0.05}), "lacks scale_dir_params"),
    "no steps": (lambda: dumps({"model": predictor(raw_parameters(), {"num_points": 2})}), "lacks num_steps, sampler"),
    "no model": (lambda: dumps({"ema": predictor(raw_parameters(), METADATA)}), 'no persistent object "model"'),
    "a list": (lambda: dumps([1, 2]), 'no persistent object "model"'),
    "a dict as model": (lambda: dumps({"model": METADATA}), 'no persistent object "model"'),
    "another N": (lambda: snapshot(raw_parameters(4)), r"must have shape \(N, K\) = \(3, 2\), got \(4, 2\)"),
    "another K": (lambda: snapshot(raw_parameters(3, 3)), "got \\(3, 3\\)"),
    "flat": (lambda: snapshot(raw_parameters() | {"r_params": np.zeros(6, np.float32)}), r"got \(6,\)"),
    "NaN": (lambda: snapshot(raw_parameters() | {"r_params": np.full((3, 2), np.nan)}), "r_params must be finite"),
    "infinite": (lambda: snapshot(raw_parameters() | {"weight_s": np.full((3, 2), np.inf)}), "weight_s must be finite"),
    "r of 1": (lambda: snapshot(raw_parameters() | {"r_params": np.full((3, 2), 99.0)}), r"r must be in \(0, 1\)"),
    "integers": (lambda: snapshot() and dumps({"model": integers()}), "torch.LongStorage"),
    "one grid point": (lambda: snapshot(raw_parameters(), {"num_steps": 1}), "num_steps counts grid points"),
    "many steps": (lambda: snapshot(raw_parameters(), {"num_steps": 10**9}), "num_steps must be an integer from 1"),
    "steps as text": (lambda: snapshot(raw_parameters(), {"num_steps": "4"}), "num_steps must be an integer"),
    "a sampler": (lambda: snapshot(metadata={"sampler_stu": "amed"}), "sampler_stu is 'amed'"),
    "an order": (lambda: snapshot(metadata={"sampler_stu": "ipndm", "max_order": 7}), "order must be an integer"),
    "no order": (lambda: snapshot(metadata={"sampler_stu": "ipndm", "max_order": None}), "max_order must be"),
    "a schedule": (lambda: snapshot(metadata={"schedule_type": "cosine"}), "schedule_type 'cosine' on sd3"),
    "a backend": (lambda: snapshot(metadata={"backend": "video"}), "backend 'video'"),
    "another latent model": (lambda: snapshot(metadata=SD15 | {"dataset_name": "lsun_bedroom"}), "'lsun_bedroom'"),
    "flux without mu": (lambda: snapshot(metadata={"backend": "flux"}), "records no flowmatch_mu"),
    "a bound": (lambda: snapshot(metadata={"scale_dir": 3.0}), "scale_dir, a bound, must be from 0 to 1"),
    "a bound of text": (lambda: snapshot(metadata={"scale_time": "x"}), "scale_time must be a finite number"),
    "a wild shift": (lambda: snapshot(metadata={"flowmatch_shift": float("nan")}), "flowmatch_shift must be a finite"),
    "metadata of tuples": (lambda: snapshot(metadata={"extra": {(1, 2): 3}}), "a dict's key"),
    "metadata of bytes": (lambda: snapshot(metadata={"extra": b"123"}), "'extra' is not plain data"),
    "endless metadata": (lambda: snapshot(metadata={"extra": list(range(2000))}), "'extra' is not plain data, or too"),
    "a size of text": (lambda: snapshot(metadata={"backend_config": {"resolution": "big"}}), "size must be two"),
    "empty": (lambda: b"", "no pickle, or cut off"),
    "text": (lambda: b"This is no pickle at all.\n", "no pickle, or cut off|opcode"),
    "a PNG": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), "opcode PERSID"),
    "JSON": (lambda: b'{"format": "epd-table"}', "refused|no pickle"),
    "of torch.save": (lambda: saved(), "no pickle, or cut off|opcode"),
    "oversized": (lambda: bytes(reader.MAX_BYTES + 1), "a snapshot has at most"),
}


def integers():
    model = predictor(raw_parameters(), METADATA)
    model.register_buffer("extra", torch.arange(3))
    return model


def saved():
    buffer = io.BytesIO()
    torch.save({"model": torch.zeros(3)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("case", WRONG)
def test_no_table(read, case):
    make, message = WRONG[case]
    data = make()
    with pytest.raises(ValueError, match=message) as error:
        read(data)
    assert "\n" not in str(error.value)
    assert "predictor.pkl: " in str(error.value)


# -- hostile files ----------------------------------------------------------------------------------------------------


class Bomb:
    """Pickles to a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def hostile(canary):
    """Files that would make the canary under Python's own unpickler, and what their refusal must name."""
    touch = f"open({str(canary)!r}, 'w').close()"
    command = f"touch {canary}"
    system = named(os.system.__module__, "system")
    shell = Bomb(os.system, command)
    blob = pickle.dumps(shell, 2)
    inner = named("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(blob)) + blob + b"\x85R."
    body = text(command)
    yield "REDUCE", pickle.dumps(shell), f"{os.system.__module__}.system"
    yield "REDUCE of protocol 0", pickle.dumps(shell, 0), f"{os.system.__module__}.system"
    yield "inside the model", snapshot(metadata={"extra": shell}), f"{os.system.__module__}.system"
    yield "eval", pickle.dumps(Bomb(eval, touch)), "builtins.eval"
    yield "exec", pickle.dumps(Bomb(exec, touch)), "builtins.exec"
    yield "eval of protocol 2", pickle.dumps(Bomb(eval, touch), 2), "__builtin__.eval"
    yield "nested", b"\x80\x04" + inner, f"{os.system.__module__}.system"
    yield "INST", b"(" + body + b"i" + system[1:] + b".", "opcode INST"
    yield "OBJ", b"(" + system + body + b"o.", f"{os.system.__module__}.system"
    yield "OBJ of a known name", b"(" + named("collections", "OrderedDict") + body + b"o.", "opcode OBJ"
    yield "NEWOBJ", b"\x80\x02" + named("subprocess", "Popen") + body + b"\x85\x81.", "subprocess.Popen"
    yield "NEWOBJ_EX", b"\x80\x04" + named("collections", "OrderedDict") + b")}\x92.", "opcode NEWOBJ_EX"
    yield "NEWOBJ of a call", b"\x80\x02" + named("collections", "OrderedDict") + b")\x81.", "collections.OrderedDict"
    yield "REDUCE of an object", b"\x80\x02" + named("dnnlib.util", "EasyDict") + b")R.", "dnnlib.util.EasyDict"
    yield "BUILD with __setstate__", b"\x80\x02" + named("importlib", "import_module") + b"}b.", "importlib"
    yield "BUILD onto a name", b"\x80\x02" + named("collections", "OrderedDict") + b"}b.", "a Module is expected"
    yield "EXT", b"\x80\x02\x82\x01.", "opcode EXT1"
    yield "EXT4", b"\x80\x02\x84\x01\x00\x00\x00.", "opcode EXT4"
    yield "PERSID", b"Pstorage\n.", "opcode PERSID"
    yield "BINPERSID", b"\x80\x02" + body + b"Q.", "no tensor's storage"
    yield "a name through attributes", b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.", "torch.os.system"
    yield "a module for a name", b"\x80\x04\x8c\x0ctorch._utils\x8c\x02os\x93.", "torch._utils.os"
    yield "a name with escapes", b"\x80\x04\x8c\x04\x1b[2J\x8c\x01\n\x93.", r"\\x1b\[2J.\\n"
    yield "STACK_GLOBAL of numbers", b"\x80\x04K\x01K\x02\x93.", "a name is expected"
    yield "torch.load", pickle.dumps(Bomb(torch.load, str(canary))), "torch.serialization.load"


NAMES = [name for name, _, _ in hostile(Path("canary"))]


@pytest.mark.parametrize("case", NAMES)
def test_hostile(read, canary, case):
    data, message = next((data, message) for name, data, message in hostile(canary) if name == case)
    with pytest.raises(ValueError, match=message) as error:
        read(data)
    assert str(error.value).isprintable()


def test_the_canary_sings(canary, tmp_path):
    """The hostile files do what they are feared for where they are trusted: the test above can fail."""
    other = tmp_path / "other"
    for case in ("REDUCE", "REDUCE of protocol 0", "eval", "exec", "eval of protocol 2", "INST", "OBJ"):
        data = next(data for name, data, _ in hostile(other) if name == case)
        pickle.loads(data)  # noqa: S301 -- made two lines above, to see it work
        assert other.exists(), case
        other.unlink()


LEGACY = [pickle.dumps(value, 2) for value in (reader.LEGACY_MAGIC, 1001, {"little_endian": True})]
FLOATS = b"\x80\x02(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu")
KEYS = pickle.dumps(["0"], 2)
SIX = struct.pack("<q", 6) + bytes(24)
STORED = FLOATS + b"K\x06NtQ."
BLOBS = {
    "whole": (b"".join([*LEGACY, STORED, KEYS, SIX]), None),
    "cut off": (b"".join([*LEGACY, STORED, KEYS, SIX[:-1]]), "cut off or too long"),
    "too long": (b"".join([*LEGACY, STORED, KEYS, SIX, b"1"]), "cut off or too long"),
    "another count": (b"".join([*LEGACY, STORED, KEYS, struct.pack("<q", 5), bytes(24)]), "counts its numbers wrongly"),
    "another magic": (b"".join([pickle.dumps(1, 2), *LEGACY[1:], STORED, KEYS, SIX]), "in no format of torch"),
    "big-endian": (b"".join([*LEGACY[:2], pickle.dumps({"little_endian": False}, 2), STORED]), "not little-endian"),
    "another key": (b"".join([*LEGACY, STORED, pickle.dumps(["1"], 2), SIX]), "not one storage"),
    "a list instead": (b"".join([*LEGACY, pickle.dumps([1], 2), KEYS, SIX]), "not one storage"),
    "a view": (b"".join([*LEGACY, FLOATS + b"K\x06K\x01tQ.", KEYS, SIX]), "no tensor's storage"),
    "an enormous count": (b"".join([*LEGACY, FLOATS + b"J\xff\xff\xff\x7fNtQ.", KEYS]), "a storage of more than"),
    "a negative count": (b"".join([*LEGACY, FLOATS + b"J\xff\xff\xff\xffNtQ.", KEYS]), "a storage of more than"),
    "a blob in a blob": (
        b"".join([*LEGACY, b"\x80\x02" + named("torch.storage", "_load_from_bytes") + b"."]),
        "_load_",
    ),
    "a call in a blob": (b"".join([*LEGACY, b"\x80\x02" + named("torch", "FloatStorage") + b")R."]), "a call of torch"),
    "no zip": (b"PK\x03\x04 but no zip", "broken zip"),
    "nothing": (b"", "no pickle, or cut off"),
}


def with_blob(blob, size=(3, 2), stride=(2, 1), offset=0):
    """A tensor of a storage, as the only content of a pickle."""
    load = named("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(blob)) + blob + b"\x85R"
    rest = b"".join(pickle.dumps(value, 2)[2:-1] for value in (offset, size, stride))
    return b"\x80\x02" + named("torch._utils", "_rebuild_tensor_v2") + b"(" + load + rest + b"\x89}tR."


@pytest.mark.parametrize("case", BLOBS)
def test_storages(case):
    blob, message = BLOBS[case]
    if message is None:
        np.testing.assert_array_equal(reader.read(with_blob(blob)), np.zeros((3, 2)))
        return
    with pytest.raises(ValueError, match=message):
        reader.read(with_blob(blob))


TENSORS = {
    "beyond its storage": {"size": (4, 2)},
    "beyond by offset": {"offset": 1},
    "beyond by stride": {"stride": (3, 1)},
    "negative offset": {"offset": -1},
    "negative stride": {"stride": (-2, 1)},
    "enormous by stride 0": {"size": (10**9, 10**9), "stride": (0, 0)},
    "enormous and empty": {"size": (10**12, 0)},
    "of many axes": {"size": (1,) * 5, "stride": (1,) * 5},
    "of other strides": {"stride": (1,)},
    "of fractions": {"size": (3.0, 2)},
    "of booleans": {"size": (True, 2)},
    "of a list": {"size": [3, 2]},
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_stay_within_their_storage(case):
    with pytest.raises(ValueError, match="refused: a tensor"):
        reader.read(with_blob(BLOBS["whole"][0], **TENSORS[case]))


def test_any_stride_of_an_axis_of_one():
    blob = BLOBS["whole"][0]
    assert reader.read(with_blob(blob, size=(1, 6), stride=(10**30, 1))).shape == (1, 6)


def test_zip_bomb(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match="compressed storage"):
        reader.read(with_blob(buffer.getvalue()))


def laughs(open_, close):
    """Ten things of ten things of ... 100 levels, each stored once and used ten times."""
    data = b"\x80\x02" + text("ha") + b"q\x00"
    for level in range(100):
        data += open_ + bytes([0x68, level]) * 10 + close + bytes([0x71, level + 1])
    return data


BOMBS = {
    "billion laughs": laughs(b"(", b"t") + b".",
    "billion laughs as a key": b"\x80\x02}q\xff" + laughs(b"(", b"t")[2:] + b"Ns.",
    "billion laughs as metadata": None,
    "many opcodes": b"\x80\x02" + b"N" * 200_000 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 20_000 + b".",
    "a far memo index": b"\x80\x02Nr\xff\xff\xff\xff.",
    "an unknown memo index": b"\x80\x02j\xff\xff\xff\xff.",
    "a length of 2^63 - 1": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b"x.",
    "a length of 2^32 - 1": b"\x80\x02X\xff\xff\xff\xffx.",
    "a long of 2^31 - 1 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a digit string": b"I" + b"9" * 500_000 + b"\n.",
    "an empty stack": b"\x80\x02.",
    "a missing mark": b"\x80\x02t.",
    "across a mark": b"\x80\x02N(\x85.",
    "append to a number": b"\x80\x02K\x01Na.",
    "an odd dict": b"\x80\x02}(Nu.",
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(read, case):
    data = BOMBS[case]
    if data is None:
        shared = ["ha"] * 10
        for _ in range(100):
            shared = [shared] * 10
        data = snapshot(metadata={"extra": shared})
    tracemalloc.start()
    with pytest.raises(ValueError):
        read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def again(head, step, count=8000):
    """A pickle that appends `step` to a list over and over; `head` leaves a name and arguments in the memo."""
    return b"\x80\x02" + head + b"]" + step * count + b"."


def repeated():
    """Files of a few kilobytes whose every few bytes ask for another large copy."""
    call = b"h\xf0h\xf1Ra"  # of the name and the arguments in the memo
    tensor = with_blob(BLOBS["whole"][0], size=(1 << 16,), stride=(0,))[2:-2]  # less protocol, REDUCE and STOP
    arguments = tensor.removeprefix(named("torch._utils", "_rebuild_tensor_v2"))
    yield "tensors", again(named("torch._utils", "_rebuild_tensor_v2") + b"q\xf0" + arguments + b"q\xf1", call)
    entries = b"}(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(2000)) + b"u"
    reconstruct = named("torch_utils.persistence", "_reconstruct_persistent_obj")
    meta = b"}(" + text("type") + text("class") + text("state") + entries + b"u\x85"
    yield "persistent objects", again(reconstruct + b"q\xf0" + meta + b"q\xf1", call)
    easy = named("dnnlib.util", "EasyDict") + b"q\xf0"
    yield "states", again(easy + entries + b"q\xf1", b"h\xf0)\x81h\xf1ba")
    blob = b"".join([*LEGACY, STORED.replace(b"K\x06", b"M\x00\x40"), KEYS, struct.pack("<q", 1 << 14), bytes(1 << 16)])
    load = named("torch.storage", "_load_from_bytes") + b"q\xf0B" + struct.pack("<I", len(blob)) + blob + b"\x85q\xf1"
    yield "storages", again(load, call)


@pytest.mark.parametrize("case", ["tensors", "persistent objects", "states", "storages"])
def test_repeated_copies_are_one_budget(case):
    """Each step is small and allowed; a few of them are read, thousands of them refused early."""
    data = dict(repeated())[case]
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"refused: more than 262144 numbers and dict entries in all"):
        reader.read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_opcodes_of_nested_pickles_count():
    head, call = named("torch.storage", "_load_from_bytes") + b"q\xf0", b"h\xf0h\xf1Ra"
    nested = pickle.dumps([None] * 5000, 2)  # in the place of a version, which may be anything
    blob = b"".join([LEGACY[0], nested, *LEGACY[2:], STORED, KEYS, SIX])
    with pytest.raises(ValueError, match="refused: more than 50000 opcodes"):
        reader.read(again(head + b"B" + struct.pack("<I", len(blob)) + blob + b"\x85q\xf1", call, 20))


def test_too_little_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def fails(data):
        raise MemoryError

    monkeypatch.setattr(reader, "read", fails)
    (tmp_path / "predictor.pkl").write_bytes(b"x")
    assert main(["import", str(tmp_path / "predictor.pkl"), "-o", str(tmp_path / "t.json")]) == 2
    assert capsys.readouterr().err == "error: not enough memory; close other programs, or give a smaller file\n"


def test_truncated_anywhere(read, canary):
    data = snapshot()
    for end in range(0, len(data), 31):
        with pytest.raises(ValueError, match=r"refused|cut off"):
            read(data[:end])


def test_damaged_anywhere(read, monkeypatch):
    """A flipped byte gives a table or a ValueError in one line, never another error."""
    rng = np.random.default_rng(0)
    told = []
    monkeypatch.setattr(torch.storage.TypedStorage, "__reduce__", reduce_to_zip)
    zipped = snapshot()
    monkeypatch.undo()
    for data in (snapshot(), zipped):
        for _ in range(100):
            damaged = bytearray(data)
            damaged[rng.integers(len(data))] = rng.integers(256)
            try:
                read(bytes(damaged))
            except ValueError as error:
                told.append(str(error))
    assert 0 < len(told) < 200
    assert "".join(told).isprintable()
