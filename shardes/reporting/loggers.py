"""Metrics loggers: TensorBoard, Weights & Biases, and users' own."""

import importlib.util
import os
import secrets
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from textwrap import indent
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from shardes.errors import ConfigError, suggestion
from shardes.reporting import json_lines
from shardes.tasks.user_code import user_class
from shardes.words import prompt_text

CLOSE_TIMEOUT = 60.0  # seconds that a logger may take to finish
SHOWN = 16  # samples of a split that TensorBoard and W&B show of an evaluation, the first ones
GROUPS = {  # what a metric's name begins with, and what it begins with in TensorBoard and W&B
    "reward/": "reward_parts/",  # names that a task gives
    "reward_": "reward/",
    "center_": "center/",
    "held_out_": "center/held_out_",
    "distance": "center/distance",
    "drift": "center/drift",
    "unmoved": "center/unmoved",
    "seconds_": "seconds/",
    "seconds": "seconds/iteration",
    "generated_tokens": "tokens/generated",
    "scoring_": "failures/scoring_",
    "evaluation_": "failures/evaluation_",
}


class Logger(Protocol):
    """Receives metrics.

    It is created on rank 0 as Class(directory, settings): the run directory, and the settings as
    nested dicts. Its constructor and methods are called in one thread of its own. Training never
    waits for it, and continues without it after it has raised an exception.
    """

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log the metrics of iteration `step`.

        Steps ascend. The last one has only the evaluation of the final center.
        """
        ...

    def close(self) -> None:
        """Finish within CLOSE_TIMEOUT seconds."""
        ...


class SampleLogger(Logger, Protocol):
    """A logger that receives samples too."""

    def log_samples(self, samples: list[dict[str, Any]], step: int) -> None:
        """Log the rows of samples.jsonl of one split, as the center before iteration `step` has
        answered; before the metrics of that step.
        """
        ...


def grouped(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics by group/name, without their iteration."""
    return {_grouped(name): value for name, value in metrics.items() if name != "iteration"}


def _grouped(name: str) -> str:
    for start, group in GROUPS.items():
        if name.startswith(start):
            return group + name.removeprefix(start)
    return f"system/{name}"


class TensorBoard:
    """Event files in the run directory.

    A resumed run replaces the events of the iterations that it repeats.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        self._directory = directory
        self._writer: SummaryWriter | None = None

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self._writer is None:  # the purge takes the samples of this step too
            for rows in _samples(self._directory)[step].values():
                self.log_samples(rows, step)
        writer = self._open(step)
        for key, value in grouped(metrics).items():
            writer.add_scalar(key, value, step)
        writer.flush()

    def log_samples(self, samples: list[dict[str, Any]], step: int) -> None:
        parts = []
        for row in samples[:SHOWN]:
            text = f"{prompt_text(row['prompt'])}\n\n→ {row['response']}"
            # Markdown that begins a line with four spaces is shown as it is.
            parts.append(f"reward {row['reward']:.4g}\n\n{indent(text, ' ' * 4, bool)}")
        self._open(step).add_text(f"samples/{samples[0]['split']}", "\n\n".join(parts), step)

    def _open(self, step: int) -> SummaryWriter:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._directory), purge_step=step)
        return self._writer

    def close(self) -> None:
        if self._writer:
            self._writer.close()


class WandB:
    """A Weights & Biases run in the project $WANDB_PROJECT, by default "shardes".

    Its id is kept in the run directory, so that a resumed run continues it. Offline there is
    nothing to continue: each start writes a directory of its own, and the one that is synchronized
    last replaces the others. So an offline start begins with the metrics of the iterations before
    it.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        import wandb

        id_file = directory / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "shardes"),
            name=directory.name,
            id=id_file.read_text(),
            resume="allow",
            dir=directory,
            config=settings,
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._table = wandb.Table
        if self._run.offline:
            self._repeat(directory)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(grouped(metrics), step=step)

    def log_samples(self, samples: list[dict[str, Any]], step: int) -> None:
        rows = [[prompt_text(row["prompt"]), row["response"], row["reward"]] for row in samples]
        table = self._table(columns=["prompt", "response", "reward"], data=rows[:SHOWN])
        self._run.log({f"samples/{samples[0]['split']}": table}, step=step)

    def _repeat(self, directory: Path) -> None:
        """Log samples and metrics of the iterations before this start."""
        metrics = {row["iteration"]: row for row in json_lines.read(directory / "metrics.jsonl")}
        samples = _samples(directory)
        for step in sorted(samples.keys() | metrics.keys()):
            for rows in samples[step].values():
                self.log_samples(rows, step)
            self.log(metrics.get(step, {}), step)

    def close(self) -> None:
        self._run.finish()


