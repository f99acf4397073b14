"""Means, standard deviations and confidence intervals.

Sums are exactly rounded: every machine gets the same bits.
"""

import math
from collections.abc import Sequence

Z = 1.959964  # standard normal quantile of 97.5 %


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def std(values: Sequence[float]) -> float:
    """Population standard deviation (ddof 0)."""
    average = mean(values)
    return math.sqrt(math.fsum((value - average) ** 2 for value in values) / len(values))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the mean, by the normal approximation."""
    average = mean(values)
    if len(values) < 2:
        return -math.inf, math.inf
    variance = math.fsum((value - average) ** 2 for value in values) / (len(values) - 1)
    half = Z * math.sqrt(variance / len(values))
    return average - half, average + half


def proportion_interval(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a proportion."""
    share, z = successes / count, Z**2 / count
    middle = (share + z / 2) / (1 + z)
    half = Z / (1 + z) * math.sqrt(share * (1 - share) / count + z / (4 * count))
    return middle - half, middle + half
