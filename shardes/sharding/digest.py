"""The digest of a model's weights, which does not depend on the sharding."""

from collections.abc import Sequence

import numba
import numpy as np
import torch

from shardes.noise.definition import name_key
from shardes.sharding.regions import BLOCK, Region

# An element's hash is the 64-bit finalizer of MurmurHash3 of
# name key + index·INDEX_FACTOR + bits·BITS_FACTOR, all modulo 2**64.
INDEX_FACTOR, BITS_FACTOR = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
MIX_1, MIX_2 = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53


def digest(name: str, regions: Sequence[Region], values: torch.Tensor, threads: bool = True) -> int:
    """The digest of some elements of parameter `name`: an integer in [0, 2**64).

    A digest is the sum over elements, modulo 2**64, of a hash of (name, element index, float32
    bits). So the digests of shards add up to the digest of the whole model, however it is sharded.

    Args:
        regions: where the elements lie in the full tensor.
        values: the elements, in the order of the regions: flat, of any floating dtype.
        threads: whether to use several threads on a CPU.
    """
    total, offset, key = 0, 0, name_key(name)
    on_device: torch.Tensor | int = 0  # added up there, which nothing waits for
    for region in regions:
        for first in range(0, region.numel, BLOCK):
            last = min(first + BLOCK, region.numel)
            bits = values[offset + first : offset + last].float().view(torch.int32)
            for piece in region.cut(first, last):
                piece_bits, bits = bits[: piece.numel], bits[piece.numel :]
                if bits.device.type == "cpu":
                    total += _hash_on_cpu(piece_bits, piece, key, threads)
                else:
                    on_device = on_device + _hash(piece_bits, piece, key)
        offset += region.numel
    return (total + int(on_device)) % 2**64


def format_digest(total: int) -> str:
    """A digest as text, as in journals: the sum modulo 2**64 as 16 hexadecimal digits."""
    return f"{total % 2**64:016x}"


def _hash(bits: torch.Tensor, region: Region, key: int) -> torch.Tensor:
    """The sum of the hashes, on any device. Arithmetic of int64 wraps like that of uint64."""

    def shifted(x):
        return (x >> 33) & 0x7FFFFFFF

    rows = torch.arange(region.rows, device=bits.device)[:, None] * region.stride
    index = (region.start + rows + torch.arange(region.cols, device=bits.device)).view(-1)
    x = (
        index * _signed(INDEX_FACTOR)
        + (bits.long() & 0xFFFFFFFF) * _signed(BITS_FACTOR)
        + _signed(key)
    )
    x = (x ^ shifted(x)) * _signed(MIX_1)
    x = (x ^ shifted(x)) * _signed(MIX_2)
    return (x ^ shifted(x)).sum()


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _hash_on_cpu(bits: torch.Tensor, region: Region, key: int, threads: bool) -> int:
    hash_rows = _hash_rows_threaded if threads else _hash_rows_alone
    words = bits.numpy().view(np.uint32)
    # Threads work on different rows, so one long row is split into many, and a tail.
    if region.rows == 1 and region.cols > 8192:
        region = Region(region.start, region.cols // 4096, 4096, 4096)
    tail_start, tail = region.start + region.rows * region.stride, words[region.numel :]
    sums = hash_rows(
        words, np.uint64(region.start), region.rows, region.cols, region.stride, np.uint64(key)
    )
    tail_sum = hash_rows(tail, np.uint64(tail_start), 1, tail.size, 0, np.uint64(key))
    return int(sums) + int(tail_sum)


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
