"""Whole iterations on a GPU, of runs that are started as a user starts them."""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu import Figure
from benchmarks.measure import environment_with

ROOT = Path(__file__).parent.parent
ES_PARTS = ("perturb", "restore", "update", "exchange")
LOW_RANK = ("es.noise=low_rank", "es.rank=1")


def train(part, size: str, ranks: int, members: int, prompts: int, tokens: int, *keys: str):
    """The metrics of each of a run's iterations but the first, and seconds before that one.

    Raises:
        RuntimeError: the run failed; has the end of its output.
    """
    directory = part.directory(size)
    if part.device == "cuda":
        torch.cuda.empty_cache()  # the run needs the memory
    with tempfile.TemporaryDirectory(dir=part.work) as folder:
        config = Path(folder, "config.yaml")
        config.write_text(json.dumps({
            "model": {"path": str(directory), "dtype": "bfloat16"},
            "es": {"population_size": members, "iterations": 3},
            "generation": {"max_new_tokens": tokens},
            "task": {"path": f"{ROOT}/benchmarks/task.py:Lengths"},
            "eval": {"every": 0},
            "checkpoint": {"every": 0},
            "run": {"dir": f"{folder}/run"},
        }))  # fmt: skip
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
            launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        variables = {"BENCHMARK_PROMPTS": str(prompts)}
        if part.device == "cpu":
            variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        start = time.perf_counter()
        done = subprocess.run(
            [*launcher, "launchers/train.py", str(config), *keys],
            cwd=ROOT,
            env=environment_with(ROOT, **variables),
            capture_output=True,
            text=True,
            timeout=max(part.seconds_left, 1),
        )
        wall = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(" ".join(f"{done.stdout}\n{done.stderr}".split())[-600:])
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    return metrics[1:], wall - sum(row["seconds"] for row in metrics)


def iteration(part) -> Iterator[Figure]:
    """Iterations of each size; ES's share of them; the time to start."""
    members, prompts, tokens = (2, 2, 4) if part.toy else (8, 16, 64)
    cases = [
        ("135M", "deepspeed", ()),
        ("1B", "deepspeed", ()),
        ("1B", "fsdp", ()),
        ("1B", "fsdp", LOW_RANK),
        ("8B", "fsdp", LOW_RANK),
        ("8B", "deepspeed", ()),
    ]
    if importlib.util.find_spec("deepspeed") is None:
        cases = [case for case in cases if case[1] == "fsdp"] + [("8B", "fsdp", ())]
    for size, engine, keys in cases:
        what = f"{size}, {engine}, {'low rank' if keys else 'full noise'}"
        if part.seconds_left < 20:
            yield Figure("iteration", what, "s", note="no time was left")
            continue
        try:
            metrics, rest = train(
                part, size, 1, members, prompts, tokens, f"engine={engine}", *keys
            )
        except subprocess.TimeoutExpired as error:
            yield Figure("iteration", what, "s", note=f"took more than {error.timeout:.0f} s")
            continue
        except RuntimeError as error:
            yield Figure("iteration", what, "s", note=str(error))
            continue
        yield from _figures(what, metrics, rest, members, prompts, tokens)


def _figures(what, metrics, rest, members, prompts, tokens) -> Iterator[Figure]:
    def median(name: str) -> float:
        return statistics.median(row[name] for row in metrics)

    parts = ", ".join(
        f"{name} {median(f'seconds_{name}'):.3g} s" for name in ("generate", "gather", *ES_PARTS)
    )
    whole = f"{what}: iteration of {members} × {prompts} × {tokens} tokens"
    yield Figure("iteration", whole, "s", [row["seconds"] for row in metrics], note=parts)
    generated = [row["generated_tokens"] / row["seconds"] for row in metrics]
    yield Figure("iteration", f"{what}: tokens", "tokens/s", generated)
    overhead = [
        100 * sum(row[f"seconds_{name}"] for name in ES_PARTS) / row["seconds_generate"]
        for row in metrics
    ]
    yield Figure("iteration", f"{what}: ES beside generation", "%", overhead)
    memory = f"peak resident memory {median('peak_resident_bytes') / 1e9:.3g} GB"
    yield Figure("iteration", f"{what}: before and after iterations", "s", [rest], note=memory)


def gather(part) -> Iterator[Figure]:
    """Gathering once per member, and layer by layer, over two devices."""
    devices = torch.cuda.device_count() if part.device == "cuda" else 2
    if devices < 2:
        yield Figure("gather", "shard 2", "s", note="needs two devices")
        return
    size, members, prompts, tokens = ("1B", 2, 2, 4) if part.toy else ("1B", 4, 16, 32)
    times = {}
    for mode in ("member", "layer"):
        keys = ("engine=fsdp", "sharding.shard=2", f"sharding.gather={mode}")
        metrics, _ = train(part, size, 2, members, prompts, tokens, *keys)
        times[mode] = [
            (row["seconds_gather"] + row["seconds_generate"]) / members for row in metrics
        ]
        note = f"of which gathering {metrics[-1]['seconds_gather'] / members:.3g} s"
        if mode == "member":
            first = note
    what = f"{size}, FSDP 2, a member of {prompts} × {tokens} tokens, gather: member"
    yield Figure("gather", what, "s", times["member"], "layer", times["layer"], first)
