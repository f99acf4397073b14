"""The noise on CPUs, in Numba: the same bits as reference.py.

Threads process different stretches of a shard. In a stretch, a short array of counters at a time
goes through the Philox rounds, which the compiler vectorizes, and then each element is looked up in
the table. These look-ups limit the speed; vector gathers are no faster than scalar loads.

With low-rank noise, threads process different tiles of a matrix. In a tile, a member's factors are
computed once, and each element costs three vectorized operations per k.

`numba.get_num_threads()` is the number of threads. If Numba's only threading layer is its own
workqueue (neither OpenMP nor TBB is available), only one Python thread at a time may call this.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numba
import numpy as np
import torch

from shardes.noise.definition import (
    LANES,
    MULTIPLIER_0,
    MULTIPLIER_1,
    ROUNDS,
    WEYL_0,
    WEYL_1,
    name_key,
    table,
)
from shardes.noise.low_rank import COLS, ROWS, LowRank
from shardes.noise.tiles import rectangles, tiles

STRETCH = 1 << 14  # elements that a thread takes at a time
# Counters per pass: few enough for the rounds of a pass to overlap with the look-ups of the one
# before.
COUNTERS = 32
# Of a tile: so large that the factors cost little, so small that its sum stays in the cache.
TILE_ROWS, TILE_COLS = 64, 512
TERMS = 4  # products that are added to a sum in one pass
# 32-bit words are held in uint64, so that their products fit.
MASK, WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
SCRATCH = 1 << 20  # float32 elements of scratch memory for dtypes that the kernel does not support


class _Stretch(NamedTuple):
    """Consecutive elements, as a region."""

    start: int
    rows: int
    cols: int
    stride: int


def gaussian(seed: int, name: str, start: int, count: int) -> torch.Tensor:
    """Elements `start` to `start + count - 1` of ε(seed) of parameter `name`: float32, (count,)."""
    values = torch.zeros(count)
    add_noise(values, name, [_Stretch(start, 1, count, count)], [seed], [1.0], values)
    return values


def add_noise(x: torch.Tensor, name: str, regions, seeds, coefficients, out: torch.Tensor) -> None:
    """`noise.add_noise` with checked arguments; the coefficients are exact float32 values."""
    terms = (np.uint64(name_key(name)), *_members(seeds, coefficients), table())
    for x_part, out_part, place in _parts(x, regions, out):
        if x_part.size <= STRETCH:  # one thread is enough; waking the others would cost time
            _add(x_part, out_part, place, 0, x_part.size, *terms)
        else:
            _add_in_threads(x_part, out_part, place, *terms)


def add_low_rank_noise(
    x: torch.Tensor,
    name: str,
    regions,
    seeds,
    coefficients,
    out: torch.Tensor,
    low_rank: LowRank,
) -> None:
    """`noise.add_noise` of low rank, with checked arguments; the coefficients are exact c_n'."""
    (m, n), names = low_rank.matrix, [np.uint64(name_key(name + end)) for end in (ROWS, COLS)]
    terms = (m, n, low_rank.rank, *names, *_members(seeds, coefficients), table())
    for x_part, out_part, place in _parts(x, regions, out):
        parts = rectangles(place, x_part.size, m, n)
        cut = tiles(parts, TILE_ROWS, TILE_COLS)
        if x_part.size <= STRETCH:
            _add_tiles(x_part, out_part, cut, *terms)
        else:
            _add_tiles_in_threads(x_part, out_part, cut, *terms)


