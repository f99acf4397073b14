"""The regions of all ranks cover every element once, for tensors of any shape."""

from math import prod
from types import SimpleNamespace

from deepspeed.checkpoint.affine import contiguous_split_map, replicated_map, sub_param_map
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from shardes.engines import deepspeed, fsdp

DEGREES = st.integers(1, 5)


def elements(regions) -> list[int]:
    return [region.index(j) for region in regions for j in range(region.numel)]


def sizes(draw, total: int, ranks: int) -> list[int]:
    """Any split of a dimension, however uneven."""
    edges = sorted(draw(st.lists(st.integers(0, total), min_size=ranks - 1, max_size=ranks - 1)))
    return [b - a for a, b in zip([0, *edges], [*edges, total], strict=True)]


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    tensor=DEGREES,
    shards=DEGREES,
)
def test_autotp_and_zero(data, shape, tensor, shards):
    dim = data.draw(st.integers(0, len(shape) - 1))
    kind = data.draw(st.sampled_from(["replicated", "split", "packed"]))
    if kind == "replicated":
        layout = replicated_map(shape, tensor)
    elif kind == "split":
        layout = contiguous_split_map(shape, sizes(data.draw, shape[dim], tensor), dim)
    else:
        dim = 0  # the slice has pieces of several parts, one after another
        shape = [3 * shape[0], *shape[1:]]
        widths = [sizes(data.draw, shape[0] // 3, tensor) for _ in range(3)]
        layout = sub_param_map(shape, [sum(w) for w in widths], widths, dim)
    meta = {"conversion": {"affine_map": layout.to_dict()}}
    param = SimpleNamespace(ds_autotp_universal_checkpoint_meta=meta)
    counted_elements = []
    for rank in range(tensor):
        regions, counted = deepspeed.slice_regions("w", tuple(shape), param, rank)
        parts = [deepspeed.zero_partition(regions, shards, shard) for shard in range(shards)]
        assert sum(map(elements, parts), []) == elements(regions)
        counted_elements += elements(regions) if counted else []
    assert sorted(counted_elements) == list(range(prod(shape)))


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    tensor=DEGREES,
    shards=DEGREES,
)
def test_fsdp_and_tensor_parallel(data, shape, tensor, shards):
    placements = st.sampled_from([Replicate(), *map(Shard, range(len(shape)))])
    by_tensor, by_shard = data.draw(placements), data.draw(st.sampled_from([Replicate(), Shard(0)]))
    counted_elements = []
    for t in range(tensor):
        for s in range(shards):
            regions, counted = fsdp.regions_of(
                tuple(shape), by_tensor, by_shard, (tensor, t), (shards, s)
            )
            counted_elements += elements(regions) if counted else []
    assert sorted(counted_elements) == list(range(prod(shape)))
