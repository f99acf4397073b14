"""What responses are worth: a task's scores, guarded, and how sure their means are."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from shardes.config import ConfigError
from shardes.population import mean
from shardes.tasks import Task

Z = 1.959964  # standard normal quantile of 97.5 %


def score(task: Task, split: str, texts: list[str], which: Sequence[int] | None, saved: Path) -> list[float]:
    """The task's rewards, one per response; `which` are the prompts that were answered, by number (None: all).

    Raises:
        ConfigError: the task raised, or gave another count; prompts and responses are then in the file `saved`.
    """
    try:
        found = task.score(split, texts) if which is None else task.score(split, texts, which)
        rewards = list(map(float, found))
    except Exception as error:
        prompts = task.prompts(split)
        asked = prompts if which is None else [prompts[number] for number in which]
        rows = [dict(prompt=prompt, response=text) for prompt, text in zip(asked, texts, strict=True)]
        saved.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        raise ConfigError(
            f"task: scoring {split} raised {type(error).__name__}: {error}; the responses: {saved}"
        ) from error
    if len(rewards) != len(texts):
        raise ConfigError(f"task: score gave {len(rewards)} rewards for {len(texts)} responses")
    return rewards


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
