"""The noise on NVIDIA GPUs, in Triton: the same bits as reference.py.

A program processes one stretch of counters in one row of a region. It computes the eight elements
of each counter together, and adds all terms before it writes to memory. With low-rank noise, a
program processes one tile of a matrix, and computes each factor of the tile once per term. The
kernels are compiled without fused multiply-add.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from shardes.noise.definition import LANES, ROUNDS, name_key, table
from shardes.noise.low_rank import COLS, ROWS, LowRank
from shardes.noise.tiles import rectangles, tiles

COUNTERS = 128  # per program: 1,024 elements
TILE_ROWS, TILE_COLS = 32, 128  # per program, with low-rank noise
INTERPRETED = triton.knobs.runtime.interpret  # Triton's interpreter, for tests without a GPU
OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": False}


def add_noise(x: torch.Tensor, name: str, regions, seeds, coefficients, out: torch.Tensor) -> None:
    """`noise.add_noise` with checked arguments; the coefficients are exact float32 values."""
    members, weights = _members(seeds, coefficients, x.device)
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
    members, weights = _members(seeds, coefficients, x.device)
    (m, n), (rows, cols) = low_rank.matrix, (name_key(name + end) for end in (ROWS, COLS))
    offset = 0
    for region in regions:
        part = slice(offset, offset + region.rows * region.cols)
        place = np.array([region.start, region.rows, region.cols, region.stride, 0])
        cut = tiles(rectangles(place, part.stop - offset, m, n), TILE_ROWS, TILE_COLS)
        with _on(x.device):
            _add_tile[(len(cut),)](
                x[part], out[part], torch.from_numpy(cut).to(x.device), m, n, low_rank.rank,
                rows & 0xFFFFFFFF, rows >> 32, cols & 0xFFFFFFFF, cols >> 32, members, weights,
                len(seeds), _table(x.device), TILE_ROWS=TILE_ROWS, TILE_COLS=TILE_COLS,
                LANES=LANES, ROUNDS=ROUNDS, **OPTIONS,
            )  # fmt: skip
        offset = part.stop


def _on(device: torch.device) -> AbstractContextManager:
    """A context in which `device` is the current one: Triton launches there, not where x lies."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _members(seeds, coefficients, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
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
    lane = tl.arange(0, LANES)[None, :]
    col = counter[:, None] * LANES + lane - first
    inside = (col >= 0) & (col < cols)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    total = tl.zeros((COUNTERS, LANES), tl.float32)
    for n in range(terms):
        w0, w1, w2, w3 = tl.philox(
            tl.load(seeds + n), low, high, tl.full(low.shape, name_low, tl.uint32),
            tl.full(low.shape, name_high, tl.uint32), n_rounds=ROUNDS,
        )  # fmt: skip
        word = tl.where(lane < 4, tl.where(lane < 2, w0[:, None], w1[:, None]),
                        tl.where(lane < 6, w2[:, None], w3[:, None]))  # fmt: skip
        quantile = (word >> (16 * (lane % 2)).to(tl.uint32)) & 0xFFFF
        total += tl.load(coefficients + n) * tl.load(table + quantile)
    place = row * cols + col
    _store_sum(x, out, place, inside, total)


@triton.jit(
    do_not_specialize=[
        "m", "n", "rank", "rows_low", "rows_high", "cols_low", "cols_high", "terms",
    ],
    do_not_specialize_on_alignment=["x", "out", "tiles"],
)  # fmt: skip
def _add_tile(
    x, out, tiles, m: tl.int64, n: tl.int64, rank: tl.int32, rows_low: tl.int64,
    rows_high: tl.int64, cols_low: tl.int64, cols_high: tl.int64, seeds, coefficients,
    terms: tl.int32, table, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """out = x + Σ_n Σ_k c_n'·(a_k·b_k) in one tile; the factors' names are `rows` and `cols`."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 6
    first, row, col = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    height, width, step = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    down, across = tl.arange(0, TILE_ROWS), tl.arange(0, TILE_COLS)
    row_index, col_index = (row + down) * rank, (row // m * n + col + across) * rank
    total = tl.zeros((TILE_ROWS, TILE_COLS), tl.float32)
    for i in range(terms):
        seed, coefficient = tl.load(seeds + i), tl.load(coefficients + i)
        for k in range(rank):
            a = _elements(seed, row_index + k, rows_low, rows_high, table, LANES, ROUNDS)
            b = _elements(seed, col_index + k, cols_low, cols_high, table, LANES, ROUNDS)
            total += coefficient * (a[:, None] * b[None, :])
    inside = (down < height)[:, None] & (across < width)[None, :]
    _store_sum(x, out, first + down[:, None] * step + across[None, :], inside, total)


@triton.jit
def _elements(seed, index, name_low, name_high, table, LANES: tl.constexpr, ROUNDS: tl.constexpr):
    """Elements `index` of ε."""
    counter, lane = index // LANES, index % LANES
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, low, high, tl.full(low.shape, name_low, tl.uint32),
        tl.full(low.shape, name_high, tl.uint32), n_rounds=ROUNDS,
    )  # fmt: skip
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    return tl.load(table + ((word >> (16 * (lane % 2)).to(tl.uint32)) & 0xFFFF))


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
    return torch.from_numpy(table()).to(device)
