"""Responses of the center before and after training, side by side, of one or several runs."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardes.es.statistics import mean
from shardes.reporting.page import Answer, Answers, Block, Details, Heading, Text
from shardes.reporting.run_directory import RunContents
from shardes.words import counted

SHOWN = 3  # of each group
SPLITS = {"test": "held-out prompts", "train": "training prompts"}
Row = dict[str, Any]


@dataclass
class Asked:
    """A prompt with the first and the last row of samples.jsonl of each run, by its name."""

    prompt: Any
    before: dict[str, Row]
    after: dict[str, Row]

    @property
    def gain(self) -> float:
        """Of the reward, as the mean over runs."""
        return mean([self.after[run]["reward"] - self.before[run]["reward"] for run in self.after])


def before_and_after(runs: Mapping[str, RunContents]) -> list[Block]:
    """A few prompts of each split with the responses of the first and of the last evaluation."""
    blocks: list[Block] = []
    for split, name in SPLITS.items():
        asked = _asked({run: contents.samples for run, contents in runs.items()}, split)
        if not asked:
            continue
        pages = _groups(asked, name)
        # Held-out prompts count: the others are a click away.
        blocks += pages if split == "test" else [Details(name.capitalize(), pages)]
    return blocks or [Text("There are not two evaluations of the same prompts yet.")]


def _asked(samples: Mapping[str, Sequence[Row]], split: str) -> list[Asked]:
    """The prompts that every run was asked at its first and at its last evaluation, in order."""
    found: list[dict[tuple[str, int], Row]] = []
    for rows in samples.values():
        rows = [row for row in rows if row.get("split") == split]
        evaluated = {row["iteration"] for row in rows}
        if len(evaluated) < 2:
            return []
        for end in (min(evaluated), max(evaluated)):
            found.append(_by_prompt(row for row in rows if row["iteration"] == end))
    common = [key for key in found[0] if all(key in rows for rows in found)] if found else []
    return [
        Asked(
            found[0][key]["prompt"],
            {run: rows[key] for run, rows in zip(samples, found[::2], strict=True)},
            {run: rows[key] for run, rows in zip(samples, found[1::2], strict=True)},
        )
        for key in common
    ]


def _by_prompt(rows: Iterable[Row]) -> dict[tuple[str, int], Row]:
    """Rows by prompt, and by how often it came before: a set may hold it more than once."""
    seen: Counter = Counter()
    keyed = {}
    for row in rows:
        prompt = json.dumps(row["prompt"])
        keyed[prompt, seen[prompt]] = row
        seen[prompt] += 1
    return keyed


def _groups(asked: Sequence[Asked], name: str) -> list[Block]:
    """The largest gains and losses, and what kept its reward, with a sentence that counts them."""
    ordered = sorted(asked, key=lambda one: -one.gain)
    groups = {
        "Gained": [one for one in ordered if one.gain > 0],
        "Lost": [one for one in reversed(ordered) if one.gain < 0],
        "The same": [one for one in ordered if one.gain == 0],
    }
    gained, lost, same = map(len, groups.values())
    rewards = (
        " → ".join(
            f"{mean([getattr(one, end)[run]['reward'] for one in asked]):.4g}"
            for end in ("before", "after")
        )
        + (f" ({run})" if len(asked[0].after) > 1 else "")
        for run in asked[0].after
    )
    blocks: list[Block] = [
        Text(
            f"{counted(len(asked), name.removesuffix('s')).capitalize()}: mean reward "
            f"{', '.join(rewards)}. {gained} gained reward, {lost} lost, {same} kept it; up to "
            f"{SHOWN} of each are shown, the largest changes first."
        )
    ]
    for title, group in groups.items():
        blocks += [Heading(title)] if group else []
        blocks += [Answers(one.prompt, _answers(one)) for one in group[:SHOWN]]
    return blocks


def _answers(asked: Asked) -> list[Answer]:
    """One column of before if all runs began with the same answer, and one per run of after."""
    several = len(asked.after) > 1
    first = next(iter(asked.before.values()))
    same = all(
        (row["response"], row["reward"]) == (first["response"], first["reward"])
        for row in asked.before.values()
    )
    answers = []
    for number, (run, after) in enumerate(asked.after.items()):
        before = asked.before[run]
        of_run = f"{run}, " if several else ""
        if not same or number == 0:
            answers.append(_answer("" if same else of_run, before))
        answers.append(_answer(of_run, after, after["reward"] - before["reward"]))
    return answers


def _answer(of_run: str, row: Row, change: float = 0.0) -> Answer:
    done = row["iteration"]
    when = f"after {counted(done, 'iteration')}" if done else "before training"
    return Answer(of_run + when, row["response"], float(row["reward"]), change)
