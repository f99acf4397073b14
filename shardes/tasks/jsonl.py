"""The task for a user's own data: rows of a file, a template for prompts, and a reward function."""

import string
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeGuard

from shardes.errors import ConfigError
from shardes.tasks.rows import load_rows

DEFAULT_TEMPLATE = "{prompt}"


class Template:
    """Text in which {field} stands for the value of an example's field; {{ and }} are braces.

    Fields are only looked up, by their whole name: {a.b} is the field called "a.b", not an
    attribute.

    Raises:
        ConfigError: a brace has no partner, or there is more than a field's name between braces.
    """

    def __init__(self, text: str):
        try:
            self._pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"task.template: {error}; write {{{{ or }}}} for a brace in the text"
            ) from None
        for _, field, format_spec, conversion in self._pieces:
            if field == "" or format_spec or conversion:
                raise ConfigError(
                    f"task.template={text}: between braces there must be a field's name "
                    "and nothing else"
                )

    @property
    def fields(self) -> list[str]:
        return [field for _, field, _, _ in self._pieces if field is not None]

    def fill(self, example: Mapping[str, Any]) -> str:
        return "".join(
            text + ("" if field is None else str(example[field]))
            for text, field, _, _ in self._pieces
        )


class Jsonl:
    """Examples from files or data sets, one source per split: "train", "test" and `tests`.

    The worker processes of `shardes.rewards.scoring` pass each example to the reward function as it
    is in the file.

    Args:
        chat: whether a prompt is put as a user message. A prompt that is a list of messages is used
            as it is.
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
            raise ConfigError(
                "task.train: is required with task.name=jsonl: a file of JSON lines, "
                "{...} with a prompt, or another file or data set (see docs/tasks.md)"
            )
        if test is None:
            raise ConfigError(
                "task.test: is required with task.name=jsonl: held-out examples, which show "
                "whether the model generalizes; move some lines of task.train into a file of "
                "their own"
            )
        self._template = Template(DEFAULT_TEMPLATE if template is None else template)
        self._chat = chat
        self._examples: dict[str, list[dict]] = {}
        self._prompts: dict[str, list[str | list[dict[str, str]]]] = {}
        for split, source in ({"train": train, "test": test} | dict(tests)).items():
            rows = load_rows(source)
            self._examples[split] = [row for _, row in rows]
            self._prompts[split] = [
                self._prompt(f"{source}: {position}", row) for position, row in rows
            ]

    def prompts(self, split: str) -> list[str | list[dict[str, str]]]:
        return self._prompts[split]

    def example(self, split: str, number: int) -> dict:
        """The example of prompt `number`."""
        return self._examples[split][number]

    def _prompt(self, position: str, example: dict) -> str | list[dict[str, str]]:
        for field in self._template.fields:
            if example.get(field) is None:
                raise ConfigError(f"{position} has no {field}{_hint(field, example)}")
        prompt = example.get("prompt")
        if self._template.fields == ["prompt"] and not isinstance(prompt, str):
            if not _is_chat(prompt):
                raise ConfigError(
                    f"{position}: prompt is {prompt!r}; it must be a text, or messages with role "
                    "and content"
                )
            if not self._chat or self._template.fill({"prompt": ""}):
                raise ConfigError(
                    f"{position}: prompt is a list of messages; leave task.chat and task.template "
                    "at their defaults"
                )
            # An answer left in the data looks the same: continuing it must be meant.
            if prompt[-1]["role"] == "assistant" and prompt[-1].get("prefix") is not True:
                raise ConfigError(
                    f"{position}: prompt ends with a message of role assistant, as if it still "
                    "held the answer; leave that message out or, if responses are to continue it, "
                    'give it the field "prefix": true'
                )
            return prompt
        text = self._template.fill(example)
        return [{"role": "user", "content": text}] if self._chat else text


def _hint(field: str, example: Mapping[str, Any]) -> str:
    """The end of a message about a missing field: what a row of chat data lacks."""
    messages = example.get("messages")
    if field != "prompt" or not _is_chat(messages):
        return ""
    is_answer = messages[-1]["role"] == "assistant"
    without = ", without the last one, of role assistant, which is the answer" if is_answer else ""
    return f" but messages: name that field prompt{without}"


def _is_chat(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )
