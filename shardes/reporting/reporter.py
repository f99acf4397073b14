"""What a rank reports while it trains: nothing, lines on the terminal, or all of the run's output.

Rank 0 of the primary job has a RunReporter: terminal, metrics files and loggers. The leading rank
of a replica that joined the run prints lines (ConsoleReporter). All other ranks report nothing
(Reporter).
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardes.config import loading as settings
from shardes.config.schema import Config
from shardes.reporting import json_lines
from shardes.reporting.attempts import Attempt
from shardes.reporting.learning import LearningWatch
from shardes.reporting.loggers import Loggers
from shardes.reporting.progress import Pace, Terminal, held_out_text, significant
from shardes.storage.journal import Record, is_better
from shardes.storage.resume import ResumePoint
from shardes.words import counted

METRICS, SAMPLES, EXTREMES = "metrics.jsonl", "samples.jsonl", "extremes.jsonl"
BETTER = {"best": operator.gt, "worst": operator.lt}
OnMetrics = Callable[[dict[str, float]], None]


def ignore(metrics: dict[str, float]) -> None:
    """What is called with metrics by default."""


class Reporter:
    """Reports nothing."""

    def say(self, line: str) -> None:
        """Print one line."""

    def member_finished(self, tokens: int) -> None:
        """Count the tokens that a member has generated."""

    def evaluating(self, begins: bool = False) -> None:
        """Show that the center is evaluated; called when that begins, and until it is."""

    def progress(self, iteration: int, done: int) -> None:
        """Show how many of the iteration's members have been evaluated."""

    def responses(
        self, member: int, prompts: Sequence, responses: Sequence[str], rewards: Sequence[float]
    ) -> None:
        """Keep the iteration's best and worst response, of the members this replica evaluates."""

    def answered(self, texts: Sequence[str], kinds: Sequence[str]) -> None:
        """See `LearningWatch.answered`."""

    def check_learning(self, record: Record) -> None:
        """Warn, once for each cause, if nothing can be learned from an iteration."""

    def log_iteration(self, metrics: dict[str, float]) -> None:
        """Record an iteration's metrics, and print a line that sums them up."""

    def repair_iteration(self, metrics: dict[str, float]) -> None:
        """Record the metrics of the iteration replayed last, if a stop came before that."""

    def samples(
        self,
        iteration: int,
        split: str,
        prompts: Sequence,
        responses: Sequence[str],
        rewards: Sequence[float],
    ) -> None:
        """Record the center's responses to a split's prompts; on return they are on disk."""

    def summary(
        self,
        reward_means: Sequence[float],
        evaluations: Mapping[int, dict[str, float]],
        digest: str,
        seconds: float,
    ) -> None:
        """Record the run's results, and print a line that sums them up.

        Args:
            reward_means: the mean reward of every iteration.
            evaluations: the metrics of the centers that were evaluated, by iteration.
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
        resume: where this start begins.
        layout: how the ranks are laid out.
        printed: the lines that this start has printed already; they go to output.log.
        on_metrics: is called with the metrics of each iteration, once they are in the files.
    """

    def __init__(
        self,
        config: Config,
        resume: ResumePoint,
        layout: dict | None = None,
        printed: Sequence[str] = (),
        on_metrics: OnMetrics = ignore,
    ):
        self._on_metrics = on_metrics
        self._directory = directory = Path(config.run.dir)
        warnings: list[str] = []
        self._recorded = _trim_files(directory, resume, warnings.append)
        best = {} if resume.best is None else resume.evaluations[resume.best]
        self._attempt = Attempt(directory, config, layout or {})
        for line in printed:
            self._attempt.log_line(line)
        self._metrics, self._samples, self._extremes = (
            open(directory / name, "a", encoding="utf-8") for name in (METRICS, SAMPLES, EXTREMES)
        )
        es = config.es
        pace = Pace(
            es.iterations,
            es.population_size,
            resume.iteration,
            len(resume.rewards),
            config.eval.every,
        )
        self._terminal = Terminal(pace, best.get("held_out_reward", -math.inf))
        self._loggers = Loggers(
            config.tracking.loggers, directory, settings.nested(config), self.say
        )
        self._tokens = 0
        self._best_and_worst: dict[str, dict[str, Any]] = {}
        self._learning = LearningWatch(config)
        for warning in warnings:
            self.say(warning)

    def say(self, line: str) -> None:
        self._terminal.say(line)
        self._attempt.log_line(line)

    def member_finished(self, tokens: int) -> None:
        self._tokens += tokens

    def evaluating(self, begins: bool = False) -> None:
        self._terminal.evaluating(begins)

    def progress(self, iteration: int, done: int) -> None:
        self._terminal.progress(iteration, done, self._tokens)

    def responses(
        self, member: int, prompts: Sequence, responses: Sequence[str], rewards: Sequence[float]
    ) -> None:
        for kind, beats in BETTER.items():
            reward = max(rewards) if kind == "best" else min(rewards)
            kept = self._best_and_worst.get(kind)
            if kept is None or beats(reward, kept["reward"]):
                number = list(rewards).index(reward)
                self._best_and_worst[kind] = dict(
                    kind=kind, member=member, prompt=prompts[number], response=responses[number],
                    reward=reward,
                )  # fmt: skip

    def answered(self, texts: Sequence[str], kinds: Sequence[str]) -> None:
        self._learning.answered(texts, kinds)

    def check_learning(self, record: Record) -> None:
        if warning := self._learning.finish(record):
            self.say(warning)

    def log_iteration(self, metrics: dict[str, float]) -> None:
        iteration = int(metrics["iteration"])
        json_lines.append(self._metrics, [metrics])
        json_lines.append(
            self._extremes,
            [{"iteration": iteration} | row for row in self._best_and_worst.values()],
        )
        self._best_and_worst.clear()
        self._loggers.log(metrics, iteration)
        self._attempt.log_line(self._terminal.log_iteration(metrics, self._tokens))
        self._tokens = 0
        self._on_metrics(metrics)

    def repair_iteration(self, metrics: dict[str, float]) -> None:
        if int(metrics["iteration"]) not in self._recorded:
            json_lines.append(self._metrics, [metrics])
            self._loggers.log(metrics, int(metrics["iteration"]))

    def samples(
        self,
        iteration: int,
        split: str,
        prompts: Sequence,
        responses: Sequence[str],
        rewards: Sequence[float],
    ) -> None:
        rows = [
            dict(iteration=iteration, split=split, prompt=prompt, response=response, reward=reward)
            for prompt, response, reward in zip(prompts, responses, rewards, strict=True)
        ]
        json_lines.append(self._samples, rows, durable=True)
        self._loggers.log_samples(rows, iteration)

    def summary(
        self,
        reward_means: Sequence[float],
        evaluations: Mapping[int, dict[str, float]],
        digest: str,
        seconds: float,
    ) -> None:
        first, last = (evaluations[iteration(evaluations)] for iteration in (min, max))
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
            **{name: last[name] for name in ("distance", "distance_relative") if name in last},
            "digest": digest,
            "seconds": seconds,
        }
        try:
            text = json_lines.to_json(summary, indent=2)
            (self._directory / "summary.json").write_text(text + "\n")
        except OSError as error:  # not worth ending the run: starting it again writes the file
            self.say(f"warning: no summary.json: {error}")
        self._loggers.log(last, len(reward_means))
        members, center = (
            f"{significant(before)} → {significant(after)}"
            for before, after in (
                (reward_means[0], reward_means[-1]),
                (first["center_reward"], last["center_reward"]),
            )
        )
        self.say(
            f"done: member reward {members}, center's on training prompts {center}, "
            f"held-out {held_out_text(first)} → {held_out_text(last)}; "
            f"{seconds:.0f} s, center {digest}"
        )
        self._tell_best(evaluations)

    def _tell_best(self, evaluations: Mapping[int, dict[str, float]]) -> None:
        """Say if an earlier center had a better held-out reward than the final one."""
        best = max(sorted(evaluations), key=lambda t: evaluations[t]["held_out_reward"])
        if not is_better(evaluations[best], evaluations[max(evaluations)]):
            return
        where = "before the first iteration: what was learned does not help there"
        if best:
            where = (
                f"after {counted(best, 'iteration')}: shardes export {self._directory} DIR "
                f"--iteration {best} exports that center"
            )
        self.say(f"the best held-out reward was {held_out_text(evaluations[best])}, {where}")

    def close(self) -> None:
        self._terminal.close()
        self._loggers.close()
        for file in (self._metrics, self._samples, self._extremes):
            try:
                file.close()
            except OSError as error:  # not worth ending the run: the journal has the results
                self.say(f"warning: {file.name} is incomplete: {error}")


