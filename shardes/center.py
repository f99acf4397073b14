"""θ on this rank: perturb, restore, update.

`restore: copy` keeps the center in float32 beside the live weights (on the host, where the model is on a
GPU): a member is live = cast(center + σ·ε), the update lands in float32, and the center is copied to the live
weights only where it is to answer itself.
`restore: subtract` is the paper's way: the live weights are the center, restoring subtracts the same noise;
what rounding leaves behind is measured.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import sqrt

import torch

from shardes.config import Restore
from shardes.noise import add_noise
from shardes.shards import BLOCK, Region, Shard, digest
from shardes.update import Update, evolves
from shardes.weights import WeightFiles, load
from shardes.world import World

SAMPLE = 256  # subtract mode watches one element in this many for drift


class Center(ABC):
    """The weights being trained, on this rank."""

    def __init__(self, shards: Sequence[Shard], world: World, base: WeightFiles, evolve: str | None):
        self._shards = shards
        self._world = world
        self._base = base
        self._moving = [shard for shard in shards if evolves(evolve, shard.name)]
        self._lossy = shards[0].tensor.dtype != torch.float32  # live weights that an update may leave as they were

    @abstractmethod
    def values(self, shard: Shard) -> torch.Tensor:
        """The center's part for `shard`: flat, without padding."""

    @abstractmethod
    def perturb(self, seed: int, sigma: float) -> None:
        """Make the live weights those of the member: θ + σ·ε(seed)."""

    @abstractmethod
    def restore(self, seed: int, sigma: float) -> None:
        """Undo `perturb(seed, sigma)`, complete or not: another member, an update or `show` may follow."""

    @abstractmethod
    def show(self) -> None:
        """Make the live weights the center's, between members."""

    @abstractmethod
    def update(self, update: Update) -> dict[str, float]:
        """Take a step. Returns what metrics should say of it."""

    def digest(self) -> str:
        """The digest of the whole center, over all ranks of the replica: 16 hexadecimal digits."""
        parts = (digest(*part) for part in self.parts())
        return f"{self._world.sum_uint64(sum(parts) % 2**64):016x}"

    @property
    def names(self) -> list[str]:
        """The parameters, in the model's order."""
        return [shard.name for shard in self._shards]

    def parts(self) -> Iterator[tuple[str, Sequence[Region], torch.Tensor]]:
        """What this rank holds and counts: (parameter, regions, flat values)."""
        for shard in self._shards:
            if shard.owned:
                yield shard.name, shard.regions, self.values(shard)

    def tensor_digests(self) -> dict[str, str]:
        """The digest of what this rank alone holds of each parameter, whether it counts it or not."""
        return {s.name: f"{digest(s.name, s.regions, self.values(s)):016x}" for s in self._shards}

    def distance(self) -> dict[str, float]:
        """How far the center is from the base model: L2 norm of θ − θ₀, and that over the norm of θ₀."""
        moved = total = 0.0
        for shard in self._shards:
            for where, regions in shard.blocks() if shard.owned else ():
                theta = self.values(shard)[where].to("cpu", torch.float32)
                origin = torch.empty_like(theta)
                self._base.read(shard.name, regions, origin)
                moved += torch.sum((theta - origin).double() ** 2).item()
                total += torch.sum(origin.double() ** 2).item()
        moved, total = self._world.sum(moved, total)
        return {"distance": sqrt(moved), "distance_relative": sqrt(moved / total)}

    def _unmoved(self, same: int) -> dict[str, float]:
        """The share of all weights that `same` of this rank's are, where the live dtype can lose updates."""
        if not self._lossy:
            return {}
        owned = sum(shard.numel for shard in self._shards if shard.owned)
        unmoved, total = self._world.sum(same, owned)
        return {"unmoved": unmoved / total}


