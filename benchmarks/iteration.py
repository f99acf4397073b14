"""Metrics of whole training runs, which are started as a user starts them."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import Row, environment_with
from shardes.distributed.ports import free_port
from shardes.engines import empty_model

ROOT = Path(__file__).parent.parent


def train(
    directory: Path,
    ranks: int,
    prompts: int,
    tokens: int,
    members: int,
    iterations: int,
    *keys: str,
    **env: str,
) -> list[dict[str, float]]:
    """The metrics of each iteration of a run, except the first, which warms up.

    Raises:
        RuntimeError: the run failed; has the end of its output.
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
        command = [
            *launcher,
            "--master_port",
            str(free_port()),
            "launchers/train.py",
            str(config),
            *keys,
        ]
        # The ranks set their own numbers of threads.
        environ = environment_with(ROOT, BENCHMARK_PROMPTS=str(prompts))
        done = subprocess.run(
            command, cwd=ROOT, env=environ | env, capture_output=True, text=True, timeout=1800
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][1:]


def rows(directory: Path, toy: bool) -> Iterator[Row]:
    repeats = 1 if toy else 5
    yield from _one_replica(directory, toy, repeats)
    yield _two_replicas(directory, toy, repeats)
    yield _gather(directory, toy, repeats)
    for gather, target in (("member", 4), ("layer", 10)):
        yield _low_rank(directory, toy, gather, target)


def _one_replica(directory: Path, toy: bool, repeats: int) -> Iterator[Row]:
    """ES's share of an iteration, and the memory."""
    prompts, tokens, members = (2, 4, 2) if toy else (32, 64, 8)
    metrics = train(directory, 1, prompts, tokens, members, repeats)
    parts = ("perturb", "restore", "update", "exchange")
    shares = [
        sum(row[f"seconds_{part}"] for part in parts) / row["seconds_generate"] for row in metrics
    ]
    times = ", ".join(f"{part} {_median(metrics, f'seconds_{part}'):.2f} s" for part in parts)
    note = (
        f"{times}; generation {_median(metrics, 'seconds_generate'):.1f} s; "
        f"{_median(metrics, 'exchanged_bytes'):.0f} bytes through the store"
    )
    what = f"ES overhead, {prompts} prompts × {tokens} tokens, N = {members}"
    against = "the iteration's generation time"
    yield Row("overhead", what, against, 0.05, shares, at_most=True, note=note)

    weights = 4 * sum(param.numel() for param in empty_model(directory, torch.float32).parameters())
    peaks = [row["peak_resident_bytes"] / weights for row in metrics]
    mebibytes = metrics[-1]["peak_resident_bytes"] / 2**20
    note = f"{mebibytes:.0f} MiB; live weights and center alone are 2"
    what = "peak resident set of that run"
    yield Row("resident", what, "the weights, float32", None, peaks, note=note)


def _two_replicas(directory: Path, toy: bool, repeats: int) -> Row:
    prompts, tokens, members = (2, 4, 2) if toy else (8, 32, 8)
    one_thread = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    one = train(directory, 1, prompts, tokens, members, repeats, **one_thread)
    two = train(directory, 2, prompts, tokens, members, repeats)
    values = [a["seconds"] / b["seconds"] for a, b in zip(one, two, strict=True)]
    note = (
        f"{members} members; idle at the end {_median(two, 'seconds_idle'):.2f} s "
        f"of {_median(two, 'seconds'):.1f} s"
    )
    what = "members/s, 2 replicas on two cores"
    return Row("replicas", what, "1 replica on one core", 1.8, values, note=note)


def _gather(directory: Path, toy: bool, repeats: int) -> Row:
    """Gathering once per member, compared with gathering layer by layer."""
    prompts, tokens = (2, 4) if toy else (4, 12)
    times = {}
    for gather in ("member", "layer"):
        keys = "sharding.shard=2", f"sharding.gather={gather}"
        metrics = train(directory, 2, prompts, tokens, 2, repeats, *keys)
        times[gather] = [(row["seconds_gather"] + row["seconds_generate"]) / 2 for row in metrics]
    values = [layer / member for layer, member in zip(times["layer"], times["member"], strict=True)]
    medians = (f"{gather} {statistics.median(each):.2f} s" for gather, each in times.items())
    note = f"{', '.join(medians)} per member"
    return Row("gather", "ZeRO 2, gather: member", "per-layer hooks", 8, values, note=note)


def _low_rank(directory: Path, toy: bool, gather: str, target: float) -> Row:
    """Members with low-rank noise, compared with a few with full noise: seconds per member."""
    prompts, tokens, members, few = (2, 4, 4, 2) if toy else (4, 32, 16, 2)
    keys, seconds = ("sharding.shard=2", f"sharding.gather={gather}"), {}
    for noise, count in (("low_rank", members), ("full", few)):
        metrics = train(
            directory, 2, prompts, tokens, count, 1 if toy else 2, *keys, f"es.noise={noise}"
        )
        seconds[noise] = [(row["seconds"] - row["seconds_update"]) / count for row in metrics]
    values = [full / low for full, low in zip(seconds["full"], seconds["low_rank"], strict=True)]
    medians = (f"{noise} {statistics.median(each):.2f} s" for noise, each in seconds.items())
    what = f"ZeRO 2, gather: {gather}, low rank, N = {members}, {prompts} prompts × {tokens} tokens"
    note = f"{', '.join(medians)} per member; full noise with N = {few}"
    return Row(f"low rank: {gather}", what, "full noise", target, values, note=note)


def _median(metrics: list[dict[str, float]], name: str) -> float:
    return statistics.median(row[name] for row in metrics)
