"""The noise on NVIDIA GPUs, in Triton: the same bits as reference.py.

A program processes one stretch of counters in one row of a region. It computes the eight elements
of each counter together, and adds all terms before it writes to memory. With low-rank noise, the
factors of all members are computed first; a program then adds their products to one tile of a
matrix. The kernels are compiled without fused multiply-add.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from shardes.noise.definition import LANES, ROUNDS, name_key, table
from shardes.noise.low_rank import COLS, ROWS, LowRank
from shardes.noise.tiles import rectangles, tiles

COUNTERS = 128  # per program: 1,024 elements
TILE_ROWS, TILE_COLS = 64, 128  # per program, with low-rank noise
FACTORS = 1 << 26  # numbers of low-rank factors held at a time, which bounds temporary memory
INTERPRETED = triton.knobs.runtime.interpret  # Triton's interpreter, for tests without a GPU
OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": False}


def add_noise(x: torch.Tensor, name: str, regions, seeds, coefficients, out: torch.Tensor) -> None:
    """`noise.add_noise` with checked arguments; the coefficients are exact float32 values."""
    members, weights = _members(tuple(seeds), tuple(coefficients), x.device)
    key = name_key(name)
    offset = 0
    for region in regions:
        # A row that starts in the middle of a counter can need one more counter.
        aligned = region.start % LANES == 0 and (region.rows == 1 or region.stride % LANES == 0)
        counters = triton.cdiv(region.cols, LANES) + (not aligned)
        stretches = triton.cdiv(counters, COUNTERS)
        part = slice(offset, offset + region.rows * region.cols)
        with _on(x.device):
            _add[(region.rows * stretches,)](
                x[part], out[part], region.start, region.cols, region.stride, stretches,
                key & 0xFFFFFFFF, key >> 32, members, weights, len(seeds), _table(x.device),
                COUNTERS=COUNTERS, LANES=LANES, ROUNDS=ROUNDS, **OPTIONS,
            )  # fmt: skip
        offset = part.stop


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
    members, weights = _members(tuple(seeds), tuple(coefficients), x.device)
    (m, n), rank = low_rank.matrix, low_rank.rank
    most = max(FACTORS // (2 * rank * max(len(seeds), 1)), 1)
    offset = 0
    for region in regions:
        part = slice(offset, offset + region.rows * region.cols)
        place = np.array([region.start, region.rows, region.cols, region.stride, 0])
        blocks = tiles(rectangles(place, part.stop - offset, m, n), most, most)
        for first, row, col, height, width, step in blocks.tolist():
            a = _factor(name + ROWS, members, row * rank, height * rank)
            b = _factor(name + COLS, members, (row // m * n + col) * rank, width * rank)
            across = triton.cdiv(width, TILE_COLS)
            with _on(x.device):
                _add_products[(triton.cdiv(height, TILE_ROWS) * across,)](
                    x[part], out[part], first, height, width, step, across, a, b, weights,
                    len(seeds), rank, TILE_ROWS=TILE_ROWS, TILE_COLS=TILE_COLS, **OPTIONS,
                )  # fmt: skip
        offset = part.stop


def _factor(name: str, members: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """The `count` elements of ε from `start` on, for each member: float32, (members, count)."""
    factor = torch.empty((len(members), count), dtype=torch.float32, device=members.device)
    key, stretches = name_key(name), triton.cdiv(triton.cdiv(count, LANES) + 1, COUNTERS)
    with _on(members.device):
        _gaussian[(stretches * len(members),)](
            factor, start, count, stretches, key & 0xFFFFFFFF, key >> 32, members,
            _table(members.device), COUNTERS=COUNTERS, LANES=LANES, ROUNDS=ROUNDS, **OPTIONS,
        )  # fmt: skip
    return factor


def _on(device: torch.device) -> AbstractContextManager:
    """A context in which `device` is the current one: Triton launches there, not where x lies."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=2)  # the parameters of a model have the same terms, one after another
