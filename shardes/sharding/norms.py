"""Sums of squares over weights, in float64 and in one pass."""

import numba
import numpy as np

CHUNK = 128  # elements added up one after another; NumPy adds the chunks' sums in pairs


def moved_and_total(theta: np.ndarray, origin: np.ndarray) -> tuple[float, float]:
    """Σ (θ − θ₀)² and Σ θ₀² of two flat float32 arrays.

    The sums do not depend on the number of threads, and on the sharding by some 1e-15 of their
    value only.
    """
    moved, total = _squares(theta, origin, -(-theta.size // CHUNK)).sum(axis=1).tolist()
    return moved, total


@numba.njit(parallel=True, nogil=True, cache=True)
def _squares(theta, origin, chunks):
    sums = np.zeros((2, chunks))
    for chunk in numba.prange(chunks):
        moved = total = 0.0
        for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, theta.size)):
            moved += (np.float64(theta[i]) - np.float64(origin[i])) ** 2
            total += np.float64(origin[i]) ** 2
        sums[0, chunk], sums[1, chunk] = moved, total
    return sums
