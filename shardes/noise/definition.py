"""The definition of ε: Philox bits, and a table of normal quantiles.

ε(seed) is a function of the member's seed, the parameter's name and the element's index in the full
tensor. Philox-4x32-10 (Salmon et al., SC'11), with the seed as key and (index // 8, name key) as
counter, gives eight 16-bit numbers u. Element `index` is T[u[index % 8]], where T has the midpoints
of 65,536 equally probable slices of the standard normal distribution.
"""

import hashlib
from functools import cache
from statistics import NormalDist

import numpy as np

NOISE = "philox4x32-10/quantile16/1"  # the name of this definition in journals
LOW_RANK_NOISE = "philox4x32-10/quantile16/low_rank/1"  # and that of products of ε (low_rank.py)

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LANES = 8  # elements per counter

TABLE_SHA256 = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"


@cache
def table() -> np.ndarray:
    """T, scaled to unit variance: float32, shape (65536,).

    Raises:
        RuntimeError: this machine computes another table, so its noise would differ.
    """
    inverse = NormalDist().inv_cdf
    upper = np.array([inverse((u + 0.5) / 65536) for u in range(32768, 65536)])
    quantiles = np.concatenate([-upper[::-1], upper])
    values = (quantiles / np.sqrt(np.mean(quantiles**2))).astype("<f4")
    if hashlib.sha256(values.tobytes()).hexdigest() != TABLE_SHA256:
        raise RuntimeError(
            "this machine computes a different table of normal quantiles; please report this"
        )
    return values


@cache
def name_key(name: str) -> int:
    """The high 64 bits of a parameter's counters, from its name in the unsharded model."""
    return int.from_bytes(hashlib.blake2b(name.encode()).digest()[:8], "little")