def _members(
    seeds: tuple[int, ...], coefficients: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds and coefficients as arguments of a kernel."""
    members = torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64)).to(device)
    return members, torch.tensor(coefficients, dtype=torch.float32, device=device)


# The types of integers are fixed, so that each pair of dtypes has one kernel, whatever the region.
@triton.jit(
    do_not_specialize=["start", "cols", "stride", "stretches", "name_low", "name_high", "terms"],
    do_not_specialize_on_alignment=["x", "out"],
)
def _add(
    x, out, start: tl.int64, cols: tl.int64, stride: tl.int64, stretches: tl.int32,
    name_low: tl.int64, name_high: tl.int64, seeds, coefficients, terms: tl.int32, table,
    COUNTERS: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """out = x + Σ c_n·ε(s_n) over the local elements of one region."""
    row = (tl.program_id(0) // stretches).to(tl.int64)
    first = start + row * stride
    counter = first // LANES + (tl.program_id(0) % stretches) * COUNTERS + tl.arange(0, COUNTERS)
    col = counter[:, None] * LANES + tl.arange(0, LANES)[None, :] - first
    inside = (col >= 0) & (col < cols)
    total = tl.zeros((COUNTERS, LANES), tl.float32)
    for n in range(terms):
        noise = _elements(tl.load(seeds + n), counter, name_low, name_high, table, LANES, ROUNDS)
        total += tl.load(coefficients + n) * noise
    _store_sum(x, out, row * cols + col, inside, total)


@triton.jit(do_not_specialize=["start", "count", "stretches", "name_low", "name_high"])
def _gaussian(
    out, start: tl.int64, count: tl.int64, stretches: tl.int32, name_low: tl.int64,
    name_high: tl.int64, seeds, table,
    COUNTERS: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Row n of out = the elements of ε(s_n) from `start` on."""
    member = (tl.program_id(0) // stretches).to(tl.int64)
    counter = start // LANES + (tl.program_id(0) % stretches) * COUNTERS + tl.arange(0, COUNTERS)
    place = counter[:, None].to(tl.int64) * LANES + tl.arange(0, LANES)[None, :] - start
    noise = _elements(tl.load(seeds + member), counter, name_low, name_high, table, LANES, ROUNDS)
    tl.store(out + member * count + place, noise, mask=(place >= 0) & (place < count))


@triton.jit
def _elements(seed, counter, name_low, name_high, table, LANES: tl.constexpr, ROUNDS: tl.constexpr):
    """The elements of ε of some counters, shape (counters, LANES)."""
    lane, counter = tl.arange(0, LANES)[None, :], counter.to(tl.int64)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, low, high, tl.full(low.shape, name_low, tl.uint32),
        tl.full(low.shape, name_high, tl.uint32), n_rounds=ROUNDS,
    )  # fmt: skip
    word = tl.where(lane < 4, tl.where(lane < 2, w0[:, None], w1[:, None]),
                    tl.where(lane < 6, w2[:, None], w3[:, None]))  # fmt: skip
    quantile = (word >> (16 * (lane % 2)).to(tl.uint32)) & 0xFFFF
    upper = quantile > 0x7FFF
    value = tl.load(table + tl.where(upper, 0xFFFF - quantile, quantile))
    return tl.where(upper, -value, value)


@triton.jit(
    do_not_specialize=["first", "height", "width", "step", "across", "terms", "rank"],
    do_not_specialize_on_alignment=["x", "out"],
)
def _add_products(
    x, out, first: tl.int64, height: tl.int64, width: tl.int64, step: tl.int64, across: tl.int64,
    a, b, coefficients, terms: tl.int32, rank: tl.int32,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """out = x + Σ_n Σ_k c_n'·(a_k·b_k) in one tile of a block of `height` × `width`."""
    tile = tl.program_id(0).to(tl.int64)
    down = tile // across * TILE_ROWS + tl.arange(0, TILE_ROWS)
    right = tile % across * TILE_COLS + tl.arange(0, TILE_COLS)
    total = tl.zeros((TILE_ROWS, TILE_COLS), tl.float32)
    for i in range(terms):
        coefficient = tl.load(coefficients + i)
        for k in range(rank):
            rows = tl.load(a + (i * height + down) * rank + k, mask=down < height, other=0.0)
            cols = tl.load(b + (i * width + right) * rank + k, mask=right < width, other=0.0)
            total += coefficient * (rows[:, None] * cols[None, :])
    inside = (down < height)[:, None] & (right < width)[None, :]
    _store_sum(x, out, first + down[:, None] * step + right[None, :], inside, total)


@triton.jit
def _store_sum(x, out, place, inside, total):
    """out = x + total, rounded once."""
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + total
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(out + place, _nearest_bfloat16(value), mask=inside)
    else:
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _nearest_bfloat16(value):
    """The value rounded to nearest even, from its bits: Triton's interpreter would truncate it."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@cache
def _table(device: torch.device) -> torch.Tensor:
    """The lower half of the table, which is antisymmetric: it fits in a multiprocessor's cache."""
    lower, upper = np.split(table(), 2)
    assert np.array_equal(lower, -upper[::-1])
    return torch.from_numpy(lower).to(device)
