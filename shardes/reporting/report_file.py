"""The file that an evaluation's report goes to."""

import os
from itertools import chain, count
from pathlib import Path

from shardes.errors import ConfigError, RunError
from shardes.storage.files import write_whole

OUT = "evaluation.json"
SYSTEM = ("dev", "proc")  # top folders whose links lead to open files


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

    @property
    def failed(self) -> Path:
        """The file for responses that could not be scored."""
        beside = Path(OUT) if self._is_stream() else self.path
        return beside.with_suffix(".failed.json")

    def write(self, text: str) -> None:
        """Write the file.

        Raises:
            RunError: that failed.
        """
        if not self._given:
            self.path = _unused()  # another evaluation may have ended meanwhile
        try:
            if self._is_stream():
                # Without waiting for whoever is to read a pipe.
                handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
                os.set_blocking(handle, True)
                with open(handle, "w", encoding="utf-8") as stream:
                    stream.write(text)
            else:
                write_whole(self._target(), text)
        except OSError as error:
            raise RunError(f"--out {self.path}: cannot be written: {error}") from error

    def _is_stream(self) -> bool:
        """Whether it is a device, a pipe, or an open file, as /dev/stdout is: no other file may
        replace it.
        """
        target = self._target()
        return target.parts[1] in SYSTEM or (target.exists() and not target.is_file())

    def _target(self) -> Path:
        """The file that a link leads to, short of what the system's own links lead to."""
        target = self.path.absolute()
        while target.is_symlink() and target.parts[1] not in SYSTEM:
            target = target.parent / target.readlink()
        return target


def _unused() -> Path:
    file = Path(OUT)
    numbered = (file.with_stem(f"{file.stem}_{number}") for number in count(2))
    return next(path for path in chain([file], numbered) if not path.exists())
