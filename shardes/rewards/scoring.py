"""The rewards of responses.

A task with `score` is called once for all responses, in this process. A task with `reward`, and a
user's reward function, are called for one response at a time in worker processes. A response that
could not be scored there gets the reward task.on_error, or ends the run. So does a response that a
model could not complete.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from shardes.config.schema import TaskConfig
from shardes.errors import ConfigError
from shardes.rewards.worker_pool import ScoringFailure, WorkerPool
from shardes.tasks import Task
from shardes.tasks.jsonl import Jsonl

NOTHING: Mapping[int, str] = MappingProxyType({})
REMEDY = (
    "to give such responses a fixed reward instead, set task.on_error to it (and list "
    "task.on_error in resume.allow_changes)"
)
FAILURES = ("scoring_failures", "scoring_timeouts")  # the timeouts are among the failures


class Scorer:
    """Scores responses to a task's prompts.

    Args:
        saved: the file for the prompts and responses of the latest failure.
        poll: called regularly while workers score; an exception from it ends the scoring.
    """

    def __init__(
        self, settings: TaskConfig, task: Task, saved: Path, poll: Callable[[], None] = lambda: None
    ):
        self._settings, self._task, self._poll = settings, task, poll
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
        """One reward per response.

        Args:
            which: the numbers of the prompts that were answered; None: all of the split.
            failures: why a response is not complete, by its position in `responses`.

        Raises:
            ConfigError: a response is not complete, with task.on_error=fail; or the task failed in
                this process, or in a worker with task.on_error=fail, or returned a wrong number of
                rewards. The prompts and responses are then saved.
        """
        prompts = self._task.prompts(split)
        numbers = range(len(prompts)) if which is None else which
        rows = [
            dict(prompt=prompts[number], response=response)
            for number, response in zip(numbers, responses, strict=True)
        ]
        if failures and self._settings.on_error == "fail":
            position, problem = next(iter(failures.items()))
            raise ConfigError(f"prompt {numbers[position]} of {split}: {problem}; {REMEDY}")
        if hasattr(self._task, "score"):
            rewards = self._score_all(self._task.score, split, responses, which, rows)
        else:
            complete = [i for i in range(len(responses)) if i not in failures]
            scored = self._score_each(
                split,
                [responses[i] for i in complete],
                [numbers[i] for i in complete],
                [rows[i] for i in complete],
            )
            by_position = dict(zip(complete, scored, strict=True))
            rewards = [by_position.get(i, 0.0) for i in range(len(responses))]
        self._failures["scoring_failures"] += len(failures)
        for i in failures:
            rewards[i] = float(self._settings.on_error)
        return rewards

    def take_failures(self) -> dict[str, int]:
        """How many responses got task.on_error since the last call, by the names of FAILURES."""
        failures, self._failures = self._failures, Counter()
        return {name: failures[name] for name in FAILURES}

    def close(self) -> None:
        """End the workers."""
        if self._pool:
            self._pool.close()
            self._pool = None

    def _score_all(
        self,
        score: Callable,
        split: str,
        responses: list[str],
        which: Sequence[int] | None,
        rows: list[dict],
    ) -> list[float]:
        # Without `which` for a task that does not take it.
        arguments = (split, responses) if which is None else (split, responses, which)
        try:
            rewards = list(map(float, score(*arguments)))
        except Exception as error:
            problem = f"task: scoring {split} raised {type(error).__name__}: {error}"
            raise ConfigError(f"{problem}; the responses: {self._save(rows)}") from error
        if len(rewards) != len(responses):
            raise ConfigError(
                f"task: score gave {len(rewards)} rewards for {len(responses)} responses"
            )
        return rewards

    def _score_each(
        self, split: str, responses: list[str], numbers: Sequence[int], rows: list[dict]
    ) -> list[float]:
        pairs = list(zip(numbers, responses, strict=True))
        jobs: list[list]
        if isinstance(self._task, Jsonl):
            jobs = [[response, self._task.example(split, number)] for number, response in pairs]
        else:
            jobs = [[split, number, response] for number, response in pairs]
        self._pool = self._pool or WorkerPool(self._settings, self._poll)
        try:
            results = self._pool.score(jobs)
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
                json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            partial.replace(self.saved)
        except (OSError, ValueError) as error:
            return f"not saved ({error})"
        return str(self.saved)
