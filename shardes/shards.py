"""Where a rank's numbers live.

A shard is the part of one parameter that this rank holds, as a flat tensor. Its regions say which elements
of the full, unsharded tensor those are. Noise, loading, digests and export are written over regions and
never ask which engine cut the model up.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numba
import numpy as np
import torch

from shardes.noise.definition import name_key

BLOCK = 1 << 20  # elements worked on at a time wherever a temporary is needed


@dataclass(frozen=True)
class Region:
    """`rows` runs of `cols` consecutive elements of the full tensor, `stride` apart, the first at `start`.

    Element j of the region is element `start + (j // cols) * stride + j % cols` of the full tensor. Rows do not
    overlap.
    """

    start: int
    rows: int
    cols: int
    stride: int

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    def index(self, element: int) -> int:
        """The index in the full tensor of one of the region's elements."""
        return self.start + element // self.cols * self.stride + element % self.cols

    def cut(self, first: int, last: int) -> list["Region"]:
        """The regions of this region's elements `first` to `last - 1`."""
        row, col = divmod(first, self.cols)
        last_row, last_col = divmod(last, self.cols)
        at = self.start + row * self.stride
        if row == last_row:
            return [run(at + col, last_col - col)]
        regions = []
        if col:
            regions.append(run(at + col, self.cols - col))
            row += 1
        if row < last_row:
            regions.append(Region(self.start + row * self.stride, last_row - row, self.cols, self.stride))
        if last_col:
            regions.append(run(self.start + last_row * self.stride, last_col))
        return regions


def run(start: int, count: int) -> Region:
    """The region of `count` consecutive elements."""
    return Region(start, 1, count, count)


def cut(regions: Sequence[Region], first: int, last: int) -> tuple[Region, ...]:
    """The regions of local elements `first` to `last - 1` of a shard that is described by `regions`.

    `last` may lie beyond the regions' end (a padded slice): what lies beyond belongs to no region.
    """
    pieces: list[Region] = []
    offset = 0
    for region in regions:
        begin, end = max(first - offset, 0), min(last - offset, region.numel)
        if begin < end:
            pieces += region.cut(begin, end)
        offset += region.numel
    return tuple(pieces)


def strided_regions(shape: Sequence[int], offset: int, strides: Sequence[int]) -> tuple[Region, ...]:
    """The regions, in row-major order, of a strided view (`torch.as_strided`'s terms) of the full tensor."""
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
    return tuple(
        Region(offset + sum(i * step for i, (_, step) in zip(index, outer, strict=True)), rows, cols, stride)
        for index in itertools.product(*(range(size) for size, _ in outer))
    )


def box_regions(shape: Sequence[int], lows: Sequence[int], sizes: Sequence[int]) -> tuple[Region, ...]:
    """The regions of the box `lows[d] : lows[d] + sizes[d]` of a row-major tensor of `shape`."""
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    return strided_regions(sizes, sum(low * s for low, s in zip(lows, strides, strict=True)), strides)


@dataclass
class Shard:
    """This rank's part of one parameter.

    `tensor` is flat, the live weights in the model's dtype on the model's device; its elements follow
    `regions` in order, and what lies beyond them is padding. `owned` is False where another rank of the
    replica holds the same elements and counts them in sums over all weights.
    """

    name: str
    shape: tuple[int, ...]
    tensor: torch.Tensor
    regions: tuple[Region, ...]
    owned: bool = True

    def __post_init__(self):
        self.numel = sum(region.numel for region in self.regions)
        assert self.tensor.ndim == 1 and self.numel <= self.tensor.numel(), self.name

    @property
    def values(self) -> torch.Tensor:
        """The live weights without padding: a view, shape (numel,)."""
        return self.tensor[: self.numel]

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[slice, tuple[Region, ...]]]:
        """Local stretches of at most `size` elements, each with its regions."""
        for first in range(0, self.numel, size):
            last = min(first + size, self.numel)
            yield slice(first, last), cut(self.regions, first, last)


