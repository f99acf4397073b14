"""Members of low-rank noise that answer side by side, in one batch and without changing a weight.

A member's noise on a matrix W is E = (1/√r)·Σ_k a_k·b_kᵀ (see `noise.LowRank`). So a linear layer
computes x·Wᵀ + (σ/√r)·(x·b)·aᵀ, with the factors a and b of each row's member, and an embedding
adds (σ/√r)·a[token]·bᵀ. Under tensor parallelism a rank has the parts of a and b that belong to its
slice of W; a row-parallel layer adds its term before the all-reduce that it makes in any case.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardes.clock import Clock
from shardes.config.schema import ESConfig, Noise
from shardes.engines.linear import TERM
from shardes.errors import ConfigError
from shardes.es import side_by_side_cpu
from shardes.es.population import Member
from shardes.es.update import evolves
from shardes.noise import LowRank, factors
from shardes.sharding.regions import ParameterShard, Region

# AutoTP's layers, by name because engine=fsdp does not need DeepSpeed
LINEAR = ("LinearLayer", "LinearAllreduce", "VocabParallelLinear")
EMBEDDING = ("VocabParallelEmbedding", "HiddenParallelEmbedding")  # their output is whole


class Kept:
    """Tensors on a device at addresses that stay, as captured decode steps need, until one is set
    that is longer than ever before: `moves` counts these.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._memory: dict[Hashable, torch.Tensor] = {}
        self.moves = 0

    def set(self, key: Hashable, values: torch.Tensor) -> torch.Tensor:
        """The memory of a key, which begins with these values."""
        memory = self._memory.get(key)
        if memory is None or len(memory) < len(values):
            self._memory.pop(key, None)  # freed before more is allocated
            self._memory[key] = memory = torch.empty_like(values, device=self._device)
            self.moves += 1
        memory[: len(values)] = values
        return memory


class Rows:
    """Which member each row of a batch belongs to; all layers look here.

    Attributes:
        slots: shape (rows,), int64: where the row's factors lie.
        scales: shape (rows,), float32: σ/√r, negative for the second member of a pair.
    """

    def __init__(self, device: torch.device):
        self._kept = Kept(device)
        self.set([], [])

    @property
    def moves(self) -> int:
        """How often the tensors have moved."""
        return self._kept.moves

    def set(self, slots: Sequence[int], scales: Sequence[float]) -> None:
        values = torch.tensor(slots, dtype=torch.long), torch.tensor(scales, dtype=torch.float32)
        self.slots, self.scales = (
            self._kept.set(i, value)[: len(value)] for i, value in enumerate(values)
        )

    def __len__(self) -> int:
        return len(self.slots)


