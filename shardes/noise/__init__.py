"""ε, the noise of a member: a function of a seed, a parameter's name and an element's index.

`definition` has the table and the constants, `reference` computes the noise on any device, and
`cpu` and `cuda` compute the same bits faster. `low_rank` has the address of low-rank noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from shardes.noise.low_rank import COLS, ROWS, LowRank

if TYPE_CHECKING:  # commands that compute no noise start without torch
    import torch

__all__ = ["LowRank", "add_noise", "factors", "gaussian"]


def gaussian(seed: int, name: str, start: int, count: int) -> torch.Tensor:
    """Elements `start` to `start + count - 1` of ε(seed) of a parameter: float32 on the CPU, flat.

    Args:
        seed: the member's seed, 0 <= seed < 2**64.
        name: the parameter's name in the unsharded model's `named_parameters()`.
        start, count: elements of the full tensor in row-major order.

    Raises:
        ValueError: seed, start or count is out of range.
    """
    _check([seed], [1.0])
    if start < 0 or count < 0:
        raise ValueError(f"start={start}, count={count}: must not be negative")
    from shardes.noise import cpu

    return cpu.gaussian(seed, name, start, count)


def factors(
    seed: int, name: str, low_rank: LowRank, box: Sequence[slice] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors a and b of the noise of a matrix, E(seed) = a·bᵀ / √r: float32, on the CPU.

    Args:
        low_rank: the parameter's shape and the rank r; it has at least two dimensions.
        box: the elements wanted, as one slice, without a step, for each dimension of the full
            parameter; None: all.

    Returns:
        a, of the shape (..., rows, r), and b, (..., cols, r), where the box has the shape
        (..., rows, cols).
    """
    import torch

    assert low_rank.is_matrix, f"{name} of shape {low_rank.shape} has no noise of low rank"
    rank, (m, n) = low_rank.rank, low_rank.matrix
    box = [slice(None)] * len(low_rank.shape) if box is None else box
    *outer, rows, cols = (
        range(*part.indices(size)) for part, size in zip(box, low_rank.shape, strict=True)
    )
    stack = np.arange(low_rank.matrices).reshape(low_rank.shape[:-2])
    chosen = stack[tuple(slice(part.start, part.stop) for part in outer)]

    def factor(suffix: str, size: int, part: range) -> torch.Tensor:
        made = [
            gaussian(seed, name + suffix, (e * size + part.start) * rank, len(part) * rank)
            for e in chosen.flatten().tolist()
        ]
        return torch.cat(made).view(*chosen.shape, len(part), rank)

    return factor(ROWS, m, rows), factor(COLS, n, cols)


def add_noise(
    x: torch.Tensor,
    name: str,
    regions: Sequence,
    seeds: Sequence[int],
    coefficients: Sequence[float],
    out: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
) -> None:
    """out = x + Σ_n c_n·ε(s_n), on a shard: the operation of perturbing, restoring and updating.

    Each product c_n·ε is rounded to float32, c_n being a float32. The products are added in
    float32, in member order, starting from zero, and without fused multiply-add. x is widened to
    float32, the sum is added, and the result is rounded to out's dtype, to nearest even. So the
    bits do not depend on the device, on the number of threads, or on the sharding.

    Noise of low rank has the terms c_n'·(a·b) for each member and, within it, for each k, where
    c_n' is the float32 next to c_n / √r; each of the two products is rounded to float32. A
    parameter of fewer than two dimensions gets none: x is rounded to out's dtype.

    Args:
        x: the shard of parameter `name`: flat, float32, bfloat16 or float16.
        regions: where the elements of x, in order, lie in the full tensor: objects with the
            attributes of `sharding.regions.Region`. Elements of x beyond them do not change.
        seeds: N member seeds, 0 <= s < 2**64.
        coefficients: N numbers; they are rounded to float32.
        out: a tensor like x, with any of the three dtypes. None: x itself.
        low_rank: the parameter's shape and the rank of its noise; None: full noise.

    Raises:
        ValueError: the regions are longer than x, out is not like x, a seed is out of range, or
            there are not as many seeds as coefficients.
    """
    out = x if out is None else out
    count = sum(region.rows * region.cols for region in regions)
    if x.ndim != 1 or out.shape != x.shape or out.device != x.device or count > x.numel():
        raise ValueError(
            f"{name}: x {tuple(x.shape)}, out {tuple(out.shape)} and regions of {count} elements "
            "do not fit together"
        )
    _check(seeds, coefficients)
    kernel = _kernel(x.device)
    if low_rank is None:
        rounded = [float(np.float32(c)) for c in coefficients]
        kernel.add_noise(x, name, regions, seeds, rounded, out)
    elif low_rank.is_matrix:
        scaled = low_rank.scaled(coefficients)
        kernel.add_low_rank_noise(x, name, regions, seeds, scaled, out, low_rank)
    elif out is not x:
        out[:count].copy_(x[:count])


def _kernel(device: torch.device) -> ModuleType:
    """The module that computes the noise on a device."""
    if device.type == "cpu":
        from shardes.noise import cpu

        return cpu
    if device.type == "cuda" and find_spec("triton"):
        from shardes.noise import cuda

        return cuda
    from shardes.noise import reference

    return reference


def _check(seeds: Sequence[int], coefficients: Sequence[float]) -> None:
    if len(seeds) != len(coefficients) or not all(0 <= seed < 2**64 for seed in seeds):
        raise ValueError(
            f"seeds must be {len(coefficients)} integers from 0 to 2**64 - 1: {list(seeds)}"
        )
