"""ε, the noise of a member: a function of a seed, a parameter's name and an element's index.

`definition` has the table and the constants, `reference` computes the noise on any device, and
`cpu` and `cuda` compute the same bits faster.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch

from shardes.noise import cpu, reference

__all__ = ["add_noise", "gaussian"]


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
    return cpu.gaussian(seed, name, start, count)


def add_noise(
    x: torch.Tensor,
    name: str,
    regions: Sequence,
    seeds: Sequence[int],
    coefficients: Sequence[float],
    out: torch.Tensor | None = None,
) -> None:
    """out = x + Σ_n c_n·ε(s_n), on a shard: the operation of perturbing, restoring and updating.

    Each product c_n·ε is rounded to float32, c_n being a float32. The products are added in
    float32, in member order, starting from zero, and without fused multiply-add. x is widened to
    float32, the sum is added, and the result is rounded to out's dtype, to nearest even. So the
    bits do not depend on the device, on the number of threads, or on the sharding.

    Args:
        x: the shard of parameter `name`: flat, float32, bfloat16 or float16.
        regions: where the elements of x, in order, lie in the full tensor: objects with the
            attributes of `sharding.regions.Region`. Elements of x beyond them do not change.
        seeds: N member seeds, 0 <= s < 2**64.
        coefficients: N numbers; they are rounded to float32.
        out: a tensor like x, with any of the three dtypes. None: x itself.

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
    rounded = [float(np.float32(c)) for c in coefficients]
    _kernel(x.device).add_noise(x, name, regions, seeds, rounded, out)


def _kernel(device: torch.device) -> ModuleType:
    """The module that computes the noise on a device."""
    if device.type == "cpu":
        return cpu
    if device.type == "cuda" and find_spec("triton"):
        from shardes.noise import cuda

        return cuda
    return reference


def _check(seeds: Sequence[int], coefficients: Sequence[float]) -> None:
    if len(seeds) != len(coefficients) or not all(0 <= seed < 2**64 for seed in seeds):
        raise ValueError(
            f"seeds must be {len(coefficients)} integers from 0 to 2**64 - 1: {list(seeds)}"
        )
