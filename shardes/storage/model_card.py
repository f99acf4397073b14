"""The README.md of an exported model, as the Hugging Face hub reads it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from shardes.config.schema import SETTINGS
from shardes.es.statistics import mean
from shardes.sharding.model_directory import CARD
from shardes.storage.journal import Evaluation, History, Record
from shardes.words import counted

MAX_ROWS = 12  # of the table of iterations
KEPT = ("license", "license_name", "license_link", "language")  # of the base model's card
FIGURES = {
    "held_out_reward": "mean reward, held-out prompts",
    "held_out_accuracy": "accuracy, held-out prompts",
    "center_reward": "mean reward, training prompts",
}


def model_card(history: History, iteration: int, base: Path, hub_id: str | None) -> str:
    """A card of the center after `iteration` iterations of a run.

    Args:
        base: the base model's directory; a card there says what licence and languages it has.
        hub_id: the base model's id on the hub; None: it is known as a directory only, whose path
            nobody else can use.
    """
    settings, records = history.settings, history.records[:iteration]
    name = code(hub_id or Path(history.header.model).name)
    link = f"[{name}](https://huggingface.co/{hub_id})" if hub_id else name
    evaluations = [history.evaluations[t] for t in sorted(history.evaluations) if t <= iteration]
    return f"""---
{_metadata(base, hub_id).to_yaml()}
---

# {name}, fine-tuned with evolution strategies

The base model {link} after {counted(iteration, "iteration")} of training with shardes, as in
[Evolution Strategies at Scale](https://arxiv.org/abs/2509.24372). Task: {_task(settings)}. The base
model's licence applies to this model too.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

## Results

{_results(evaluations)}

## Training

{_training(settings, records)}

{table(["iteration", "σ", "α", "members' mean reward", "best member"], _iterations(records))}

## Settings

{table(["key", "value"], [[code(key), code(shown(key, value))] for key, value in settings.items()])}
"""


def _task(settings: dict[str, Any]) -> str:
    name, path = settings["task.name"], settings["task.path"]
    if name is None and path is None:
        return "an object in Python"
    return code(name or Path(path.rpartition(":")[0]).name)


def _metadata(base: Path, hub_id: str | None) -> ModelCardData:
    try:
        found = metadata_load(base / CARD) or {}
    except (OSError, ValueError, YAMLError):  # there is no card, or its header is none
        found = {}
    known = {key: found[key] for key in KEPT if key in found}
    if hub_id and "license" not in known:
        page = f"https://huggingface.co/{hub_id}"
        known |= dict(license="other", license_name="that-of-the-base-model", license_link=page)
    return ModelCardData(
        base_model=hub_id,
        base_model_relation="finetune" if hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["evolution-strategies", "shardes"],
        **known,
    )


def _results(evaluations: Sequence[Evaluation]) -> str:
    """The center's figures before training and at its last evaluation."""
    if not evaluations:
        return "The journal has no evaluation."
    ends = [evaluations[0], *evaluations[1:][-1:]]
    rows = [
        [name, *(f"{end.metrics[key]:.4g}" if key in end.metrics else "–" for end in ends)]
        for key, name in FIGURES.items()
        if any(key in end.metrics for end in ends)
    ]
    heads = [
        f"after {counted(end.iteration, 'iteration')}" if end.iteration else "before training"
        for end in ends
    ]
    prompts = counted(len(ends[-1].rewards.get("test", [])), "held-out prompt")
    return f"Greedy answers to {prompts}:\n\n{table(['', *heads], rows)}"


def _training(settings: dict[str, Any], records: Sequence[Record]) -> str:
    """The population, its noise, and the schedules of σ and α."""
    if not records:
        return "No iteration."
    rank = records[-1].rank
    noise = f"low-rank noise (rank {rank} on each matrix)" if rank else "full noise (every weight)"
    ways = {"linear": "linearly", "cosine": "along half a cosine wave"}
    sentences = [
        f"{counted(len(records[-1].rewards), 'member')} in each iteration, with {noise}; computed "
        f"in {settings['model.dtype']}, with greedy decoding."
    ]
    for name, greek in (("sigma", "σ"), ("alpha", "α")):
        first, last = (getattr(record, name) for record in (records[0], records[-1]))
        sentence = f"{greek} is {first:g}"
        if first != last:
            sentence += f" at first and {last:g} in the last of these iterations"
        if settings.get(f"es.{name}_final") is not None:
            sentence += f"; it changes {ways[settings['es.schedule']]}"
        sentences.append(f"{sentence}.")
    return " ".join(sentences)


def _iterations(records: Sequence[Record]) -> list[list[str]]:
    """At most MAX_ROWS iterations, evenly spaced, with the first and the last."""
    last = len(records) - 1
    numbers = sorted({round(row * last / (MAX_ROWS - 1)) for row in range(MAX_ROWS)})
    return [
        [str(i), *(f"{value:.4g}" for value in (r.sigma, r.alpha, mean(r.rewards), max(r.rewards)))]
        for i in (numbers if records else [])
        for r in [records[i]]
    ]


def shown(key: str, value: Any) -> str:
    """A setting's value as JSON; of a path that begins at the root, its last part only."""
    if key in SETTINGS and SETTINGS[key].is_path and isinstance(value, str) and value[:1] in "/~":
        value = value.rsplit("/", 1)[-1]
    return json.dumps(value, ensure_ascii=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of GitHub's Markdown.

    Args:
        rows: cells of Markdown without line breaks.
    """
    # A table is split at its bars before anything else is read.
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    """Text of one line as a code span, in which no character has a meaning."""
    text = re.sub(r"[\x00-\x1f]", " ", text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[:1] in ("`", " ") or text[-1:] in ("`", " ") else ""
    return f"{fence}{space}{text}{space}{fence}"
