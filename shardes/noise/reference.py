"""The noise in plain torch: a readable specification, and the fallback for other devices."""

from collections.abc import Callable, Sequence
from functools import cache

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

BLOCK = 1 << 18  # elements computed at a time, which bounds temporary memory
MASK = 0xFFFFFFFF


def gaussian(seed: int, name: str, index: torch.Tensor) -> torch.Tensor:
    """ε(seed) of parameter `name` at elements `index` (int64, any shape and device): float32."""
    counter, lane = index // LANES, index % LANES
    key = name_key(name)
    high = [torch.full_like(counter, key & MASK), torch.full_like(counter, key >> 32)]
    words = philox([counter & MASK, counter >> 32, *high], seed & MASK, seed >> 32)
    word = torch.stack(words, dim=-1).gather(-1, (lane // 2).unsqueeze(-1)).squeeze(-1)
    return _table(index.device)[(word >> 16 * (lane % 2)) & 0xFFFF]


def philox(counter: Sequence[torch.Tensor], key_0: int, key_1: int) -> list[torch.Tensor]:
    """Philox-4x32-10 of four counter words and two key words; 32-bit words in int64 tensors."""
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        # A product of 2**63 or more wraps to a negative int64 with the same bits.
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK) ^ c1 ^ key_0,
            p1 & MASK,
            ((p0 >> 32) & MASK) ^ c3 ^ key_1,
            p0 & MASK,
        )
        key_0, key_1 = (key_0 + WEYL_0) & MASK, (key_1 + WEYL_1) & MASK
    return [c0, c1, c2, c3]


def add_noise(x: torch.Tensor, name: str, regions, seeds, coefficients, out: torch.Tensor) -> None:
    """`noise.add_noise` with checked arguments; the coefficients are exact float32 values."""

    def add(total: torch.Tensor, index: torch.Tensor) -> None:
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            total += gaussian(seed, name, index) * coefficient  # rounded twice, never fused

    _add(x, regions, out, add)


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
    (m, n), rank = low_rank.matrix, low_rank.rank

    def add(total: torch.Tensor, index: torch.Tensor) -> None:
        row, col = index // n, index // n // m * n + index % n
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            for k in range(rank):
                a = gaussian(seed, name + ROWS, row * rank + k)
                b = gaussian(seed, name + COLS, col * rank + k)
                total += a * b * coefficient  # rounded three times

    _add(x, regions, out, add)


def _add(
    x: torch.Tensor,
    regions,
    out: torch.Tensor,
    add: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """out = x + what `add` adds to zeros, given the elements' indices in the full tensor."""
    offset = 0
    for region in regions:
        for first in range(0, region.rows * region.cols, BLOCK):
            last = min(first + BLOCK, region.rows * region.cols)
            local = torch.arange(first, last, device=x.device)
            index = region.start + (local // region.cols) * region.stride + local % region.cols
            part = slice(offset + first, offset + last)
            total = torch.zeros(last - first, dtype=torch.float32, device=x.device)
            add(total, index)
            out[part] = (x[part].float() + total).to(out.dtype)
        offset += region.rows * region.cols


@cache
def _table(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(table()).to(device)
