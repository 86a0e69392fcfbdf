import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_bundle
from PIL import Image

import epd
from runtime import png
from runtime.__main__ import main


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "runtime", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image)


def test_generate_json_has_the_keys_of_the_design(bundles, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert main(["generate", "red", "--model", str(bundles["sd3"]), "-s", "3", "-o", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == [
        "images", "seeds", "prompt", "solver", "steps", "sequential_calls", "total_evaluations", "guided_forwards",
        "guidance_interval", "provider", "directions", "seconds", "predicted_rss_bytes", "peak_rss_bytes", "bundle",
    ]  # fmt: skip
    assert printed["images"] == [str(out)]
    assert list(printed["provider"]) == ["asked", "ran", "nodes", "macs_share", "fallbacks", "retries"]
    assert printed["provider"] | {"nodes": None, "macs_share": None} == {
        "asked": "cpu", "ran": "CPUExecutionProvider", "nodes": None, "macs_share": None, "fallbacks": [], "retries": 0
    }  # fmt: skip
    assert pixels(out).shape == (16, 16, 3)


@pytest.mark.parametrize("how", [["--solver", "epd", "-k", "3"], ["--solver", "heun", "--steps", "2"], []])
def test_from_metadata_draws_it_again(bundles, tmp_path, family, how):
    model = ["--model", str(bundles[family])]
    first = ["generate", "red", "--negative-prompt", "a", "--guidance-scale", "2.7", "-s", "8", "--num-images", "2"]
    assert main([*first, *model, *how, "-o", str(tmp_path / "a.png")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-8.png", "a-9.png"]
    again = ["generate", "--from-metadata", str(tmp_path / "a-9.png"), *model, "-o", str(tmp_path / "b.png")]
    assert main(again) == 0
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "a-9.png"))
    assert main([*again, "--solver", "euler", "-s", "1"]) == 0
    assert not np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "a-9.png"))


def test_from_metadata_knows_table_model_and_bundle(bundles, tmp_path, capsys):
    tables = [("two.json", epd.start_table(epd.schedule.flow(2), 2))]
    own = tiny_bundle.bundle(tmp_path / "own", "sd3", tables=tables)
    out = tmp_path / "a.png"
    assert main(["generate", "red", "--model", str(own), "-s", "1", "-o", str(out)]) == 0
    again = ["generate", "--from-metadata", str(out), "-o", str(tmp_path / "b.png"), "--model"]
    assert main([*again, str(own)]) == 0
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(out))
    capsys.readouterr()
    assert main([*again, str(bundles["sd15"])]) == 2
    assert "drawn with tiny-sd3, this is tiny-sd15" in capsys.readouterr().err
    assert main([*again, str(bundles["sd3"])]) == 2
    assert "another export of tiny-sd3" in capsys.readouterr().err


def test_prompt_file(bundles, tmp_path):
    (tmp_path / "prompt.txt").write_text("red\n", encoding="utf-8-sig")
    model = ["--model", str(bundles["sd15"]), "-s", "1"]
    assert main(["generate", "--prompt-file", str(tmp_path / "prompt.txt"), *model, "-o", str(tmp_path / "a.png")]) == 0
    assert main(["generate", "red", *model, "-o", str(tmp_path / "b.png")]) == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a PROMPT"),
        (["red", "--steps", "0"], "steps must be from 1"),
        (["red", "-W", "24", "-H", "24"], "python -m export nobody/tiny"),
        (["red", "--provider", "npu"], "unknown provider 'npu'"),
        (["red", "--provider", "migraphx"], "pip install onnxruntime-migraphx"),
        (["red", "--provider-option", "fast"], "is not KEY=VALUE"),
        (["red", "-o", "nowhere/a.png"], "cannot be written"),
        (["red", "--table", "nothing.json"], "nothing.json"),
        (["red", "--solver", ""], "unknown solver ''"),
        (["red", "--model", ""], "the model is an empty text"),
        (["--prompt-file", "nothing.txt"], "nothing.txt"),
        (["red", "--from-metadata", "nothing.png"], "nothing.png"),
    ],
)
def test_a_mistake_is_one_line_and_2(bundles, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model", str(bundles["sd3"]), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not list(tmp_path.iterdir())


def test_an_empty_output_is_refused(bundles, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "red", "--model", str(bundles["sd3"]), "-o", ""])
    assert ended.value.code == 2
    assert "is empty; give a path" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_to_inspect_is_refused(capsys):
    assert main(["inspect", ""]) == 2
    assert "the model is an empty text" in capsys.readouterr().err


