"""Seconds that named parts of the work take."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Sums up seconds by part: `with clock("generate"): ...`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last call; 0.0 for a part that did not occur."""
        taken, self._seconds = self._seconds, defaultdict(float)
        return taken
