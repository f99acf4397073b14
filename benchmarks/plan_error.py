"""Compare the planner's times of a CPU with measured iterations of models of three sizes.

    python -m benchmarks.plan_error [--runs]

One process with one thread makes an iteration of the trainer's own parts: members, decoding, and
the update with its digest. With `--runs`, models of three other sizes, which the planner was not
fitted to, are trained by `shardes train`, and the time from one iteration to the next is compared
with the plan of the same config. Both sides are in CPU seconds, so that a busy machine disturbs
them less, and the CPU's rates are measured anew. The weights are random, and every response has all
of its tokens. Prints the tables of docs/plan.md.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.generation import prompts
from benchmarks.plan_table import row
from benchmarks.side_by_side import Population
from shardes.config.loading import load
from shardes.config.schema import Config, DType, ESConfig, Gather, ModelConfig, Noise
from shardes.es.update import Update
from shardes.inference.prompts import encode
from shardes.planning.devices import measured_cpu
from shardes.planning.layouts import Layout, Machine
from shardes.planning.planner import Planner
from shardes.planning.shapes import read_shapes
from shardes.planning.time import Estimate
from shardes.planning.workload import Workload, read_workload
from shardes.sharding.digest import digest

TOKENIZER = Path("models/SmolLM2-135M-Instruct")
SIZES = {  # layers, hidden size, intermediate size, heads, key-value heads
    "46M": (8, 512, 1408, 8, 4),
    "135M": (30, 576, 1536, 9, 3),
    "362M": (32, 960, 2560, 15, 5),
}
LOADS = ((2, 16), (8, 8))  # prompts, new tokens
MEMBERS = 2
RUN_SIZES = {  # of whole runs: other shapes and sizes than those above
    "28M": (6, 384, 1024, 6, 2),
    "104M": (16, 640, 1728, 10, 5),
    "259M": (24, 896, 2432, 14, 7),
}
RUN_LOAD = (4, 12)
ITERATIONS = 5  # of a run; the first is not measured, as it loads kernels and allocates memory
# Its rewards differ, so that updates have terms. Its first call of each iteration is a time mark.
TASK = """
import json, time
from benchmarks.generation import prompts

class Letters:
    def prompts(self, split):
        return prompts(COUNT if split == "train" else 1)
    def score(self, split, responses):
        with open("MARKS", "a") as file:
            file.write(json.dumps([split, time.process_time()]) + "\\n")
        return [float(sum(map(ord, text)) % 97) for text in responses]
"""


def make(directory: Path, sizes: tuple[int, ...]) -> None:
    """A model with random weights and SmolLM2's tokenizer."""
    layers, hidden, intermediate, heads, key_value_heads = sizes
    torch.manual_seed(0)
    config = LlamaConfig(
        eos_token_id=None,
        vocab_size=49152,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for pattern in ("*token*", "*.jinja", "vocab.json", "merges.txt"):
        for file in TOKENIZER.glob(pattern):
            shutil.copy(file, directory)


def compare(directory: Path, noise: Noise, count: int, tokens: int) -> tuple[float, float]:
    """The CPU seconds of an iteration of `count` prompts: planned and measured."""
    es = ESConfig(population_size=MEMBERS, noise=noise)
    model, _ = read_shapes(Config(model=ModelConfig(str(directory), DType.float32), es=es))
    low_rank = noise is Noise.low_rank
    population = Population(directory, es.rank)
    encoded, decode = encode(population.tokenizer, prompts(count)), population.decoder(tokens)
    answer = population.together if low_rank else population.one_after_another
    update = Update(range(MEMBERS), [1e-6] * MEMBERS, rank=es.rank if low_rank else 0)

    def iteration() -> float:
        began = time.process_time()
        answer(decode, encoded, MEMBERS)
        population.center.update(update)
        for part in population.center.parts():
            digest(*part)
        return time.process_time() - began

    device = measured_cpu(1, torch.float32, time.process_time)
    lengths = tuple(map(len, encoded))
    work = Workload(lengths, lengths[:1], tokens, 65536, MEMBERS if low_rank else 1)
    machine, layout = Machine(1, 1, None, 1 << 40), Layout(1, 1, 1, Gather.member)
    planned = Estimate(model, layout, work, es, tokens, device, machine).seconds().total
    iteration()
    return planned, iteration()


def models(sizes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Path]]:
    """Each model's name and directory, which lasts until the next one."""
    for name, size in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), size)
            yield name, Path(folder)


def table() -> Iterator[str]:
    yield row(["parameters", "noise", "prompts × tokens", "planned", "measured", "ratio"])
    yield row(["---"] * 6)
    for name, folder in models(SIZES):
        for noise in Noise:
            for count, tokens in LOADS:
                planned, measured = compare(folder, noise, count, tokens)
                cells = [name, noise.value, f"{count} × {tokens}", f"{planned:.2f} s"]
                yield row([*cells, f"{measured:.2f} s", f"{measured / planned:.2f}"])


def train(directory: Path, noise: Noise) -> tuple[float, list[float]]:
    """The CPU seconds of an iteration of `shardes train`, planned, and those of each measured."""
    count, tokens = RUN_LOAD
    marks, task, file = (directory / name for name in ("marks.jsonl", "task.py", "config.yaml"))
    marks.unlink(missing_ok=True)
    task.write_text(TASK.replace("COUNT", str(count)).replace("MARKS", str(marks)))
    settings = {
        "model": {"path": str(directory), "dtype": "float32"},
        "es": {"population_size": MEMBERS, "iterations": ITERATIONS, "noise": noise.value},
        "generation": {"max_new_tokens": tokens},
        "task": {"path": f"{task}:Letters"},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "run": {"dir": str(directory / noise.value)},
    }
    file.write_text(yaml.safe_dump(settings))
    config = load(str(file), [])
    work = read_workload(config, None, None)
    totals = []

    def plan() -> None:
        device = measured_cpu(1, torch.float32, time.process_time)
        planner = Planner(config, work, Machine(1, 1, None, 1 << 40), device, tokens)
        totals.append(planner.estimate(planner.configured()).seconds().total)

    plan()
    command = [sys.executable, "-m", "shardes.commands.cli", "train", str(file)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    done = subprocess.run(command, env=os.environ | one_thread, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    plan()
    journal = (directory / noise.value / "journal.jsonl").read_text().splitlines()
    records = [line for line in map(json.loads, journal) if line["kind"] == "iteration"]
    assert {record["tokens"] for record in records} == {MEMBERS * count * tokens}
    calls = [seconds for split, seconds in map(json.loads, marks.open()) if split == "train"]
    assert len(calls) == MEMBERS * ITERATIONS + 2  # the center is evaluated first and last
    begun = calls[1 + MEMBERS : -1 : MEMBERS]  # from iteration 1 on
    each = [end - begin for begin, end in pairwise(begun)]
    return statistics.mean(totals), each


def runs_table() -> Iterator[str]:
    yield row(["parameters", "noise", "planned", "measured", "of each iteration", "error"])
    yield row(["---"] * 6)
    for name, folder in models(RUN_SIZES):
        for noise in Noise:
            planned, each = train(folder, noise)
            measured = statistics.median(each)
            spread = f"{min(each):.2f} to {max(each):.2f} s"
            cells = [name, noise.value, f"{planned:.2f} s", f"{measured:.2f} s", spread]
            yield row([*cells, f"{planned / measured - 1:+.0%}"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in runs_table() if "--runs" in sys.argv[1:] else table():
        print(line, flush=True)
    sys.exit(0)
