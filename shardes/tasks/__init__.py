"""What is asked of the model and what its answers are worth."""

import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Protocol

from shardes.config import ConfigError
from shardes.tasks.conciseness import Conciseness
from shardes.tasks.countdown import Countdown
from shardes.tasks.math import Math

Split = str  # "train", "test", or a name in task.tests
Message = dict[str, str]


class Task(Protocol):
    """Prompts and their rewards, in two splits: "train", which the population climbs, and "test", held out.

    A task knows nothing of ranks. Every rank makes its own copy, and all must find the same prompts in the
    same order.
    """

    def prompts(self, split: Split) -> Sequence[str | list[Message]]:
        """The prompts of a split, in the same order at every call.

        A str goes to the model raw; a list of messages {"role": ..., "content": ...} goes through the
        tokenizer's chat template first.
        """
        ...

    def score(self, split: Split, responses: list[str], which: Sequence[int] | None = None) -> list[float]:
        """One reward per response, higher is better; responses come in the prompts' order.

        `which` are the prompts that were answered, by number; None: all of the split. It is given only with
        task.prompts_per_iteration: a task that is not used so need not take it. A task may also have
        `correct(split, responses) -> list[bool]`: which of all prompts are answered right, for the accuracy.
        """
        ...


TASKS: dict[str, Callable[..., Task]] = {"conciseness": Conciseness, "countdown": Countdown, "math": Math}


def load_task(
    name: str | None,
    path: str | None,
    train: str | None = None,
    test: str | None = None,
    tests: Mapping[str, str] = MappingProxyType({}),
) -> Task:
    """The built-in task called `name`, or the user's own at `path`, written file.py:Class.

    The user's class is made without arguments. While its file loads, modules beside it can be imported. `train`,
    `test` and `tests` are where problems come from, for countdown and math.

    Raises:
        ConfigError: both or neither given, no such task, or a file or class that cannot be used.
    """
    if (name is None) == (path is None):
        what = "both are given" if name is not None else "neither is given"
        raise ConfigError(f"task.name, task.path: {what}; give one: a built-in task's name, or file.py:Class")
    for split, file in (("train", train), ("test", test), ("tests", dict(tests) or None)):
        takes = ["math"] if split == "tests" else ["countdown", "math"]
        if file is not None and name not in takes:
            raise ConfigError(f"task.{split}={file}: only for task.name={' or '.join(takes)}")
    if path is not None:
        return _load_own(path)
    if name is None or name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(TASKS)}"
        raise ConfigError(f"task.name={name}: no such task; {hint}")
    given = {"countdown": (train, test), "math": (train, test, tests)}
    return TASKS[name](*given.get(name, ()))


def _load_own(path: str) -> Task:
    file, colon, class_name = path.rpartition(":")
    if not (colon and file and class_name):
        raise ConfigError(f"task.path={path}: must be written file.py:Class")
    if not Path(file).is_file():
        raise ConfigError(f"task.path={path}: there is no file {Path(file).absolute()}")
    source = Path(file).resolve()
    # Within reach only while the file loads, lest a neighbour be taken later for an installed module.
    sys.path.insert(0, str(source.parent))
    try:
        module = _import(source, path)
        made_of = getattr(module, class_name, None)
        if not isinstance(made_of, type):
            raise ConfigError(f"task.path={path}: no class {class_name} there{_classes(module)}")
        try:
            task = made_of()
        except Exception as error:
            raise ConfigError(f"task.path={path}: {class_name}() raised {_in_words(error)}") from error
    finally:
        sys.path.remove(str(source.parent))
    for method in ("prompts", "score"):
        if not callable(getattr(task, method, None)):
            raise ConfigError(f"task.path={path}: {class_name} has no {method}(); see shardes.tasks.Task")
    return task


def _import(source: Path, path: str) -> ModuleType:
    # Named by its place: it can pass neither for an installed module nor for another user's file of its name.
    name = f"shardes_task_{hashlib.sha256(str(source).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, source)
    if spec is None or spec.loader is None:
        raise ConfigError(f"task.path={path}: {source.name} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"task.path={path}: importing {source} raised {_in_words(error)}") from error
    return module


def _classes(module: ModuleType) -> str:
    values = [value for value in vars(module).values() if isinstance(value, type)]
    own = [value.__name__ for value in values if value.__module__ == module.__name__]
    return f"; it has {', '.join(own)}" if own else ""


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
