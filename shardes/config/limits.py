"""Limits on the values of settings."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

LARGEST_REWARD = 1e100  # sums of squares over a population are far from overflow
REWARD_RANGE = f"a number from -{LARGEST_REWARD:g} to {LARGEST_REWARD:g}"
MOST_PARTS = 16  # of a reward, beside the number that decides
PART_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")


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


def is_reward(value: Any) -> bool:
    """Whether a value can be a reward: a number from -LARGEST_REWARD to LARGEST_REWARD."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and bool(abs(value) <= LARGEST_REWARD)


def is_part_name(value: Any) -> bool:
    """Whether a value can name a part of a reward, in metrics as `reward/NAME`."""
    return isinstance(value, str) and PART_NAME.fullmatch(value) is not None


def is_reward_text(text: str) -> bool:
    """Whether a text is a number that can be a reward."""
    try:
        return is_reward(float(text))
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
