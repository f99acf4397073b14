"""Rows of the table, and functions that measure them."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from shardes.distributed import environment


@dataclass
class Row:
    """One comparison. A row without ratios was skipped, and `note` says why.

    Attributes:
        what: what is measured.
        against: what it is compared with.
        target: the smallest `ratio` that is good enough, or the largest with `at_most`. None: there
            is no target.
        ratios: one per repeat.
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
        reached = self.ratio <= self.target if self.at_most else self.ratio >= self.target
        return "yes" if reached else "MISSED"

    def as_dict(self) -> dict:
        return asdict(self) | {
            "ratio": self.ratio if self.ratios else None,
            "verdict": self.verdict,
        }


def environment_with(root: Path, **variables: str) -> dict[str, str]:
    """The variables that this process was started with, for one that imports from `root` too."""
    before = environment.inherited().get("PYTHONPATH")
    path = str(root) if before is None else f"{root}{os.pathsep}{before}"
    return environment.inherited() | {"PYTHONPATH": path} | variables


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object]) -> float:
    """The median of five calls, after one that is not measured."""
    work()
    return statistics.median(seconds(work) for _ in range(5))


def ratios(
    work: Callable[[], object], baseline: Callable[[], object], repeats: int
) -> tuple[list[float], float]:
    """How many times as long the baseline takes, for each repeat, and the median seconds of `work`.

    The two take turns, after one call of each that is not measured.
    """
    work(), baseline()
    ratios, times = [], []
    for _ in range(repeats):
        baseline_time, work_time = seconds(baseline), seconds(work)
        ratios.append(baseline_time / work_time)
        times.append(work_time)
    return ratios, statistics.median(times)


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The exponent p of time ~ size**p, fitted to the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
