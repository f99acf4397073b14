"""Regions say which elements a rank holds, however the tensor was cut."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes import shards
from shardes.noise.definition import name_key
from shardes.shards import Region, Shard, box_regions, cut, digest, run, strided_regions


def elements(regions) -> list[int]:
    """The full tensor's element indices, by the definition."""
    return [r.start + (j // r.cols) * r.stride + j % r.cols for r in regions for j in range(r.numel)]


@settings(max_examples=200, deadline=None)
@given(
    regions=st.lists(
        st.builds(
            lambda s, r, c, g: Region(s, r, c, c + g),
            *[st.integers(0, 90)] * 1,
            *[st.integers(1, 9)] * 2,
            st.integers(0, 5),
        ),
        max_size=4,
    ),
    first=st.integers(0, 200),
    count=st.integers(0, 200),
)
def test_a_cut_holds_the_elements_between(regions, first, count):
    assert elements(cut(regions, first, first + count)) == elements(regions)[first : first + count]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 6), min_size=0, max_size=4))
def test_a_box_holds_the_elements_of_the_slice(data, shape):
    lows = [data.draw(st.integers(0, n - 1)) for n in shape]
    sizes = [data.draw(st.integers(0, n - low)) for n, low in zip(shape, lows, strict=True)]
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    box = whole[tuple(slice(low, low + size) for low, size in zip(lows, sizes, strict=True))]
    assert elements(box_regions(shape, lows, sizes)) == box.reshape(-1).tolist()


@pytest.mark.parametrize("dims", [(0, 1), (1, 0)])
def test_strided_views(dims):
    whole = torch.arange(35).view(5, 7)
    view = whole[1:4, 2:5].permute(dims)
    regions = strided_regions(view.shape, view.storage_offset(), view.stride())
    assert elements(regions) == view.reshape(-1).tolist()


def test_contiguous_views_are_one_run():
    assert box_regions((4, 6, 5), (1, 0, 0), (2, 6, 5)) == (run(30, 60),)
    assert box_regions((), (), ()) == (run(0, 1),)


def test_blocks_cover_a_shard():
    shard = Shard("w", (10, 10), torch.zeros(33), (Region(3, 4, 5, 10), run(80, 9)))
    pieces = list(shard.blocks(7))
    assert [where.stop - where.start for where, _ in pieces] == [7, 7, 7, 7, 1]
    assert sum((elements(regions) for _, regions in pieces), []) == elements(shard.regions)


def reference_digest(name: str, index: int, bits: int) -> int:
    """One element's hash, in Python integers."""
    x = (name_key(name) + index * shards.INDEX_FACTOR + bits * shards.BITS_FACTOR) % 2**64
    for factor in (shards.MIX_1, shards.MIX_2):
        x = (x ^ (x >> 33)) * factor % 2**64
    return x ^ (x >> 33)


def test_the_digest_is_its_definition_on_any_device_path():
    regions = (run(5, 70), Region(200, 9, 11, 40), run(2**41, 3))
    values = torch.randn(172)
    bits = values.view(torch.int32).tolist()
    expected = sum(reference_digest("w", index, b % 2**32) for index, b in zip(elements(regions), bits, strict=True))
    assert digest("w", regions, values) == expected % 2**64
    parts, offset = 0, 0
    for region in regions:
        part = values[offset : offset + region.numel].view(torch.int32)
        parts += shards._hash(part, region, name_key("w"))
        offset += region.numel
    assert parts % 2**64 == expected % 2**64


@settings(max_examples=50, deadline=None)
@given(edges=st.sets(st.integers(1, 19_999), max_size=5))
def test_the_digest_is_the_same_however_sharded(edges):
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    edges = [0, *sorted(edges), 20_000]
    parts = [digest("w", [run(a, b - a)], values[a:b]) for a, b in pairwise(edges)]
    assert sum(parts) % 2**64 == digest("w", [run(0, 20_000)], values)


def test_the_digest_sees_a_flipped_bit_a_swap_and_a_name():
    values = torch.randn(1000)
    seen = {digest("w", [run(0, 1000)], values), digest("v", [run(0, 1000)], values)}
    flipped, swapped = values.clone(), values.clone()
    flipped.view(torch.int32)[500] ^= 1
    swapped[[3, 4]] = swapped[[4, 3]]
    seen |= {digest("w", [run(0, 1000)], flipped), digest("w", [run(0, 1000)], swapped)}
    assert len(seen) == 4


def test_low_precision_has_the_digest_of_its_float32_values():
    values = torch.randn(1000).bfloat16()
    assert digest("w", [run(0, 1000)], values) == digest("w", [run(0, 1000)], values.float())
