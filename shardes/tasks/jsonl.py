"""The task for a user's own data: rows of a file, a template for prompts, and a reward function."""

import string
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeGuard

from shardes.errors import ConfigError
from shardes.tasks.rows import load_rows

PROMPT_FIELD = "prompt"


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
        template: the prompt; None: the field `prompt_field`, a text or a list of messages.
        chat: whether a text is put as a user message. Messages are used as they are.
        system: a system message before the user's.
        prompt_field: None: PROMPT_FIELD.
        function: the reward function.

    Raises:
        ConfigError: the settings contradict each other, a source cannot be read, or an example has
            no prompt of this form; names file, line and id.
    """

    def __init__(
        self,
        train: str | None,
        test: str | None,
        tests: Mapping[str, str] = MappingProxyType({}),
        template: str | None = None,
        chat: bool = True,
        system: str | None = None,
        prompt_field: str | None = None,
        function: Callable[..., Any] | None = None,
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
        if template is not None and prompt_field is not None:
            raise ConfigError(
                f"task.prompt_field={prompt_field}: leave it out or leave out task.template, "
                "which says itself where fields go"
            )
        if system is not None and not chat:
            raise ConfigError(
                "task.system: is a message of a chat; with task.chat=false, begin task.template "
                "with its text"
            )
        self.function = function
        self._template = None if template is None else Template(template)
        self._chat, self._field = chat, prompt_field or PROMPT_FIELD
        self._system = [] if system is None else [{"role": "system", "content": system}]
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
        fields = [self._field] if self._template is None else self._template.fields
        for field in fields:
            if example.get(field) is None:
                raise ConfigError(f"{position} has no {field}{_hint(field, example)}")
        if self._template is None:
            prompt = example[self._field]
            if not isinstance(prompt, str):
                return [*self._system, *self._messages(position, prompt)]
        else:
            for field in fields:
                if _is_chat(example[field]):
                    raise ConfigError(
                        f"{position}: {field} is a list of messages; set task.prompt_field={field} "
                        "in place of task.template"
                    )
            prompt = self._template.fill(example)
        return [*self._system, {"role": "user", "content": prompt}] if self._chat else prompt

    def _messages(self, position: str, prompt: object) -> list[dict[str, str]]:
        """The messages of an example.

        Raises:
            ConfigError: it has none, or they are not a prompt.
        """
        field = self._field
        if not _is_chat(prompt):
            raise ConfigError(
                f"{position}: {field} is {prompt!r}; it must be a text, or messages with role "
                "and content"
            )
        if not self._chat:
            raise ConfigError(
                f"{position}: {field} is a list of messages; leave out task.chat=false"
            )
        if self._system and prompt[0]["role"] == "system":
            raise ConfigError(
                f"{position}: {field} has a system message of its own; leave out task.system"
            )
        # An answer left in the data looks the same: continuing it must be meant.
        if prompt[-1]["role"] == "assistant" and prompt[-1].get("prefix") is not True:
            raise ConfigError(
                f"{position}: {field} ends with a message of role assistant, as if it still "
                "held the answer; leave that message out or, if responses are to continue it, "
                'give it the field "prefix": true'
            )
        return prompt


def _hint(field: str, example: Mapping[str, Any]) -> str:
    """The end of a message about a missing field: which of the example's fields is meant."""
    if field == PROMPT_FIELD and _is_chat(messages := example.get("messages")):
        is_answer = messages[-1]["role"] == "assistant"
        answer = ", and leave out the last one, of role assistant, which is the answer"
        return f" but messages: set task.prompt_field=messages{answer if is_answer else ''}"
    return f"; its fields: {', '.join(map(str, example)) or 'none'}"


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
