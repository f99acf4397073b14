"""θ on this rank: perturb, restore, update.

`restore: copy` keeps the center in float32 beside the live weights, or in host memory (see
`staging.center_device`). A member is live = cast(center + σ·ε), the update is applied in float32,
and the center is copied to the live weights only when it answers prompts itself.
`restore: subtract` is the paper's way: the live weights are the center, and restoring subtracts the
same noise. The drift that rounding leaves is measured.
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
from shardes.es.rule import Rule
from shardes.es.staging import Stager, block_size
from shardes.es.update import Update, evolves, noise_kind
from shardes.noise import add_noise
from shardes.sharding.digest import digest, format_digest
from shardes.sharding.norms import moved_and_total
from shardes.sharding.regions import ParameterShard, Region
from shardes.sharding.weight_files import WeightFiles, load

HOST = torch.device("cpu")
Part = tuple[ParameterShard, slice, tuple[Region, ...]]
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
        self._block = block_size(shards[0].tensor.device)

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
    def placement(self) -> str:
        """Where a center that is kept apart from live weights on an accelerator lies, or ""."""
        return ""

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
                squares = moved_and_total(theta.numpy(), origin.numpy())
                moved, total = moved + squares[0], total + squares[1]
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
    """An exact float32 center beside the live weights, on their device or the host."""

    def __init__(
        self,
        shards: Sequence[ParameterShard],
        world: World,
        source: WeightFiles,
        base: WeightFiles,
        evolve: str | None,
        rank: int,
        clock: Clock,
        device: torch.device,
        rule: Rule | None,
    ):
        super().__init__(shards, world, base, evolve, rank, clock)
        self._rule = rule
        buffers = rule.buffers if rule else 0
        self._kept = {  # by the user's rule
            shard.name: [torch.zeros(shard.numel, device=device) for _ in range(buffers)]
            for shard in self._evolving
        }
        live = shards[0].tensor.device
        self._stager = Stager(live, self._block) if device != live else None
        self._thetas = {
            shard.name: torch.empty(
                shard.numel, dtype=torch.float32, device=device, pin_memory=self._stager is not None
            )
            for shard in shards
        }
        for shard in shards:
            source.read(shard.name, shard.regions, self.values(shard))
            if shard not in self._evolving:
                shard.values.copy_(self.values(shard))  # no member ever writes these
        self._in_model = False

    @property
    def placement(self) -> str:
        if self._world.device.type == "cpu":
            return ""
        first = next(iter(self._thetas.values()))
        size = 4e-9 * sum(theta.numel() for theta in self._thetas.values())
        where = "in host memory" if first.device.type == "cpu" else f"on {first.device}"
        return f"the float32 center lies {where}: {size:.3g} GB of this rank (center.device)"

    def values(self, shard: ParameterShard) -> torch.Tensor:
        return self._thetas[shard.name]

    def _perturb(self, member: Member) -> None:
        self._in_model = False
        for (shard, block, regions), theta in self._on_device(self._evolving):
            term = [member.seed], [member.sigma]
            kind = noise_kind(self._rank, shard.shape)
            add_noise(theta, shard.name, regions, *term, shard.values[block], kind)

    def _restore(self, member: Member) -> None:
        pass  # members and updates are written from the center, whatever the live weights are

    def load_into_model(self) -> None:
        if not self._in_model:
            for (shard, block, _), theta in self._on_device(self._shards):
                shard.values[block].copy_(theta)
        self._in_model = True

    def update(self, update: Update) -> dict[str, float]:
        unchanged: torch.Tensor | int = 0  # added up on the device, which nothing waits for
        size = self._block if self._lossy else None
        for (shard, block, regions), theta in self._on_device(self._shards, size):
            live = shard.values[block]
            before = theta.to(live.dtype) if self._lossy and shard.counted else None
            stored = [kept[block] for kept in self._kept.get(shard.name, ())]
            kept = [part.to(theta.device) for part in stored]  # the same where they lie there
            update.apply(
                theta, shard.name, shard.shape, regions, self._base, rule=self._rule, kept=kept
            )
            if self._stager:
                for part, changed in zip(stored, kept, strict=True):
                    part.copy_(changed)
            live.copy_(theta)
            if before is not None:
                unchanged = unchanged + torch.sum(live == before)
            if self._stager:
                self.values(shard)[block].copy_(theta, non_blocking=True)
        if self._stager:
            self._stager.finish()
        self._in_model = True
        return self._unmoved(int(unchanged))

    def _on_device(
        self, shards: Sequence[ParameterShard], size: int | None = None
    ) -> Iterator[tuple[Part, torch.Tensor]]:
        """The center's parts for `shards` on the device of the live weights.

        Args:
            size: the most elements of a part; None: a whole shard, unless it must be staged.
        """
        if self._stager:
            size = self._block
        parts = (
            ((shard, block, regions), self.values(shard)[block])
            for shard in shards
            for block, regions in shard.blocks(max(size or shard.numel, 1))
        )
        return self._stager.stage(parts) if self._stager else parts


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
        device: torch.device,
        rule: Rule | None,
    ):
        assert rank == 0, "es.restore=subtract is for full noise"
        assert rule is None, "es.restore=subtract is for the rule of the paper"
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
        unchanged: torch.Tensor | int = 0
        for shard in self._shards:
            for block, regions in shard.blocks(self._block):
                live = shard.values[block]
                before = live.clone() if self._lossy and shard.counted else None
                update.apply(live, shard.name, shard.shape, regions, self._base, live)
                if before is not None:
                    unchanged = unchanged + torch.sum(live == before)
        self._take_sample()
        return drift | self._unmoved(int(unchanged))

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
    device: torch.device = HOST,
    rule: Rule | None = None,
) -> Center:
    """The center with the weights of `source`.

    `base`, by default the same, is where training began. `restore: subtract` is for full noise, and
    its center lies where the live weights are. Any other lies on `device`. `rule` is the user's;
    one that has buffers begins with a `source` that is the base model.
    """
    kind = {Restore.copy: CopyCenter, Restore.subtract: SubtractCenter}[mode]
    return kind(shards, world, source, base or source, evolve, rank, clock or Clock(), device, rule)