@dataclass
class Factors:
    """This rank's factors of one parameter, transposed, for the members of a group: float32.

    There may be memory for more members.

    Attributes:
        a: shape (members, rank, rows of the matrix).
        b: shape (members, rank, columns of the matrix).
    """

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class MatrixSlice:
    """The part of a matrix that a rank holds under tensor parallelism.

    Attributes:
        shape: of the whole matrix.
        rows: which rows of the whole matrix the slice's rows are, as ranges one after another.
        cols: the range of columns.
    """

    shape: tuple[int, int]
    rows: tuple[range, ...]
    cols: range

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], regions: Sequence[Region]) -> "MatrixSlice":
        """The slice that these regions describe.

        Raises:
            ConfigError: it is no block of whole rows, and no block of columns.
        """
        width = shape[-1]
        if all(r.start % width == 0 and r.cols % width == 0 for r in regions):
            if all(r.rows == 1 for r in regions):
                starts = [range(r.start // width, (r.start + r.cols) // width) for r in regions]
                return cls((shape[0], width), tuple(starts), range(width))
        elif len(regions) == 1 and regions[0].stride == width and regions[0].cols < width:
            row, col = divmod(regions[0].start, width)
            rows = (range(row, row + regions[0].rows),)
            return cls((shape[0], width), rows, range(col, col + regions[0].cols))
        raise ConfigError(
            f"es.members_per_batch: {name} is split in a way that low-rank members cannot share; "
            "set es.members_per_batch=1, or sharding.tensor=1"
        )

    @property
    def size(self) -> int:
        return sum(map(len, self.rows)) * len(self.cols)


def add_linear_term(rows: Rows, factors: Factors, x: torch.Tensor, y: torch.Tensor) -> None:
    """y += (σ/√r)·(x·b)·aᵀ, in place, where `Factors` holds aᵀ and bᵀ.

    Args:
        x: input, shape (rows, tokens, columns of the matrix), or the first two flattened.
        y: output, likewise.
    """
    if not len(rows):
        return
    x, y = (t.to_local() if isinstance(t, DTensor) else t for t in (x, y))
    x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    assert len(x) % len(rows) == 0, f"{len(x)} lines of {len(rows)} rows"
    if y.device.type == "cpu" and x.dtype == y.dtype == torch.float32:
        side_by_side_cpu.add_term(x, y, rows.slots, rows.scales, factors.a, factors.b)
        return
    a, b = (t[rows.slots] for t in (factors.a, factors.b))
    scaled = (a * rows.scales[:, None, None]).to(y.dtype)
    inner = torch.bmm(x.view(len(rows), -1, x.shape[-1]), b.to(x.dtype).transpose(1, 2))
    y.view(len(rows), -1, y.shape[-1]).baddbmm_(inner, scaled)


def embed(
    forward: Callable[[torch.Tensor], torch.Tensor],
    layer: Any,
    rows: Rows,
    factors: Factors,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """An embedding's output plus (σ/√r)·a[token]·bᵀ, scaled as the embedding is."""
    out = forward(tokens)
    if not len(rows):
        return out
    chosen = factors.a[rows.slots[:, None], :, tokens] * rows.scales[:, None, None]
    term = torch.bmm(chosen.to(out.dtype), factors.b[rows.slots].to(out.dtype))
    scale = getattr(layer, "embed_scale", None)
    return out + (term if scale is None else term * scale)


@dataclass(frozen=True)
class _User:
    """A layer that computes with a matrix."""

    layer: nn.Module
    name: str  # of the parameter
    matrix: MatrixSlice


class SideBySide:
    """Lets the rows of a batch compute with the weights of different members.

    Args:
        module: the model that an engine has sharded.
        shards: the engine's.
        device: where it computes.
        rank: r.
        evolve: see `Update.evolve`.

    Raises:
        ConfigError: a layer computes with a matrix in a way that is not supported; names it.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        shards: Sequence[ParameterShard],
        device: torch.device,
        rank: int,
        evolve: str | None = None,
    ):
        self._rank, self._kept = rank, Kept(device)
        self._rows = Rows(device)
        self._members: list[tuple[int, float]] = []  # of the group: slot and scale
        by_name = {shard.name: shard for shard in shards}
        shapes = {shard.name: shard.shape for shard in shards}
        self._users = [
            _User(layer, name, _matrix_slice(layer, by_name[name]))
            for layer, name in matrix_layers(module, shapes, rank, evolve)
        ]
        self._held: dict[str, MatrixSlice] = {}  # what this rank has factors of
        for user in self._users:
            held = self._held.get(user.name, user.matrix)
            self._held[user.name] = max(held, user.matrix, key=lambda matrix: matrix.size)

    @contextmanager
    def members(self, members: Sequence[Member], clock: Clock) -> Iterator[None]:
        """A context in which rows of a batch can belong to these members: see `set_rows`.

        Making their factors counts as the clock's part "perturb".
        """
        seeds = list(dict.fromkeys(member.seed for member in members))  # a pair shares its factors
        with clock("perturb"):
            held = {name: self._factors(seeds, name, matrix) for name, matrix in self._held.items()}
        self._members = [
            (seeds.index(member.seed), member.sigma / sqrt(self._rank)) for member in members
        ]
        with ExitStack() as stack:
            for user in self._users:
                own = self._cut(held[user.name], user)
                stack.enter_context(self._attached(user.layer, own))
            try:
                yield
            finally:
                self._members = []
                self.set_rows([])

    def set_rows(self, members: Sequence[int]) -> Hashable:
        """Set the member of each row of the batch, by its number in the group; empty: no rows.

        Returns another value once tensors that forward passes read for the members have moved.
        """
        chosen = [self._members[member] for member in members]
        self._rows.set([slot for slot, _ in chosen], [scale for _, scale in chosen])
        return self._kept.moves, self._rows.moves

    def _factors(self, seeds: Sequence[int], name: str, matrix: MatrixSlice) -> Factors:
        low_rank = LowRank(matrix.shape, self._rank)
        cols = slice(matrix.cols.start, matrix.cols.stop)
        a, b = [], []
        for seed in seeds:
            boxes = [(slice(rows.start, rows.stop), cols) for rows in matrix.rows]
            pairs = [factors(seed, name, low_rank, box) for box in boxes]
            a.append(torch.cat([rows for rows, _ in pairs]).T)
            b.append(pairs[0][1].T)
        return self._fixed(name, torch.stack(a), torch.stack(b))

    def _fixed(self, key: Hashable, a: torch.Tensor, b: torch.Tensor) -> Factors:
        return Factors(self._kept.set((key, "a"), a), self._kept.set((key, "b"), b))

    def _cut(self, factors: Factors, user: _User) -> Factors:
        """The factors of a user's part of a matrix, from those of the part that the rank has."""
        held, wanted = self._held[user.name], user.matrix
        if held == wanted:
            return factors
        rows = torch.cat([torch.arange(r.start, r.stop) for r in wanted.rows])
        cols = torch.arange(wanted.cols.start, wanted.cols.stop)
        device = factors.a.device
        return self._fixed(
            (user.name, user.layer),
            factors.a[..., rows.to(device)],
            factors.b[..., cols.to(device)],
        )

    @contextmanager
    def _attached(self, layer: Any, factors: Factors) -> Iterator[None]:
        """A context in which a layer adds the term of its rows' members."""
        if _is_embedding(layer):
            before = layer.__dict__.get("forward")
            layer.forward = partial(embed, layer.forward, layer, self._rows, factors)
            try:
                yield
            finally:
                del layer.forward
                if before is not None:
                    layer.forward = before
            return
        if _kind(layer) is Conv1D:  # its weight is the transposed matrix
            factors = Factors(factors.b, factors.a)
        setattr(layer, TERM, partial(add_linear_term, self._rows, factors))
        try:
            yield
        finally:
            delattr(layer, TERM)


def answer_side_by_side(es: ESConfig) -> bool:
    """Whether members answer in one batch, and not one after another with perturbed weights."""
    return es.noise is Noise.low_rank and es.members_per_batch != 1


def matrix_layers(
    module: PreTrainedModel, shapes: Mapping[str, Sequence[int]], rank: int, evolve: str | None
) -> list[tuple[nn.Module, str]]:
    """The layers that compute with a matrix that members change, and the matrix's names.

    Args:
        shapes: of the unsharded parameters.

    Raises:
        ConfigError: a layer does so in a way that members cannot share.
    """
    names = {id(param): name for name, param in module.named_parameters()}
    layers = []
    for layer in module.modules():
        for key, param in layer._parameters.items():
            if param is None:
                continue
            name = names[id(param)]
            if not evolves(evolve, rank, name, tuple(shapes[name])):
                continue
            supported = _is_linear(layer) or _is_embedding(layer)
            # An expert computes with some of the tokens, in an order of its own.
            if key != "weight" or not supported or ".experts." in name:
                raise ConfigError(
                    f"es.members_per_batch: members cannot share {name}, which "
                    f"{type(layer).__name__} computes with in its own way; set "
                    "es.members_per_batch=1, which perturbs the weights in place"
                )
            layers.append((layer, name))
    return layers


def _matrix_slice(layer: nn.Module, shard: ParameterShard) -> MatrixSlice:
    # Any rank may look up any token, so it has an embedding's whole factors.
    whole = (Region.contiguous(0, prod(shard.shape)),)
    regions = whole if _is_embedding(layer) else shard.tensor_regions
    return MatrixSlice.of(shard.name, shard.shape, regions)


def _is_linear(layer: nn.Module) -> bool:
    kind = _kind(layer)
    if kind.__name__ in LINEAR and kind.__module__.startswith("deepspeed"):
        return not getattr(layer, "gather_output", False)
    return kind in (nn.Linear, Conv1D)


def _is_embedding(layer: nn.Module) -> bool:
    kind = _kind(layer)
    if kind.__name__ in EMBEDDING and kind.__module__.startswith("deepspeed"):
        return True
    own_forward = getattr(kind, "forward", None) is not nn.Embedding.forward
    return issubclass(kind, nn.Embedding) and (not own_forward or hasattr(layer, "embed_scale"))


def _kind(layer: nn.Module) -> type:
    """The layer's class; FSDP makes a class of its own for each that it wraps."""
    return type(layer).__bases__[-1] if isinstance(layer, FSDPModule) else type(layer)