def test_a_console_that_has_not_the_letters_of_a_path(bundles, tmp_path):
    command = [sys.executable, "-m", "runtime", "generate", "red", "--model", bundles["sd3"], "-o", tmp_path / "東.png"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").strip().endswith("\\u6771.png")


def test_steps_that_the_first_table_has_not_name_another_solver(tmp_path, capsys):
    table = epd.start_table(epd.schedule.flow(3, 3.0), 2)
    folder = tiny_bundle.bundle(tmp_path / "b", "sd3", tables=[("t.json", table)])
    drawn = ["generate", "red", "--model", str(folder), "-o", str(tmp_path / "a.png"), "--steps", "5"]
    assert main(drawn) == 2
    assert "--solver euler" in capsys.readouterr().err
    assert main([*drawn, "--solver", "euler"]) == 0


def test_from_metadata_tells_another_provider_and_precision(bundles, tmp_path, caplog):
    file, other = tmp_path / "a.png", tmp_path / "b.png"
    assert main(["generate", "red", "--model", str(bundles["sd3"]), "-o", str(file)]) == 0
    again = ["generate", "--from-metadata", str(file), "--model", str(bundles["sd3"]), "-o", str(other)]
    assert main(again) == 0
    assert not caplog.messages
    with Image.open(file) as image:
        line = image.info["parameters"].replace("CPUExec", "CUDAExec").replace("Precision: fp32", "Precision: fp16")
        png.save(image, file, line)
    assert main(again) == 0
    (told,) = caplog.messages
    assert "Precision fp16 (here fp32), Provider CUDAExecutionProvider (here CPUExecutionProvider)" in told


def test_ctrl_c_is_130_and_one_line(bundles, tmp_path, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.pipeline.Pipeline.draw", stop)
    out = tmp_path / "a.png"
    assert main(["generate", "red", "--model", str(bundles["sd3"]), "-o", str(out)]) == 130
    assert capsys.readouterr().err.strip().splitlines() == ["stopped"]
    assert not out.exists()


def test_inspect(bundles, capsys):
    assert main(["inspect", str(bundles["sd3"]), "--verify"]) == 0
    text = capsys.readouterr().out
    for words in ("tiny-sd3: sd3, flow", "transformer", "opset 18", "parity 1.0e-06", "every SHA-256 agrees"):
        assert words in text
    assert main(["inspect", str(bundles["sd3"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "sd3"
    assert main(["inspect", str(bundles["optimum"])]) == 0
    assert "no bundle.json" in capsys.readouterr().out


def test_inspect_verify_finds_a_changed_byte(bundles, tmp_path, capsys):
    folder = shutil.copytree(bundles["sd3"], tmp_path / "copy")
    graph = folder / "vae_decoder" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[-20] ^= 1
    graph.write_bytes(content)
    assert main(["inspect", str(folder)]) == 0
    assert main(["inspect", str(folder), "--verify"]) == 2
    assert "SHA-256 differs" in capsys.readouterr().err


def test_inspect_verify_opens_tokenizers_that_are_not_recorded(bundles, tmp_path, capsys):
    folder = shutil.copytree(bundles["sd3"], tmp_path / "copy")
    tiny_bundle.change(folder, files=())
    assert main(["inspect", str(folder), "--verify"]) == 0
    assert "no others are recorded" in capsys.readouterr().out
    shutil.rmtree(folder / "tokenizer_2")
    assert main(["inspect", str(folder), "--verify"]) == 2
    assert "tokenizer_2: neither tokenizer.json" in capsys.readouterr().err


def test_a_process_ends_with_one_line_and_no_traceback(tmp_path):
    done = run("generate", "red", "--model", tmp_path / "none")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no such folder" in done.stderr


def test_importing_the_runtime_imports_no_torch():
    code = (
        "import sys, runtime.pipeline, runtime.__main__, runtime.record, runtime.inspect\n"
        "barred = {'torch', 'transformers', 'diffusers', 'onnx', 'onnxruntime', 'export', 'shapes'}\n"
        "print(sorted(barred & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom runtime.__main__ import main\n"
        "try: main(['generate', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'PIL', 'tokenizers', 'onnxruntime', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_from_metadata_keeps_what_is_not_asked_for(bundles, tmp_path, capsys):
    def printed(*arguments):
        assert main(["generate", *arguments, "--model", str(bundles["sd3"]), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        return report["solver"], report["steps"], report["total_evaluations"]

    file, other = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    assert printed("red", "--solver", "epd", "-k", "2", "--steps", "5", "-o", file) == ("epd", 5, 15)
    assert printed("--from-metadata", file, "-o", other, "--solver", "euler") == ("euler", 5, 5)
    assert printed("--from-metadata", file, "-o", other, "-k", "3") == ("epd", 5, 20)


@pytest.mark.parametrize("command", [["solvers"], ["solvers", "--json"]])
def test_a_reader_that_has_seen_enough(command):
    """As `head`, which closes the pipe: nothing is said of it."""
    command = [sys.executable, "-m", "runtime", *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == ("", 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_standard_output_is_told():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "runtime", "solvers"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
def test_a_real_ctrl_c(tmp_path):
    folder = tiny_bundle.bundle(tmp_path / "b", "sd3", random_weights=True)  # which is told once it has started
    tiny_bundle.change(folder, schedule=tiny_bundle.SD3_SCHEDULE | {"num_train_timesteps": 300_000})
    out = tmp_path / "a.png"
    command = [sys.executable, "-m", "runtime", "generate", "red", "--model", folder, "--steps", "300000", "-o", out]
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of a shell's background job ignores it
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, heard)
    with process:
        try:
            assert "RANDOM WEIGHTS" in process.stderr.readline()
            time.sleep(2)
            process.send_signal(signal.SIGINT)
            printed, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, printed, told) == (130, "", "stopped\n")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
