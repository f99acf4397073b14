"""Limits on the values of settings."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


@dataclass(frozen=True)
class Limit:
    """A check of a setting's value. `demand` completes the error message "KEY=VALUE: ..."."""

    demand: str
    holds: Callable[[Any], bool]


def at_least(minimum: int) -> Limit:
    return Limit(f"must be at least {minimum}", lambda value: value >= minimum)


def required(meaning: str) -> Limit:
    return Limit(f"is required: {meaning}", lambda value: value not in (MISSING, ""))


POSITIVE = Limit("must be positive", lambda value: value > 0)


def is_pattern(text: str) -> bool:
    """Whether a text is a regular expression."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def is_finite(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def is_address(text: str) -> bool:
    """Whether a text is HOST:PORT."""
    host, _, port = text.rpartition(":")
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    return bool(host) and digits and 0 < int(port) < 65536


def is_text(value: object) -> bool:
    """Whether a value is a text that can be encoded and that a path can hold."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def is_size(text: str) -> bool:
    """Whether a text is a file size as Hugging Face's libraries write it, such as 5GB."""
    return re.fullmatch(r"[1-9]\d*[KMGT]B", text) is not None
