"""Errors that end a run with one line instead of a traceback."""

import difflib
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_REASON = 1000  # characters of an exception's own text in a message
PREEMPTED = 75  # EX_TEMPFAIL: start the same command again
PRIMARY_LOST = 1
CODES: dict[int, int] = {  # exit code by signal; SLURM warns by SIGUSR1
    signal.SIGINT: 0,
    signal.SIGTERM: 0,
    signal.SIGUSR1: PREEMPTED,
}


class ConfigError(ValueError):
    """A user's mistake. The message names the key, its value and what to do. Exit code 2."""


class RunError(RuntimeError):
    """The run cannot continue. The message says why and what to do. Exit code 1."""


class Stopped(Exception):
    """The run was asked to stop. `code` is the exit code; `said`: the user has been told."""

    def __init__(self, code: int, said: bool = False):
        super().__init__(
            f"{stop_reason(code)}; all finished members are kept: start the same command again to "
            "go on"
        )
        self.code, self.said = code, said


def stop_reason(code: int) -> str:
    """Why a run stops with an exit code of `Stopped`."""
    reasons = {PREEMPTED: "preempted", PRIMARY_LOST: "the primary job is gone"}
    return reasons.get(code, "stopped as asked")


def described(error: BaseException) -> str:
    """The type and text of an exception, in one line."""
    kind, text = type(error).__name__, one_line(error)
    return kind if text == kind else f"{kind}: {text[:MAX_REASON]}"


def one_line(text: object) -> str:
    """A text, or an error's message, in one line; the type's name of an error without a message."""
    try:
        words = str(text).split()
    except Exception:  # from the code of an error's class
        words = []
    return " ".join(words) or type(text).__name__


@contextmanager
def mistakes_in(subject: str) -> Iterator[None]:
    """A context in which a user's file is read: an error of any kind is a ConfigError about it.

    Libraries raise whatever their code meets in a file that is not as they expect it.
    """
    try:
        yield
    except (ConfigError, RunError):
        raise
    except Exception as error:
        raise ConfigError(f"{subject}: {one_line(error)}") from error


@contextmanager
def unusable_files() -> Iterator[None]:
    """A context in which an OSError, whose text names the file, is a ConfigError."""
    try:
        yield
    except BrokenPipeError:  # no file: whoever read the output has gone
        raise
    except OSError as error:
        raise ConfigError(one_line(error)) from error


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


def nearby(path: str | Path, otherwise: str = "", told: bool = False) -> str:
    """The end of a message about a file that does not exist: what may have been meant, or where a
    relative path was looked for.

    Args:
        otherwise: the text if its directory has no similar name.
        told: whether the message says already where it was looked for.
    """
    names: list[str] = []
    with suppress(OSError):
        names = [entry.name for entry in Path(path).parent.iterdir()]
    similar = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.75)
    if similar:
        return f"; did you mean {Path(path).with_name(similar[0])}?"
    where = "" if told or Path(path).is_absolute() else f" (looked in {Path.cwd()})"
    return where + (f"; {otherwise}" if otherwise else "")
