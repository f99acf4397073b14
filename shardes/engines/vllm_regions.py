"""Where the parameters of a model lie in vLLM's, which are fused, cut, padded and renamed.

vLLM's own code says it: the model's `load_weights` is given tensors on the meta device. A view of
one still says, by its offset and strides, which elements it is, so what is copied where is known
without memory. A loader that computes with the weights makes other tensors, and is refused.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from shardes.distributed.world import all_gather
from shardes.sharding.regions import ParameterShard, Region, strided_regions
from shardes.sharding.weight_files import WeightFiles

aten = torch.ops.aten


class NoPlace(Exception):
    """What of a model has no one place in vLLM's parameters; the text continues "...: "."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a parameter of vLLM, and those of a tensor of the files they are."""

    param: str
    first: int
    tensor: str
    regions: tuple[Region, ...]

    @property
    def end(self) -> int:
        return self.first + sum(region.numel for region in self.regions)


class CopyRecorder(TorchDispatchMode):
    """Records what is copied from tensors on the meta device to others, and copies nothing.

    Args:
        names: of the tensors, by the addresses of their storages.
    """

    def __init__(self, names: Mapping[int, str]):
        super().__init__()
        self._names = names
        self.copies: list[tuple[torch.Tensor, torch.Tensor, str]] = []  # to, from, the tensor
        self.computed: list[torch.Tensor] = []  # places of what is no part of a tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            place, source = args[0], args[1].expand(args[0].shape)
            name = self._name(source)
            if name is None:
                self.computed.append(place)
            else:
                self.copies.append((place, source, name))
            return place
        if func is aten.clone.default and args[0].is_meta and self._name(args[0]):
            return args[0].as_strided(args[0].shape, args[0].stride(), args[0].storage_offset())
        return func(*args, **(kwargs or {}))

    def _name(self, tensor: torch.Tensor) -> str | None:
        return self._names.get(tensor.untyped_storage()._cdata)


def find_pieces(model: Any, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> list[Piece]:
    """Which elements of the files' tensors vLLM's `load_weights` copies to which parameters.

    Args:
        model: of vLLM. Its parameters keep their values.
        shapes: of the files' tensors, by name.

    Raises:
        NoPlace: the loader computes with weights, or fills what is no parameter.
    """
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()
    }
    recorder = CopyRecorder({t.untyped_storage()._cdata: name for name, t in tensors.items()})
    with torch.no_grad(), recorder:
        model.load_weights(iter(tensors.items()))
    owners = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
    if recorder.computed:
        name = owners.get(recorder.computed[0].untyped_storage().data_ptr(), "a buffer")
        raise NoPlace(f"vLLM's loader computes with the weights of {name}")
    params = dict(model.named_parameters())
    pieces = []
    for place, source, tensor in recorder.copies:
        owner = owners.get(place.untyped_storage().data_ptr())
        if owner is None:
            raise NoPlace(f"vLLM loads {tensor} into what is no parameter")
        base = params[owner].storage_offset()
        for part, elements in _contiguous(place, source):
            offset = int(elements.storage_offset())
            regions = strided_regions(elements.shape, offset, elements.stride())
            pieces.append(Piece(owner, int(part.storage_offset() - base), tensor, regions))
    return pieces