class CopyCenter(Center):
    """An exact float32 center beside the live weights."""

    def __init__(
        self, shards: Sequence[Shard], world: World, source: WeightFiles, base: WeightFiles, evolve: str | None
    ):
        super().__init__(shards, world, base, evolve)
        pinned = world.device.type == "cuda"
        self._thetas = {
            shard.name: torch.empty(shard.numel, dtype=torch.float32, pin_memory=pinned) for shard in shards
        }
        for shard in shards:
            source.read(shard.name, shard.regions, self.values(shard))
            if shard not in self._moving:
                shard.values.copy_(self.values(shard))  # members are written only where they differ
        self._shown = False

    def values(self, shard: Shard) -> torch.Tensor:
        return self._thetas[shard.name]

    def perturb(self, seed: int, sigma: float) -> None:
        self._shown = False
        for shard in self._moving:
            for where, regions, theta in self._staged(shard, shard.numel):
                add_noise(theta, shard.name, regions, [seed], [sigma], out=shard.values[where])

    def restore(self, seed: int, sigma: float) -> None:
        pass  # members and updates are written from the center, whatever the live weights are

    def show(self) -> None:
        if not self._shown:
            for shard in self._shards:
                shard.values.copy_(self.values(shard))
        self._shown = True

    def update(self, update: Update) -> dict[str, float]:
        same = 0
        for shard in self._shards:
            for where, regions, theta in self._staged(shard, BLOCK if self._lossy else shard.numel):
                live, home = shard.values[where], self.values(shard)[where]
                before = theta.to(live.dtype) if self._lossy and shard.owned else None
                update.apply(theta, shard.name, regions, self._base)
                live.copy_(theta)
                if before is not None:
                    same += int(torch.sum(live == before))
                if theta.data_ptr() != home.data_ptr():
                    home.copy_(theta)
        self._shown = True
        return self._unmoved(same)

    def _staged(self, shard: Shard, size: int):
        """The center's part for `shard` where the live weights are, in blocks of at most `size` elements."""
        theta = self.values(shard)
        if shard.tensor.device != theta.device:
            size = BLOCK  # copies
        for where, regions in shard.blocks(max(size, 1)):
            yield where, regions, theta[where].to(shard.tensor.device, non_blocking=True)


class SubtractCenter(Center):
    """The live weights are the center; what perturbing and subtracting leaves behind is measured."""

    def __init__(
        self, shards: Sequence[Shard], world: World, source: WeightFiles, base: WeightFiles, evolve: str | None
    ):
        super().__init__(shards, world, base, evolve)
        load(source, shards)
        self._perturbed: list[Shard] = []
        self._watch()

    def values(self, shard: Shard) -> torch.Tensor:
        return shard.values

    def perturb(self, seed: int, sigma: float) -> None:
        for shard in self._moving:
            add_noise(shard.values, shard.name, shard.regions, [seed], [sigma])
            self._perturbed.append(shard)

    def restore(self, seed: int, sigma: float) -> None:
        while self._perturbed:
            shard = self._perturbed.pop()
            add_noise(shard.values, shard.name, shard.regions, [seed], [-sigma])

    def show(self) -> None:
        assert not self._perturbed

    def update(self, update: Update) -> dict[str, float]:
        metrics = self._drift()
        same = 0
        for shard in self._shards:
            for where, regions in shard.blocks():
                live = shard.values[where]
                before = live.clone() if self._lossy and shard.owned else None
                update.apply(live, shard.name, regions, self._base, live)
                if before is not None:
                    same += int(torch.sum(live == before))
        self._watch()
        return metrics | self._unmoved(same)

    def _watch(self) -> None:
        """Remember a sample of the center, to be compared after the iteration's members."""
        self._sample = [shard.values[::SAMPLE].clone() for shard in self._shards]

    def _drift(self) -> dict[str, float]:
        """What is left of this iteration's members: root mean square, and the share of weights changed."""
        squares, changed, count = 0.0, 0, 0
        for shard, before in zip(self._shards, self._sample, strict=True):
            if shard.owned:
                left = shard.values[::SAMPLE].double() - before.double()
                squares += torch.sum(left**2).item()
                changed += int(torch.count_nonzero(left))
                count += left.numel()
        square, drifted, total = self._world.sum(squares, changed, count)
        return {"drift": sqrt(square / total), "drifted": drifted / total}


def open_center(
    mode: Restore,
    shards: Sequence[Shard],
    world: World,
    source: WeightFiles,
    base: WeightFiles | None = None,
    evolve: str | None = None,
) -> Center:
    """The center with the weights of `source`; `base` is where training began, by default there.

    Members differ from it in the parameters that `evolve`, a regular expression, is found in; None: in all.
    """
    kind = {Restore.copy: CopyCenter, Restore.subtract: SubtractCenter}[mode]
    return kind(shards, world, source, base or source, evolve)


@contextmanager
def member(
    center: Center, seed: int, sigma: float, clock: Callable[[str], AbstractContextManager] = nullcontext
) -> Iterator[None]:
    """A context in which the live weights are θ + σ·ε(seed); restored afterwards, come what may.

    `clock("perturb")` and `clock("restore")` are contexts around the two parts.
    """
    try:
        with clock("perturb"):
            center.perturb(seed, sigma)
        yield
    finally:
        with clock("restore"):
            center.restore(seed, sigma)
