"""Bad input to the exporter: one line that names cause and remedy, and nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from export import ExportError, write
from export.__main__ import main
from export.worker import Job
from runtime.bundle import Bundle
from shapes.models import write_tokenizer

ROOT = Path(write.__file__).parent.parent


@pytest.fixture
def checkpoint(tiny_checkpoints: dict[str, Path]) -> Path:
    return tiny_checkpoints["sd15"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def refusal(capsys, *command: object) -> str:
    """What a refused export says: one line on standard error, status 2."""
    assert main([str(word) for word in command]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("export: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_folder_that_is_no_checkpoint(capsys, tmp_path: Path, target: Path):
    (tmp_path / "empty").mkdir()
    assert "model_index.json is missing" in refusal(capsys, tmp_path / "empty", "-o", target)
    assert not target.exists()


def test_a_name_that_means_nothing(capsys, target: Path):
    assert "sd3-medium, sd15, shapes-sd3" in refusal(capsys, "no-such-model", "-o", target)


def test_a_name_no_bundle_may_have(capsys, checkpoint: Path, tmp_path: Path, target: Path):
    copy = shutil.copytree(checkpoint, tmp_path / ("long" * 26))
    assert "is not one plain file name" in refusal(capsys, copy, "-o", target)


def test_a_model_that_is_not_downloaded(capsys, tmp_path: Path, target: Path):
    line = refusal(capsys, "nobody/nothing", "--offline", "--cache-dir", tmp_path / "cache", "-o", target)
    assert "not in the cache" in line


def test_a_missing_component(capsys, checkpoint: Path, tmp_path: Path, target: Path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    shutil.rmtree(copy / "text_encoder")
    assert "no text_encoder" in refusal(capsys, copy, "-o", target)
    next((copy / "unet").glob("*.safetensors")).unlink()
    assert "lacks this component's weights" in refusal(capsys, copy, "-o", target, "--components", "unet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_truncated_weights(capsys, checkpoint: Path, tmp_path: Path, target: Path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "unet: its weights" in refusal(capsys, copy, "-o", target, "--components", "unet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--height", "76"], "multiple of 8, such as 72 or 80"),
        (["--width", "-8"], "multiple of 8"),
        (["--components", "transformer"], "this model has text_encoder, unet, vae_decoder, vae_encoder"),
        (["--t5", "fp16"], "only Stable Diffusion 3"),
        (["-k", "0"], "at least one direction"),
        (["--revision", "main"], "not taken from the hub; leave it out"),
        (["--offline"], "not taken from the hub; leave it out"),
        (["--cache-dir", "cache"], "not taken from the hub; leave it out"),
        (["--height", "0"], "multiple of 8"),
        (["--random-weights"], "--random-weights knows sd15, sd3-medium"),
    ],
)
def test_options_that_do_not_fit(capsys, checkpoint: Path, target: Path, arguments: list[str], said: str):
    assert said in refusal(capsys, checkpoint, "-o", target, *arguments)
    assert not target.exists()


@pytest.mark.parametrize("option", [["--variant", "fp16"], ["--revision", "main"], ["--offline"]])
def test_options_about_weights_that_random_ones_lack(capsys, target: Path, option: list[str]):
    assert f"{option[0]}: --random-weights" in refusal(capsys, "sd15", "--random-weights", "-o", target, *option)
    assert not target.exists()


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit(config: Path, **changes: object) -> None:
    content = json.loads(config.read_text(encoding="utf-8")) | changes
    config.write_text(json.dumps(content), encoding="utf-8")


def test_a_damaged_tokenizer(capsys, copy: Path, target: Path):
    whole = copy / "tokenizer" / "tokenizer.json"
    (whole.parent / "merges.txt").unlink(missing_ok=True)
    content = whole.read_bytes()
    for damaged in (content[:-1000], b"[]", b'{"model": {"type": "BPE"}}'):
        whole.write_bytes(damaged)
        line = refusal(capsys, copy, "-o", target)
        assert str(whole) in line
        assert "download the checkpoint again" in line
    assert sorted(path.name for path in target.parent.iterdir()) == ["copy"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("merges.txt", b"#version: 0.2\nnonsense\n", "damaged at 'nonsense'"),
        ("merges.txt", b"#version: 0.2\nno piece\n", "damaged at 'no piece'"),
        ("merges.txt", b"\n\n", "damaged at ''"),
        ("merges.txt", b"\xff\xfe\x00", "damaged ('utf-8' codec"),
        ("vocab.json", b'{"a": "b"}', "a piece without a number"),
    ],
)
def test_a_damaged_tokenizer_of_the_older_kind(capsys, copy: Path, target: Path, file: str, content: bytes, said: str):
    folder = copy / "tokenizer"
    write_tokenizer(folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / file).write_bytes(content)
    line = refusal(capsys, copy, "-o", target)
    assert line.startswith(f"export: {folder / file}: damaged")
    assert said in line
    assert sorted(path.name for path in target.parent.iterdir()) == ["copy"]


@pytest.mark.parametrize("size", [None, "64", [18, 18]])
def test_sd3_without_a_whole_sample_size(
    capsys, tiny_checkpoints: dict[str, Path], tmp_path: Path, target: Path, size: object
):
    copy = shutil.copytree(tiny_checkpoints["sd3"], tmp_path / "copy")
    edit(copy / "transformer" / "config.json", sample_size=size)
    line = refusal(capsys, copy, "-o", target, "--height", "80", "--width", "112")
    assert "sample_size in transformer/config.json" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_a_file_that_cannot_be_read_is_no_fault_of_the_target(capsys, copy: Path, target: Path):
    gone = copy / "tokenizer" / "merges.txt"
    gone.unlink(missing_ok=True)
    gone.symlink_to(copy / "nowhere")  # as in a cache of downloads that was cleared by hand
    line = refusal(capsys, copy, "-o", target)
    assert line.startswith(f"export: {gone}: cannot be read")
    assert str(target) not in line
    assert sorted(path.name for path in target.parent.iterdir()) == ["copy"]


@pytest.mark.parametrize("size", [None, "64", [18]])
def test_a_checkpoint_that_names_no_size(capsys, copy: Path, target: Path, size: object):
    edit(copy / "unet" / "config.json", sample_size=size)
    assert "give --height and --width" in refusal(capsys, copy, "-o", target, "--height", "72")
    assert main([str(copy), "-o", str(target), "--height", "72", "--width", "104", "--dry-run"]) == 0


def job(checkpoint: Path, notes: Path) -> Job:
    (notes / "out").mkdir()
    return Job(
        task="export",
        component="text_encoder",
        checkpoint=str(checkpoint),
        source=str(checkpoint),
        folder=str(notes / "out"),
        result=str(notes / "result.json"),
        precision="fp32",
        height=72,
        width=104,
        directions=2,
        opset=23,
        t5_tokens=0,
        random=True,
    )


def test_want_of_memory_is_told_as_such(copy: Path, tmp_path: Path):
    edit(copy / "text_encoder" / "config.json", vocab_size=2**42)  # more than a process can address
    with pytest.raises(ExportError, match=r"text_encoder: the export process ran out of memory .* more memory"):
        write.run(job(copy, tmp_path))


def test_a_worker_that_cannot_write_its_result(copy: Path, tmp_path: Path):
    (tmp_path / "result.partial").mkdir()  # stands where it would write, as a full disk would
    with pytest.raises(ExportError, match=r"could not write its result .* set TMPDIR"):
        write.run(job(copy, tmp_path))


def test_what_is_there_is_left_alone(capsys, checkpoint: Path, target: Path):
    target.mkdir()
    (target / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert "no bundle" in refusal(capsys, checkpoint, "-o", target, "--overwrite")
    (target / "bundle.json").write_text("{}", encoding="utf-8")
    assert "--overwrite" in refusal(capsys, checkpoint, "-o", target)
    assert (target / "thesis.txt").exists()


def test_a_place_that_cannot_be_written(capsys, checkpoint: Path, tmp_path: Path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    line = refusal(capsys, copy, "-o", tmp_path / "file" / "bundle")  # told before weights are fetched or missed
    assert "cannot be written" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "file"]


@pytest.fixture(params=[64, 300])  # kB: full while configurations are written, and while a worker writes weights
def small_disk(request, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk(capsys, checkpoint: Path, small_disk: Path):
    line = refusal(capsys, checkpoint, "-o", small_disk / "bundle", "--components", "unet")
    assert "No space left on device" in line
    assert "free some space" in line
    assert list(small_disk.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_in_mid_export_leaves_nothing(checkpoint: Path, target: Path):
    command = [sys.executable, "-m", "export", str(checkpoint), "-o", str(target)]
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of a shell's background job ignores it
    try:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, heard)
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    with process:
        try:
            while not workers and time.monotonic() < deadline:
                time.sleep(0.02)
                workers = psutil.Process(process.pid).children(recursive=True)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "export: stopped; nothing was written"
    assert "Traceback" not in said
    assert workers
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert list(target.parent.iterdir()) == []


@pytest.mark.slow
def test_a_kill_in_mid_export_leaves_the_old_bundle_whole_and_the_next_export_clears_up(checkpoint: Path, target: Path):
    command = [str(checkpoint), "-o", str(target), "--components", "vae_decoder", "--overwrite"]
    assert main(command) == 0
    before = Bundle.open(target).fingerprint()
    process = subprocess.Popen([sys.executable, "-m", "export", *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    try:
        while not list(target.parent.glob(".bundle.*.partial/vae_decoder")) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert len(list(target.parent.glob(".bundle.*.partial"))) == 1
    Bundle.open(target).verify()
    assert Bundle.open(target).fingerprint() == before
    assert main(command) == 0
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def left_behind(target: Path, pid: int, end: str) -> Path:
    folder = target.parent / f".{target.name}.{pid}.{end}"
    folder.mkdir()
    (folder / "bundle.json").write_text("{}", encoding="utf-8")
    return folder


NOBODY = 4194305  # no such process: above the largest id of Linux


@pytest.mark.parametrize(
    "pid", [NOBODY, os.getpid()], ids=["another", "same"]
)  # in a container the next export has the same id
def test_a_kill_between_the_two_renames_gives_the_old_bundle_back_and_the_next_export_heeds_it(
    capsys, checkpoint: Path, target: Path, pid: int
):
    left_behind(target, pid, "old")
    left_behind(target, pid, "partial")
    assert "give --overwrite" in refusal(capsys, checkpoint, "-o", target)
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]
    assert (target / "bundle.json").exists()


def test_an_export_that_runs_is_left_alone_but_not_another_process_with_its_number(target: Path):
    running, repeated = (left_behind(target, os.getppid(), end) for end in ("old", "partial"))
    write.check_target(target, overwrite=False)
    assert running.exists()
    assert repeated.exists()
    os.utime(repeated, (1, 1))  # made before the process of this number began
    write.check_target(target, overwrite=False)
    assert running.exists()
    assert not repeated.exists()


def test_dry_run_counts_the_published_architecture_and_writes_nothing(capsys, target: Path):
    command = ["sd15", "--random-weights", "--components", "unet", "--dry-run", "--json", "-o", str(target)]
    assert main(command) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert predicted["components"]["unet"]["parameters"] == 859_520_964  # as published
    assert not target.exists()
