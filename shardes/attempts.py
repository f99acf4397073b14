"""What each start of a run leaves in the run directory: logs/attempt_1, logs/attempt_2, ..."""

import json
import sys
import traceback
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from shardes import settings
from shardes.about import about
from shardes.config import Config, ConfigError, RunError


def attempts(directory: Path) -> list[Path]:
    """A run's attempts, the first one first."""
    found = (directory / "logs").glob("attempt_*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("attempt_")))


class Attempt:
    """One start's own directory, for rank 0: config.yaml, environment.json, and output.log with what it printed.

    `world` says how the ranks are laid out. None of it is worth ending a run for.
    """

    def __init__(self, directory: Path, config: Config, world: dict[str, Any]):
        number = max((int(path.name.removeprefix("attempt_")) for path in attempts(directory)), default=0) + 1
        self.directory = directory / "logs" / f"attempt_{number}"
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with suppress(OSError):
            self.directory.mkdir(parents=True)
            (self.directory / "config.yaml").write_text(settings.to_yaml(config), encoding="utf-8")
            environment = {"started": now, "command": sys.argv, "world": world, **about()}
            (self.directory / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")

    def line(self, text: str) -> None:
        """Add a line to output.log."""
        with suppress(OSError), open(self.directory / "output.log", "a", encoding="utf-8") as file:
            file.write(text + "\n")


def record_failure(directory: Path, rank: int, error: Exception) -> None:
    """Leave what ended a rank in the newest attempt's rankR.log, if there is one."""
    known = isinstance(error, ConfigError | RunError)
    text = f"error: {error}\n" if known else "".join(traceback.format_exception(error))
    for attempt in attempts(directory)[-1:]:
        with suppress(OSError), open(attempt / f"rank{rank}.log", "a", encoding="utf-8") as file:
            file.write(text)