# The finalizer of MurmurHash3 (64 bit) over name key + index·A + bits·B, all modulo 2**64.
INDEX_FACTOR, BITS_FACTOR = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
MIX_1, MIX_2 = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53


def digest(name: str, regions: Sequence[Region], values: torch.Tensor, threads: bool = True) -> int:
    """The digest of some elements of parameter `name`: an integer in [0, 2**64).

    A digest is a sum over elements, modulo 2**64, of a hash of (name, element index, float32 bits), so those
    of the parts of a model add up to the same number however it is sharded. `values` is flat, any floating
    dtype, widened to float32, in the order of `regions`. `threads` says whether a CPU may use several.
    """
    total, offset, key = 0, 0, name_key(name)
    for region in regions:
        for first in range(0, region.numel, BLOCK):
            last = min(first + BLOCK, region.numel)
            bits = values[offset + first : offset + last].float().view(torch.int32)
            for piece in region.cut(first, last):
                part, bits = bits[: piece.numel], bits[piece.numel :]
                on_cpu = part.device.type == "cpu"
                total += _hash_on_cpu(part, piece, key, threads) if on_cpu else _hash(part, piece, key)
        offset += region.numel
    return total % 2**64


def _hash(bits: torch.Tensor, region: Region, key: int) -> int:
    """Sum of hashes, on any device; int64 arithmetic wraps as uint64's does."""

    def shifted(x):
        return (x >> 33) & 0x7FFFFFFF

    rows = torch.arange(region.rows, device=bits.device)[:, None] * region.stride
    index = (region.start + rows + torch.arange(region.cols, device=bits.device)).view(-1)
    x = index * _signed(INDEX_FACTOR) + (bits.long() & 0xFFFFFFFF) * _signed(BITS_FACTOR) + _signed(key)
    x = (x ^ shifted(x)) * _signed(MIX_1)
    x = (x ^ shifted(x)) * _signed(MIX_2)
    return int((x ^ shifted(x)).sum())


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _hash_on_cpu(bits: torch.Tensor, region: Region, key: int, threads: bool) -> int:
    hash_rows = _hash_rows_threaded if threads else _hash_rows_alone
    lanes = bits.numpy().view(np.uint32)
    if region.rows == 1 and region.cols > 8192:  # threads share out rows
        region = Region(region.start, region.cols // 4096, 4096, 4096)
    at, tail = region.start + region.rows * region.stride, lanes[region.numel :]
    sums = hash_rows(lanes, np.uint64(region.start), region.rows, region.cols, region.stride, np.uint64(key))
    return int(sums) + int(hash_rows(tail, np.uint64(at), 1, tail.size, 0, np.uint64(key)))


@numba.njit(inline="always")
def _hash_row(bits, base):
    total = np.uint64(0)
    for col in range(bits.size):
        x = base + np.uint64(col) * np.uint64(INDEX_FACTOR)
        x += np.uint64(bits[col]) * np.uint64(BITS_FACTOR)
        x = (x ^ (x >> np.uint64(33))) * np.uint64(MIX_1)
        x = (x ^ (x >> np.uint64(33))) * np.uint64(MIX_2)
        total += x ^ (x >> np.uint64(33))
    return total


@numba.njit(parallel=True, cache=True)
def _hash_rows_threaded(bits, start, rows, cols, stride, key):
    total = np.uint64(0)
    for row in numba.prange(rows):
        base = key + (start + np.uint64(row * stride)) * np.uint64(INDEX_FACTOR)
        total += _hash_row(bits[row * cols : (row + 1) * cols], base)
    return total


@numba.njit(nogil=True, cache=True)
def _hash_rows_alone(bits, start, rows, cols, stride, key):
    total = np.uint64(0)
    for row in range(rows):
        base = key + (start + np.uint64(row * stride)) * np.uint64(INDEX_FACTOR)
        total += _hash_row(bits[row * cols : (row + 1) * cols], base)
    return total
