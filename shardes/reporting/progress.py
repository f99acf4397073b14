"""Progress on the terminal: a bar for the iteration's members, and a line per iteration."""

import math
import time
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text


class _ProgressBar(Progress):
    """A progress bar with a status line below it, so that both fit into 80 columns."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.status)


class Terminal:
    """Standard output of rank 0; if it is not a terminal, lines are printed and no bar is shown.

    Args:
        iterations: of the whole run.
        start: the first iteration of this start.
        best_held_out: the best held-out reward so far; -inf if none was measured.
    """

    def __init__(self, iterations: int, population_size: int, start: int, best_held_out: float):
        self._iterations, self._population_size, self._start = iterations, population_size, start
        self._figures = {"best held-out": best_held_out} if math.isfinite(best_held_out) else {}
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = _ProgressBar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("members  {task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=population_size, left="")
        self._bar.start()
        self._started = self._iteration_started = time.monotonic()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False)

    def progress(self, iteration: int, done: int, tokens: int) -> None:
        """Show the number of members evaluated in an iteration, and the tokens they generated."""
        elapsed = time.monotonic() - self._iteration_started
        self._figures["tokens/s"] = tokens / elapsed
        if iteration > self._start:
            per_iteration = (self._iteration_started - self._started) / (iteration - self._start)
        else:
            per_iteration = elapsed * self._population_size / done if done else math.nan
        left = max(per_iteration * (self._iterations - iteration) - elapsed, 0)
        self._bar.update(
            self._task,
            description=f"iteration {iteration} of {self._iterations}",
            completed=done,
            left=f"{duration(left)} left" if math.isfinite(left) else "",
        )
        self._bar.status = self._status()

    def log_iteration(self, metrics: dict[str, float]) -> str:
        """Print the line that sums up an iteration, and return it."""
        iteration, now = int(metrics["iteration"]), time.monotonic()
        rate = metrics["generated_tokens"] / metrics["seconds"]
        per_iteration = (now - self._started) / (iteration + 1 - self._start)
        left = per_iteration * (self._iterations - iteration - 1)
        held_out = (
            f"  held-out {metrics['held_out_reward']:.2f}" if "held_out_reward" in metrics else ""
        )
        failed = (
            f"  {metrics['scoring_failures']} not scored" if metrics.get("scoring_failures") else ""
        )
        line = (
            f"iteration {iteration}  reward {metrics['reward_mean']:.2f} ± "
            f"{metrics['reward_std']:.2f}  best {metrics['reward_max']:.2f}{held_out}{failed}  "
            f"{metrics['seconds']:.1f} s  {rate:.0f} tokens/s  {duration(left)} left"
        )
        self.say(line)
        self._iteration_started = now
        self._figures |= {"reward": metrics["reward_mean"], "tokens/s": rate}
        if "held_out_reward" in metrics:
            self._figures["held-out"] = reward = metrics["held_out_reward"]
            self._figures["best held-out"] = max(self._figures.get("best held-out", reward), reward)
        self._bar.update(self._task, completed=self._population_size, left=f"{duration(left)} left")
        self._bar.status = self._status()
        return line

    def _status(self) -> str:
        names = ("reward", "held-out", "best held-out")
        rewards = [f"{name} {self._figures[name]:.2f}" for name in names if name in self._figures]
        return "  ".join([f"{self._figures['tokens/s']:.0f} tokens/s", *rewards])

    def close(self) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """Seconds as H:MM:SS, or as M:SS if less than an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
