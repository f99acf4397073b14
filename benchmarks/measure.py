"""Rows of the table, and how they are measured."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np


@dataclass
class Row:
    """One comparison: the median of its ratios and their spread.

    `target` is the least that `ratio` should be, or the most where `at_most`. A row without ratios was skipped;
    `note` says why.
    """

    name: str
    what: str
    against: str
    target: float | None
    ratios: list[float] = field(default_factory=list)
    at_most: bool = False
    note: str = ""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        if not self.ratios:
            return "skipped"
        if self.target is None:
            return ""
        return "yes" if (self.ratio <= self.target if self.at_most else self.ratio >= self.target) else "MISSED"

    def as_dict(self) -> dict:
        return asdict(self) | {"ratio": self.ratio if self.ratios else None, "verdict": self.verdict}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object]) -> float:
    """The median of five calls, after one that is not measured."""
    work()
    return statistics.median(seconds(work) for _ in range(5))


def ratios(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[list[float], float]:
    """How many times longer theirs takes, taken in turns after one unmeasured call of each; and our median seconds."""
    ours(), theirs()
    found, mine = [], []
    for _ in range(repeats):
        other, own = seconds(theirs), seconds(ours)
        found.append(other / own)
        mine.append(own)
    return found, statistics.median(mine)


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The exponent p of time ~ size**p, fitted to the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
