"""Errors that end a run with one line instead of a traceback."""

import difflib
from collections.abc import Iterable

MAX_REASON = 1000  # characters of an exception's own text in a message


class ConfigError(ValueError):
    """A user's mistake. The message names the key, its value and what to do. Exit code 2."""


class RunError(RuntimeError):
    """The run cannot continue. The message says why and what to do. Exit code 1."""


def described(error: BaseException) -> str:
    """The type and text of an exception, in one line."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # from the code of its class
        text = ""
    return f"{type(error).__name__}: {text[:MAX_REASON]}" if text else type(error).__name__


def suggestion(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The end of a message about an unknown name: the most similar known name, or all of them.

    Args:
        otherwise: the text if no known name is similar; by default a list of all known names.
    """
    known = list(known)
    similar = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if similar:
        return f"did you mean {similar[0]}?"
    return otherwise or f"there are: {', '.join(known)}"
