"""The run's record: a line per iteration, enough to rebuild every center from the base model."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Record:
    """One iteration: its members, what they earned, and what the update adds of each member's ε.

    `digest` is that of the center on which the rewards were measured, before the update.
    """

    iteration: int
    seeds: list[int]
    rewards: list[float]
    coefficients: list[float]
    sigma: float
    alpha: float
    digest: str


class Journal:
    """`journal.jsonl`, open for appending."""

    def __init__(self, path: Path):
        self._file = open(path, "a", encoding="utf-8")

    def append(self, record: Record) -> None:
        """Write a record; on return it is on disk."""
        self._file.write(json.dumps(asdict(record)) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
