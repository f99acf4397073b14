"""What decides a run besides its settings and its model: code, data and prompts.

Each is known by its SHA-256, so that a run is not resumed, joined, or computed by several ranks
with an edited reward function, other data or other prompts without a word.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from inspect import getsource
from pathlib import Path

from shardes.config.schema import TaskConfig
from shardes.errors import ConfigError
from shardes.storage.files import differing, sha256s
from shardes.tasks.user_code import code_files

UPDATE = "es.update"
PROMPTS = "task.prompts"  # stands for the prompts in resume.allow_changes
EVALUATION = ("task.test", "task.prompts/test")  # decide evaluations, but not the center


def run_sources(
    task: TaskConfig,
    prompts: Mapping[str, Sequence[list[int]]],
    own: object = None,
    update: str | None = None,
) -> dict[str, str]:
    """The SHA-256 of the task's, the reward's or the update's code, of data files, and of the
    prompts.

    Keys are the settings that name a file, followed by the file's name where there are several, and
    `task.prompts/SPLIT`. Call it after the code was loaded.

    Args:
        prompts: token ids by split.
        own: the user's task object, if it is not the settings' task. Its methods' source counts
            as that of task.path.
        update: es.update.
    """
    sources = {
        f"{PROMPTS}/{split}": hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()
        for split, rows in prompts.items()
    }
    code = {"task.path": task.path, "task.reward": task.reward, UPDATE: update}
    for key, reference in code.items():
        if reference is not None:
            file, *imported = code_files(reference)
            sources[key] = _sha256(file)
            sources |= {f"{key}/{other.name}": _sha256(other) for other in imported}
    if own is not None:
        sources["task.path"] = hashlib.sha256(_methods(type(own)).encode()).hexdigest()
    for key, source in (("task.train", task.train), ("task.test", task.test)):
        if source is not None and Path(source).exists():
            sources[key] = _sha256(Path(source))
    return sources


def _methods(kind: type) -> str:
    """The source of a class's methods; Python knows it of a notebook's cells, too, and there not
    that of the class.
    """
    text = ""
    for one in kind.__mro__[:-1]:
        for name, function in sorted(vars(one).items()):
            with suppress(OSError, TypeError):  # generated, written in C, or no function
                text += f"{name}\n{getsource(function)}"
    return text


def _sha256(path: Path) -> str:
    """The SHA-256 of a file, or of the names and contents of a directory's files."""
    if path.is_file():
        return sha256s(path.parent, [path.name])[path.name]
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    return hashlib.sha256(json.dumps(sha256s(path, names)).encode()).hexdigest()


def check_sources(
    before: Mapping[str, str], now: Mapping[str, str], allowed: Iterable[str], run: Path
) -> list[str]:
    """Compare the sources that a run had with those of a start that resumes it.

    Args:
        before: from the journal of `run`.
        allowed: settings whose sources may differ.

    Returns:
        A note for the user on each difference that is allowed, or that concerns only evaluations.

    Raises:
        ConfigError: another source differs; names it.
    """
    notes, allowed = [], set(allowed)
    changed = sorted(differing(before, now), key=_is_prompts)  # prompts follow from data and code
    prompts_follow = any(_setting(key) in allowed for key in changed)
    for key in changed:
        setting = _setting(key)
        if key in EVALUATION:
            notes.append(f"{key}: changed; held-out rewards before and after are not comparable")
        elif setting in allowed or (_is_prompts(key) and prompts_follow):
            notes.append(f"{key}: changed, as resume.allow_changes permits")
        else:
            old, new = (sources.get(key, "missing")[:16] for sources in (before, now))
            if setting == UPDATE:
                raise ConfigError(
                    f"{_described(key)} changed since the run in {run} began (SHA-256 {new}, "
                    f"before {old}); restore it, since the journal's updates are computed with it, "
                    "or choose another run.dir"
                )
            raise ConfigError(
                f"{_described(key)} changed since the run in {run} began (SHA-256 {new}, before "
                f"{old}); restore it, list {setting} in resume.allow_changes to change it on "
                "purpose, or choose another run.dir"
            )
    return notes


def first_difference(one: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """The first source that differs, with both SHA-256s, for a message; None if none does."""
    keys = sorted(differing(one, other), key=_is_prompts)
    if not keys:
        return None
    first, second = (sources.get(keys[0], "missing")[:16] for sources in (one, other))
    return f"{_described(keys[0])} (SHA-256 {first}, not {second})"


def _setting(key: str) -> str:
    return key.partition("/")[0]


def _is_prompts(key: str) -> bool:
    return _setting(key) == PROMPTS


def _described(key: str) -> str:
    setting, _, name = key.partition("/")
    if setting == PROMPTS:
        return f"{setting}: the {name} prompts' token ids (task, chat template or tokenizer)"
    return f"{setting}: {name or 'its file'}"
