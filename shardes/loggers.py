"""Where metrics go besides the run directory's own files: TensorBoard, Weights & Biases, a logger of the user's."""

import difflib
import importlib.util
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from shardes.config import ConfigError
from shardes.tasks.own import own_class

PATIENCE = 60.0  # seconds that a logger may take to end


class Logger(Protocol):
    """Takes metrics. Made as Class(directory, settings): the run directory, and the settings as nested dicts.

    There is one, on rank 0. All of its methods are called in one thread, which is not the run's: the run does not
    wait for it, and goes on without it once it raises.
    """

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Take the metrics of iteration `step`. Steps ascend; the last has only the final center's evaluation."""
        ...

    def close(self) -> None:
        """Finish, within a minute."""
        ...


class TensorBoard:
    """Event files in the run directory; a run that goes on replaces what was logged of the iterations ahead."""

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
    """A run of Weights & Biases, in the project $WANDB_PROJECT or "shardes"; goes on under its id, which is kept."""

    def __init__(self, directory: Path, settings: dict[str, Any]):
        import wandb

        kept = directory / "wandb_id"
        if not kept.exists():
            kept.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "shardes"),
            name=directory.name,
            id=kept.read_text(),
            resume="allow",
            dir=directory,
            config=settings,
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[Path, dict[str, Any]], Logger]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check(names: Sequence[str]) -> None:
    """Raise ConfigError for a logger that cannot be used: a name of LOGGERS, or a user's own as file.py:Class."""
    for name in names:
        if ":" in name:
            with own_class("tracking.loggers", name) as made_of:
                for method in ("log", "close"):
                    if not callable(getattr(made_of, method, None)):
                        raise ConfigError(
                            f"tracking.loggers={name}: {made_of.__name__} has no {method}(); see shardes.loggers.Logger"
                        )
        elif name not in LOGGERS:
            near = difflib.get_close_matches(name, LOGGERS, n=1, cutoff=0.4)
            hint = (
                f"did you mean {near[0]}?" if near else f"there are: {', '.join(LOGGERS)}, or your own as file.py:Class"
            )
            raise ConfigError(f"tracking.loggers={name}: no such logger; {hint}")
        elif name == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ConfigError("tracking.loggers=wandb: wandb is not installed; pip install 'shardes[wandb]'")


class Loggers:
    """A run's loggers, each in a thread of its own: neither one that raises nor one that hangs holds the run up."""

    def __init__(self, names: Sequence[str], directory: Path, settings: dict[str, Any], warn: Callable[[str], None]):
        self._directory, self._settings, self._warn = directory, settings, warn
        self._queues: dict[str, SimpleQueue] = {name: SimpleQueue() for name in names}
        self._threads = {name: threading.Thread(target=self._work, args=(name,), daemon=True) for name in names}
        for thread in self._threads.values():
            thread.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Hand metrics to every logger."""
        for queue in self._queues.values():
            queue.put((dict(metrics), step))

    def close(self) -> None:
        """Let every logger finish; one that takes longer than PATIENCE is left behind."""
        for queue in self._queues.values():
            queue.put(None)
        for name, thread in self._threads.items():
            thread.join(PATIENCE)
            if thread.is_alive():
                self._warn(f"warning: tracking.loggers={name}: not done after {PATIENCE:.0f} s, left behind")

    def _work(self, name: str) -> None:
        try:
            logger = self._make(name)
            while (item := self._queues[name].get()) is not None:
                logger.log(*item)
            logger.close()
        except (Exception, SystemExit) as error:
            self._warn(
                f"warning: tracking.loggers={name}: {type(error).__name__}: {error}; the run goes on without it "
                "(metrics.jsonl has every figure)"
            )

    def _make(self, name: str) -> Logger:
        if name in LOGGERS:
            return LOGGERS[name](self._directory, self._settings)
        with own_class("tracking.loggers", name) as made_of:
            return made_of(self._directory, self._settings)
