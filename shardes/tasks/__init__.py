"""Tasks: the prompts for the model, and the rewards of its responses."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from shardes.config.schema import TaskConfig
from shardes.errors import ConfigError, described, suggestion
from shardes.tasks.conciseness import Conciseness
from shardes.tasks.countdown import Countdown
from shardes.tasks.extraction import Extraction
from shardes.tasks.jsonl import Jsonl
from shardes.tasks.math import Math
from shardes.tasks.user_code import check_own_task, load_reward_function, load_user_task

Split = str  # "train", "test", or a name in task.tests
Message = dict[str, str]


class Task(Protocol):
    """Prompts in two splits: "train", whose rewards the run raises, and "test", which is held out.

    A task knows nothing of ranks. Every rank makes its own task object, and all of these must give
    the same prompts in the same order. A task has one of two ways to score. `score` takes all
    responses at once, in the run's own process. `reward` takes one response, in a worker process
    with limits of time and memory (see `shardes.rewards.scoring`). A task may also have
    `correct(split, responses, which=None) -> list[bool]`: whether each response of a split is
    right, for the accuracy.
    """

    def prompts(self, split: Split) -> Sequence[str | list[Message]]:
        """The prompts of a split, in the same order at every call.

        A str goes to the model as raw text. A list of messages {"role": ..., "content": ...} goes
        through the tokenizer's chat template first. If the last one's role is assistant, the
        response continues it.
        """
        ...


class ScoringTask(Task, Protocol):
    """A task that scores all responses at once."""

    def score(
        self, split: Split, responses: list[str], which: Sequence[int] | None = None
    ) -> list[float] | list[dict[str, float]]:
        """One reward per response, higher is better; responses are in the order of the prompts.

        A reward is a number, or a dict whose number "reward" decides. Its other numbers are logged.

        A stop of the run raises KeyboardInterrupt in it.

        Args:
            which: the numbers of the prompts that were answered; None: all of the split. It is only
                passed with task.prompts_per_iteration and eval.prompts; without these, a task need
                not take it.
        """
        ...


class RewardTask(Task, Protocol):
    """A task that scores one response at a time."""

    def reward(self, split: Split, number: int, response: str) -> float | dict[str, float]:
        """The reward of a response to prompt `number`; every worker has its own task object.

        It may be `async`: then a worker makes several calls at once.
        """
        ...


TASKS: dict[str, Callable[..., ScoringTask]] = {
    "conciseness": Conciseness,
    "countdown": Countdown,
    "extraction": Extraction,
    "math": Math,
}
USED_BY = {  # the built-in tasks that use a setting
    "train": ["countdown", "extraction", "math", "jsonl"],
    "test": ["countdown", "extraction", "math", "jsonl"],
    "tests": ["math", "jsonl"],
    "template": ["jsonl"],
    "chat": ["jsonl"],
    "system": ["jsonl"],
    "prompt_field": ["jsonl"],
    "reward": ["jsonl"],
}


def prompts_of(task: Task, split: Split) -> list[str | list[Message]]:
    """The prompts of a split.

    Raises:
        ConfigError: the task raised an exception, which is the error's cause, or did not return a
            sequence.
    """
    try:
        prompts = task.prompts(split)
        if isinstance(prompts, str | Mapping):
            raise TypeError(f"it returned a {type(prompts).__name__}, not a list")
        return list(prompts)
    except KeyboardInterrupt:  # Ctrl-C
        raise
    except BaseException as error:  # sys.exit, too
        raise ConfigError(f"task: prompts({split!r}) raised {described(error)}") from error


def configured_task(settings: TaskConfig, own: Task | None = None) -> Task:
    """The task that the settings name; ConfigError as from `load_task`.

    Args:
        own: the user's object, in place of a task that the settings name.
    """
    if own is not None:
        for key in ("name", "path", *USED_BY):
            value, default = getattr(settings, key), getattr(TaskConfig(), key)
            if value != default:
                raise ConfigError(
                    f"task.{key}={value}: is not used with a task object; leave it out, or leave "
                    "out the object"
                )
        check_own_task(own)
        return own
    return load_task(
        settings.name,
        settings.path,
        settings.train,
        settings.test,
        settings.tests,
        template=settings.template,
        chat=settings.chat,
        system=settings.system,
        prompt_field=settings.prompt_field,
        reward=settings.reward,
    )


def load_task(
    name: str | None,
    path: str | None,
    train: str | None = None,
    test: str | None = None,
    tests: Mapping[str, str] = MappingProxyType({}),
    *,
    template: str | None = None,
    chat: bool = True,
    system: str | None = None,
    prompt_field: str | None = None,
    reward: str | None = None,
) -> Task:
    """A built-in task by its name, or a user's own.

    Args:
        name: the built-in task.
        path: the user's own, written file.py:Class.
        train, test, tests: the sources of problems, where the task uses them; see
            `shardes.tasks.rows.load_rows`.
        template, chat, system, prompt_field, reward: for jsonl.

    Raises:
        ConfigError: both or neither of name and path are set, there is no such task, a setting is
            not used by this task, or a file, class or function cannot be used.
    """
    if (name is None) == (path is None):
        problem = "both are given" if name is not None else "neither is given"
        raise ConfigError(
            f"task.name, task.path: {problem}; give one: a built-in task's name, or file.py:Class"
        )
    for split in {"train", "test"}.intersection(tests):
        raise ConfigError(f"task.tests: {split} is the set of task.{split}; choose another name")
    values: dict[str, Any] = {"train": train, "test": test, "tests": dict(tests) or None}
    values |= {"template": template, "chat": None if chat else False, "system": system}
    values |= {"prompt_field": prompt_field, "reward": reward}
    if path is not None:
        own = load_user_task(path)  # a wrong path is the likelier mistake
        _check_used(None, values)
        return own
    assert name is not None
    _check_used(name, values)
    if name == "jsonl":
        function = _reward_of_jsonl(reward)
        return Jsonl(train, test, tests, template, chat, system, prompt_field, function)
    return _built_in(name, train, test, tests)


def _built_in(name: str, train: str | None, test: str | None, tests: Mapping[str, str]) -> Task:
    if name not in TASKS:
        raise ConfigError(f"task.name={name}: no such task; {suggestion(name, [*TASKS, 'jsonl'])}")
    sources = {
        "countdown": (train, test),
        "extraction": (train, test),
        "math": (train, test, tests),
    }
    return TASKS[name](*sources.get(name, ()))


def _check_used(name: str | None, values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value that the task does not use."""
    for key, value in values.items():
        if value is not None and name not in USED_BY[key]:
            raise ConfigError(f"task.{key}={value}: only for task.name={' or '.join(USED_BY[key])}")


def _reward_of_jsonl(reward: str | None) -> Callable[..., Any]:
    if reward is None:
        raise ConfigError(
            "task.reward: is required with task.name=jsonl: my_module:function or "
            "my_reward.py:function"
        )
    return load_reward_function(reward)
