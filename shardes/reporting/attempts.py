"""Records of each start of a run, in the run directory: logs/attempt_1, logs/attempt_2, ..."""

import json
import re
import sys
import traceback
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from shardes.config import loading as settings
from shardes.config.schema import Config
from shardes.errors import ConfigError, RunError
from shardes.reporting.system_info import system_info


def attempts(directory: Path) -> list[Path]:
    """The attempt directories of a run directory, in the order of the starts."""
    found = (directory / "logs").glob("attempt_*")
    return sorted((path for path in found if re.fullmatch(r"attempt_\d+", path.name)), key=_number)


def _number(attempt: Path) -> int:
    return int(attempt.name.removeprefix("attempt_"))


class Attempt:
    """The directory of one start: config.yaml, environment.json and the printed lines (output.log).

    Only rank 0 makes one. An error while writing it never ends the run.

    Args:
        layout: how the ranks are laid out, for environment.json.
    """

    def __init__(self, directory: Path, config: Config, layout: dict[str, Any]):
        number = max(map(_number, attempts(directory)), default=0) + 1
        self.directory = directory / "logs" / f"attempt_{number}"
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with suppress(OSError):
            self.directory.mkdir(parents=True)
            (self.directory / "config.yaml").write_text(settings.to_yaml(config), encoding="utf-8")
            environment = {"started": now, "command": sys.argv, "world": layout, **system_info()}
            (self.directory / "environment.json").write_text(
                json.dumps(environment, indent=2) + "\n", encoding="utf-8"
            )

    def log_line(self, line: str) -> None:
        """Append a line to output.log."""
        with suppress(OSError), open(self.directory / "output.log", "a", encoding="utf-8") as file:
            file.write(line + "\n")


def record_failure(directory: Path, rank: int, error: Exception) -> None:
    """Append the error that ended a rank to rankR.log of the newest attempt, if there is one."""
    expected = isinstance(error, ConfigError | RunError)
    text = f"error: {error}\n" if expected else "".join(traceback.format_exception(error))
    for attempt in attempts(directory)[-1:]:
        with suppress(OSError), open(attempt / f"rank{rank}.log", "a", encoding="utf-8") as file:
            file.write(text)
