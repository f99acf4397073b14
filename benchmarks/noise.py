"""Perturb, restore and update, against the paper's description of them and against bare memory."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.measure import Row, median_seconds, ratios, slope
from shardes.center import member, open_center
from shardes.config import Restore
from shardes.engines import empty_model
from shardes.noise import add_noise
from shardes.shards import Region, Shard, cut, run

SIGMA, ALPHA = 0.001, 0.0005


class Weights:
    """A model's parameters with random values, `copies` times: a center and live weights (or one for both), float32."""

    def __init__(self, directory: Path, copies: int = 1, apart: bool = True):
        shapes = {name: param.shape for name, param in empty_model(directory, torch.float32).named_parameters()}
        self.center = {
            f"{name}.{copy}": torch.randn(shape.numel()) * 0.02
            for copy in range(copies)
            for name, shape in shapes.items()
        }
        self.live = {name: theta.clone() if apart else theta for name, theta in self.center.items()}
        self.size = sum(theta.numel() for theta in self.center.values())

    def read(self, name: str, regions: Sequence[Region], out: torch.Tensor) -> None:
        out.copy_(self.center[name])  # as WeightFiles.read, of whole parameters

    def perturb(self, part: int = 0, parts: int = 1) -> None:
        for name, theta in self.center.items():
            share = -(-theta.numel() // parts)
            regions = cut((run(0, theta.numel()),), part * share, (part + 1) * share)
            where = slice(part * share, (part + 1) * share)
            add_noise(theta[where], name, regions, [7], [SIGMA], out=self.live[name][where])

    def update(self, members: int) -> None:
        for name, theta in self.center.items():
            add_noise(theta, name, (run(0, theta.numel()),), range(members), [ALPHA / members] * members)

    def papers_perturb(self, sign: float) -> None:
        """Algorithm 2: for every parameter, a generator seeded anew, a normal tensor, an addition."""
        for x in self.live.values():
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
            x.add_(sign * SIGMA * noise)

    def papers_update(self, members: int) -> None:
        """For every parameter and every seed: draw, scale by the reward, add up; then divide and add."""
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
    """Perturb, perturb and restore, update, the memory floor, extra memory, growth."""
    weights, members = Weights(directory), 4 if toy else 30
    size = f"{weights.size / 1e6:.0f}M parameters" if weights.size > 1e6 else f"{weights.size} parameters"

    found, took = ratios(weights.perturb, lambda: weights.papers_perturb(1), 5)
    rate = f"{weights.size / took / 1e6:.0f}M normals/s"
    yield Row("perturb", f"perturb, {size}", "randn, add_", 6, found, note=rate)

    shards = [Shard(name, x.shape, x, (run(0, x.numel()),)) for name, x in weights.live.items()]
    center = open_center(Restore.copy, shards, SimpleNamespace(device=torch.device("cpu")), weights)

    def ours():
        with member(center, 7, SIGMA):
            pass

    found, _ = ratios(ours, lambda: [weights.papers_perturb(sign) for sign in (1, -1)], 5)
    yield Row("restore", "perturb and restore (copy)", "the loop with +σ, then −σ", 12, found)
    found, took = ratios(lambda: weights.update(members), lambda: weights.papers_update(members), 2 if toy else 5)
    rate = f"{weights.size * members / took / 1e6:.0f}M normals/s"
    yield Row("update", f"update, N = {members}", "randn, mul, add per seed", 10, found, note=rate)
    found, _ = ratios(weights.bare_addition, weights.perturb, 5)
    yield Row("floor", "perturb", "a bare x.add_(y, alpha=c)", 5, found, at_most=True, note="times as long")

    # What x += Σ c·ε takes beyond x, as subtract mode does it.
    extra = [_extra_bytes(lambda: weights.update(members)) / (4 * weights.size) for _ in range(5)]
    yield Row("memory", "update in place: extra memory", "the shard's bytes", 0.01, extra, at_most=True)

    sizes, times = [], []
    for copies in (1, 4, 16):
        several = Weights(directory, copies, apart=False)
        sizes.append(several.size)
        times.append(median_seconds(several.perturb))
        del several
    yield _growth("parameters", sizes, times, 1.0)
    ranks = [1, 2, 4]
    times = [median_seconds(lambda parts=parts: weights.perturb(0, parts)) for parts in ranks]
    yield _growth("ranks (a rank's share)", ranks, times, -1.0)
    populations = [2, 4, 8] if toy else [8, 32, 128]
    times = [median_seconds(lambda count=count: weights.update(count)) for count in populations]
    yield _growth("population size (update)", populations, times, 1.0)


def _growth(of: str, sizes: list, times: list[float], expected: float) -> Row:
    shown = ", ".join(f"{size}: {1e3 * took:.3g} ms" for size, took in zip(sizes, times, strict=True))
    fitted = slope(sizes, times)
    return Row(f"growth: {of}", f"time ~ {of} to the power of", f"{expected:+.0f}", None, [fitted], note=shown)


def _extra_bytes(work) -> int:
    """How far the resident set rises above where it was, while `work` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    work()
    return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
