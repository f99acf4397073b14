"""Reads single records of a journal, also of one that another thread writes."""

from pathlib import Path
from typing import BinaryIO

from shardes.storage.journal import CHECKSUM_KEY, Record, decode

RECORD = f'{{"kind": "{Record.kind}", '.encode()


class RecordReader:
    """The records of the journal at `path`, by iteration; not for several threads.

    Lines are looked for only when they are needed, and none is kept.
    """

    def __init__(self, path: Path):
        self._path = path
        # Of records: begin, end, number of the line, checksum of the line before
        self._lines: list[tuple[int, int, int, str]] = []
        # Of the lines that have been looked at
        self._end, self._number, self._checksum = 0, 0, ""

    def record(self, iteration: int) -> Record:
        """The record of an iteration that is finished.

        Raises:
            ValueError: the journal does not have it, or not as it was written; names the line.
            OSError: the journal cannot be read.
        """
        with self._path.open("rb") as file:
            if iteration >= len(self._lines):
                self._look_on(file)
            if iteration >= len(self._lines):
                raise ValueError(
                    f"{self._path}: ends at line {self._number}, before the record of iteration "
                    f"{iteration}"
                )
            begin, end, number, checksum = self._lines[iteration]
            file.seek(begin)
            line = file.read(end - begin)
        place = f"{self._path}, line {number}: damaged"
        try:
            record, _ = decode(line.decode(), checksum)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{place} ({error})") from error
        if not isinstance(record, Record) or record.iteration != iteration:
            raise ValueError(f"{place} (the record of iteration {iteration} is not there)")
        return record

    def _look_on(self, file: BinaryIO) -> None:
        file.seek(self._end)
        for line in file:
            if not line.endswith(b"\n"):  # it is being written
                return
            begin, self._end = self._end, self._end + len(line)
            self._number += 1
            if line.startswith(RECORD):
                self._lines.append((begin, self._end - 1, self._number, self._checksum))
            self._checksum = line.decode(errors="replace").rpartition(CHECKSUM_KEY)[2][:-3]
