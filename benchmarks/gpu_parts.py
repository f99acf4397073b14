"""The parts of benchmarks/gpu.py: python -m benchmarks.gpu_parts PART --device D --work DIR"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import gpu_iteration, random_model
from benchmarks.generation import vllm_rates
from benchmarks.gpu import PREFIX, Figure
from benchmarks.side_by_side import Population
from shardes.clock import Clock
from shardes.config.schema import Restore
from shardes.distributed import environment
from shardes.engines.linear import use_own_forward
from shardes.es.center import open_center
from shardes.es.population import Member
from shardes.es.update import Update, noise_kind
from shardes.inference.generation import Decoder
from shardes.noise import _kernel, add_noise
from shardes.sharding.regions import ParameterShard, Region
from shardes.sharding.weight_files import WeightFiles

SIGMA = 0.001
MEMBERS = 30  # of an update


class Part:
    """A device, a folder for models, and the time that is left."""

    def __init__(self, options: argparse.Namespace):
        self.device, self.work, self.toy = options.device, options.work, options.device == "cpu"
        self._deadline = time.monotonic() + options.seconds

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def times(self, *works: Callable[[], object], repeats: int = 10) -> list[list[float]]:
        """Seconds of each repeat of each of several works, which take turns.

        One call of each is not measured. There are fewer repeats, but two, of what takes long.
        """
        for work in works:
            work()
        seconds: list[list[float]] = [[] for _ in works]
        start = time.perf_counter()
        while len(seconds[0]) < 2 or (
            len(seconds[0]) < repeats and time.perf_counter() - start < 12 and self.seconds_left > 0
        ):
            for work, made in zip(works, seconds, strict=True):
                made.append(self.seconds(work))
        return seconds

    def directory(self, size: str) -> Path:
        return random_model.directory(self.work, size, self.device, self.toy)


def rates(amount: float, times: Sequence[float]) -> list[float]:
    return [amount / seconds for seconds in times]


def copy_bandwidth(part: Part) -> list[float]:
    """GB/s of a copy on the device, read and written bytes counted."""
    x = torch.randn(1 << (20 if part.toy else 28), device=part.device)
    y = torch.empty_like(x)
    (times,) = part.times(lambda: y.copy_(x))
    return rates(8e-9 * x.numel(), times)


class Weights:
    """A float32 center and bfloat16 live weights on the device, with the shapes of a model."""

    def __init__(self, part: Part, size: str):
        with torch.device("meta"):
            model = random_model.model(size, "meta", part.toy, torch.bfloat16)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.center = {
            name: torch.randn(prod(shape), device=part.device) * 0.02
            for name, shape in self.shapes.items()
        }
        self.live = {name: theta.bfloat16() for name, theta in self.center.items()}
        self.size = sum(theta.numel() for theta in self.center.values())
        kernel = _kernel(torch.device(part.device)).__name__.rpartition(".")[2]
        self.note = f"{size}: {self.size / 1e6:.0f}M parameters, kernel {kernel}"

    def add(self, seeds: Sequence[int], coefficient: float, rank: int, in_place: bool) -> None:
        for name, theta in self.center.items():
            kind, out = noise_kind(rank, self.shapes[name]), theta if in_place else self.live[name]
            regions = [Region.contiguous(0, theta.numel())]
            add_noise(theta, name, regions, seeds, [coefficient] * len(seeds), out, kind)

    def read(self, name: str, regions: Sequence[Region], out: torch.Tensor) -> None:
        out.copy_(self.center[name])  # like WeightFiles.read, for whole parameters

    def shards(self) -> list[ParameterShard]:
        return [
            ParameterShard(name, self.shapes[name], x, (Region.contiguous(0, x.numel()),))
            for name, x in self.live.items()
        ]


def noise(part: Part) -> Iterator[Figure]:
    """Perturbing reads 4 and writes 2 bytes per parameter, updating reads and writes 4."""
    copy = copy_bandwidth(part)
    yield Figure("noise", "copy", "GB/s", copy)
    against = "the copy's GB/s"
    weights, members = Weights(part, "1B"), 4 if part.toy else MEMBERS
    for rank in (0, 1):
        kind = f"low rank, r = {rank}" if rank else "full noise"
        (times,) = part.times(lambda rank=rank: weights.add([7], SIGMA, rank, False))
        values = rates(6e-9 * weights.size, times)
        what = f"perturb, {kind}, center on the device"
        yield Figure("noise", what, "GB/s", values, against, copy, weights.note)
        (times,) = part.times(lambda rank=rank: weights.add(range(members), 1e-6, rank, True))
        values, median = rates(8e-9 * weights.size, times), sorted(times)[len(times) // 2]
        note = f"{1e3 * median / members:.3g} ms per member"
        note += f", {weights.size * members / median / 1e9:.3g} G elements/s"
        yield Figure("noise", f"update, N = {members}, {kind}", "GB/s", values, against, copy, note)
    yield from _center(part, weights, copy, members)


def _center(part: Part, weights: Weights, copy: list[float], members: int) -> Iterator[Figure]:
    """What a run makes of it, with its center in host memory."""
    world = SimpleNamespace(device=torch.device(part.device), sum=lambda *values: list(values))
    shards = weights.shards()
    center = open_center(Restore.copy, shards, world, weights)
    place = "host" if center.values(shards[0]).device.type == "cpu" else "the device"

    def perturb() -> None:
        with center.perturbed(Member(7, SIGMA)):
            pass

    update = Update(range(members), [1e-6] * members)
    for what, amount, work in (
        (f"perturb, center on {place}", 6e-9, perturb),
        (f"update, N = {members}, center on {place}", 8e-9, lambda: center.update(update)),
    ):
        (times,) = part.times(work)
        note = f"as a run does it: {1e3 * sorted(times)[len(times) // 2]:.3g} ms"
        values = rates(amount * weights.size, times)
        yield Figure("noise", what, "GB/s", values, "the copy's GB/s", copy, note)


def decode(part: Part) -> Iterator[Figure]:
    """Tokens/s of greedy decoding, every response of the same length."""
    cases = {"1B": (1, 8, 32, 128, 512), "8B": (32, 512)}
    new_tokens, length = (6, 5) if part.toy else (64, 64)
    for size, counts in cases.items():
        model = random_model.model(size, part.device, part.toy, torch.bfloat16)
        model.generation_config.eos_token_id = None
        # The same weights, with the layers of transformers
        shared: dict[int, Any] = {id(param): param for param in model.parameters()}
        plain = deepcopy(model, shared)
        use_own_forward(model)
        decode = Decoder(random_model.tokenizer(), new_tokens, frozenset(), (), 1 << 24)
        generator = torch.Generator().manual_seed(0)
        for count in counts:
            ids = torch.randint(256, (count, length), generator=generator)
            prompts, ids = ids.tolist(), ids.to(part.device)
            mask = torch.ones_like(ids)
            generate = partial(plain.generate, do_sample=False, max_new_tokens=new_tokens)
            if part.seconds_left < 20:
                return
            own, other = part.times(
                partial(decode, model, prompts),
                partial(generate, input_ids=ids, attention_mask=mask),
                repeats=4,
            )
            tokens = count * new_tokens
            what = f"{size}, {count} rows × {new_tokens} tokens"
            values, baseline = rates(tokens, own), rates(tokens, other)
            note = f"{1e3 * min(own) / new_tokens:.3g} ms per step"
            yield Figure("decode", what, "tokens/s", values, "generate", baseline, note)
            if size == "1B" and importlib.util.find_spec("vllm"):
                yield _vllm(part, size, what, prompts, new_tokens, values)
        del model, plain


def _vllm(part, size, what, prompts, new_tokens, values) -> Figure:
    directory = part.directory(size)
    baseline, note = vllm_rates(sys.executable, directory, prompts, new_tokens, "bfloat16", 3)
    return Figure("decode", what, "tokens/s", values if baseline else [], "vLLM", baseline, note)


def members(part: Part) -> Iterator[Figure]:
    """Members/s: low rank side by side, against full noise one after another."""
    count, new_tokens = (2, 4) if part.toy else (4, 32)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(256, (count, 48), generator=generator).tolist()
    for size in ("1B", "135M"):
        population = Population(part.directory(size), 1, part.device, torch.bfloat16)
        decode = population.decoder(new_tokens)
        alone = 2 if part.toy else 8  # their rate does not depend on their number
        for number in (3,) if part.toy else (16, 64):
            if part.seconds_left < 20:
                return
            together, apart = part.times(
                partial(population.together, decode, prompts, number),
                partial(population.one_after_another, decode, prompts, alone),
                repeats=5,
            )
            what = f"{size}, N = {number}, {count} prompts × {new_tokens} tokens, low rank"
            values, baseline = rates(number, together), rates(alone, apart)
            yield Figure("members", what, "members/s", values, "full noise", baseline)
            yield _term(part, population, decode, prompts, number, size)
        del population


def _term(part, population, decode, prompts, number, size) -> Figure:
    """What the low-rank term adds to the time of a batch."""
    with population.side_by_side.members([Member(s, SIGMA) for s in range(number)], Clock()):
        with_term, without = part.times(
            lambda: population._decode(decode, prompts, number),
            lambda: decode(population.model, [*prompts] * number),
            repeats=5,
        )
    what = f"{size}, {number * len(prompts)} rows with the low-rank term"
    return Figure("members", what, "s", with_term, "without", without)


def load(part: Part) -> Iterator[Figure]:
    """Reading a model's files into the center, float32 on the host."""
    files = WeightFiles(part.directory("1B"))
    sizes = {name: info.numel for name, info in files.tensors.items()}
    pinned = part.device == "cuda"
    center = {name: torch.empty(size, pin_memory=pinned) for name, size in sizes.items()}

    def read() -> None:
        for name, theta in center.items():
            files.read(name, [Region.contiguous(0, theta.numel())], theta)

    (times,) = part.times(read, repeats=3)
    values = rates(2e-9 * sum(sizes.values()), times)
    note = "files in the page cache; bytes of the files, bfloat16"
    yield Figure("load", "1B, files to a float32 center", "GB/s", values, note=note)


PARTS: dict[str, Callable[[Part], Iterator[Figure]]] = {
    "noise": noise,
    "decode": decode,
    "members": members,
    "load": load,
    "gather": gpu_iteration.gather,
    "iteration": gpu_iteration.iteration,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args(argv)
    for figure in PARTS[options.part](Part(options)):
        print(PREFIX + json.dumps(asdict(figure)), flush=True)
    return 0


if __name__ == "__main__":
    environment.run(main)
