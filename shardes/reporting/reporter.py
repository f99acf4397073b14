"""What a rank reports while it trains: nothing, lines on the terminal, or all of the run's output.

Rank 0 of the primary job has a RunReporter: terminal, metrics files and loggers. The leading rank
of a replica that joined the run prints lines (ConsoleReporter). All other ranks report nothing
(Reporter).
"""

import json
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardes.config import loading as settings
from shardes.config.schema import Config
from shardes.reporting import json_lines
from shardes.reporting.attempts import Attempt
from shardes.reporting.loggers import Loggers
from shardes.reporting.progress import Terminal

METRICS, SAMPLES, EXTREMES = "metrics.jsonl", "samples.jsonl", "extremes.jsonl"
BETTER = {"best": operator.gt, "worst": operator.lt}


class Reporter:
    """Reports nothing."""

    def say(self, line: str) -> None:
        """Print one line."""

    def member_finished(self, tokens: int) -> None:
        """Count the tokens that a member has generated."""

    def progress(self, iteration: int, done: int) -> None:
        """Show how many of the iteration's members have been evaluated."""

    def responses(
        self, member: int, prompts: Sequence, responses: Sequence[str], rewards: Sequence[float]
    ) -> None:
        """Keep the iteration's best and worst response, of the members this replica evaluates."""

    def log_iteration(self, metrics: dict[str, float]) -> None:
        """Record an iteration's metrics, and print a line that sums them up."""

    def samples(
        self,
        iteration: int,
        split: str,
        prompts: Sequence,
        responses: Sequence[str],
        rewards: Sequence[float],
    ) -> None:
        """Record the center's responses to a split's prompts."""

    def summary(
        self,
        reward_means: Sequence[float],
        evaluations: Sequence[dict[str, float]],
        digest: str,
        seconds: float,
    ) -> None:
        """Record the run's results, and print a line that sums them up.

        Args:
            reward_means: the mean reward of every iteration.
            evaluations: this start's evaluations of the center; the last is the final center's.
            digest: the final center's.
        """

    def close(self) -> None:
        """Finish; called once, at the end or after an error."""


class ConsoleReporter(Reporter):
    """Prints lines, and writes nothing."""

    def say(self, line: str) -> None:
        print(line, flush=True)


