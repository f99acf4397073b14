"""Members of low-rank noise that answer side by side, in one batch and without changing a weight.

A member's noise on a matrix W is E = (1/√r)·Σ_k a_k·b_kᵀ (see `noise.LowRank`). So a linear layer
computes x·Wᵀ + (σ/√r)·(x·b)·aᵀ, with the factors a and b of each row's member, and an embedding
adds (σ/√r)·a[token]·bᵀ. Under tensor parallelism a rank has the parts of a and b that belong to its
slice of W; a row-parallel layer adds its term before the all-reduce that it makes in any case.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardes.clock import Clock
from shardes.config.schema import Config, EngineName, ESConfig, Noise
from shardes.engines.linear import TERM, are_experts
from shardes.errors import ConfigError
from shardes.es.matrix_layers import is_embedding, is_router, kind_of, matrix_layers
from shardes.es.member_terms import (
    Factors,
    Kept,
    Rows,
    add_expert_term,
    add_linear_term,
    embed,
    route,
)
from shardes.es.population import Member
from shardes.inference.generation import rows_of_batch
from shardes.noise import LowRank, factors
from shardes.sharding.regions import ParameterShard, Region

ADAPTERS = 16  # members that answer together with engine=vllm, unless a setting says otherwise


@dataclass(frozen=True)
class MatrixSlice:
    """The part of a matrix that a rank holds under tensor parallelism.

    Attributes:
        shape: of the whole parameter: a matrix, or a stack of matrices, of which all are held.
        rows: which rows of the whole matrix the slice's rows are, as ranges one after another.
        cols: the range of columns.
    """

    shape: tuple[int, ...]
    rows: tuple[range, ...]
    cols: range

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], regions: Sequence[Region]) -> "MatrixSlice":
        """The slice that these regions describe.

        Raises:
            ConfigError: it is no block of whole rows, and no block of columns.
        """
        width = shape[-1]
        if len(shape) > 2:
            if sum(region.numel for region in regions) == prod(shape):
                return cls(shape, (range(shape[-2]),), range(width))
        elif all(r.start % width == 0 and r.cols % width == 0 for r in regions):
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


@dataclass(frozen=True)
class _User:
    """A layer that computes with a matrix."""

    layer: nn.Module
    key: str  # of the parameter in the layer
    name: str
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
        self._rank, self._device, self._kept = rank, device, Kept(device)
        self._rows = Rows(device)
        self._members: list[tuple[int, float]] = []  # of the group: slot and scale
        by_name = {shard.name: shard for shard in shards}
        shapes = {shard.name: shard.shape for shard in shards}
        self._by_layer: dict[nn.Module, list[_User]] = defaultdict(list)
        self._held: dict[str, MatrixSlice] = {}  # what this rank has factors of
        for layer, key, name in matrix_layers(module, shapes, rank, evolve):
            matrix = _matrix_slice(layer, by_name[name])
            self._by_layer[layer].append(_User(layer, key, name, matrix))
            held = self._held.get(name, matrix)
            self._held[name] = max(held, matrix, key=lambda matrix: matrix.size)

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
            for layer, users in self._by_layer.items():
                own = {user.key: (user.name, self._cut(held[user.name], user)) for user in users}
                stack.enter_context(self._attached(layer, own))
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
        outer, a, b = [slice(None)] * (len(matrix.shape) - 2), [], []
        for seed in seeds:
            boxes = [(*outer, slice(rows.start, rows.stop), cols) for rows in matrix.rows]
            pairs = [factors(seed, name, low_rank, box) for box in boxes]
            a.append(torch.cat([rows for rows, _ in pairs], -2).mT)
            b.append(pairs[0][1].mT)
        return self._fixed(name, torch.stack(a, -3), torch.stack(b, -3))

    def _fixed(self, key: Hashable, a: torch.Tensor, b: torch.Tensor) -> Factors:
        if a.ndim > 3:  # experts: which tokens they compute with differs, so no step is captured
            return Factors(a.to(self._device), b.to(self._device))
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
            (user.name, user.key, user.layer),
            factors.a[..., rows.to(device)],
            factors.b[..., cols.to(device)],
        )

    @contextmanager
    def _attached(self, layer: Any, own: Mapping[str, tuple[str, Factors]]) -> Iterator[None]:
        """A context in which a layer adds the term of its rows' members.

        Args:
            own: names and factors of its matrices, by their keys in the layer.
        """
        before, key = layer.__dict__.get("forward"), TERM
        name, factors = next(iter(own.values()))
        if kind_of(layer) is Conv1D:  # its weight is the transposed matrix
            factors = Factors(factors.b, factors.a)
        term: Callable = partial(add_linear_term, name, self._rows, factors)
        if is_embedding(layer):
            key, term = "forward", partial(embed, layer.forward, layer, self._rows, factors)
        elif is_router(layer):
            shape = torch.Size((factors.a.shape[-1], factors.b.shape[-1]))
            key, term = "forward", partial(route, layer.forward, term, shape, name)
        elif are_experts(layer):
            term = partial(add_expert_term, own, self._rows)
        setattr(layer, key, term)
        try:
            yield
        finally:
            delattr(layer, key)
            if before is not None:
                layer.forward = before


def answer_side_by_side(es: ESConfig) -> bool:
    """Whether members answer in one batch, and not one after another with perturbed weights."""
    return es.noise is Noise.low_rank and es.members_per_batch != 1


def members_together(config: Config, lengths: Sequence[int], replicas: int) -> int:
    """How many members answer together: `es.members_per_batch`, by default as many as
    `generation.batch_tokens` holds, or with engine=vllm `ADAPTERS`.

    If there are several replicas, or may be, that is at most half a replica's share of the members,
    so that a fast one can take more than a slow one.

    Args:
        lengths: of the prompts that a member answers, in tokens.
    """
    es, generation = config.es, config.generation
    if not answer_side_by_side(es):
        return 1
    if es.members_per_batch is not None:
        return min(es.members_per_batch, es.population_size)
    tokens = max(lengths) + generation.max_new_tokens
    rows = rows_of_batch(tokens, generation.batch_tokens, generation.decode)
    most = rows * config.sharding.shard // len(lengths)
    if config.engine is EngineName.vllm:  # which forms its batches itself
        most = ADAPTERS
    share = es.population_size
    if replicas > 1 or config.replicas.port is not None or config.replicas.join is not None:
        share = -(-share // (2 * replicas))
    return max(min(most, share), 1)


def _matrix_slice(layer: nn.Module, shard: ParameterShard) -> MatrixSlice:
    # Any rank may look up any token, so it has an embedding's whole factors.
    whole = (Region.contiguous(0, prod(shard.shape)),)
    regions = whole if is_embedding(layer) else shard.tensor_regions
    return MatrixSlice.of(shard.name, shard.shape, regions)
