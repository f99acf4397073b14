"""The figures of an evaluation, with 95 % confidence intervals, and how they are printed."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shardes.es.statistics import interval, mean, proportion_interval

KINDS = ("greedy", "sampled")
SHOWN = ("reward", "accuracy", "kl")

Figures = dict[str, float | tuple[float, float]]


def figures(rows: Sequence[Mapping[str, Any]]) -> Figures:
    """Means with their intervals.

    Reward and KL are averaged over prompts, each prompt by its samples' mean; accuracy over
    responses.
    """
    report: Figures = {
        "responses": len(rows),
        "tokens": mean([row["tokens"] for row in rows]),
    }
    for key in ("reward", "kl"):
        if any(key in row for row in rows):
            means = list(_by_prompt(rows, key).values())
            report |= {key: mean(means), f"{key}_interval": interval(means)}
    if "correct" in rows[0]:
        correct = sum(row["correct"] for row in rows)
        report |= {
            "accuracy": correct / len(rows),
            "accuracy_interval": proportion_interval(correct, len(rows)),
        }
    return report


def differences(
    tuned: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]
) -> dict[str, float | tuple[float, float]]:
    """How much the tuned model's mean reward and accuracy exceed the base's.

    The intervals are those of the mean over prompts of the two models' difference on a prompt: a
    prompt that is hard for both models does not widen them.
    """
    report: dict[str, float | tuple[float, float]] = {}
    for key, name in (("reward", "reward"), ("correct", "accuracy")):
        if key in tuned[0]:
            before = _by_prompt(base, key)
            gains = [value - before[prompt] for prompt, value in _by_prompt(tuned, key).items()]
            report |= {name: mean(gains), f"{name}_interval": interval(gains)}
    return report


def _by_prompt(rows: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """The mean of a value over each prompt's responses that have it."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if key in row:
            values.setdefault(row["prompt"], []).append(float(row[key]))
    return {prompt: mean(found) for prompt, found in values.items()}


def summary(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """A line of figures each for the greedy and the sampled responses of a split."""
    lines = []
    for split, report in splits.items():
        for kind in KINDS:
            values = report.get(kind, {})
            parts = [f"{key} {_figure(values, key)}" for key in SHOWN if key in values]
            if parts:
                count = values["responses"]
                lines.append(f"{split}, {kind}: {', '.join(parts)} ({count} responses)")
    return "\n".join(lines)


def not_scored(splits: Mapping[str, Mapping[str, Any]], file: Path) -> str:
    """A line for each split, and model, with responses that got task.on_error; `file` has them."""
    reports = {
        f"{split}{of}": report
        for split, tuned in splits.items()
        for of, report in (("", tuned), (", base", tuned.get("base") or {}))
    }
    return "\n".join(
        f"{name}: {count} not scored, and given task.on_error; the latest: {file}"
        for name, report in reports.items()
        if (count := report.get("scoring_failures"))
    )


def print_comparison(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Print base and tuned model side by side, and their difference."""
    table = Table("responses", "", "base", "tuned", "difference", box=None, pad_edge=False)
    for split, report in splits.items():
        for kind in (kind for kind in KINDS if kind in report):
            tuned, base, gains = (
                part[kind] for part in (report, report["base"], report["difference"])
            )
            for key in (key for key in SHOWN if key in tuned):
                table.add_row(
                    f"{split}, {tuned['responses']} {kind}",
                    key,
                    _figure(base, key),
                    _figure(tuned, key),
                    _figure(gains, key, "+"),
                )
    Console(highlight=False, width=None if sys.stdout.isatty() else 150).print(table)


def _figure(values: Mapping[str, Any], key: str, sign: str = "") -> str:
    """A figure with its interval, if that is finite; accuracies in percent; "" if there is none."""
    if key not in values:
        return ""
    scale, unit = (100, " %") if key == "accuracy" else (1, "")
    low, high = values[f"{key}_interval"]
    text = f"{scale * values[key]:{sign}.4g}{unit}"
    if not math.isfinite(low):  # of one prompt
        return text
    return f"{text} [{scale * low:{sign}.4g}, {scale * high:{sign}.4g}]"