def _trim_files(directory: Path, resume: ResumePoint, warn: Callable[[str], None]) -> set[int]:
    """Make the files end where the journal does; returns the iterations that have metrics.

    An iteration whose metrics are missing gets what the resume point knows of it. Only the last of
    those that are replayed stays without: see `Reporter.repair_iteration`.
    """
    rows = {row["iteration"]: row for row in json_lines.read(directory / METRICS, warn)}
    metrics = {}
    for t, reward_mean in enumerate(resume.reward_means):
        known = {"iteration": t, "reward_mean": reward_mean} | resume.evaluations.get(t, {})
        if t in rows or t + 1 < resume.iteration or not resume.records:
            metrics[t] = rows.get(t, known)
    json_lines.replace(directory / METRICS, metrics.values())
    # A stop may have come after an evaluation's samples and before its entry in the journal.
    complete = resume.iteration - bool(resume.records)
    for name, end in ((SAMPLES, complete), (EXTREMES, resume.iteration)):
        kept = [
            row
            for row in json_lines.read(directory / name, warn)
            if row["iteration"] < end
            or (name == SAMPLES and row["iteration"] in resume.evaluations)
        ]
        json_lines.replace(directory / name, kept)
    return set(metrics)


def add_recorded_evaluations(directory: Path, resume: ResumePoint) -> None:
    """Complete a resume point by the evaluations in a run's metrics, if its journal has none, as
    those of earlier versions.
    """
    if resume.evaluations:
        return
    for row in json_lines.read(directory / METRICS):
        if row["iteration"] < resume.iteration and "held_out_reward" in row:
            names = ("center_reward", "held_out_reward", "held_out_accuracy", "distance")
            resume.evaluations[row["iteration"]] = {n: row[n] for n in names if n in row}
    resume.best = max(
        resume.evaluations,
        key=lambda t: resume.evaluations[t]["held_out_reward"],
        default=None,
    )


def peak_resident_bytes() -> int:
    """The largest amount of host memory that this process has had resident."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
