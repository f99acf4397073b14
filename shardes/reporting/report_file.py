"""The file that an evaluation's report goes to."""

import os
from itertools import chain, count
from pathlib import Path

from shardes.errors import ConfigError, RunError
from shardes.storage.files import write_whole

OUT = "evaluation.json"


class ReportFile:
    """A file that is written whole or not at all.

    Args:
        given: it replaces a file that is there. None: OUT in the working directory, with a number
            if it exists already.

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, given: Path | None):
        self._given = given
        self.path = path = given or _unused()
        if not path.parent.is_dir():
            raise ConfigError(f"--out {path}: there is no directory {path.parent}")
        if path.is_dir():
            raise ConfigError(f"--out {path}: a directory; name a file in it")
        if not os.access(path if self._is_stream() else path.parent, os.W_OK):
            raise ConfigError(f"--out {path}: cannot be written; choose another place")

    def write(self, text: str) -> None:
        """Write the file.

        Raises:
            RunError: that failed.
        """
        if not self._given:
            self.path = _unused()  # another evaluation may have ended meanwhile
        try:
            if self._is_stream():
                self.path.write_text(text, encoding="utf-8")
            else:
                write_whole(self.path, text)
        except OSError as error:
            raise RunError(f"--out {self.path}: cannot be written: {error}") from error

    def _is_stream(self) -> bool:
        """Whether it is a device or a pipe, which no other file may replace."""
        return self.path.exists() and not self.path.is_file()


def _unused() -> Path:
    file = Path(OUT)
    numbered = (file.with_stem(f"{file.stem}_{number}") for number in count(2))
    return next(path for path in chain([file], numbered) if not path.exists())
