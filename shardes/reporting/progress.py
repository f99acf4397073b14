"""Progress on the terminal: what takes long, a bar for the members, and a line per iteration."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

SILENCE = 10.0  # most seconds without a line, where no bar is shown
BAR_INTERVAL = 1.0  # seconds between two looks at what is counted
FIRST_WAIT, NEXT_WAIT = 10.0, 60.0  # seconds until a step is said to take long, and said again


class _Console(Console):
    """A console that raises BrokenPipeError as print does, instead of writing to nowhere."""

    def on_broken_pipe(self) -> None:
        raise


class _ProgressBar(Progress):
    """A progress bar with a status line below it, so that both fit into 80 columns."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.status)


class Pace:
    """How fast a run goes, and how long it still takes.

    Evaluations of the center are timed apart: iterations of equal work are seldom equally often
    followed by one. This start's first iteration, with what is compiled or allocated once, counts
    only until there is another. All times are of the monotonic clock.

    Args:
        iterations: of the whole run.
        start: the first iteration of this start, which begins now.
        restored: the members of that iteration that were evaluated before.
        every: eval.every.
    """

    def __init__(
        self, iterations: int, population_size: int, start: int, restored: int, every: int
    ):
        self.iterations, self.population_size = iterations, population_size
        self._first, self._restored, self._every = start, restored, every
        self._start = start + restored / population_size
        # Without the time of evaluations, from here on:
        # the run, the iteration, the last of its members that was done
        self._started = self._began = self._done_at = time.monotonic()
        self._first_ended = math.nan
        self._done = restored
        self._evaluating_since: float | None = None
        self._evaluations, self._evaluation = 0.0, 0.0  # seconds of all, and of the last

    def evaluating(self, now: float, begins: bool = False) -> float:
        """The seconds that the evaluation takes so far. Members may be evaluated between the
        answers and their scores.
        """
        if begins:
            self._evaluation = 0.0
        if self._evaluating_since is None:
            self._evaluating_since = now
        return self._evaluation + now - self._evaluating_since

    def members(self, iteration: int, done: int, now: float) -> float:
        """The seconds that are left when so many members of an iteration are done; NaN if unknown.

        Between two members' ends it falls with the time.
        """
        now = self._working(now)
        if done != self._done:
            self._done, self._done_at = done, now
        per_iteration = self._per_iteration(iteration)
        if math.isnan(per_iteration):
            new = done - self._restored if iteration == self._first else done
            per_iteration = self.until_last_member * self.population_size / new if new else math.nan
        left = per_iteration * (self.iterations - max(iteration, self._start))
        return max(left - (now - self._began), 0.0) + self._evaluations_after(iteration)

    @property
    def until_last_member(self) -> float:
        """The seconds from the iteration's begin until the last of its members that is done."""
        return self._done_at - self._began

    def end_iteration(self, iteration: int, now: float) -> float:
        """The seconds that are left when an iteration has ended; NaN if unknown."""
        now = self._working(now)
        self._began = self._done_at = now
        self._done = 0
        if iteration == self._first:
            self._first_ended = now
        left = self._per_iteration(iteration + 1) * (self.iterations - iteration - 1)
        return left + self._evaluations_after(iteration)

    def passed(self, now: float) -> float:
        """The seconds that the iteration has taken so far."""
        return self._working(now) - self._began

    def _per_iteration(self, iteration: int) -> float:
        """The mean seconds of the iterations before this one, without this start's first if there
        are others; NaN if there is none.
        """
        after_first = iteration - self._first - 1
        if after_first > 0:
            return (self._began - self._first_ended) / after_first
        done = iteration - self._start  # 0: its members were all evaluated before
        return (self._began - self._started) / done if done > 0 else math.nan

    def _working(self, now: float) -> float:
        """The time without that of evaluations, of which the present one has ended."""
        if self._evaluating_since is not None:
            seconds, self._evaluating_since = now - self._evaluating_since, None
            self._evaluation += seconds
            self._evaluations += seconds
        return now - self._evaluations

    def _evaluations_after(self, iteration: int) -> float:
        """The seconds of evaluations after an iteration, the final one included."""
        between = range(iteration + 1, self.iterations)
        count = sum(t % self._every == 0 for t in between) if self._every else 0
        return (count + 1) * self._evaluation