class RunReporter(Reporter):
    """The terminal, the metrics files of the run directory, and the loggers.

    Args:
        reward_means: the mean rewards of the iterations before this start.
        layout: how the ranks are laid out.

    Attributes:
        best_held_out: the best held-out reward of the iterations before this start; -inf if none.
    """

    def __init__(
        self, config: Config, reward_means: Sequence[float] = (), layout: dict | None = None
    ):
        self._directory = directory = Path(config.run.dir)
        _trim_files(directory, reward_means)
        self._first_evaluation = next(iter(_evaluations(directory)), None)
        self.best_held_out = _best_held_out(directory)
        self._attempt = Attempt(directory, config, layout or {})
        self._metrics, self._samples, self._extremes = (
            open(directory / name, "a", encoding="utf-8") for name in (METRICS, SAMPLES, EXTREMES)
        )
        es = config.es
        self._terminal = Terminal(
            es.iterations, es.population_size, len(reward_means), self.best_held_out
        )
        self._loggers = Loggers(
            config.tracking.loggers, directory, settings.nested(config), self.say
        )
        self._tokens = 0
        self._best_and_worst: dict[str, dict[str, Any]] = {}

    def say(self, line: str) -> None:
        self._terminal.say(line)
        self._attempt.log_line(line)

    def member_finished(self, tokens: int) -> None:
        self._tokens += tokens

    def progress(self, iteration: int, done: int) -> None:
        self._terminal.progress(iteration, done, self._tokens)

    def responses(
        self, member: int, prompts: Sequence, responses: Sequence[str], rewards: Sequence[float]
    ) -> None:
        for kind, is_better in BETTER.items():
            reward = max(rewards) if kind == "best" else min(rewards)
            kept = self._best_and_worst.get(kind)
            if kept is None or is_better(reward, kept["reward"]):
                number = list(rewards).index(reward)
                self._best_and_worst[kind] = dict(
                    kind=kind, member=member, prompt=prompts[number], response=responses[number],
                    reward=reward,
                )  # fmt: skip

    def log_iteration(self, metrics: dict[str, float]) -> None:
        iteration = int(metrics["iteration"])
        json_lines.append(self._metrics, [metrics])
        json_lines.append(
            self._extremes,
            [{"iteration": iteration} | row for row in self._best_and_worst.values()],
        )
        self._best_and_worst.clear()
        self._tokens = 0
        self._loggers.log(metrics, iteration)
        self._attempt.log_line(self._terminal.log_iteration(metrics))

    def samples(
        self,
        iteration: int,
        split: str,
        prompts: Sequence,
        responses: Sequence[str],
        rewards: Sequence[float],
    ) -> None:
        json_lines.append(self._samples, [
            dict(iteration=iteration, split=split, prompt=prompt, response=response, reward=reward)
            for prompt, response, reward in zip(prompts, responses, rewards, strict=True)
        ])  # fmt: skip

    def summary(
        self,
        reward_means: Sequence[float],
        evaluations: Sequence[dict[str, float]],
        digest: str,
        seconds: float,
    ) -> None:
        first, last = self._first_evaluation or evaluations[0], evaluations[-1]
        names = [
            name
            for name in ("center_reward", "held_out_reward", "held_out_accuracy")
            if name in last
        ]
        summary: dict[str, Any] = {
            "iterations": len(reward_means),
            "reward_mean_first": reward_means[0],
            "reward_mean_last": reward_means[-1],
            **{f"{name}_first": first[name] for name in names if name in first},
            **{f"{name}_last": last[name] for name in names},
            "distance": last["distance"],
            "distance_relative": last["distance_relative"],
            "digest": digest,
            "seconds": seconds,
        }
        try:
            (self._directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        except OSError as error:  # not worth ending the run: starting it again writes the file
            self.say(f"warning: no summary.json: {error}")
        self._loggers.log(last, len(reward_means))
        self.say(
            f"done: member reward {reward_means[0]:.2f} → {reward_means[-1]:.2f}, "
            f"center's {first['center_reward']:.2f} → {last['center_reward']:.2f}, "
            f"held-out {first['held_out_reward']:.2f} → {last['held_out_reward']:.2f}; "
            f"{seconds:.0f} s, center {digest}"
        )

    def close(self) -> None:
        self._terminal.close()
        self._loggers.close()
        for file in (self._metrics, self._samples, self._extremes):
            try:
                file.close()
            except OSError as error:  # not worth ending the run: the journal has the results
                self.say(f"warning: {file.name} is incomplete: {error}")


def _best_held_out(directory: Path) -> float:
    """The best held-out reward in a run directory's metrics; -inf if none was measured."""
    return max((row["held_out_reward"] for row in _evaluations(directory)), default=-math.inf)


def _evaluations(directory: Path) -> list[dict[str, float]]:
    """The metrics of the iterations whose center was evaluated."""
    return [row for row in json_lines.read(directory / METRICS) if "held_out_reward" in row]


def _trim_files(directory: Path, reward_means: Sequence[float]) -> None:
    """Make the files end before iteration len(reward_means).

    Each iteration before it has one line of metrics: only its mean reward if the run ended after
    the journal's record and before the metrics were written.
    """
    metrics = {row["iteration"]: row for row in json_lines.read(directory / METRICS)}
    json_lines.replace(
        directory / METRICS,
        [
            metrics.get(iteration, {"iteration": iteration, "reward_mean": reward_mean})
            for iteration, reward_mean in enumerate(reward_means)
        ],
    )
    for name in (SAMPLES, EXTREMES):
        rows = json_lines.read(directory / name)
        json_lines.replace(
            directory / name, [row for row in rows if row["iteration"] < len(reward_means)]
        )


def peak_resident_bytes() -> int:
    """The largest amount of host memory that this process has had resident."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
