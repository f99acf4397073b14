"""θ on this rank: perturb, restore, update.

`restore: copy` keeps the center in float32 beside the live weights (in host memory, if the model is
on a GPU). A member is live = cast(center + σ·ε), the update is applied in float32, and the center
is copied to the live weights only when it answers prompts itself. `restore: subtract` is the
paper's way: the live weights are the center, and restoring subtracts the same noise. The drift that
rounding leaves is measured.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite, prod, sqrt

import torch

from shardes.clock import Clock
from shardes.config.schema import Restore
from shardes.distributed.world import World
from shardes.errors import RunError
from shardes.es.population import Member
from shardes.es.update import Update, evolves, noise_kind
from shardes.noise import add_noise
from shardes.sharding.digest import digest, format_digest
from shardes.sharding.regions import BLOCK, ParameterShard, Region
from shardes.sharding.weight_files import WeightFiles, load

SAMPLE = 256  # subtract mode watches one element in this many for drift


class Center(ABC):
    """The weights being trained, on this rank.

    Args:
        shards: this rank's live weights.
        base: the base model.
        evolve: members differ from the center in the parameters whose names match this regular
            expression; None: in all.
        rank: of the noise on matrices, and vectors have none; 0: full noise.
        clock: its parts "perturb" and "restore" are timed.
    """

    def __init__(
        self,
        shards: Sequence[ParameterShard],
        world: World,
        base: WeightFiles,
        evolve: str | None,
        rank: int,
        clock: Clock,
    ):
        self._shards, self._world, self._base, self._clock = shards, world, base, clock
        self._rank = rank
        self._evolving = [
            shard for shard in shards if evolves(evolve, rank, shard.name, shard.shape)
        ]
        # In 16 bits an update can be too small to change a live weight.
        self._lossy = shards[0].tensor.dtype != torch.float32

    @contextmanager
    def perturbed(self, member: Member) -> Iterator[None]:
        """A context in which the live weights are θ + σ·ε(seed). On exit the center is θ as before.

        With `restore: copy` the live weights keep the member's values until the next member, update
        or `load_into_model`.
        """
        try:
            with self._clock("perturb"):
                self._perturb(member)
            yield
        finally:
            with self._clock("restore"):
                self._restore(member)

    @abstractmethod
    def values(self, shard: ParameterShard) -> torch.Tensor:
        """The center's part for `shard`: flat, without padding."""

    @abstractmethod
    def _perturb(self, member: Member) -> None: ...

    @abstractmethod
    def _restore(self, member: Member) -> None:
        """Undo `_perturb`, also one that failed half way."""

    @abstractmethod
    def load_into_model(self) -> None:
        """Copy the center to the live weights. Call it only between members."""

    @abstractmethod
    def update(self, update: Update) -> dict[str, float]:
        """θ ← θ + Σ c_n·ε(s_n), c_n = (α/N)·z_n; with weight decay if any. Returns metrics."""

    def digest(self) -> str:
        """The digest of the whole center, over all ranks of the replica; collective."""
        total = sum(digest(*part) for part in self.parts()) % 2**64
        return format_digest(self._world.sum_uint64(total))

    @property
    def names(self) -> list[str]:
        """The parameters, in the model's order."""
        return [shard.name for shard in self._shards]

    def parts(self) -> Iterator[tuple[str, Sequence[Region], torch.Tensor]]:
        """The shards that this rank counts in sums: (parameter, regions, flat values)."""
        for shard in self._shards:
            if shard.counted:
                yield shard.name, shard.regions, self.values(shard)

    def tensor_digests(self) -> dict[str, str]:
        """The digest of this rank's part of each parameter, whether it counts that part or not."""
        return {
            shard.name: format_digest(digest(shard.name, shard.regions, self.values(shard)))
            for shard in self._shards
        }

    def distance(self) -> dict[str, float]:
        """Distance from the base model: the L2 norm of θ − θ₀, and that over the norm of θ₀;
        collective.

        Raises:
            RunError: θ is not finite.
        """
        moved = total = 0.0
        for shard in self._shards:
            for block, regions in shard.blocks() if shard.counted else ():
                theta = self.values(shard)[block].to("cpu", torch.float32)
                origin = torch.empty_like(theta)
                self._base.read(shard.name, regions, origin)
                moved += torch.sum((theta - origin).double() ** 2).item()
                total += torch.sum(origin.double() ** 2).item()
        moved, total = self._world.sum(moved, total)
        if not isfinite(moved):
            raise RunError(
                "the center has weights that are NaN or infinite: es.alpha or es.sigma is too "
                "large. Start again from an earlier snapshot with a smaller one"
            )
        return {"distance": sqrt(moved), "distance_relative": sqrt(moved / total)}

    def rms(self) -> dict[str, float]:
        """The root mean square of the elements of each parameter that training changes;
        collective.
        """
        squares = dict.fromkeys((shard.name for shard in self._evolving), 0.0)
        for shard in self._evolving:
            for block, _ in shard.blocks() if shard.counted else ():
                squares[shard.name] += torch.sum(self.values(shard)[block].double() ** 2).item()
        totals = self._world.sum(*squares.values())
        return {
            shard.name: sqrt(total / prod(shard.shape))
            for shard, total in zip(self._evolving, totals, strict=True)
        }

    def _unmoved(self, unchanged: int) -> dict[str, float]:
        """The share of live weights that an update left unchanged, where their dtype allows that.

        Args:
            unchanged: number of this rank's elements.
        """
        if not self._lossy:
            return {}
        counted = sum(shard.numel for shard in self._shards if shard.counted)
        unmoved, total = self._world.sum(unchanged, counted)
        return {"unmoved": unmoved / total}


