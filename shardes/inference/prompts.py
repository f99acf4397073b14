"""Encoding of prompts."""

from collections.abc import Sequence

from transformers import BatchEncoding, PreTrainedTokenizerBase

from shardes.errors import ConfigError

Prompt = str | list[dict[str, str]]  # text, or a list of chat messages


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The token ids of each prompt. Chat messages go through the tokenizer's chat template.

    Raises:
        ConfigError: there are no prompts, one is empty, or there is no chat template for a chat.
    """
    if not prompts:
        raise ConfigError(
            "task: its list of prompts is empty; "
            "prompts(split) must return at least one, for train and for test"
        )
    return [_encode(tokenizer, number, prompt) for number, prompt in enumerate(prompts)]


def _encode(tokenizer: PreTrainedTokenizerBase, number: int, prompt: Prompt) -> list[int]:
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
        chat = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        assert isinstance(chat, BatchEncoding)
        ids = chat["input_ids"]
    if not ids:
        raise ConfigError(f"task: prompt {number} is empty")
    return ids
