"""The noise on CPUs, in Numba: the same bits as reference.py.

Threads process different stretches of a shard. In a stretch, a short array of counters at a time
goes through the Philox rounds, which the compiler vectorizes, and then each element is looked up in
the table. These look-ups limit the speed; vector gathers are no faster than scalar loads.

`numba.get_num_threads()` is the number of threads. If Numba's only threading layer is its own
workqueue (neither OpenMP nor TBB is available), only one Python thread at a time may call this.
"""

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

STRETCH = 1 << 14  # elements that a thread takes at a time
# Counters per pass: few enough for the rounds of a pass to overlap with the look-ups of the one
# before.
COUNTERS = 32
# 32-bit words are held in uint64, so that their products fit.
MASK, WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
SCRATCH = 1 << 20  # float32 elements of scratch memory for dtypes that the kernel does not support


def gaussian(seed: int, name: str, start: int, count: int) -> torch.Tensor:
    """Elements `start` to `start + count - 1` of ε(seed) of parameter `name`: float32, (count,)."""
    values = torch.zeros(count)
    _run(
        values.numpy(),
        values.numpy(),
        _place(start, 1, count, count),
        *_terms(name, [seed], [1.0]),
        table(),
    )
    return values


def add_noise(x: torch.Tensor, name: str, regions, seeds, coefficients, out: torch.Tensor) -> None:
    """`noise.add_noise` with checked arguments; the coefficients are exact float32 values."""
    terms = _terms(name, seeds, coefficients)
    direct = x.dtype == out.dtype == torch.float32 and x.is_contiguous() and out.is_contiguous()
    scratch = torch.empty(0 if direct else min(SCRATCH, x.numel()))
    offset = 0
    for region in regions:
        count = region.rows * region.cols
        if direct:
            part = slice(offset, offset + count)
            place = _place(region.start, region.rows, region.cols, region.stride)
            _run(x[part].numpy(), out[part].numpy(), place, *terms, table())
        else:
            for first in range(0, count, SCRATCH):
                part = slice(offset + first, offset + min(first + SCRATCH, count))
                block = scratch[: part.stop - part.start]
                block.copy_(x[part])
                place = _place(region.start, region.rows, region.cols, region.stride, first)
                _run(block.numpy(), block.numpy(), place, *terms, table())
                out[part].copy_(block)
        offset += count


def _run(x, out, place, *terms) -> None:
    if x.size <= STRETCH:  # one thread is enough; waking the others would cost time
        _add(x, out, place, 0, x.size, *terms)
    else:
        _add_in_threads(x, out, place, *terms)


def _place(start: int, rows: int, cols: int, stride: int, skip: int = 0) -> np.ndarray:
    """A region without its first `skip` elements, as an argument of the kernel."""
    return np.array([start, rows, cols, stride, skip], dtype=np.int64)


def _terms(name: str, seeds, coefficients) -> tuple[np.uint64, np.ndarray, np.ndarray]:
    """The terms of the sum as arguments of the kernel: name key, seeds, coefficients."""
    members = np.array(seeds, dtype=np.uint64), np.array(coefficients, dtype=np.float32)
    return np.uint64(name_key(name)), *members


@numba.njit(parallel=True, cache=True)
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
