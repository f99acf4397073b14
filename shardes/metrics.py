"""What a person sees: progress while it runs, and the run directory's files."""

import json
import math
import operator
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from shardes import settings
from shardes.attempts import Attempt
from shardes.config import Config, RunError
from shardes.loggers import Loggers
from shardes.progress import Screen

EXTREMES = {"best": operator.gt, "worst": operator.lt}
FILES = ("metrics.jsonl", "samples.jsonl", "extremes.jsonl")


class Clock:
    """Seconds spent in named parts: `with clock("generate"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start


class Reporter:
    """The terminal, the files of the run directory that are for people, and the loggers, of one run; for rank 0.

    `means` are the mean rewards of the iterations before; `layout` says how the ranks are laid out.
    `first_evaluation` is what metrics.jsonl says of the first center that was evaluated; `best_held_out` the best
    held-out reward of any.
    """

    def __init__(self, config: Config, means: Sequence[float] = (), layout: dict[str, Any] | None = None):
        self._directory = directory = Path(config.run.dir)
        self.first_evaluation = _continue(directory, means)
        self.best_held_out = max(
            (row["held_out_reward"] for row in _rows(directory / "metrics.jsonl") if "held_out_reward" in row),
            default=-math.inf,
        )
        self._attempt = Attempt(directory, config, layout or {})
        self._metrics, self._samples, self._extremes = (open(directory / name, "a", encoding="utf-8") for name in FILES)
        es = config.es
        self._screen = Screen(es.iterations, es.population_size, len(means), self.best_held_out)
        self._loggers = Loggers(config.tracking.loggers, directory, settings.nested(config), self.say)
        self._tokens = 0
        self._found: dict[str, dict[str, Any]] = {}

    def say(self, line: str) -> None:
        """Print one line."""
        self._screen.say(line)
        self._attempt.line(line)

    def member(self, tokens: int) -> None:
        """Count what a member has generated, as the progress shows it."""
        self._tokens += tokens

    def members(self, iteration: int, done: int) -> None:
        """Show how many of the iteration's members are evaluated."""
        self._screen.members(iteration, done, self._tokens)

    def responses(self, member: int, prompts: Sequence, responses: Sequence[str], rewards: Sequence[float]) -> None:
        """Keep the best and the worst response to the iteration's prompts; of members that this replica evaluated."""
        for kind, better in EXTREMES.items():
            reward = max(rewards) if kind == "best" else min(rewards)
            if kind not in self._found or better(reward, self._found[kind]["reward"]):
                row = list(rewards).index(reward)
                found = dict(kind=kind, member=member, prompt=prompts[row], response=responses[row])
                self._found[kind] = found | {"reward": reward}

    def iteration(self, metrics: dict[str, float]) -> None:
        """Record one iteration's metrics, and show the line that sums them up."""
        step = int(metrics["iteration"])
        _put(self._metrics, [metrics])
        _put(self._extremes, [dict(iteration=step) | found for found in self._found.values()])
        self._found.clear()
        self._tokens = 0
        self._loggers.log(metrics, step)
        self._attempt.line(self._screen.iteration(metrics))

    def samples(
        self, iteration: int, split: str, prompts: Sequence, responses: Sequence[str], rewards: Sequence[float]
    ) -> None:
        """Record the center's responses to a split's prompts."""
        rows = zip(prompts, responses, rewards, strict=True)
        _put(self._samples, [
            dict(iteration=iteration, split=split, prompt=prompt, response=response, reward=reward)
            for prompt, response, reward in rows
        ])  # fmt: skip

    def summary(self, means: list[float], evaluations: list[dict[str, float]], digest: str, seconds: float) -> None:
        """Write summary.json, and say in a line what the run has come to.

        `means` are all iterations' mean rewards, `evaluations` this start's evaluations of the center, the last one of
        the final center, whose digest is given.
        """
        first, last = self.first_evaluation or evaluations[0], evaluations[-1]
        names = [name for name in ("center_reward", "held_out_reward", "held_out_accuracy") if name in last]
        summary: dict[str, Any] = {
            "iterations": len(means),
            "reward_mean_first": means[0],
            "reward_mean_last": means[-1],
            **{f"{name}_first": first[name] for name in names if name in first},
            **{f"{name}_last": last[name] for name in names},
            "distance": last["distance"],
            "distance_relative": last["distance_relative"],
            "digest": digest,
            "seconds": seconds,
        }
        (self._directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self._loggers.log(last, len(means))
        self.say(
            f"done: member reward {means[0]:.2f} → {means[-1]:.2f}, center's {first['center_reward']:.2f} → "
            f"{last['center_reward']:.2f}, held-out {first['held_out_reward']:.2f} → {last['held_out_reward']:.2f}; "
            f"{seconds:.0f} s, center {digest}"
        )

    def close(self) -> None:
        self._screen.close()
        self._loggers.close()
        for file in (self._metrics, self._samples, self._extremes):
            try:
                file.close()
            except OSError as error:  # what counts is in the journal
                self.say(f"warning: the metrics are not complete: {error}")


def _continue(directory: Path, means: Sequence[float]) -> dict[str, float] | None:
    """Make the files end before iteration len(means), each once; returns the first metrics with an evaluation.

    Iterations that were recorded in the journal, but not here, get their mean reward.
    """
    known = {row["iteration"]: row for row in _rows(directory / "metrics.jsonl")}
    metrics = [known.get(i, {"iteration": i, "reward_mean": reward}) for i, reward in enumerate(means)]
    _replace(directory / "metrics.jsonl", metrics)
    for name in FILES[1:]:
        _replace(directory / name, [row for row in _rows(directory / name) if row["iteration"] < len(means)])
    return next((row for row in metrics if "held_out_reward" in row), None)


def _put(file: TextIO, rows: Sequence[dict]) -> None:
    """Append rows to a file of JSON objects.

    Raises:
        RunError: they could not be written.
    """
    try:
        file.write(_lines(rows))
        file.flush()
    except OSError as error:
        raise RunError(
            f"{file.name}: cannot be written ({error}). The journal is whole: once there is room, start the same "
            "command again to go on"
        ) from error


def _lines(rows: Sequence[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _rows(file: Path) -> list[dict]:
    """The whole lines of a file of JSON objects."""
    if not file.exists():
        return []
    *lines, _ = file.read_text(encoding="utf-8").split("\n")
    return list(map(json.loads, lines))


def _replace(file: Path, rows: list[dict]) -> None:
    beside = file.with_name(file.name + ".partial")
    beside.write_text(_lines(rows), encoding="utf-8")
    beside.replace(file)


def peak_resident_bytes() -> int:
    """The most memory of the host that this process has had resident so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
