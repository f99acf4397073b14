"""The noise in plain torch: a readable specification, and the fallback for other devices."""

from collections.abc import Sequence
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
    offset = 0
    for region in regions:
        for first in range(0, region.rows * region.cols, BLOCK):
            last = min(first + BLOCK, region.rows * region.cols)
            local = torch.arange(first, last, device=x.device)
            index = region.start + (local // region.cols) * region.stride + local % region.cols
            part = slice(offset + first, offset + last)
            total = torch.zeros(last - first, dtype=torch.float32, device=x.device)
            for seed, coefficient in zip(seeds, coefficients, strict=True):
                total += gaussian(seed, name, index) * coefficient  # rounded twice, never fused
            out[part] = (x[part].float() + total).to(out.dtype)
        offset += region.rows * region.cols


@cache
def _table(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(table()).to(device)
