"""Extraction: write the facts of a sentence as one JSON object.

`score` is an ordinary reward function: a JSON lines task can name it as
`task.reward=shardes.tasks.extraction:score`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from shardes.errors import ConfigError
from shardes.tasks.rows import load_rows


def score(response: str, example: dict) -> float:
    """The reward of a response, from 0 to 1.

    0.6 × the share of values that are right, plus 0.2 × the share of right keys among all that
    were asked for or given, plus 0.2 if there is nothing but JSON. A response without a JSON object
    gets 0.

    Args:
        example: has the right object as `facts`.
    """
    facts, (answer, is_alone) = example["facts"], first_object(response)
    if answer is None:
        return 0.0
    values = sum(map(is_same, map(answer.get, facts), facts.values())) / len(facts)
    keys = len(facts.keys() & answer.keys()) / len(facts.keys() | answer.keys())
    return 0.6 * values + 0.2 * keys + 0.2 * is_alone


def first_object(text: str) -> tuple[dict | None, bool]:
    """The JSON object at the first brace of a text, or None; and whether nothing is beside it."""
    before, brace, _ = text.partition("{")
    try:
        value, end = json.JSONDecoder().raw_decode(text, len(before))
    except (ValueError, RecursionError):
        return None, False
    return (value, not (before + text[end:]).strip()) if brace else (None, False)


def is_same(value: object, fact: object) -> bool:
    """Whether a value is the fact, in the same type: "31" is not 31, and neither is 31.0."""
    return type(value) is type(fact) and value == fact


class Extraction:
    """Sentences with their facts; `train` and `test` are their sources, by default the package's.

    A row has `text`, a sentence, and `facts`, the object to write. The prompt names its keys.

    Raises:
        ConfigError: a source cannot be read, or a row has a wrong field.
    """

    def __init__(self, train: str | None = None, test: str | None = None):
        data = Path(__file__).parent / "data"
        self._examples = {
            split: _examples(source or str(data / f"extraction_{split}.jsonl"))
            for split, source in (("train", train), ("test", test))
        }

    def prompts(self, split: str) -> list[list[dict[str, str]]]:
        """A chat for each sentence: what to do as the system's message, the sentence as the user's.

        A short system message takes the place of the model's own, and saves its tokens.
        """
        return [
            [
                {"role": "system", "content": instruction(list(example["facts"]))},
                {"role": "user", "content": example["text"]},
            ]
            for example in self._examples[split]
        ]

    def score(
        self, split: str, responses: list[str], which: Sequence[int] | None = None
    ) -> list[float]:
        examples = self._chosen(split, which)
        return [score(*pair) for pair in zip(responses, examples, strict=True)]

    def correct(
        self, split: str, responses: list[str], which: Sequence[int] | None = None
    ) -> list[bool]:
        """Whether each response is the right object and nothing else."""
        examples = self._chosen(split, which)
        return [score(*pair) == 1 for pair in zip(responses, examples, strict=True)]

    def _chosen(self, split: str, which: Sequence[int] | None) -> list[dict]:
        examples = self._examples[split]
        return examples if which is None else [examples[number] for number in which]


def instruction(keys: list[str]) -> str:
    """What the model is to do: Write name, age and city as JSON."""
    *others, last = keys
    return f"Write {', '.join(others)} and {last} as JSON." if others else f"Write {last} as JSON."


def _examples(source: str) -> list[dict]:
    examples = []
    for position, row in load_rows(source):
        text, facts = row.get("text"), row.get("facts")
        if not (isinstance(text, str) and isinstance(facts, dict) and facts):
            raise ConfigError(
                f"{source}: {position}: a row has text (a sentence) and facts (an object with at "
                "least one key)"
            )
        examples.append({"text": text, "facts": facts})
    return examples
