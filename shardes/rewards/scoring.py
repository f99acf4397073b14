"""The rewards of responses.

A task with `score` is called once for all responses, in this process; a stop of the run interrupts
it. A task with `reward`, and a user's reward function, are called in worker processes: for one
response at a time, or once for all of a model's if the function's name is score_batch. A response
that could not be scored there gets the reward task.on_error, or ends the run. So does a response
that a model could not complete. Every reward is within `shardes.config.limits.LARGEST_REWARD`: no
other may reach the journal.

A reward may be a dict. Its number "reward" is the reward; its other numbers, the parts, are logged
and decide nothing. All rewards of a task have the same parts.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from shardes.config.limits import REWARD_RANGE, is_reward
from shardes.config.schema import TaskConfig
from shardes.errors import ConfigError, described
from shardes.rewards.worker import split_parts
from shardes.rewards.worker_pool import JobResult, Results, Scored, WorkerPool
from shardes.rewards.worker_process import ScoringFailure
from shardes.tasks import RewardTask, ScoringTask, Task, prompts_of
from shardes.tasks.jsonl import Jsonl
from shardes.tasks.user_code import is_async, is_batch

NOTHING: Mapping[int, str] = MappingProxyType({})
REMEDY = (
    "to give such responses a fixed reward instead, set task.on_error to it (once the run has an "
    "iteration, with resume.allow_changes=[task.on_error])"
)
FAILURES = ("scoring_failures", "scoring_timeouts")  # the timeouts are among the failures


class TaskError(Exception):
    """The task raised `cause` in this process."""

    def __init__(self, cause: BaseException):
        super().__init__(cause)
        self.cause = cause


class Scorer:
    """Scores responses to a task's prompts.

    Args:
        saved: the file for the prompts and responses of the latest failure.
        poll: called regularly while workers score, and around calls of the task in this process;
            an exception from it ends the scoring.
        users_code: makes the context of such a call, in which a stop raises KeyboardInterrupt.

    Attributes:
        in_workers: whether worker processes score, while this process decodes.
        is_batch: whether all responses of a model are scored in one call there.
        parts: of the responses that were scored last, the mean of each named part of their rewards;
            {} if rewards are plain numbers, or if none of the responses could be scored.
        is_tried: whether `try_out` was called, or would be of no use for this task.
    """

    def __init__(
        self,
        settings: TaskConfig,
        task: Task,
        saved: Path,
        poll: Callable[[], None] = lambda: None,
        users_code: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self._settings, self._task, self._poll = settings, task, poll
        self._users_code = users_code
        self.saved = saved
        self._pool: WorkerPool | None = None
        self._failures: Counter[str] = Counter()
        self.in_workers = not hasattr(task, "score")
        self.is_batch = isinstance(task, Jsonl) and is_batch(settings.reward or "")
        self.parts: dict[str, float] = {}
        self._part_names: set[str] | None = None  # once a response was scored
        # With another task.on_error a failure ends nothing. A batch is never a part of the prompts.
        self.is_tried = not self.in_workers or self.is_batch or settings.on_error != "fail"

    def __call__(
        self,
        split: str,
        responses: list[str],
        which: Sequence[int] | None = None,
        failures: Mapping[int, str] = NOTHING,
    ) -> list[float]:
        """One reward per response: see `start`, whose function this calls."""
        return self.start(split, responses, which, failures)()

    def try_out(self, split: str, response: str, number: int) -> None:
        """Score the first response, to prompt `number`, at once: a mistake in the reward is
        reported before the others have ended.

        Raises:
            ConfigError: see `start`.
        """
        assert not self.is_tried
        self.is_tried = True
        self(split, [response], [number])

    def start(
        self,
        split: str,
        responses: list[str],
        which: Sequence[int] | None = None,
        failures: Mapping[int, str] = NOTHING,
    ) -> Callable[[], list[float]]:
        """Start to score responses; returns a function that waits for one reward per response.

        Worker processes score from now on. A task with `score` is called by that function: it must
        not run beside what this process does meanwhile.

        Args:
            which: the numbers of the prompts that were answered; None: all of the split.
            failures: why a response is not complete, by its position in `responses`.

        Raises:
            ConfigError: a response is not complete, with task.on_error=fail; or the task failed in
                this process, or in a worker with task.on_error=fail, or returned a wrong number of
                rewards or one that is not REWARD_RANGE; or the parts of rewards are not those of
                earlier ones. What failed in scoring is then saved. The function raises it, and
                this does not.
        """
        results = None
        refused = failures and self._settings.on_error == "fail"
        if self.in_workers and not refused:
            numbers = range(len(responses)) if which is None else which
            complete = [
                (number, response)
                for i, (number, response) in enumerate(zip(numbers, responses, strict=True))
                if i not in failures
            ]
            self._pool = self._pool or WorkerPool(self._settings, self._poll, self._is_async())
            results = self._pool.start(self._jobs(split, complete))
        return partial(self._rewards, split, responses, which, failures, results)

    def _rewards(
        self,
        split: str,
        responses: list[str],
        which: Sequence[int] | None,
        failures: Mapping[int, str],
        results: Results | None,
    ) -> list[float]:
        prompts = prompts_of(self._task, split)
        numbers = range(len(prompts)) if which is None else which
        rows = [
            dict(prompt=prompts[number], response=response)
            for number, response in zip(numbers, responses, strict=True)
        ]
        if failures and self._settings.on_error == "fail":
            position, problem = next(iter(failures.items()))
            raise ConfigError(f"prompt {numbers[position]} of {split}: {problem}; {REMEDY}")
        scored: dict[int, Scored | None]
        if results is None:
            score = cast(ScoringTask, self._task).score
            scored = self._score_all(score, split, responses, which, rows, failures)
        else:
            complete = [i for i in range(len(responses)) if i not in failures]
            waited = self._wait(
                results, split, [numbers[i] for i in complete], [rows[i] for i in complete]
            )
            scored = dict(zip(complete, waited, strict=True))
        self._failures["scoring_failures"] += len(failures)
        self.parts = self._mean_parts([value for value in scored.values() if value])
        return [
            value.reward if (value := scored.get(i)) else float(self._settings.on_error)
            for i in range(len(responses))
        ]

    def _mean_parts(self, scored: list[Scored]) -> dict[str, float]:
        """The mean of each named part.

        Raises:
            ConfigError: a reward has other parts than those before. That is an error whatever
                task.on_error is: which reward is the wrong one would depend on their order.
        """
        for value in scored:
            if self._part_names is None:
                self._part_names = {*value.parts}
            if self._part_names != {*value.parts}:
                before, now = (
                    ", ".join(["reward", *sorted(names)])
                    for names in (self._part_names, {*value.parts})
                )
                raise ConfigError(
                    f"task: a reward has {now}, and rewards before had {before}; every reward must "
                    "have the same named numbers"
                )
        names = sorted(scored[0].parts) if scored else []
        return {
            name: math.fsum(value.parts[name] for value in scored) / len(scored) for name in names
        }

    def correct(
        self, split: str, responses: list[str], which: Sequence[int] | None = None
    ) -> list[bool] | None:
        """Whether each response of a split is right; None if the task does not say.

        Args:
            which: the numbers of the prompts that were answered; None: all of the split.

        Raises:
            ConfigError: the task raised an exception, or did not return a bool for each response.
        """
        correct = getattr(self._task, "correct", None)
        if correct is None:
            return None
        try:
            # Without `which` for a task that does not take it.
            arguments = (split, responses) if which is None else (split, responses, which)
            values = self._call(lambda: _bools(correct(*arguments)))
        except TaskError as error:
            problem = f"task: correct({split!r}, ...) raised {described(error.cause)}"
            raise ConfigError(problem) from error.cause
        if len(values) != len(responses):
            raise ConfigError(
                f"task: correct gave {len(values)} values for {len(responses)} responses of {split}"
            )
        return values

    def take_failures(self) -> dict[str, int]:
        """How many responses got task.on_error since the last call, by the names of FAILURES."""
        failures, self._failures = self._failures, Counter()
        return {name: failures[name] for name in FAILURES}

    def close(self) -> None:
        """End the workers."""
        if self._pool:
            self._pool.close()
            self._pool = None

    def _call(self, function: Callable[[], Any]) -> Any:
        """Call the user's code in this process.

        Raises:
            TaskError: it raised something, and not because a stop interrupted it.
        """
        process, cause = os.getpid(), None
        self._poll()
        try:
            with self._users_code():
                value = function()
        except BaseException as error:
            cause = error
        if os.getpid() != process:  # a child that it forked must not train
            os._exit(1)
        self._poll()
        if cause:
            raise TaskError(cause)
        return value

    def _score_all(
        self,
        score: Callable,
        split: str,
        responses: list[str],
        which: Sequence[int] | None,
        rows: list[dict],
        failures: Mapping[int, str],
    ) -> dict[int, Scored | None]:
        """What this process' call of the task gives the complete responses, by position."""

        # Without `which` for a task that does not take it.
        arguments = (split, responses) if which is None else (split, responses, which)
        try:
            rewards = self._call(lambda: list(map(_as_scored, score(*arguments))))
        except TaskError as error:
            problem = f"task: scoring {split} raised {described(error.cause)}"
            raise ConfigError(f"{problem}; the responses: {self._save(rows)}") from error.cause
        if len(rewards) != len(responses):
            raise ConfigError(
                f"task: score gave {len(rewards)} rewards for {len(responses)} responses"
            )
        complete = {i: scored for i, scored in enumerate(rewards) if i not in failures}
        for position, scored in complete.items():
            for name, value in {"": scored.reward, **scored.parts}.items():
                if not is_reward(value):
                    number = position if which is None else which[position]
                    what = (
                        f"the reward {value}" if not name else f"a reward whose {name} is {value}"
                    )
                    raise ConfigError(
                        f"task: score gave prompt {number} of {split} {what}, not {REWARD_RANGE}; "
                        f"the responses: {self._save(rows)}"
                    )
        return {**complete}

    def _is_async(self) -> bool:
        """Whether what workers call is async."""
        if isinstance(self._task, Jsonl):
            return self._task.function is not None and is_async(self._task.function)
        return is_async(cast(RewardTask, self._task).reward)

    def _jobs(self, split: str, complete: Sequence[tuple[int, str]]) -> list[list]:
        """What the workers' function is called with, for prompts by number and their responses."""
        if not isinstance(self._task, Jsonl):
            return [[split, number, response] for number, response in complete]
        pairs = [(response, self._task.example(split, number)) for number, response in complete]
        if self.is_batch:
            return [list(map(list, zip(*pairs, strict=True)))] if pairs else []
        return list(map(list, pairs))

    def _wait(
        self, started: Results, split: str, numbers: Sequence[int], rows: list[dict]
    ) -> list[Scored | None]:
        """What workers gave the responses; None: that one failed, and gets task.on_error."""
        assert self._pool
        results: dict[int, JobResult]
        try:
            jobs = self._pool.wait(started)
            if self.is_batch and jobs:
                (batch,) = jobs
                jobs = [batch] * len(rows) if isinstance(batch, ScoringFailure) else [*batch]
            results = dict(enumerate(jobs))
        except ScoringFailure as failure:
            results = dict.fromkeys(range(len(rows)) if self.is_batch else [failure.job], failure)
        failures = {
            number: result
            for number, result in results.items()
            if isinstance(result, ScoringFailure)
        }
        saved = [rows[number] | {"error": str(failure)} for number, failure in failures.items()]
        if failures and self._settings.on_error == "fail":
            number, first = next(iter(failures.items()))
            together = [failure for failure in failures.values() if failure is first]
            what = f"prompt {numbers[number]}"
            if len(together) > 1:
                what = f"a batch of {len(together)} responses to prompts"
            file = self._save(saved)
            raise ConfigError(
                f"task: scoring {what} of {split}: {first}; prompt and response: {file}; {REMEDY}"
            )
        if failures:
            self._failures["scoring_failures"] += len(failures)
            self._failures["scoring_timeouts"] += sum(
                failure.timed_out for failure in failures.values()
            )
            self._save(saved)
        return [result if isinstance(result, Scored) else None for result in results.values()]

    def _save(self, rows: list[dict]) -> str:
        """Save what could not be scored; returns the file, or why it could not be written."""
        partial = self.saved.with_name(f"{self.saved.name}.{os.getpid()}")
        try:
            partial.write_text(
                json.dumps(rows, indent=1, ensure_ascii=False, default=str) + "\n",
                encoding="utf-8",
            )
            partial.replace(self.saved)
        except (OSError, ValueError) as error:
            return f"not saved ({error})"
        return str(self.saved)


def _as_scored(value: Any) -> Scored:
    reward, parts = split_parts(value)
    return Scored(float(reward), {name: float(part) for name, part in parts.items()})


def _bools(values: Iterable[Any]) -> list[bool]:
    """Values that equal True or False, as bools.

    Raises:
        ValueError: one does not.
    """
    values = list(values)
    for value in values:
        if value not in (True, False):
            raise ValueError(f"{value!r} is not True or False")
    return list(map(bool, values))
