"""Low-rank noise: the noise of a matrix as a product of two thin factors, E = Σ_k a_k·b_kᵀ / √r.

a, with a row for each row of the matrix, and b, with a row for each column, are ε under two further
names. So an element of E is a function of seed, name and index, like an element of ε. A parameter
of more than two dimensions is a stack of matrices, each with factors of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np

ROWS, COLS = "#rows", "#cols"  # what the names of the factors end with


@dataclass(frozen=True)
class LowRank:
    """That the noise of a parameter of this shape has this rank.

    Element f of the parameter lies in column j = f % n of row R = f // n, counted over all matrices
    of the stack, of matrix e = R // m, where the last two dimensions are m × n. Its factors are the
    elements R·r + k and (e·n + j)·r + k, k < r, of ε under the two names. A parameter of fewer than
    two dimensions has no noise.
    """

    shape: tuple[int, ...]
    rank: int

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter is a matrix or a stack of matrices, so that it has noise."""
        return len(self.shape) > 1

    @property
    def matrix(self) -> tuple[int, int]:
        """m and n: the rows and columns of one matrix."""
        rows, cols = self.shape[-2:]
        return rows, cols

    @property
    def matrices(self) -> int:
        return prod(self.shape[:-2])

    def scaled(self, coefficients: Sequence[float]) -> list[float]:
        """The coefficients over √r, rounded to float32 once: those of a·bᵀ."""
        return [float(np.float32(c / sqrt(self.rank))) for c in coefficients]
