"""Perturbing, restoring and updating, compared with the paper's algorithm and a plain addition."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.measure import Row, median_seconds, ratios, slope
from shardes.config.schema import Restore
from shardes.engines import empty_model
from shardes.es.center import open_center
from shardes.es.population import Member
from shardes.es.update import noise_kind
from shardes.noise import add_noise
from shardes.sharding.regions import ParameterShard, Region, cut

SIGMA, ALPHA = 0.001, 0.0005


class Weights:
    """A model's parameters, `copies` times, in float32 with random values.

    Args:
        separate: whether the center and the live weights are different tensors.
    """

    def __init__(self, directory: Path, copies: int = 1, separate: bool = True):
        shapes = {
            name: param.shape
            for name, param in empty_model(directory, torch.float32).named_parameters()
        }
        self.shapes = {
            f"{name}.{copy}": tuple(shape)
            for copy in range(copies)
            for name, shape in shapes.items()
        }
        self.center = {name: torch.randn(prod(shape)) * 0.02 for name, shape in self.shapes.items()}
        self.live = {
            name: theta.clone() if separate else theta for name, theta in self.center.items()
        }
        self.size = sum(theta.numel() for theta in self.center.values())

    def read(self, name: str, regions: Sequence[Region], out: torch.Tensor) -> None:
        out.copy_(self.center[name])  # like WeightFiles.read, for whole parameters

    def perturb(self, rank: int = 0, ranks: int = 1, noise_rank: int = 0) -> None:
        """Perturb the share of one of several ranks."""
        for name, theta in self.center.items():
            size = -(-theta.numel() // ranks)
            first, last = rank * size, (rank + 1) * size
            regions = cut((Region.contiguous(0, theta.numel()),), first, last)
            live, kind = self.live[name][first:last], noise_kind(noise_rank, self.shapes[name])
            add_noise(theta[first:last], name, regions, [7], [SIGMA], live, kind)

    def update(self, members: int, noise_rank: int = 0) -> None:
        coefficients = [ALPHA / members] * members
        for name, theta in self.center.items():
            region, kind = (
                Region.contiguous(0, theta.numel()),
                noise_kind(noise_rank, self.shapes[name]),
            )
            add_noise(theta, name, (region,), range(members), coefficients, low_rank=kind)

    def papers_perturb(self, sign: float) -> None:
        """Algorithm 2: for every parameter, seed a generator, draw a normal tensor, add it."""
        for x in self.live.values():
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
            x.add_(sign * SIGMA * noise)

    def papers_update(self, members: int) -> None:
        """For every parameter and seed, draw, scale by the reward and sum; then divide and add."""
        for x in self.live.values():
            update = torch.zeros_like(x)
            for seed in range(members):
                noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
                noise.mul_(1.3)
                update.add_(noise)
            update.div_(members)
            x.add_(ALPHA * update)

    def bare_addition(self) -> None:
        for name, x in self.live.items():
            x.add_(self.center[name], alpha=SIGMA)


def rows(directory: Path, toy: bool) -> Iterator[Row]:
    weights, members = Weights(directory), 4 if toy else 30
    yield from _speed(weights, members, 2 if toy else 5)

    # The memory that x += Σ c·ε needs beyond x, as with restore: subtract.
    extra = [_extra_bytes(lambda: weights.update(members)) / (4 * weights.size) for _ in range(5)]
    what = "update in place: extra memory"
    yield Row("memory", what, "the shard's bytes", 0.01, extra, at_most=True)

    sizes, times = [], []
    for copies in (1, 4, 16):
        several = Weights(directory, copies, separate=False)
        sizes.append(several.size)
        times.append(median_seconds(several.perturb))
        del several
    yield _growth("parameters", sizes, times, 1.0)
    ranks = [1, 2, 4]
    times = [median_seconds(partial(weights.perturb, 0, count)) for count in ranks]
    yield _growth("ranks (a rank's share)", ranks, times, -1.0)
    populations = [2, 4, 8] if toy else [8, 32, 128]
    times = [median_seconds(partial(weights.update, count)) for count in populations]
    yield _growth("population size (update)", populations, times, 1.0)


def _speed(weights: Weights, members: int, update_repeats: int) -> Iterator[Row]:
    size = (
        f"{weights.size / 1e6:.0f}M parameters"
        if weights.size > 1e6
        else f"{weights.size} parameters"
    )
    values, time = ratios(weights.perturb, lambda: weights.papers_perturb(1), 5)
    rate = f"{weights.size / time / 1e6:.0f}M normals/s"
    yield Row("perturb", f"perturb, {size}", "randn, add_", 6, values, note=rate)

    shards = [
        ParameterShard(name, x.shape, x, (Region.contiguous(0, x.numel()),))
        for name, x in weights.live.items()
    ]
    center = open_center(Restore.copy, shards, SimpleNamespace(device=torch.device("cpu")), weights)

    def perturb_and_restore():
        with center.perturbed(Member(7, SIGMA)):
            pass

    def papers_loop():
        for sign in (1, -1):
            weights.papers_perturb(sign)

    values, _ = ratios(perturb_and_restore, papers_loop, 5)
    yield Row("restore", "perturb and restore (copy)", "the loop with +σ, then −σ", 12, values)
    values, time = ratios(
        partial(weights.update, members), partial(weights.papers_update, members), update_repeats
    )
    rate = f"{weights.size * members / time / 1e6:.0f}M normals/s"
    yield Row("update", f"update, N = {members}", "randn, mul, add per seed", 10, values, note=rate)
    for rank, target in ((1, 4), (4, None)):
        low_rank, full = partial(weights.update, members, rank), partial(weights.update, members)
        values, time = ratios(low_rank, full, 5)
        what, full_noise = f"update, N = {members}, low-rank noise, r = {rank}", "full noise"
        note = f"{1e3 * time / members:.3g} ms per member"
        yield Row(f"update: low rank {rank}", what, full_noise, target, values, note=note)
    values, _ = ratios(partial(weights.perturb, noise_rank=1), weights.perturb, 5)
    yield Row("perturb: low rank", "perturb, low-rank noise, r = 1", full_noise, None, values)
    values, _ = ratios(weights.bare_addition, weights.perturb, 5)
    addition, note = "a bare x.add_(y, alpha=c)", "times as long"
    yield Row("floor", "perturb", addition, 5, values, at_most=True, note=note)


def _growth(quantity: str, sizes: list, times: list[float], expected: float) -> Row:
    """The exponent with which the time grows with a quantity."""
    pairs = zip(sizes, times, strict=True)
    note = ", ".join(f"{size}: {1e3 * seconds:.3g} ms" for size, seconds in pairs)
    what, exponent = f"time ~ {quantity} to the power of", slope(sizes, times)
    return Row(f"growth: {quantity}", what, f"{expected:+.0f}", None, [exponent], note=note)


def _extra_bytes(work) -> int:
    """By how much the resident set grows while `work` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before = _status("VmRSS")
    work()
    return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
