"""What a person sees: progress while it runs, and the run directory's files."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch.utils.tensorboard import SummaryWriter

from shardes.config import RunError


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
    """The terminal, metrics.jsonl, samples.jsonl, summary.json and TensorBoard files of one run.

    On a terminal a bar shows the iteration's members; elsewhere there is one plain line per iteration. `means` are
    the mean rewards of the iterations before; `first_evaluation` is what metrics.jsonl says of the first center
    that was evaluated; `best_held_out` the best held-out reward of any.
    """

    def __init__(self, directory: Path, iterations: int, population_size: int, means: Sequence[float] = ()):
        self._directory = directory
        self._begin = len(means)
        self.first_evaluation = _continue(directory, means)
        self.best_held_out = max(
            (row["held_out_reward"] for row in _rows(directory / "metrics.jsonl") if "held_out_reward" in row),
            default=-math.inf,
        )
        self._iterations = iterations
        self._population_size = population_size
        self._metrics = open(directory / "metrics.jsonl", "a", encoding="utf-8")
        self._samples = open(directory / "samples.jsonl", "a", encoding="utf-8")
        self._board = SummaryWriter(str(directory), purge_step=self._begin)
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("members  {task.fields[state]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=population_size, state="")
        self._bar.start()
        self._started = time.monotonic()

    def say(self, line: str) -> None:
        """Print one line."""
        self._console.print(line, markup=False)

    def members(self, iteration: int, done: int) -> None:
        """Show how many of the iteration's members are evaluated."""
        self._bar.update(self._task, description=f"iteration {iteration}", completed=done)

    def iteration(self, metrics: dict[str, float]) -> None:
        """Record one iteration's metrics, and show the line that sums them up."""
        _put(self._metrics, [metrics])
        step = int(metrics["iteration"])
        for key, value in metrics.items():
            self._board.add_scalar(key, value, step)
        self._board.flush()
        rate = metrics["generated_tokens"] / metrics["seconds"]
        left = (time.monotonic() - self._started) / (step + 1 - self._begin) * (self._iterations - step - 1)
        held_out = f"  held-out {metrics['held_out_reward']:.2f}" if "held_out_reward" in metrics else ""
        failed = f"  {metrics['scoring_failures']} not scored" if metrics.get("scoring_failures") else ""
        self.say(
            f"iteration {step}  reward {metrics['reward_mean']:.2f} ± {metrics['reward_std']:.2f}"
            f"  best {metrics['reward_max']:.2f}{held_out}{failed}  {metrics['seconds']:.1f} s  {rate:.0f} tokens/s"
            f"  {_duration(left)} left"
        )
        state = f"reward {metrics['reward_mean']:.2f}  {rate:.0f} tokens/s  {_duration(left)} left"
        self._bar.update(self._task, completed=self._population_size, state=state)

    def samples(
        self, iteration: int, split: str, prompts: Sequence, responses: Sequence[str], rewards: Sequence[float]
    ) -> None:
        """Record the center's responses to a split's prompts."""
        rows = zip(prompts, responses, rewards, strict=True)
        _put(self._samples, [
            dict(iteration=iteration, split=split, prompt=prompt, response=response, reward=reward)
            for prompt, response, reward in rows
        ])  # fmt: skip

    def summary(self, summary: dict[str, float | str]) -> None:
        """Write summary.json."""
        (self._directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        self._bar.stop()
        for file in (self._metrics, self._samples, self._board):
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
    samples = [row for row in _rows(directory / "samples.jsonl") if row["iteration"] < len(means)]
    _replace(directory / "samples.jsonl", samples)
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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
