"""The noise on NVIDIA GPUs, in Triton: the same bits as reference.py.

A program processes one stretch of counters in one row of a region. It computes the eight elements
of each counter together, and adds all terms before it writes to memory. The kernel is compiled
without fused multiply-add.
"""

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from shardes.noise.definition import LANES, ROUNDS, name_key, table

COUNTERS = 128  # per program: 1,024 elements
INTERPRETED = triton.knobs.runtime.interpret  # Triton's interpreter, for tests without a GPU
OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": False}


def add_noise(x: torch.Tensor, name: str, regions, seeds, coefficients, out: torch.Tensor) -> None:
    """`noise.add_noise` with checked arguments; the coefficients are exact float32 values."""
    members = torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64)).to(x.device)
    weights = torch.tensor(coefficients, dtype=torch.float32, device=x.device)
    key = name_key(name)
    offset = 0
    for region in regions:
        # A row that starts in the middle of a counter needs one more counter.
        stretches = triton.cdiv(triton.cdiv(region.cols, LANES) + 1, COUNTERS)
        part = slice(offset, offset + region.rows * region.cols)
        _add[(region.rows * stretches,)](
            x[part], out[part], region.start, region.cols, region.stride, stretches,
            key & 0xFFFFFFFF, key >> 32, members, weights, len(seeds), _table(x.device),
            COUNTERS=COUNTERS, LANES=LANES, ROUNDS=ROUNDS, **OPTIONS,
        )  # fmt: skip
        offset = part.stop


@triton.jit(
    do_not_specialize=["start", "cols", "stride", "stretches", "name_low", "name_high", "terms"]
)
def _add(
    x, out, start, cols, stride, stretches, name_low, name_high, seeds, coefficients, terms, table,
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
