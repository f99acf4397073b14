"""Shards and regions: which elements of a parameter a rank holds.

A shard is the part of one parameter that a rank holds, as a flat tensor. Its regions say which
elements of the full, unsharded tensor these are. Noise, loading, digests and export work on
regions, and so with any engine and any sharding.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

BLOCK = 1 << 20  # elements processed at a time, which bounds temporary memory


@dataclass(frozen=True)
class Region:
    """`rows` stretches of `cols` consecutive elements of the full tensor.

    The first one begins at element `start`, the next ones at a distance of `stride` from each
    other. Element j of the region is element `start + (j // cols) * stride + j % cols` of the full
    tensor. Rows do not overlap.
    """

    start: int
    rows: int
    cols: int
    stride: int

    @classmethod
    def contiguous(cls, start: int, count: int) -> "Region":
        """The region of `count` consecutive elements, the first at `start`."""
        return cls(start, 1, count, count)

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    def index(self, element: int) -> int:
        """The index in the full tensor of element `element` of the region."""
        return self.start + element // self.cols * self.stride + element % self.cols

    def cut(self, first: int, last: int) -> list["Region"]:
        """The regions of this region's elements `first` to `last - 1`."""
        row, col = divmod(first, self.cols)
        last_row, last_col = divmod(last, self.cols)
        row_start = self.start + row * self.stride
        if row == last_row:
            return [Region.contiguous(row_start + col, last_col - col)]
        regions = []
        if col:
            regions.append(Region.contiguous(row_start + col, self.cols - col))
            row += 1
        if row < last_row:
            regions.append(
                Region(self.start + row * self.stride, last_row - row, self.cols, self.stride)
            )
        if last_col:
            regions.append(Region.contiguous(self.start + last_row * self.stride, last_col))
        return regions


def cut(regions: Sequence[Region], first: int, last: int) -> tuple[Region, ...]:
    """The regions of elements `first` to `last - 1` of a shard with these regions.

    `last` may exceed the shard's size, as with padding; no region describes elements beyond the
    size.
    """
    pieces: list[Region] = []
    offset = 0
    for region in regions:
        begin, end = max(first - offset, 0), min(last - offset, region.numel)
        if begin < end:
            pieces += region.cut(begin, end)
        offset += region.numel
    return tuple(pieces)


def strided_regions(
    shape: Sequence[int], offset: int, strides: Sequence[int]
) -> tuple[Region, ...]:
    """The regions of a strided view (`torch.as_strided`) of the full tensor, in row-major order."""
    if 0 in shape:
        return ()
    axes: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if not axes or axes[-1][1] != 1:
        axes.append((1, 1))
    *outer, (cols, _) = axes
    *outer, (rows, stride) = outer or [(1, cols)]
    starts = (
        offset + sum(i * step for i, (_, step) in zip(index, outer, strict=True))
        for index in itertools.product(*(range(size) for size, _ in outer))
    )
    return tuple(Region(start, rows, cols, stride) for start in starts)


def box_regions(
    shape: Sequence[int], lows: Sequence[int], sizes: Sequence[int]
) -> tuple[Region, ...]:
    """The regions of the box `lows[d] : lows[d] + sizes[d]` of a row-major tensor of `shape`."""
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    offset = sum(low * stride for low, stride in zip(lows, strides, strict=True))
    return strided_regions(sizes, offset, strides)


@dataclass
class ParameterShard:
    """This rank's part of one parameter.

    Attributes:
        name: the parameter's name in the unsharded model.
        shape: of the full tensor.
        tensor: the live weights: flat, with the model's dtype and device. Its elements follow
            `regions` in order; any beyond them are padding.
        regions: where the elements lie in the full tensor.
        tensor_regions: those of the rank's slice under tensor parallelism, of which the shard is a
            part.
        counted: whether this rank counts these elements in sums over all weights. Of the ranks of a
            replica that hold the same elements, exactly one does.
    """

    name: str
    shape: tuple[int, ...]
    tensor: torch.Tensor
    regions: tuple[Region, ...]
    tensor_regions: tuple[Region, ...] = ()
    counted: bool = True

    def __post_init__(self):
        self.numel = sum(region.numel for region in self.regions)
        assert self.tensor.ndim == 1 and self.numel <= self.tensor.numel(), self.name

    @property
    def values(self) -> torch.Tensor:
        """The live weights without padding: a view of shape (numel,)."""
        return self.tensor[: self.numel]

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[slice, tuple[Region, ...]]]:
        """Slices of at most `size` elements of `values`, each with its regions."""
        for first in range(0, self.numel, size):
            last = min(first + size, self.numel)
            yield slice(first, last), cut(self.regions, first, last)
