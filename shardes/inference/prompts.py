"""Encoding of prompts."""

import json
import re
from collections.abc import Sequence
from datetime import datetime

from transformers import BatchEncoding, PreTrainedTokenizerBase

from shardes.errors import ConfigError

NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # a call in a chat template
Prompt = str | list[dict[str, str]]  # text, or a list of chat messages


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], date: datetime | None = None
) -> list[list[int]]:
    """The token ids of each prompt. Chat messages go through the tokenizer's chat template.

    Args:
        date: the date that chat templates show; by default now.

    Raises:
        ConfigError: there are no prompts, one is empty, or there is no chat template for a chat.
    """
    if not prompts:
        raise ConfigError(
            "task: its list of prompts is empty; "
            "prompts(split) must return at least one, for train and for test"
        )
    date = date or datetime.now()
    return [_encode(tokenizer, number, prompt, date) for number, prompt in enumerate(prompts)]


def _encode(
    tokenizer: PreTrainedTokenizerBase, number: int, prompt: Prompt, date: datetime
) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif not isinstance(prompt, list):
        raise ConfigError(
            f"task: prompt {number} is neither a str nor a list of messages: {prompt!r}"
        )
    elif tokenizer.chat_template is None:
        raise ConfigError(
            f"task: prompt {number} is a chat, but the tokenizer of {tokenizer.name_or_path} has "
            "no chat template; use an instruct model, or prompts that are plain strings"
        )
    else:
        template = with_date(tokenizer.get_chat_template(), date)
        chat = tokenizer.apply_chat_template(
            prompt, chat_template=template, add_generation_prompt=True, return_dict=True
        )
        assert isinstance(chat, BatchEncoding)
        ids = chat["input_ids"]
    if not ids:
        raise ConfigError(f"task: prompt {number} is empty")
    return ids


def with_date(template: str, date: datetime) -> str:
    """A chat template that shows a fixed date in place of the present one.

    Raises:
        ConfigError: the template asks for the date in a way that cannot be fixed.
    """
    fixed = NOW.sub(lambda call: json.dumps(date.strftime(call[2])), template)
    if "strftime_now(" in fixed:
        raise ConfigError(
            "model.path: the chat template shows the date in a format that it computes, so prompts "
            "would change while the run goes on; write the format into the template as text"
        )
    return fixed
