"""Metrics loggers: TensorBoard, Weights & Biases, and users' own."""

import importlib.util
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from shardes.errors import ConfigError, suggestion
from shardes.reporting import json_lines
from shardes.tasks.user_code import user_class

CLOSE_TIMEOUT = 60.0  # seconds that a logger may take to finish


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


class TensorBoard:
    """Event files in the run directory.

    A resumed run replaces the events of the iterations that it repeats.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        self._directory = directory
        self._writer: SummaryWriter | None = None

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._directory), purge_step=step)
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

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
        if self._run.offline:
            for row in json_lines.read(directory / "metrics.jsonl"):
                self.log(row, int(row["iteration"]))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


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
            queue.put((dict(metrics), step))

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
                logger.log(*entry)
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