def _samples(directory: Path) -> defaultdict[int, defaultdict[str, list[dict[str, Any]]]]:
    """The rows of samples.jsonl, by iteration and split."""
    samples: defaultdict = defaultdict(lambda: defaultdict(list))
    for row in json_lines.read(directory / "samples.jsonl"):
        samples[row["iteration"]][row["split"]].append(row)
    return samples


LOGGERS: dict[str, Callable[[Path, dict[str, Any]], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


def check(names: Sequence[str]) -> None:
    """Raise ConfigError for a logger that cannot be used.

    Args:
        names: names of LOGGERS, and users' own loggers as file.py:Class.
    """
    for name in names:
        setting = f"tracking.loggers={name}"
        if ":" in name:
            with user_class("tracking.loggers", name) as logger_class:
                for method in ("log", "close"):
                    if not callable(getattr(logger_class, method, None)):
                        raise ConfigError(
                            f"{setting}: {logger_class.__name__} has no {method}(); "
                            "see shardes.reporting.loggers.Logger"
                        )
        elif name not in LOGGERS:
            known = f"there are: {', '.join(LOGGERS)}, or your own as file.py:Class"
            raise ConfigError(f"{setting}: no such logger; {suggestion(name, LOGGERS, known)}")
        elif name == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ConfigError(f"{setting}: wandb is not installed; pip install 'shardes[wandb]'")


class Loggers:
    """A run's loggers, each in its own thread, so that one which raises or hangs stops nothing.

    Args:
        warn: prints a warning.
    """

    def __init__(
        self,
        names: Sequence[str],
        directory: Path,
        settings: dict[str, Any],
        warn: Callable[[str], None],
    ):
        self._directory, self._settings, self._warn = directory, settings, warn
        self._queues: dict[str, SimpleQueue] = {name: SimpleQueue() for name in names}
        self._threads = {
            name: threading.Thread(target=self._run, args=(name,), daemon=True) for name in names
        }
        for thread in self._threads.values():
            thread.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Queue metrics for every logger."""
        for queue in self._queues.values():
            queue.put(("log", dict(metrics), step))

    def log_samples(self, samples: Sequence[dict[str, Any]], step: int) -> None:
        """Queue a split's samples for every logger that takes samples."""
        for queue in self._queues.values():
            queue.put(("log_samples", list(map(dict, samples)), step))

    def close(self) -> None:
        """Wait until every logger has finished, for CLOSE_TIMEOUT seconds each."""
        for queue in self._queues.values():
            queue.put(None)
        for name, thread in self._threads.items():
            thread.join(CLOSE_TIMEOUT)
            if thread.is_alive():
                self._warn(
                    f"warning: tracking.loggers={name}: not done after {CLOSE_TIMEOUT:.0f} s; "
                    "the run ends without it"
                )

    def _run(self, name: str) -> None:
        try:
            logger = self._create(name)
            while (entry := self._queues[name].get()) is not None:
                method, values, step = entry
                if method == "log" or hasattr(logger, method):
                    getattr(logger, method)(values, step)
            logger.close()
        except (Exception, SystemExit) as error:
            self._warn(
                f"warning: tracking.loggers={name}: {type(error).__name__}: {error}; "
                "the run continues without it (metrics.jsonl has all metrics)"
            )

    def _create(self, name: str) -> Logger:
        if name in LOGGERS:
            return LOGGERS[name](self._directory, self._settings)
        with user_class("tracking.loggers", name) as logger_class:
            return logger_class(self._directory, self._settings)
