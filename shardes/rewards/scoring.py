"""The rewards of responses.

A task with `score` is called once for all responses, in this process; a stop of the run interrupts
it. A task with `reward`, and a user's reward function, are called for one response at a time in
worker processes. A response that could not be scored there gets the reward task.on_error, or ends
the run. So does a response that a model could not complete. Every reward is within
`shardes.config.limits.LARGEST_REWARD`: no other may reach the journal.
"""

import json
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
from shardes.rewards.worker_pool import Results, ScoringFailure, WorkerPool
from shardes.tasks import ScoringTask, Task, prompts_of
from shardes.tasks.jsonl import Jsonl

NOTHING: Mapping[int, str] = MappingProxyType({})
REMEDY = (
    "to give such responses a fixed reward instead, set task.on_error to it (and list "
    "task.on_error in resume.allow_changes)"
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

    def __call__(
        self,
        split: str,
        responses: list[str],
        which: Sequence[int] | None = None,
        failures: Mapping[int, str] = NOTHING,
    ) -> list[float]:
        """One reward per response: see `start`, whose function this calls."""
        return self.start(split, responses, which, failures)()

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
                rewards or one that is not REWARD_RANGE. What failed in scoring is then saved. The
                function raises it, and this does not.
        """
        results = None
        refused = failures and self._settings.on_error == "fail"
        if not hasattr(self._task, "score") and not refused:
            numbers = range(len(responses)) if which is None else which
            jobs = [
                self._job(split, number, response)
                for i, (number, response) in enumerate(zip(numbers, responses, strict=True))
                if i not in failures
            ]
            self._pool = self._pool or WorkerPool(self._settings, self._poll)
            results = self._pool.start(jobs)
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
        if results is None:
            score = cast(ScoringTask, self._task).score
            rewards = self._score_all(score, split, responses, which, rows, failures)
        else:
            complete = [i for i in range(len(responses)) if i not in failures]
            scored = self._wait(
                results, split, [numbers[i] for i in complete], [rows[i] for i in complete]
            )
            by_position = dict(zip(complete, scored, strict=True))
            rewards = [by_position.get(i, 0.0) for i in range(len(responses))]
        self._failures["scoring_failures"] += len(failures)
        for i in failures:
            rewards[i] = float(self._settings.on_error)
        return rewards

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
    ) -> list[float]:
        # Without `which` for a task that does not take it.
        arguments = (split, responses) if which is None else (split, responses, which)
        try:
            rewards = self._call(lambda: list(map(float, score(*arguments))))
        except TaskError as error:
            problem = f"task: scoring {split} raised {described(error.cause)}"
            raise ConfigError(f"{problem}; the responses: {self._save(rows)}") from error.cause
        if len(rewards) != len(responses):
            raise ConfigError(
                f"task: score gave {len(rewards)} rewards for {len(responses)} responses"
            )
        for position, reward in enumerate(rewards):
            if not is_reward(reward) and position not in failures:
                number = position if which is None else which[position]
                raise ConfigError(
                    f"task: score gave prompt {number} of {split} the reward {reward}, not "
                    f"{REWARD_RANGE}; the responses: {self._save(rows)}"
                )
        return rewards

    def _job(self, split: str, number: int, response: str) -> list:
        """What a worker's function is called with."""
        if isinstance(self._task, Jsonl):
            return [response, self._task.example(split, number)]
        return [split, number, response]

    def _wait(
        self, scored: Results, split: str, numbers: Sequence[int], rows: list[dict]
    ) -> list[float]:
        """The rewards that workers gave."""
        assert self._pool
        try:
            results = self._pool.wait(scored)
        except ScoringFailure as failure:
            file = self._save([rows[failure.job] | {"error": str(failure)}])
            raise ConfigError(
                f"task: scoring prompt {numbers[failure.job]} of {split}: {failure}; prompt and "
                f"response: {file}; {REMEDY}"
            ) from None
        failures = {
            number: result
            for number, result in enumerate(results)
            if isinstance(result, ScoringFailure)
        }
        if failures:
            self._failures["scoring_failures"] += len(failures)
            self._failures["scoring_timeouts"] += sum(
                failure.timed_out for failure in failures.values()
            )
            self._save([
                rows[number] | {"error": str(failure)} for number, failure in failures.items()
            ])  # fmt: skip
        return [
            float(self._settings.on_error) if isinstance(result, ScoringFailure) else result
            for result in results
        ]

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