def _parts(
    x: torch.Tensor, regions, out: torch.Tensor
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The elements of each region as arguments of a kernel: x, out, place.

    Those of dtypes that the kernels do not support go through scratch memory, block by block.
    """
    direct = x.dtype == out.dtype == torch.float32 and x.is_contiguous() and out.is_contiguous()
    scratch = torch.empty(0 if direct else min(SCRATCH, x.numel()))
    offset = 0
    for region in regions:
        count = region.rows * region.cols
        if direct:
            part = slice(offset, offset + count)
            place = _place(region.start, region.rows, region.cols, region.stride)
            yield x[part].numpy(), out[part].numpy(), place
        else:
            for first in range(0, count, SCRATCH):
                part = slice(offset + first, offset + min(first + SCRATCH, count))
                block = scratch[: part.stop - part.start]
                block.copy_(x[part])
                place = _place(region.start, region.rows, region.cols, region.stride, first)
                yield block.numpy(), block.numpy(), place
                out[part].copy_(block)
        offset += count


def _place(start: int, rows: int, cols: int, stride: int, skip: int = 0) -> np.ndarray:
    """A region without its first `skip` elements, as an argument of a kernel."""
    return np.array([start, rows, cols, stride, skip], dtype=np.int64)


def _members(seeds, coefficients) -> tuple[np.ndarray, np.ndarray]:
    """Seeds and coefficients as arguments of a kernel."""
    return np.array(seeds, dtype=np.uint64), np.array(coefficients, dtype=np.float32)


@numba.njit(parallel=True, cache=True, nogil=True)  # signs of life go on meanwhile
def _add_in_threads(x, out, place, name, seeds, coefficients, table):
    """`_add` over all of x, with Numba's threads working on different stretches."""
    for stretch in numba.prange((x.size + STRETCH - 1) // STRETCH):
        first, last = stretch * STRETCH, min((stretch + 1) * STRETCH, x.size)
        _add(x, out, place, first, last, name, seeds, coefficients, table)


@numba.njit(cache=True, error_model="numpy")
def _add(x, out, place, first, last, name, seeds, coefficients, table):
    """out = x + Σ c_n·ε(s_n) for x[first:last]; x[0] is element `skip` of the region."""
    start, cols, stride, skip = place[0], place[2], place[3], place[4]
    words = np.empty((4, COUNTERS), np.uint32)
    total = np.empty(COUNTERS * LANES, np.float32)
    at = first
    while at < last:
        row, col = (at + skip) // cols, (at + skip) % cols
        index = start + row * stride + col
        lead = index % LANES  # elements of the first counter before these
        count = min(min(last - at, cols - col), COUNTERS * LANES - lead)
        counters = (lead + count + LANES - 1) // LANES
        total[: counters * LANES] = 0
        for n in range(seeds.size):
            _philox(words, np.uint64(index // LANES), counters, name, seeds[n])
            _accumulate(total, words, counters, coefficients[n], table)
        # Slices, because x[at + i] might have a negative index, which keeps the compiler from
        # vectorizing the loop.
        x_part, out_part = x[at : at + count], out[at : at + count]
        total_part = total[lead : lead + count]
        for i in range(count):
            out_part[i] = x_part[i] + total_part[i]
        at += count


@numba.njit(cache=True, inline="always")
def _philox(words, counter, count, name, seed):
    """Philox-4x32-10 of `count` consecutive counters: words[w, i] becomes word w of counter i."""
    for i in range(count):
        c0, c1 = (counter + np.uint64(i)) & MASK, (counter + np.uint64(i)) >> WORD
        c2, c3 = name & MASK, name >> WORD
        key_0, key_1 = seed & MASK, seed >> WORD
        for _ in range(ROUNDS):
            p0, p1 = c0 * np.uint64(MULTIPLIER_0), c2 * np.uint64(MULTIPLIER_1)
            c0, c1, c2, c3 = (
                (p1 >> WORD) ^ c1 ^ key_0,
                p1 & MASK,
                (p0 >> WORD) ^ c3 ^ key_1,
                p0 & MASK,
            )
            key_0, key_1 = (key_0 + np.uint64(WEYL_0)) & MASK, (key_1 + np.uint64(WEYL_1)) & MASK
        words[0, i], words[1, i], words[2, i], words[3, i] = c0, c1, c2, c3


@numba.njit(cache=True, inline="always")
def _accumulate(total, words, count, coefficient, table):
    """total += c·ε: eight elements per counter, two of each word."""
    for i in range(count):
        for w in range(4):
            word = words[w, i]
            total[LANES * i + 2 * w] += coefficient * table[word & np.uint32(0xFFFF)]
            total[LANES * i + 2 * w + 1] += coefficient * table[word >> np.uint32(16)]


@numba.njit(parallel=True, cache=True, nogil=True)  # signs of life go on meanwhile
def _add_tiles_in_threads(x, out, tiles, m, n, rank, rows, cols, seeds, coefficients, table):
    """`_add_tiles` over all tiles, with Numba's threads working on different ones."""
    for i in numba.prange(len(tiles)):
        _add_tiles(x, out, tiles[i : i + 1], m, n, rank, rows, cols, seeds, coefficients, table)


@numba.njit(cache=True, error_model="numpy")
def _add_tiles(x, out, tiles, m, n, rank, rows, cols, seeds, coefficients, table):
    """out = x + Σ_n Σ_k c_n'·(a_k·b_k) in some tiles; `rows` and `cols` are the factors' keys."""
    words = np.empty((4, COUNTERS), np.uint32)
    a_factor = np.empty(TILE_ROWS * rank + 2 * LANES, np.float32)
    b_factor = np.empty(TILE_COLS * rank + 2 * LANES, np.float32)
    c = np.empty(TERMS, np.float32)
    a, b = np.empty((TILE_ROWS, TERMS), np.float32), np.empty((TERMS, TILE_COLS), np.float32)
    total = np.empty((TILE_ROWS, TILE_COLS), np.float32)
    for tile in tiles:
        place, row, col, height, width, step = tile
        start_a, start_b = row * rank, (row // m * n + col) * rank
        total[:height] = 0
        terms = 0
        for i in range(seeds.size):
            _factor(a_factor, words, start_a, height * rank, rows, seeds[i], table)
            _factor(b_factor, words, start_b, width * rank, cols, seeds[i], table)
            for k in range(rank):
                c[terms] = coefficients[i]
                for y in range(height):
                    a[y, terms] = a_factor[start_a % LANES + y * rank + k]
                for j in range(width):
                    b[terms, j] = b_factor[start_b % LANES + j * rank + k]
                terms += 1
                if terms == TERMS:
                    for y in range(height):
                        _add_four(total[y, :width], c, a[y], b)
                    terms = 0
        for y in range(height):
            for term in range(terms):
                _add_one(total[y, :width], c[term], a[y, term], b[term])
            at = place + y * step
            x_part, out_part, total_part = x[at : at + width], out[at : at + width], total[y]
            for j in range(width):
                out_part[j] = x_part[j] + total_part[j]


@numba.njit(cache=True, inline="always")
def _add_four(total, c, a, b):
    """total += c·(a·b) for four terms in order, without a trip to memory between them."""
    c0, c1, c2, c3 = c[0], c[1], c[2], c[3]
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    b0, b1, b2, b3 = b[0], b[1], b[2], b[3]
    for j in range(total.size):
        first = total[j] + c0 * (a0 * b0[j])
        second = first + c1 * (a1 * b1[j])
        third = second + c2 * (a2 * b2[j])
        total[j] = third + c3 * (a3 * b3[j])


@numba.njit(cache=True, inline="always")
def _add_one(total, c, a, b):
    """total += c·(a·b)."""
    for j in range(total.size):
        total[j] += c * (a * b[j])


@numba.njit(cache=True, inline="always")
def _factor(out, words, start, count, name, seed, table):
    """Elements start to start + count - 1 of ε; the first one becomes out[start % LANES]."""
    counter, counters = start // LANES, (start % LANES + count + LANES - 1) // LANES
    for first in range(0, counters, COUNTERS):
        part = min(counters - first, COUNTERS)
        _philox(words, np.uint64(counter + first), part, name, seed)
        _look_up(out[first * LANES :], words, part, table)


@numba.njit(cache=True, inline="always")
def _look_up(out, words, count, table):
    """The elements of ε of `count` counters: eight per counter, two of each word."""
    for i in range(count):
        for w in range(4):
            word = words[w, i]
            out[LANES * i + 2 * w] = table[word & np.uint32(0xFFFF)]
            out[LANES * i + 2 * w + 1] = table[word >> np.uint32(16)]
