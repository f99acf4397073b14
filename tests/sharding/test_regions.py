"""Regions describe which elements of a tensor a rank holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.sharding.regions import ParameterShard, Region, box_regions, cut, strided_regions


def elements(regions) -> list[int]:
    """The indices of the elements in the full tensor, by the definition of a region."""
    return [
        r.start + (j // r.cols) * r.stride + j % r.cols for r in regions for j in range(r.numel)
    ]


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


def test_a_contiguous_view_is_one_contiguous_region():
    assert box_regions((4, 6, 5), (1, 0, 0), (2, 6, 5)) == (Region.contiguous(30, 60),)
    assert box_regions((), (), ()) == (Region.contiguous(0, 1),)


def test_blocks_cover_a_shard():
    shard = ParameterShard(
        "w", (10, 10), torch.zeros(33), (Region(3, 4, 5, 10), Region.contiguous(80, 9))
    )
    pieces = list(shard.blocks(7))
    assert [block.stop - block.start for block, _ in pieces] == [7, 7, 7, 7, 1]
    assert sum((elements(regions) for _, regions in pieces), []) == elements(shard.regions)
