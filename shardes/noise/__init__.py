"""ε: the noise of a member, with an address. The noise knows nothing of models.

`definition` says what it is, `reference` computes it anywhere, `cpu` and `cuda` compute the same bits faster.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch

from shardes.noise import cpu, reference

__all__ = ["add_noise", "gaussian"]


def gaussian(seed: int, name: str, start: int, count: int) -> torch.Tensor:
    """Elements `start` to `start + count - 1` of ε(seed) of parameter `name`: float32, on the CPU, shape (count,).

    Args:
        seed: the member's seed, 0 <= seed < 2**64.
        name: the parameter's name in the unsharded model's `named_parameters()`.
        start, count: positions in the full tensor, flattened row by row.

    Raises:
        ValueError: seed, start or count out of range.
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
    """out = x + Σ_n c_n·ε(s_n), over a shard: the one primitive behind perturb, restore and update.

    Each product c_n·ε is rounded to float32 (c_n being a float32) and added in float32, in member order and
    from zero, without fused multiply-add; x is widened to float32, the sum added to it, and the result rounded to
    out's dtype, to nearest even. The bits are the same on any device, for any number of threads, and
    however the full tensor is cut into regions.

    Args:
        x: the shard of parameter `name`: flat, float32, bfloat16 or float16.
        regions: where x's elements, in order, lie in the full tensor: objects with `start`, `rows`, `cols`
            and `stride` (see `shards.Region`). Elements of x beyond them are left alone.
        seeds: N member seeds, 0 <= s < 2**64.
        coefficients: N numbers, rounded to float32.
        out: like x, of any of the three dtypes; x itself by default.

    Raises:
        ValueError: the regions are longer than x, out is not like x, or seeds and coefficients do not fit.
    """
    out = x if out is None else out
    count = sum(region.rows * region.cols for region in regions)
    if x.ndim != 1 or out.shape != x.shape or out.device != x.device or count > x.numel():
        raise ValueError(f"{name}: x {tuple(x.shape)}, out {tuple(out.shape)} and regions of {count} elements")
    _check(seeds, coefficients)
    _kernel(x.device).add_noise(x, name, regions, seeds, [float(np.float32(c)) for c in coefficients], out)


def _kernel(device: torch.device) -> ModuleType:
    """What computes the noise on a device."""
    if device.type == "cpu":
        return cpu
    if device.type == "cuda" and find_spec("triton"):
        from shardes.noise import cuda

        return cuda
    return reference


def _check(seeds: Sequence[int], coefficients: Sequence[float]) -> None:
    if len(seeds) != len(coefficients) or not all(0 <= seed < 2**64 for seed in seeds):
        raise ValueError(f"seeds must be {len(coefficients)} integers from 0 to 2**64 - 1: {list(seeds)}")
