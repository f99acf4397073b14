"""How sure the means of rewards are."""

import math
from collections.abc import Sequence

from shardes.population import mean

Z = 1.959964  # standard normal quantile of 97.5 %


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the mean, by the normal approximation."""
    center = mean(values)
    if len(values) < 2:
        return -math.inf, math.inf
    variance = math.fsum((value - center) ** 2 for value in values) / (len(values) - 1)
    half = Z * math.sqrt(variance / len(values))
    return center - half, center + half


def proportion_interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    share, z = right / count, Z**2 / count
    middle = (share + z / 2) / (1 + z)
    half = Z / (1 + z) * math.sqrt(share * (1 - share) / count + z / (4 * count))
    return middle - half, middle + half
