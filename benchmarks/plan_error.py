"""Compare the planner's times of a CPU with measured iterations of models of three sizes.

    python -m benchmarks.plan_error

One process with one thread makes an iteration of the trainer's own parts: members, decoding, and
the update. Both sides are in CPU seconds, so that a busy machine disturbs them less, and the CPU's
rates are measured anew before each iteration. The weights are random, and every response has all
of its tokens. Prints the table of docs/scaling.md.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.generation import prompts
from benchmarks.plan_table import row
from benchmarks.side_by_side import Population
from shardes.config.schema import Config, DType, ESConfig, Gather, ModelConfig, Noise
from shardes.es.update import Update
from shardes.inference.prompts import encode
from shardes.planning.devices import measured_cpu
from shardes.planning.layouts import Layout, Machine
from shardes.planning.shapes import read_shapes
from shardes.planning.time import Estimate
from shardes.planning.workload import Workload

TOKENIZER = Path("models/SmolLM2-135M-Instruct")
SIZES = {  # layers, hidden size, intermediate size, heads, key-value heads
    "46M": (8, 512, 1408, 8, 4),
    "135M": (30, 576, 1536, 9, 3),
    "362M": (32, 960, 2560, 15, 5),
}
LOADS = ((2, 16), (8, 8))  # prompts, new tokens
MEMBERS = 2


def make(directory: Path, sizes: tuple[int, ...]) -> None:
    """A model with random weights and SmolLM2's tokenizer."""
    layers, hidden, intermediate, heads, key_value_heads = sizes
    torch.manual_seed(0)
    config = LlamaConfig(
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
        return time.process_time() - began

    device = measured_cpu(1, torch.float32, time.process_time)
    lengths = tuple(map(len, encoded))
    work = Workload(lengths, lengths[:1], tokens, 65536, MEMBERS if low_rank else 1)
    machine, layout = Machine(1, 1, None, 1 << 40), Layout(1, 1, 1, Gather.member)
    planned = Estimate(model, layout, work, es, tokens, device, machine).seconds().total
    iteration()
    return planned, iteration()


def table() -> Iterator[str]:
    yield row(["parameters", "noise", "prompts × tokens", "planned", "measured", "ratio"])
    yield row(["---"] * 6)
    for name, sizes in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), sizes)
            for noise in Noise:
                for count, tokens in LOADS:
                    planned, measured = compare(Path(folder), noise, count, tokens)
                    cells = [name, noise.value, f"{count} × {tokens}", f"{planned:.2f} s"]
                    yield row([*cells, f"{measured:.2f} s", f"{measured / planned:.2f}"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in table():
        print(line, flush=True)
    sys.exit(0)
