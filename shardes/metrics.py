"""What a person sees: progress while it runs, and the run directory's files."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch.utils.tensorboard import SummaryWriter


class Clock:
    """Seconds spent in named parts: `with clock("generate"): ...`."""

    def __init__(self):
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

    On a terminal a bar shows the iteration's members; elsewhere there is one plain line per iteration.
    """

    def __init__(self, directory: Path, iterations: int, population_size: int):
        self._directory = directory
        self._iterations = iterations
        self._population_size = population_size
        self._metrics = open(directory / "metrics.jsonl", "a", encoding="utf-8")
        self._samples = open(directory / "samples.jsonl", "a", encoding="utf-8")
        self._board = SummaryWriter(str(directory))
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
        self._shown = 0.0

    def say(self, line: str) -> None:
        """Print one line."""
        self._console.print(line, markup=False)

    def members(self, iteration: int, done: int) -> None:
        """Show how many of the iteration's members are evaluated."""
        self._bar.update(self._task, description=f"iteration {iteration}", completed=done)

    def due(self) -> bool:
        """Whether the bar has not been refreshed for half a second."""
        now = time.monotonic()
        if self._bar.disable or now - self._shown < 0.5:
            return False
        self._shown = now
        return True

    def iteration(self, metrics: dict[str, float]) -> None:
        """Record one iteration's metrics, and show the line that sums them up."""
        self._metrics.write(json.dumps(metrics) + "\n")
        self._metrics.flush()
        step = int(metrics["iteration"])
        for key, value in metrics.items():
            self._board.add_scalar(key, value, step)
        self._board.flush()
        rate = metrics["generated_tokens"] / metrics["seconds"]
        left = (time.monotonic() - self._started) / (step + 1) * (self._iterations - step - 1)
        held_out = f"  held-out {metrics['held_out_reward']:.2f}" if "held_out_reward" in metrics else ""
        self.say(
            f"iteration {step}  reward {metrics['reward_mean']:.2f} ± {metrics['reward_std']:.2f}"
            f"  best {metrics['reward_max']:.2f}{held_out}  {metrics['seconds']:.1f} s  {rate:.0f} tokens/s"
            f"  {_duration(left)} left"
        )
        state = f"reward {metrics['reward_mean']:.2f}  {rate:.0f} tokens/s  {_duration(left)} left"
        self._bar.update(self._task, completed=self._population_size, state=state)

    def samples(
        self, iteration: int, split: str, prompts: Sequence, responses: Sequence[str], rewards: Sequence[float]
    ) -> None:
        """Record the center's responses to a split's prompts."""
        for prompt, response, reward in zip(prompts, responses, rewards, strict=True):
            row = dict(iteration=iteration, split=split, prompt=prompt, response=response, reward=reward)
            self._samples.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._samples.flush()

    def summary(self, summary: dict[str, float | str]) -> None:
        """Write summary.json."""
        (self._directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        self._bar.stop()
        for file in (self._metrics, self._samples, self._board):
            file.close()


def peak_resident_bytes() -> int:
    """The most memory of the host that this process has had resident so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
