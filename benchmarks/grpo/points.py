"""Which models of a run are evaluated: the same rule for both methods."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = Path(__file__).with_name("grpo.yaml")
RANKS = 2  # of either method, with one thread each
REPORT = "run.json"  # in a run's directory
PARTS = 12  # of the training's time
FIRST_TOKENS, GROWTH = 100_000, 1.5


class Points:
    """The points of a run's curve, lines of OUT/points.jsonl.

    A point is due when a mark is passed, and at the end. There are 12 marks at equal distances in
    time. The marks in generated tokens grow from 100,000 by half each.

    Args:
        seconds: of the whole training.
    """

    def __init__(self, out: Path, seconds: float):
        self._file = out / "points.jsonl"
        self._interval = self._next_seconds = seconds / PARTS
        self._next_tokens = float(FIRST_TOKENS)

    def due(self, seconds: float, tokens: int) -> bool:
        """Whether a mark lies between the last call's values and these."""
        passed = seconds >= self._next_seconds or tokens >= self._next_tokens
        while self._next_seconds <= seconds:
            self._next_seconds += self._interval
        while self._next_tokens <= tokens:
            self._next_tokens *= GROWTH
        return passed

    def write(self, step: int, seconds: float, tokens: int) -> None:
        """Record a point: steps, seconds and generated tokens since the start of the training."""
        with open(self._file, "a") as file:
            file.write(json.dumps(dict(step=step, seconds=seconds, tokens=tokens)) + "\n")

    def read(self) -> list[dict[str, float]]:
        """What was written, also by another process."""
        return list(map(json.loads, self._file.read_text().splitlines()))
