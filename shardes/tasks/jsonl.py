"""Your own examples: JSON lines, a template that makes prompts of them, and a reward function of yours."""

import string
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeGuard

from shardes.config import ConfigError
from shardes.tasks.rows import load_rows

PROMPT = "{prompt}"


class Template:
    """Text with {field} where the value of an example's field goes; {{ and }} are braces.

    A field is looked up by its whole name, and nothing else is done with it: {a.b} is the field called "a.b".

    Raises:
        ConfigError: a lone brace, or a place that holds more than a field's name.
    """

    def __init__(self, text: str):
        try:
            self._pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"task.template: {error}; a brace that is meant as such is written twice") from None
        for _, field, form, conversion in self._pieces:
            if field == "" or form or conversion:
                raise ConfigError(f"task.template={text}: between braces there must be a field's name and nothing else")

    @property
    def fields(self) -> list[str]:
        return [field for _, field, _, _ in self._pieces if field is not None]

    def fill(self, example: Mapping[str, Any]) -> str:
        return "".join(text + ("" if field is None else str(example[field])) for text, field, _, _ in self._pieces)


class Jsonl:
    """The task: examples of files of JSON lines or data sets, one per split. Splits are "train", "test" and `tests`.

    The reward function gets an example as it stands in the file; it is called in the workers of `shardes.scoring`.
    `chat`: prompts are put as a user's message; a prompt that is a list of messages is taken as it is.
    """

    def __init__(
        self,
        train: str | None,
        test: str | None,
        tests: Mapping[str, str] = MappingProxyType({}),
        template: str | None = None,
        chat: bool = True,
    ):
        if train is None:
            raise ConfigError("task.train: is required with task.name=jsonl: a file of JSON lines, {...} with a prompt")
        if test is None:
            raise ConfigError(
                "task.test: is required with task.name=jsonl: held-out examples, which show whether what is learned "
                "carries over; move some lines of task.train into a file of their own"
            )
        self._template = Template(PROMPT if template is None else template)
        self._chat = chat
        self._examples: dict[str, list[dict]] = {}
        self._prompts: dict[str, list[str | list[dict[str, str]]]] = {}
        for split, source in ({"train": train, "test": test} | dict(tests)).items():
            rows = load_rows(source)
            self._examples[split] = [row for _, row in rows]
            self._prompts[split] = [self._prompt(f"{source}: {where}", row) for where, row in rows]

    def prompts(self, split: str) -> list[str | list[dict[str, str]]]:
        return self._prompts[split]

    def example(self, split: str, number: int) -> dict:
        """What the prompt of that number was made of."""
        return self._examples[split][number]

    def _prompt(self, where: str, example: dict) -> str | list[dict[str, str]]:
        for field in self._template.fields:
            if example.get(field) is None:
                raise ConfigError(f"{where} has no {field}")
        given = example.get("prompt")
        if self._template.fields == ["prompt"] and not isinstance(given, str):
            if not _is_chat(given):
                raise ConfigError(f"{where}: prompt is {given!r}; it must be a text, or messages with role and content")
            if not self._chat or self._template.fill({"prompt": ""}):
                raise ConfigError(
                    f"{where}: prompt is a list of messages; leave task.chat and task.template as they are"
                )
            return given
        text = self._template.fill(example)
        return [{"role": "user", "content": text}] if self._chat else text


def _is_chat(value: Any) -> TypeGuard[list[dict[str, str]]]:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )
