"""The run's record, `journal.jsonl`: with the base model it is enough to rebuild every center.

The first line is the header; then, as the run goes on, come members' rewards, iterations, and what else
happened. A line is a JSON object and ends with a checksum over all lines up to it, so that no line can be
changed, lost or moved unnoticed. What is appended is on disk before anything is done that rests on it.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from shardes.config import ConfigError, RunError
from shardes.files import checksum, sync
from shardes.noise.definition import NOISE
from shardes.update import Update

JOURNAL = "journal.jsonl"
FORMAT = 1
MARK = ', "checksum": "'


@dataclass
class Header:
    """What the run began with: `files` are the base model's SHA-256s, `settings` those that decide the center."""

    kind: ClassVar = "header"
    model: str
    files: dict[str, str]
    settings: dict[str, Any]
    format: int = FORMAT
    noise: str = NOISE


@dataclass
class Reward:
    """One member of an iteration that is under way; `digest` is that of its center.

    `scores` are its rewards by prompt, with es.standardize_prompts.
    """

    kind: ClassVar = "reward"
    iteration: int
    member: int
    reward: float
    tokens: int
    digest: str
    scores: list[float] = field(default_factory=list)


@dataclass
class Record:
    """One iteration: its members, what they earned, and what the update adds of each seed's ε.

    `digest` is that of the center on which the rewards were measured, before the update. Antithetic members share a
    seed in pairs: there are half as many seeds and coefficients as rewards. `prompts` are the training prompts that
    were asked, by number; None: all.
    """

    kind: ClassVar = "iteration"
    iteration: int
    seeds: list[int]
    rewards: list[float]
    coefficients: list[float]
    sigma: float
    alpha: float
    digest: str
    weight_decay: float = 0.0
    decay_to: str = "zero"
    evolve: str | None = None
    prompts: list[int] | None = None

    @property
    def update(self) -> Update:
        return Update(self.seeds, self.coefficients, self.weight_decay, self.decay_to, self.evolve)


@dataclass
class Resumption:
    """A start of the run before `iteration`; `changes` are the settings that were allowed to change: [old, new]."""

    kind: ClassVar = "resume"
    iteration: int
    changes: dict[str, list]


@dataclass
class Finish:
    """The center after the last iteration that was asked for."""

    kind: ClassVar = "finish"
    iteration: int
    digest: str


Entry = Header | Reward | Record | Resumption | Finish
ENTRIES = {entry.kind: entry for entry in (Header, Reward, Record, Resumption, Finish)}


@dataclass
class History:
    """What a journal says.

    `records[k]` is iteration k's. `rewards` are those of the unfinished iteration, by member. `settings` and `files`
    are the latest. `ends[k]` is where, in bytes, the lines end that the center before iteration k rests on;
    `end` and `checksum` are those of the last whole line, and `torn` says of a last line that is none.
    """

    path: Path
    header: Header
    settings: dict[str, Any]
    files: dict[str, str]
    records: list[Record] = field(default_factory=list)
    rewards: dict[int, Reward] = field(default_factory=dict)
    resumptions: list[Resumption] = field(default_factory=list)
    finish: Finish | None = None
    ends: list[int] = field(default_factory=list)
    end: int = 0
    checksum: str = ""
    torn: str = ""

    def digest(self, iteration: int) -> str | None:
        """The digest of the center before `iteration`, where the journal has it."""
        if iteration < len(self.records):
            return self.records[iteration].digest
        entries: list[Reward | Finish] = [*self.rewards.values(), *([self.finish] if self.finish else [])]
        known = [entry.digest for entry in entries if entry.iteration == iteration]
        return known[0] if known else None

    @property
    def begun(self) -> int:
        """How many members and iterations have been recorded."""
        return len(self.records) + len(self.rewards)

    def _add(self, entry: Entry) -> None:
        if isinstance(entry, Record):
            if entry.iteration != len(self.records):
                raise ValueError(f"iteration {entry.iteration} follows {len(self.records) - 1}")
            self.records.append(entry)
            self.rewards, self.finish = {}, None
        elif isinstance(entry, Reward):
            if entry.iteration != len(self.records):
                raise ValueError(f"a reward of iteration {entry.iteration} within {len(self.records)}")
            self.rewards[entry.member] = entry
        elif isinstance(entry, Finish):
            self.finish = entry
        elif isinstance(entry, Resumption):
            self.resumptions.append(entry)
            self.apply({key: new for key, (_, new) in entry.changes.items()})
        else:
            raise ValueError("a second header")

    def apply(self, changes: dict[str, Any]) -> None:
        """Take changed settings for the latest; rewards that were measured under others are void."""
        for key, value in changes.items():
            if key == "model.path":
                self.files = value
            else:
                self.settings[key] = value
        if changes:
            self.rewards = {}


def read(path: Path) -> History | None:
    """What the journal at `path` says; None where there is none, or not even a whole header.

    A last line without its end is one that was being written when the run was killed: nothing was done that
    rests on it, so it is left out.

    Raises:
        ConfigError: a line is damaged, or the journal is of another version; names the line.
    """
    if not path.exists():
        return None
    history, previous, offset = None, "", 0
    *lines, rest = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entry, previous = _decode(line.decode(), previous)
            if history is None:
                history = _begin(path, entry)
            else:
                history._add(entry)
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path}, line {number}: damaged ({error}); all before it is sound. Put back a copy of the journal, "
                f"or cut it before that line: shardes journal {path.parent} verify"
            ) from None
        offset += len(line) + 1
        history.end, history.checksum = offset, previous
        if isinstance(entry, Header | Record):
            history.ends.append(offset)
    if history and rest:
        history.torn = f"{path}, line {len(lines) + 1}: has no end (the run was killed while it wrote it); left out"
    return history


def _begin(path: Path, entry: Entry) -> History:
    if not isinstance(entry, Header):
        raise ValueError("no header")
    if (entry.format, entry.noise) != (FORMAT, NOISE):
        raise ConfigError(
            f"{path}: journal format {entry.format} with noise {entry.noise}, where this version of shardes has "
            f"format {FORMAT} with noise {NOISE}; go on with the version that began the run"
        )
    return History(path, entry, dict(entry.settings), dict(entry.files))


def _encode(entry: Entry, previous: str) -> tuple[str, str]:
    """An entry's line, and its checksum, after a line with checksum `previous`."""
    body = json.dumps({"kind": entry.kind, **asdict(entry)}, allow_nan=False)[:-1]
    found = checksum(previous + body)
    return f'{body}{MARK}{found}"}}\n', found


def _decode(line: str, previous: str) -> tuple[Entry, str]:
    body, mark, end = line.rpartition(MARK)
    found = checksum(previous + body)
    if not mark or end != found + '"}':
        raise ValueError("its checksum does not fit")
    values = json.loads(body + "}")
    return ENTRIES[values.pop("kind")](**values), found


class Journal:
    """`journal.jsonl`, open for appending after what `history` says of it (None: from the start)."""

    def __init__(self, path: Path, history: History | None):
        self._path = path
        self._file = open(path, "r+b" if path.exists() else "x+b", buffering=0)
        self._end = history.end if history else 0
        self._checksum = history.checksum if history else ""
        self._file.truncate(self._end)
        self._file.seek(self._end)
        sync(path.parent)

    def append(self, entry: Entry) -> None:
        """Write an entry; on return it is on disk.

        Raises:
            RunError: it could not be written, and the journal is as it was; or another process wrote to it.
        """
        line, found = _encode(entry, self._checksum)
        rest = line.encode()
        if os.fstat(self._file.fileno()).st_size != self._end:
            raise RunError(f"{self._path}: another process has written to it; is a second run using this directory?")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            raise RunError(
                f"{self._path}: cannot be written ({error}). Nothing was applied that it does not hold: "
                "once it can be written, start the same command again to go on"
            ) from error
        self._end, self._checksum = self._end + len(line.encode()), found

    def close(self) -> None:
        self._file.close()