class Terminal:
    """Standard output of rank 0; if it is not a terminal, lines are printed and no bar is shown.

    A thread prints what goes on once nothing was printed for SILENCE seconds.

    Args:
        best_held_out: the best held-out reward so far; -inf if none was measured.
    """

    def __init__(self, pace: Pace, best_held_out: float):
        self._pace = pace
        self._figures = {"best held-out": best_held_out} if math.isfinite(best_held_out) else {}
        self._console = _Console(highlight=False, soft_wrap=True)
        self._bar = _ProgressBar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("members  {task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=pace.population_size, visible=False, left="")
        self._bar.status = self._what = "preparing the first iteration"
        self._bar.start()
        self._printed = self._since = time.monotonic()
        self._figures_shown: tuple[str, ...] = ()
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._watch = threading.Thread(target=self._break_silence, daemon=True)
        if not self._console.is_terminal:
            self._watch.start()

    def say(self, line: str) -> None:
        with self._lock:
            self._printed = time.monotonic()
            self._console.print(line, markup=False)

    def _break_silence(self) -> None:
        with contextlib.suppress(OSError):  # the next line of the run itself reports it
            while not self._closed.wait(1.0):
                self._say_if_due()

    def _say_if_due(self) -> None:
        """Say what goes on if nothing was printed for SILENCE seconds, in place of the bar."""
        with self._lock:
            now = time.monotonic()
            if not self._console.is_terminal and now - self._printed >= SILENCE:
                passed = f"{self._what}, {duration(now - self._since)} so far"
                self.say("  ".join(filter(None, (passed, *self._figures_shown))))

    def _goes_on(self, what: str, since: float, *figures: str) -> None:
        with self._lock:
            self._what, self._since, self._figures_shown = what, since, figures
        self._say_if_due()

    def progress(self, iteration: int, done: int, tokens: int) -> None:
        """Show the number of members evaluated in an iteration, and the tokens they generated."""
        now = time.monotonic()
        left = _time_left(self._pace.members(iteration, done, now))
        self._figures.pop("tokens/s", None)
        if tokens and self._pace.until_last_member > 0:
            self._figures["tokens/s"] = tokens / self._pace.until_last_member
        what = f"members of iteration {iteration}: {done} of {self._pace.population_size}"
        self._goes_on(what, now - self._pace.passed(now), self._rate(), left)
        self._bar.update(
            self._task,
            description=self._title(iteration),
            completed=done,
            left=left,
            visible=True,
        )
        self._bar.status = self._status()

    def evaluating(self, begins: bool = False) -> None:
        """Show that the center is evaluated; to be called when that begins, and while it lasts."""
        now = time.monotonic()
        passed = self._pace.evaluating(now, begins)
        self._goes_on("evaluating the center", now - passed)
        self._bar.update(self._task, visible=False)
        self._bar.status = f"evaluating the center, {duration(passed)} so far"

    def log_iteration(self, metrics: dict[str, float], tokens: int) -> str:
        """Print the line that sums up an iteration, and return it.

        Args:
            tokens: those generated since this start, without members evaluated before it.
        """
        iteration = int(metrics["iteration"])
        left = _time_left(self._pace.end_iteration(iteration, time.monotonic()))
        rate = tokens / metrics["seconds"]
        held_out = f"  held-out {held_out_text(metrics)}" if "held_out_reward" in metrics else ""
        failed = (
            f"  {metrics['scoring_failures']} not scored" if metrics.get("scoring_failures") else ""
        )
        line = (
            f"iteration {iteration}  reward {significant(metrics['reward_mean'])} ± "
            f"{significant(metrics['reward_std'])}  best {significant(metrics['reward_max'])}"
            f"{held_out}{failed}  "
            f"{metrics['seconds']:.1f} s  {rate:.0f} tokens/s  {left}"
        ).rstrip()
        self.say(line)
        self._figures |= {"reward": metrics["reward_mean"], "tokens/s": rate}
        if "held_out_reward" in metrics:
            self._figures["held-out"] = reward = metrics["held_out_reward"]
            self._figures["best held-out"] = max(self._figures.get("best held-out", reward), reward)
        # A bar that was full is finished, and its spinner stands still until it is reset.
        following = min(iteration + 1, self._pace.iterations - 1)
        self._bar.reset(self._task, description=self._title(following), left=left)
        self._bar.status = self._status()
        return line

    def _title(self, iteration: int) -> str:
        return f"iteration {iteration} of {self._pace.iterations}"

    def _status(self) -> str:
        names = ("reward", "held-out", "best held-out")
        figures = self._figures
        rewards = [f"{name} {significant(figures[name])}" for name in names if name in figures]
        return "  ".join(filter(None, (self._rate(), *rewards)))

    def _rate(self) -> str:
        """The tokens per second, until the last member that is done."""
        return f"{self._figures['tokens/s']:.0f} tokens/s" if "tokens/s" in self._figures else ""

    def close(self) -> None:
        """Leave only the lines."""
        self._closed.set()
        if self._watch.is_alive():
            self._watch.join()
        self._bar.update(self._task, visible=False)
        self._bar.status = ""
        self._bar.stop()


def _time_left(seconds: float) -> str:
    return f"{duration(seconds)} left" if math.isfinite(seconds) else ""


@contextlib.contextmanager
def slow_step(what: str, shown: bool = True) -> Iterator[None]:
    """A context of a step that may take minutes, before any bar is shown.

    If it takes FIRST_WAIT seconds, a line on standard error says what is waited for.

    Args:
        what: the step, as the line names it.
        shown: whether this rank prints.
    """
    started, done = time.monotonic(), threading.Event()

    def report() -> None:
        pause = FIRST_WAIT
        while not done.wait(pause):
            passed = duration(time.monotonic() - started)
            print(f"{what}, {passed} so far", file=sys.stderr, flush=True)
            pause = NEXT_WAIT

    thread = threading.Thread(target=report, daemon=True)
    if shown:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if shown:
            thread.join()


@contextlib.contextmanager
def counting(
    what: str, total: int, done: Callable[[], int], poll: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    """A context of work that is counted, with a progress bar, or with a line every SILENCE seconds
    if the output is not a terminal; yields a poll that updates it, and calls `poll`.

    Args:
        what: what is counted, in the plural.
        done: how many are done.
    """
    console, began = _Console(), time.monotonic()
    interval, shown = (BAR_INTERVAL if console.is_terminal else SILENCE), began
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def watched() -> None:
            nonlocal shown
            poll()
            now = time.monotonic()
            if now - shown >= interval:
                shown, number = now, done()
                bar.update(task, completed=number)
                if not console.is_terminal:
                    passed = duration(now - began)
                    print(f"{what}: {number} of {total}, {passed} so far", flush=True)

        yield watched


def significant(value: float) -> str:
    """A reward with four significant digits; with an exponent only where others are unreadable."""
    if 9999.5 <= abs(value) < 1e7:
        return f"{value:.0f}"
    return f"{value:#.4g}".removesuffix(".")


def held_out_text(metrics: Mapping[str, float]) -> str:
    """The held-out reward of an evaluation, and the accuracy if the task has one."""
    reward, accuracy = significant(metrics["held_out_reward"]), metrics.get("held_out_accuracy")
    return reward if accuracy is None else f"{reward} (accuracy {100 * accuracy:.1f} %)"


def duration(seconds: float) -> str:
    """Seconds as H:MM:SS, or as M:SS if less than an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
