"""Whole runs on the device, whose journals the CPU replays to the bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import NO_GPU, ROOT, run
from outcome import TASK, rows, settings

pytestmark = pytest.mark.gpu
SHARDES = [sys.executable, "-m", "shardes.commands.cli"]
LOW_RANK = ("es.noise=low_rank", "es.rank=2")
RUNS = {  # ranks, keys
    "1 rank": (1, ["engine=deepspeed"]),
    "FSDP, low rank, side by side": (1, ["engine=fsdp", *LOW_RANK]),
    "2 replicas": (2, ["engine=deepspeed"]),
    "ZeRO 2, by layer, low rank": (2, ["sharding.shard=2", "sharding.gather=layer", *LOW_RANK]),
    "FSDP, TP 2": (2, ["engine=fsdp", "sharding.tensor=2"]),
}


def train(config: str, ranks: int, *keys: str) -> list[str]:
    """The command of a run, by torchrun if it has several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [*launcher, "launchers/train.py", config, *keys]


def configure(model: Path, folder: Path, name: str) -> tuple[str, Path]:
    """A config file and the run's directory."""
    (folder / "task.py").write_text(TASK)
    keys = settings(model, folder, folder / name)
    keys["model"]["dtype"] = "bfloat16"
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(keys))
    return str(file), folder / name


@pytest.fixture(scope="module")
def finished(device, environ, pool, biased_qwen, chosen, tmp_path_factory):
    """The runs to come: (their directories, what the commands returned)."""
    folder = tmp_path_factory.mktemp("runs")

    def start(number: int, ranks: int, keys: list[str]):
        config, directory = configure(biased_qwen, folder, f"run{number}")
        return directory, run(train(config, ranks, *keys), 280, **environ)

    futures = {
        name: pool.submit(start, i, *RUNS[name])
        for i, name in enumerate(RUNS)
        if name in chosen | {"1 rank"}
    }
    yield lambda name: futures[name].result()
    for future in futures.values():
        future.cancel()


@pytest.mark.parametrize("name", RUNS)
def test_the_cpu_replays_the_devices_centers(device, finished, name):
    directory, done = finished(name)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    verified = run([*SHARDES, "journal", str(directory), "verify"], 120, **NO_GPU)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    metrics = rows(directory / "metrics.jsonl")
    assert len(metrics) == 5 and all(row["reward_std"] > 0 for row in metrics)
    world = json.loads((directory / "logs/attempt_1/environment.json").read_text())["world"]
    assert (world["device"] == "cpu") == (device.type == "cpu")


def center(directory: Path) -> str:
    return json.loads((directory / "summary.json").read_text())["digest"]


def test_a_killed_run_arrives_at_the_same_center(environ, finished, biased_qwen, tmp_path):
    undisturbed, _ = finished("1 rank")
    config, directory = configure(biased_qwen, tmp_path, "killed")
    process = subprocess.Popen(
        train(config, 1, "engine=deepspeed"), cwd=ROOT, env=os.environ | environ,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline, journal = time.monotonic() + 120, directory / "journal.jsonl"
        while not (journal.exists() and '"iteration"' in journal.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, "no iteration was made"
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert '"finish"' not in journal.read_text()
    done = run(train(config, 1, "engine=deepspeed"), 200, **environ)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert center(directory) == center(undisturbed)


def test_an_export_loads_and_answers_as_the_run(device, finished, tmp_path, record_property):
    directory, _ = finished("1 rank")
    done = run([*SHARDES, "export", str(directory), str(tmp_path / "out")], 120, **NO_GPU)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").to(device)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    samples = [row for row in rows(directory / "samples.jsonl") if row["iteration"] == 5]
    equal = 0
    for row in samples:
        prompt = tokenizer(row["prompt"], return_tensors="pt").to(device)
        out = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0]
        text = tokenizer.decode(out[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        equal += text == row["response"]
    record_property("the export's responses that are the run's, %", 100 * equal / len(samples))
    assert samples and equal
