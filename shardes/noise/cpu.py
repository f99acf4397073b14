"""The noise on CPUs, in Numba: bit for bit what reference.py computes.

Threads share out stretches of a shard; within one, the Philox rounds run over short arrays of counters, a
word each, so that the compiler turns them into vector instructions.
"""

import numba
import numpy as np
import torch

from shardes.noise.definition import LANES, MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1, name_key, table

STRETCH = 1 << 15  # elements that a thread takes at a time
COUNTERS = 128  # counters per pass over the rounds: what it works on stays in the first-level cache
SCRATCH = 1 << 20  # elements of float32 scratch for dtypes that the kernel does not know


def gaussian(seed: int, name: str, start: int, count: int) -> torch.Tensor:
    """ε(seed) of parameter `name`, elements `start` to `start + count - 1`: float32, shape (count,)."""
    values = torch.zeros(count)
    _add(values.numpy(), values.numpy(), _rows(start, 1, count, count), *_terms(name, [seed], [1.0]), table())
    return values


def add_noise(x: torch.Tensor, name: str, regions, seeds, coefficients, out: torch.Tensor) -> None:
    """`noise.add_noise` with its arguments made regular: coefficients are exact float32 values."""
    terms = _terms(name, seeds, coefficients)
    direct = x.dtype == out.dtype == torch.float32 and x.is_contiguous() and out.is_contiguous()
    scratch = None if direct else torch.empty(min(SCRATCH, x.numel()))
    offset = 0
    for region in regions:
        count = region.rows * region.cols
        if direct:
            where = slice(offset, offset + count)
            place = _rows(region.start, region.rows, region.cols, region.stride)
            _add(x[where].numpy(), out[where].numpy(), place, *terms, table())
        else:
            for first in range(0, count, SCRATCH):
                where = slice(offset + first, offset + min(first + SCRATCH, count))
                block = scratch[: where.stop - where.start]
                block.copy_(x[where])
                place = _rows(region.start, region.rows, region.cols, region.stride, first)
                _add(block.numpy(), block.numpy(), place, *terms, table())
                out[where].copy_(block)
        offset += count


def _rows(start: int, rows: int, cols: int, stride: int, skip: int = 0) -> np.ndarray:
    """A region as the kernel takes it; `skip` of its first elements are left out."""
    return np.array([start, rows, cols, stride, skip], dtype=np.int64)


def _terms(name: str, seeds, coefficients) -> tuple[int, np.ndarray, np.ndarray]:
    return np.uint64(name_key(name)), np.array(seeds, dtype=np.uint64), np.array(coefficients, dtype=np.float32)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _add(x, out, place, name, seeds, coefficients, table):
    """out = x + Σ c_n·ε(s_n) over the local elements of one region, from its element `skip` on."""
    start, cols, stride, skip = place[0], place[2], place[3], place[4]
    for stretch in numba.prange((x.size + STRETCH - 1) // STRETCH):
        at, end = stretch * STRETCH, min((stretch + 1) * STRETCH, x.size)
        words = np.empty((4, COUNTERS), np.uint32)
        total = np.empty((COUNTERS + 1) * LANES, np.float32)
        while at < end:
            row, col = (at + skip) // cols, (at + skip) % cols
            index = start + row * stride + col
            lead = index % LANES  # elements of the first counter that lie before this run
            count = min(min(end - at, cols - col), COUNTERS * LANES - lead)
            total[: lead + count] = 0
            for n in range(seeds.size):
                _philox(words, index // LANES, (lead + count + LANES - 1) // LANES, name, seeds[n])
                _accumulate(total, words, (lead + count + LANES - 1) // LANES, coefficients[n], table)
            for i in range(count):
                out[at + i] = x[at + i] + total[lead + i]
            at += count


@numba.njit(cache=True, inline="always")
def _philox(words, counter, count, name, seed):
    """Philox-4x32-10 of `count` consecutive counters."""
    mask = np.uint64(0xFFFFFFFF)
    for i in range(count):
        words[0, i] = np.uint32(np.uint64(counter + i) & mask)
        words[1, i] = np.uint32(np.uint64(counter + i) >> np.uint64(32))
        words[2, i] = np.uint32(name & mask)
        words[3, i] = np.uint32(name >> np.uint64(32))
    key_0, key_1 = np.uint32(seed & mask), np.uint32(seed >> np.uint64(32))
    for _ in range(ROUNDS):
        for i in range(count):
            p0 = np.uint64(words[0, i]) * np.uint64(MULTIPLIER_0)
            p1 = np.uint64(words[2, i]) * np.uint64(MULTIPLIER_1)
            words[0, i] = np.uint32(p1 >> np.uint64(32)) ^ words[1, i] ^ key_0
            words[1, i] = np.uint32(p1 & mask)
            words[2, i] = np.uint32(p0 >> np.uint64(32)) ^ words[3, i] ^ key_1
            words[3, i] = np.uint32(p0 & mask)
        key_0 = np.uint32(np.uint64(key_0) + np.uint64(WEYL_0) & mask)
        key_1 = np.uint32(np.uint64(key_1) + np.uint64(WEYL_1) & mask)


@numba.njit(cache=True, inline="always")
def _accumulate(total, words, count, coefficient, table):
    """total += c·ε: eight elements per counter, two of each word."""
    for i in range(count):
        for w in range(4):
            word = words[w, i]
            total[LANES * i + 2 * w] += coefficient * table[word & np.uint32(0xFFFF)]
            total[LANES * i + 2 * w + 1] += coefficient * table[word >> np.uint32(16)]
