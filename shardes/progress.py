"""A run on the terminal: a bar for the iteration's members, and a line per iteration."""

import math
import time
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text


class TwoLines(Progress):
    """A bar, and what else there is to say in a line of its own, so that both fit into 80 columns."""

    state = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.state)


class Screen:
    """Rank 0's standard output. Where it is no terminal there are lines alone.

    `iterations` are those of the whole run; it goes on with number `begin`. `best_held_out` is the best held-out
    reward so far.
    """

    def __init__(self, iterations: int, population_size: int, begin: int, best_held_out: float):
        self._iterations, self._population_size, self._begin = iterations, population_size, begin
        self._shown = {"best held-out": best_held_out} if math.isfinite(best_held_out) else {}
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = TwoLines(
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

    def members(self, iteration: int, done: int, tokens: int) -> None:
        """Show how many of the iteration's members are evaluated, and what they have generated."""
        elapsed = time.monotonic() - self._iteration_started
        self._shown["tokens/s"] = tokens / elapsed
        whole = (self._iteration_started - self._started) / max(iteration - self._begin, 1)
        if iteration == self._begin:
            whole = elapsed * self._population_size / done if done else math.nan
        left = max(whole * (self._iterations - iteration) - elapsed, 0)
        self._bar.update(
            self._task,
            description=f"iteration {iteration} of {self._iterations}",
            completed=done,
            left=f"{duration(left)} left" if math.isfinite(left) else "",
        )
        self._bar.state = self._state()

    def iteration(self, metrics: dict[str, float]) -> str:
        """Show the line that sums up an iteration, and return it."""
        step, now = int(metrics["iteration"]), time.monotonic()
        rate = metrics["generated_tokens"] / metrics["seconds"]
        left = (now - self._started) / (step + 1 - self._begin) * (self._iterations - step - 1)
        held_out = f"  held-out {metrics['held_out_reward']:.2f}" if "held_out_reward" in metrics else ""
        failed = f"  {metrics['scoring_failures']} not scored" if metrics.get("scoring_failures") else ""
        line = (
            f"iteration {step}  reward {metrics['reward_mean']:.2f} ± {metrics['reward_std']:.2f}"
            f"  best {metrics['reward_max']:.2f}{held_out}{failed}  {metrics['seconds']:.1f} s  {rate:.0f} tokens/s"
            f"  {duration(left)} left"
        )
        self.say(line)
        self._iteration_started = now
        self._shown |= {"reward": metrics["reward_mean"], "tokens/s": rate}
        if "held_out_reward" in metrics:
            self._shown["held-out"] = reward = metrics["held_out_reward"]
            self._shown["best held-out"] = max(self._shown.get("best held-out", reward), reward)
        self._bar.update(self._task, completed=self._population_size, left=f"{duration(left)} left")
        self._bar.state = self._state()
        return line

    def _state(self) -> str:
        names = ("reward", "held-out", "best held-out")
        shown = [f"{name} {self._shown[name]:.2f}" for name in names if name in self._shown]
        return "  ".join([f"{self._shown['tokens/s']:.0f} tokens/s", *shown])

    def close(self) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