class CopyCenter(Center):
    """An exact float32 center beside the live weights."""

    def __init__(
        self,
        shards: Sequence[ParameterShard],
        world: World,
        source: WeightFiles,
        base: WeightFiles,
        evolve: str | None,
        rank: int,
        clock: Clock,
    ):
        super().__init__(shards, world, base, evolve, rank, clock)
        pinned = world.device.type == "cuda"
        self._thetas = {
            shard.name: torch.empty(shard.numel, dtype=torch.float32, pin_memory=pinned)
            for shard in shards
        }
        for shard in shards:
            source.read(shard.name, shard.regions, self.values(shard))
            if shard not in self._evolving:
                shard.values.copy_(self.values(shard))  # no member ever writes these
        self._in_model = False

    def values(self, shard: ParameterShard) -> torch.Tensor:
        return self._thetas[shard.name]

    def _perturb(self, member: Member) -> None:
        self._in_model = False
        for shard in self._evolving:
            for block, regions, theta in self._staged(shard, shard.numel):
                term = [member.seed], [member.sigma]
                kind = noise_kind(self._rank, shard.shape)
                add_noise(theta, shard.name, regions, *term, shard.values[block], kind)

    def _restore(self, member: Member) -> None:
        pass  # members and updates are written from the center, whatever the live weights are

    def load_into_model(self) -> None:
        if not self._in_model:
            for shard in self._shards:
                shard.values.copy_(self.values(shard))
        self._in_model = True

    def update(self, update: Update) -> dict[str, float]:
        unchanged = 0
        for shard in self._shards:
            for block, regions, theta in self._staged(shard, BLOCK if self._lossy else shard.numel):
                live, stored = shard.values[block], self.values(shard)[block]
                before = theta.to(live.dtype) if self._lossy and shard.counted else None
                update.apply(theta, shard.name, shard.shape, regions, self._base)
                live.copy_(theta)
                if before is not None:
                    unchanged += int(torch.sum(live == before))
                if theta.data_ptr() != stored.data_ptr():
                    stored.copy_(theta)
        self._in_model = True
        return self._unmoved(unchanged)

    def _staged(
        self, shard: ParameterShard, size: int
    ) -> Iterator[tuple[slice, tuple[Region, ...], torch.Tensor]]:
        """The center's part for `shard` on the model's device, in blocks of at most `size`
        elements.
        """
        theta = self.values(shard)
        if shard.tensor.device != theta.device:
            size = BLOCK  # each block is copied to the device
        for block, regions in shard.blocks(max(size, 1)):
            yield block, regions, theta[block].to(shard.tensor.device, non_blocking=True)


class SubtractCenter(Center):
    """The live weights are the center; the drift that perturbing and subtracting leaves is
    measured.
    """

    def __init__(
        self,
        shards: Sequence[ParameterShard],
        world: World,
        source: WeightFiles,
        base: WeightFiles,
        evolve: str | None,
        rank: int,
        clock: Clock,
    ):
        assert rank == 0, "es.restore=subtract is for full noise"
        super().__init__(shards, world, base, evolve, rank, clock)
        load(source, shards)
        self._perturbed: list[ParameterShard] = []
        self._take_sample()

    def values(self, shard: ParameterShard) -> torch.Tensor:
        return shard.values

    def _perturb(self, member: Member) -> None:
        for shard in self._evolving:
            add_noise(shard.values, shard.name, shard.regions, [member.seed], [member.sigma])
            self._perturbed.append(shard)

    def _restore(self, member: Member) -> None:
        while self._perturbed:
            shard = self._perturbed.pop()
            add_noise(shard.values, shard.name, shard.regions, [member.seed], [-member.sigma])

    def load_into_model(self) -> None:
        assert not self._perturbed

    def update(self, update: Update) -> dict[str, float]:
        drift = self._drift()
        unchanged = 0
        for shard in self._shards:
            for block, regions in shard.blocks():
                live = shard.values[block]
                before = live.clone() if self._lossy and shard.counted else None
                update.apply(live, shard.name, shard.shape, regions, self._base, live)
                if before is not None:
                    unchanged += int(torch.sum(live == before))
        self._take_sample()
        return drift | self._unmoved(unchanged)

    def _take_sample(self) -> None:
        """Keep a sample of the center, to be compared after the iteration's members."""
        self._sample = [shard.values[::SAMPLE].clone() for shard in self._shards]

    def _drift(self) -> dict[str, float]:
        """What this iteration's members left behind: root mean square, and the share of weights
        changed.
        """
        squares, changed, count = 0.0, 0, 0
        for shard, before in zip(self._shards, self._sample, strict=True):
            if shard.counted:
                rest = shard.values[::SAMPLE].double() - before.double()
                squares += torch.sum(rest**2).item()
                changed += int(torch.count_nonzero(rest))
                count += rest.numel()
        square, drifted, total = self._world.sum(squares, changed, count)
        return {"drift": sqrt(square / total), "drifted": drifted / total}


def open_center(
    mode: Restore,
    shards: Sequence[ParameterShard],
    world: World,
    source: WeightFiles,
    base: WeightFiles | None = None,
    evolve: str | None = None,
    clock: Clock | None = None,
    rank: int = 0,
) -> Center:
    """The center with the weights of `source`.

    `base`, by default the same, is where training began. `restore: subtract` is for full noise.
    """
    kind = {Restore.copy: CopyCenter, Restore.subtract: SubtractCenter}[mode]
    return kind(shards, world, source, base or source, evolve, rank, clock or Clock())