def _contiguous(
    place: torch.Tensor, source: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A copy as copies whose places are contiguous."""
    outer = 0
    while not place[(0,) * outer].is_contiguous():
        outer += 1
    for index in itertools.product(*map(range, place.shape[:outer])):
        yield place[index], source[index]


def find_shards(
    model: Any,
    pieces: Sequence[Piece],
    module: PreTrainedModel,
    files: WeightFiles,
) -> dict[str, tuple[str, ParameterShard]]:
    """This rank's shards over vLLM's storage, each with the name of vLLM's parameter, by name.

    Under tensor parallelism each is the rank's slice of a parameter. `count_once` says which ranks
    count it.

    Args:
        model: of vLLM.
        pieces: see `find_pieces`.
        module: the model of transformers, on the meta device.

    Raises:
        NoPlace: a parameter is not in vLLM's model, or not in one stretch of one parameter.
    """
    by_tensor = defaultdict(list)
    for piece in pieces:
        by_tensor[piece.tensor].append(piece)
    storage = parameters(model)
    shards = {}
    for name, param in module.named_parameters():
        found, offset = [], 0
        for part in files.parts(name):
            found += [(piece, offset) for piece in by_tensor.pop(part, ())]
            offset += files.tensors[part].numel
        found.sort(key=lambda pair: (pair[0].param, pair[0].first))
        owner, first, end = _stretch(name, [piece for piece, _ in found])
        if any(piece.param != owner for copy in files.copies(name) for piece in by_tensor[copy]):
            raise NoPlace(f"{name} is tied, and vLLM holds it twice")
        live = storage[owner]
        if live.dtype != param.dtype or not live.is_contiguous():
            raise NoPlace(f"{name} is {live.dtype} in vLLM, and {param.dtype} in transformers")
        regions = tuple(
            Region(region.start + shift, region.rows, region.cols, region.stride)
            for piece, shift in found
            for region in piece.regions
        )
        flat = live.data.view(-1)[first:end]
        shards[name] = owner, ParameterShard(name, tuple(param.shape), flat, regions, regions)
    used = {owner for owner, _ in shards.values()}
    _check_filled(storage, {piece.param for piece in pieces}, used)
    return shards


def _check_filled(storage: Iterable[str], filled: set[str], used: set[str]) -> None:
    """Raise NoPlace for a parameter of vLLM that is not filled from files, or not in a shard."""
    for name in storage:
        if name not in filled:
            raise NoPlace(f"vLLM derives {name}, which no file has")
        if name not in used:
            raise NoPlace(f"vLLM's parameter {name} is none of transformers'")


def parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model of vLLM, by the names that they have without adapters."""
    return {name.replace(".base_layer.", "."): param for name, param in model.named_parameters()}


def _stretch(name: str, pieces: Sequence[Piece]) -> tuple[str, int, int]:
    """The parameter of vLLM that pieces lie in without gaps, the first element and the end."""
    if not pieces:
        raise NoPlace(f"vLLM's model has no place for {name}")
    for one, following in itertools.pairwise(pieces):
        if one.param != following.param or one.end != following.first:
            raise NoPlace(f"vLLM holds {name} in several places")
    return pieces[0].param, pieces[0].first, pieces[-1].end


def count_once(shards: Sequence[ParameterShard], device: torch.device) -> None:
    """Let the first of the ranks that hold the same slice of a parameter count it; collective over
    the default process group.

    Args:
        shards: of this rank, of the same parameters as on the other ranks.

    Raises:
        NoPlace: on every rank, if the ranks' slices of a parameter leave out elements or overlap.
    """
    rank = dist.get_rank()
    holders: list[dict[tuple, int]] = [{} for _ in shards]
    for holder, slices in enumerate(_slices(shards, device)):
        for by_slice, regions in zip(holders, slices, strict=True):
            by_slice.setdefault(regions, holder)
    for shard, by_slice in zip(shards, holders, strict=True):
        if not _is_partition([row for regions in by_slice for row in regions], prod(shard.shape)):
            raise NoPlace(f"vLLM's ranks do not hold each element of {shard.name} once")
        own = tuple((r.start, r.rows, r.cols, r.stride) for r in shard.regions)
        shard.counted = by_slice[own] == rank


def _slices(
    shards: Sequence[ParameterShard], device: torch.device
) -> Iterator[list[tuple[tuple[int, ...], ...]]]:
    """Each rank's regions of each of its shards, as tuples of numbers."""
    rows = [
        (i, region.start, region.rows, region.cols, region.stride)
        for i, shard in enumerate(shards)
        for region in shard.regions
    ]
    own, ranks = torch.tensor(rows, device=device).view(-1, 5), dist.get_world_size()
    lengths = torch.zeros(ranks, dtype=torch.long, device=device)
    all_gather(lengths, torch.tensor([len(rows)], device=device))
    longest = int(lengths.max())
    tables = own.new_zeros(ranks * longest, 5)
    all_gather(tables, torch.nn.functional.pad(own, (0, 0, 0, longest - len(rows))))
    for length, table in zip(lengths.tolist(), tables.view(ranks, longest, 5), strict=True):
        slices: list[list[tuple[int, ...]]] = [[] for _ in shards]
        for number, *region in table[:length].tolist():
            slices[number].append(tuple(region))
        yield list(map(tuple, slices))


def _is_partition(regions: Sequence[tuple[int, ...]], numel: int) -> bool:
    """Whether regions (start, rows, cols, stride) hold each of `numel` elements once."""
    starts = [start + np.arange(rows) * stride for start, rows, _, stride in regions]
    lengths = [np.full(rows, cols) for _, rows, cols, _ in regions]
    first = np.concatenate([*starts, [numel]])
    last = first + np.concatenate([*lengths, [0]])
    order = np.argsort(first, kind="stable")
    return np.array_equal(first[order], np.concatenate([[0], last[order][:-1]]))
