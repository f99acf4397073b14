"""Whole training runs, started as a user starts them, and what their metrics say."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import Row
from shardes.engines import empty_model
from shardes.world import free_port

ROOT = Path(__file__).parent.parent


def train(
    directory: Path, ranks: int, prompts: int, tokens: int, members: int, iterations: int, *keys: str, **env: str
) -> list[dict[str, float]]:
    """The metrics of each iteration of a run, but for the first, which warms up.

    Raises:
        RuntimeError: the run failed; says how.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        config.write_text(json.dumps({
            "model": {"path": str(directory.absolute()), "dtype": "float32"},
            "es": {"population_size": members, "iterations": iterations + 1},
            "generation": {"max_new_tokens": tokens},
            "task": {"path": f"{ROOT}/benchmarks/task.py:Lengths"},
            "eval": {"every": 0},
            "run": {"dir": f"{folder}/run"},
        }))  # fmt: skip
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
        command = [*launcher, "--master_port", str(free_port()), "launchers/train.py", str(config), *keys]
        # This process's own share of the cores is not the ranks'.
        own = "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"
        environ = {key: value for key, value in os.environ.items() if key not in own}
        environ |= {"BENCHMARK_PROMPTS": str(prompts), "PYTHONPATH": str(ROOT)} | env
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][1:]


def rows(directory: Path, toy: bool) -> Iterator[Row]:
    """ES's share of an iteration, replicas side by side, gathering per member against per layer."""
    repeats = 1 if toy else 5
    prompts, tokens, members = (2, 4, 2) if toy else (32, 64, 8)
    found = train(directory, 1, prompts, tokens, members, repeats)
    parts = ("perturb", "restore", "update", "exchange")
    shares = [sum(row[f"seconds_{part}"] for part in parts) / row["seconds_generate"] for row in found]
    shown = ", ".join(f"{part} {statistics.median(row[f'seconds_{part}'] for row in found):.2f} s" for part in parts)
    sent = statistics.median(row["exchanged_bytes"] for row in found)
    generation = statistics.median(row["seconds_generate"] for row in found)
    note = f"{shown}; generation {generation:.1f} s; {sent:.0f} bytes through the store"
    what = f"ES overhead, {prompts} prompts × {tokens} tokens, N = {members}"
    yield Row("overhead", what, "the iteration's generation time", 0.05, shares, at_most=True, note=note)

    weights = 4 * sum(param.numel() for param in empty_model(directory, torch.float32).parameters())
    peaks = [row["peak_resident_bytes"] / weights for row in found]
    shown = f"{found[-1]['peak_resident_bytes'] / 2**20:.0f} MiB; live weights and center alone are 2"
    yield Row("resident", "peak resident set of that run", "the weights, float32", None, peaks, note=shown)

    prompts, tokens = (2, 4) if toy else (8, 32)
    one = train(directory, 1, prompts, tokens, members, repeats, OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1")
    two = train(directory, 2, prompts, tokens, members, repeats)
    found = [a["seconds"] / b["seconds"] for a, b in zip(one, two, strict=True)]
    idle = statistics.median(row["seconds_idle"] for row in two)
    note = f"{members} members; idle at the end {idle:.2f} s of {statistics.median(r['seconds'] for r in two):.1f} s"
    yield Row("replicas", "members/s, 2 replicas on two cores", "1 replica on one core", 1.8, found, note=note)

    prompts, tokens = (2, 4) if toy else (4, 12)
    each = {}
    for gather in ("member", "layer"):
        found = train(directory, 2, prompts, tokens, 2, repeats, "sharding.shard=2", f"sharding.gather={gather}")
        each[gather] = [(row["seconds_gather"] + row["seconds_generate"]) / 2 for row in found]
    found = [layer / member for layer, member in zip(each["layer"], each["member"], strict=True)]
    note = ", ".join(f"{gather} {statistics.median(times):.2f} s" for gather, times in each.items()) + " per member"
    yield Row("gather", "ZeRO 2, gather: member", "per-layer hooks", 8, found, note=note)
