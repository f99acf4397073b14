"""What is asked of the model and what its answers are worth."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from shardes.config import ConfigError, TaskConfig
from shardes.tasks.conciseness import Conciseness
from shardes.tasks.countdown import Countdown
from shardes.tasks.jsonl import Jsonl
from shardes.tasks.math import Math
from shardes.tasks.own import load_class, load_function

Split = str  # "train", "test", or a name in task.tests
Message = dict[str, str]


class Task(Protocol):
    """Prompts and their rewards, in two splits: "train", which the population climbs, and "test", held out.

    A task knows nothing of ranks. Every rank makes its own copy, and all must find the same prompts in the
    same order. Of the two ways to score it has one: `score` for all responses at once, within the run's own process,
    or `reward` for each by itself, in worker processes with limits (see `shardes.scoring`). It may also have
    `correct(split, responses) -> list[bool]`: which of all prompts are answered right, for the accuracy.
    """

    def prompts(self, split: Split) -> Sequence[str | list[Message]]:
        """The prompts of a split, in the same order at every call.

        A str goes to the model raw; a list of messages {"role": ..., "content": ...} goes through the
        tokenizer's chat template first.
        """
        ...


class Scores(Task, Protocol):
    """A task that scores all responses at once."""

    def score(self, split: Split, responses: list[str], which: Sequence[int] | None = None) -> list[float]:
        """One reward per response, higher is better; responses come in the prompts' order.

        `which` are the prompts that were answered, by number; None: all of the split. It is given only with
        task.prompts_per_iteration: a task that is not used so need not take it.
        """
        ...


class Rewards(Task, Protocol):
    """A task that scores each response by itself."""

    def reward(self, split: Split, number: int, response: str) -> float:
        """What a response to the prompt of that number is worth; each worker has its own copy of the task."""
        ...


TASKS: dict[str, Callable[..., Scores]] = {"conciseness": Conciseness, "countdown": Countdown, "math": Math}
TAKERS = {  # the built-in tasks that know a setting
    "train": ["countdown", "math", "jsonl"],
    "test": ["countdown", "math", "jsonl"],
    "tests": ["math", "jsonl"],
    "template": ["jsonl"],
    "chat": ["jsonl"],
    "reward": ["jsonl"],
}


def configured_task(t: TaskConfig) -> Task:
    """The task that the settings name; ConfigError as from `load_task`."""
    return load_task(t.name, t.path, t.train, t.test, t.tests, template=t.template, chat=t.chat, reward=t.reward)


def load_task(
    name: str | None,
    path: str | None,
    train: str | None = None,
    test: str | None = None,
    tests: Mapping[str, str] = MappingProxyType({}),
    *,
    template: str | None = None,
    chat: bool = True,
    reward: str | None = None,
) -> Task:
    """The built-in task called `name`, or the user's own at `path`, written file.py:Class.

    `train`, `test` and `tests` are where problems come from, for countdown, math and jsonl; the rest is for jsonl.

    Raises:
        ConfigError: both or neither given, no such task, or a file, class or function that cannot be used.
    """
    if (name is None) == (path is None):
        what = "both are given" if name is not None else "neither is given"
        raise ConfigError(f"task.name, task.path: {what}; give one: a built-in task's name, or file.py:Class")
    given: dict[str, Any] = {"train": train, "test": test, "tests": dict(tests) or None}
    given |= {"template": template, "chat": None if chat else False, "reward": reward}
    for key, value in given.items():
        if value is not None and name not in TAKERS[key]:
            raise ConfigError(f"task.{key}={value}: only for task.name={' or '.join(TAKERS[key])}")
    if path is not None:
        return load_class(path)
    if name == "jsonl":
        if reward is None:
            raise ConfigError(
                "task.reward: is required with task.name=jsonl: my_module:function or my_reward.py:function"
            )
        load_function(reward)
        return Jsonl(train, test, tests, template, chat)
    assert name is not None
    if name not in TASKS:
        names = [*TASKS, "jsonl"]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names)}"
        raise ConfigError(f"task.name={name}: no such task; {hint}")
    sources = {"countdown": (train, test), "math": (train, test, tests)}
    return TASKS[name](*sources.get(name, ()))
