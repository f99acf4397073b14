"""Words of messages."""

import json
from typing import Any


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 replica", "2 replicas"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def prompt_text(prompt: Any) -> str:
    """A prompt as text, with a line for each message of a chat."""
    if isinstance(prompt, str):
        return prompt
    try:
        return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    except (TypeError, KeyError):
        return json.dumps(prompt, ensure_ascii=False)
