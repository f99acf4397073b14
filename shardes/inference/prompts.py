"""Encoding of prompts."""

import json
import os
import re
import warnings
from collections.abc import Sequence, Sized
from datetime import datetime

from transformers import BatchEncoding, PreTrainedTokenizerBase

from shardes.errors import ConfigError, mistakes_in, one_line

NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # a call in a chat template
Prompt = str | list[dict[str, str]]  # text, or a list of chat messages


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], date: datetime | None = None
) -> list[list[int]]:
    """The token ids of each prompt. Chat messages go through the tokenizer's chat template.

    A last message of role assistant is the beginning of the response: the model continues it.

    Args:
        date: the date that chat templates show; by default now.

    Raises:
        ConfigError: there are no prompts, one is empty or no text, or there is no chat template for
            a chat, or the template does not take it.
    """
    check_forms(prompts)
    date = date or datetime.now()
    return [_encode(tokenizer, number, prompt, date) for number, prompt in enumerate(prompts)]


def check_forms(prompts: Sequence[Prompt]) -> None:
    """Raise ConfigError if there are no prompts, or if one is neither text nor a chat."""
    if not isinstance(prompts, Sized):
        raise ConfigError(
            f"task: prompts(split) must return a list, and it returned {type(prompts).__name__}"
        )
    if not len(prompts):
        raise ConfigError(
            "task: its list of prompts is empty; "
            "prompts(split) must return at least one, for train and for test"
        )
    for number, prompt in enumerate(prompts):
        position = f"task: prompt {number}"
        if not isinstance(prompt, str | list):
            raise ConfigError(f"{position} is neither a str nor a list of messages: {prompt!r}")
        _check_is_text(position, prompt)
        for message in prompt if isinstance(prompt, list) else ():
            fields = message if isinstance(message, dict) else {}
            has_content = fields.get("content") is not None or fields.get("tool_calls")
            if not (isinstance(fields.get("role"), str) and has_content):
                raise ConfigError(f"{position}: {message!r} is not a message with role and content")


def _encode(
    tokenizer: PreTrainedTokenizerBase, number: int, prompt: Prompt, date: datetime
) -> list[int]:
    position = f"task: prompt {number}"
    if prompt == []:
        ids = []
    elif isinstance(prompt, list):
        ids = _encode_chat(tokenizer, position, prompt, date)
    else:
        with mistakes_in(f"{position}: the tokenizer of {tokenizer.name_or_path}"):
            ids = tokenizer(prompt)["input_ids"]
        if ids[:2] == [tokenizer.bos_token_id] * 2:
            _warn_of_second_begin(tokenizer)
    if _is_text_lost(tokenizer, prompt, ids):
        raise ConfigError(
            f"{position}: the tokenizer of {tokenizer.name_or_path} has no tokens for its text: it "
            f"becomes {tokenizer.decode(ids[:4])!r}; are tokenizer files missing there?"
        )
    if not ids:
        raise ConfigError(f"{position} is empty")
    return ids


def _is_text_lost(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: list[int]) -> bool:
    """Whether a prompt has text, and its tokens are special ones only, such as "unknown"."""
    special = set(tokenizer.all_special_ids)
    if not special.issuperset(ids):
        return False
    messages = [prompt] if isinstance(prompt, str) else [m.get("content") for m in prompt]
    text = " ".join(message for message in messages if isinstance(message, str))
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return bool(text.strip())


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    position: str,
    messages: list[dict[str, str]],
    date: datetime,
) -> list[int]:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{position} is a chat, but the tokenizer of {tokenizer.name_or_path} has "
            "no chat template; use an instruct model, or prompts that are plain strings"
        )
    continues = messages[-1]["role"] == "assistant"
    try:
        template = with_date(tokenizer.get_chat_template(), date)
        chat = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            return_dict=True,
        )
        assert isinstance(chat, BatchEncoding)
        return list(chat["input_ids"])
    except ConfigError:
        raise
    except Exception as error:  # a template may raise anything
        problem = one_line(str(error).partition("\n")[0] or error)
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(
            f"{position}: the chat template of {tokenizer.name_or_path} does not take its messages "
            f"(roles {roles}): {problem}"
        ) from error


def _check_is_text(position: str, prompt: Prompt) -> None:
    try:
        json.dumps(prompt, ensure_ascii=False, default=str).encode()
    except (TypeError, ValueError) as error:
        if not isinstance(error, UnicodeEncodeError):
            raise ConfigError(f"{position}: {one_line(error)}") from error
        character = error.object[error.start]
        raise ConfigError(
            f"{position} has {character!a}, half of a pair of UTF-16, which is no text; "
            "mend or remove it"
        ) from None


def _warn_of_second_begin(tokenizer: PreTrainedTokenizerBase) -> None:
    if os.environ.get("RANK", "0") == "0":  # the other ranks have the same prompts
        warnings.warn(
            f"task: prompts begin with {tokenizer.bos_token}, which the tokenizer adds once more; "
            "give chats as messages, or leave it out of the text",
            stacklevel=2,
        )


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
