"""The low-rank term of a linear layer on CPUs, in Numba: it reads factors where they lie.

Gathering the factors of every row in every layer and decode step takes longer than the products.
"""

import numba
import numpy as np
import torch

PARALLEL = 1 << 18  # multiply-adds from which several threads are worth waking


def add_term(
    x: torch.Tensor,
    y: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
) -> None:
    """y += scale·(x·bᵀ)·a: see `side_by_side.add_linear_term`; all float32, y contiguous."""
    arguments = (t.numpy() for t in (x.contiguous(), y, slots, scales, a, b))
    size = len(x) * (a.shape[-1] + b.shape[-1]) * a.shape[1]
    (_add_in_threads if size > PARALLEL else _add_all)(*arguments)


@numba.njit(cache=True, error_model="numpy")
def _add_all(x, y, slots, scales, a, b):
    for line in range(x.shape[0]):
        _add(x, y, line, slots, scales, a, b)


@numba.njit(cache=True, parallel=True, error_model="numpy")
def _add_in_threads(x, y, slots, scales, a, b):
    for line in numba.prange(x.shape[0]):
        _add(x, y, line, slots, scales, a, b)


# The order of the sum of a dot product is the compiler's, as it is that of a matrix product's.
@numba.njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract"}, inline="never")
def _add(x, y, line, slots, scales, a, b):
    row = line * slots.size // x.shape[0]
    slot = slots[row]
    x_line, y_line = x[line], y[line]
    for k in range(a.shape[1]):
        a_k, b_k = a[slot, k], b[slot, k]
        inner = np.float32(0)
        for j in range(x_line.size):
            inner += x_line[j] * b_k[j]
        inner *= scales[row]
        for j in range(y_line.size):
            y_line[j] += inner * a_k[j]
