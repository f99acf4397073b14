"""The journal of a run, `journal.jsonl`: with the base model, enough to rebuild every center.

The first line is the header. Rewards of members, records of iterations, evaluations of centers,
resumptions and the finish follow in the order in which they happen. Each line is a JSON object that
ends with a checksum over all lines so far, so that a line that was changed, lost or moved is
detected. A line is on disk before the run acts on it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from shardes.errors import ConfigError, RunError
from shardes.es.update import Update
from shardes.noise.definition import LOW_RANK_NOISE, NOISE
from shardes.storage.files import checksum, differing, sync

JOURNAL = "journal.jsonl"
FORMAT = 2
READABLE = (1, 2)  # format 1 has no sources, no date and no evaluations
NOISES = (NOISE, LOW_RANK_NOISE)
CHECKSUM_KEY = ', "checksum": "'


@dataclass
class Header:
    """What the run began with.

    `files` are the SHA-256s of the base model's files, `settings` those that decide the center,
    `sources` the SHA-256s of code, data and prompts (see `storage.sources`). `date`, in ISO format,
    is the one that chat templates show.
    """

    kind: ClassVar = "header"
    model: str
    files: dict[str, str]
    settings: dict[str, Any]
    format: int = FORMAT
    noise: str = NOISE
    sources: dict[str, str] = field(default_factory=dict)
    date: str = ""


@dataclass
class Reward:
    """The reward of one member of an unfinished iteration.

    `digest` is that of the center before the iteration. With es.standardize_prompts, `scores` are
    the member's rewards by prompt. `failures` counts its responses that could not be scored, by
    metric. `parts` are the means over prompts of the other named numbers of its rewards.
    """

    kind: ClassVar = "reward"
    iteration: int
    member: int
    reward: float
    tokens: int
    digest: str
    scores: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)


@dataclass
class Record:
    """One finished iteration: its members, their rewards, and the update.

    `digest` is that of the center before the iteration, on which the rewards were measured. The two
    members of an antithetic pair share a seed, so there are half as many seeds and coefficients as
    rewards. `prompts` are the numbers of the training prompts used; None: all. `tokens` and
    `failures` are sums over the members, and `parts` the means over them of the other named numbers
    of rewards. `rank` is that of the noise; 0: full noise. `rule` names the code of es.update, if
    it is set.
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
    tokens: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    rank: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    rule: str = ""

    @property
    def update(self) -> Update:
        decay, alpha = (self.weight_decay, self.decay_to), self.alpha if self.rule else 0.0
        noise = self.seeds, self.coefficients
        return Update(*noise, *decay, self.evolve, self.rank, self.rule, alpha)


@dataclass
class Evaluation:
    """What the center before `iteration`, which has this digest, scored itself.

    `metrics` are those of metrics.jsonl, and `rewards` those of every response, by split. The
    responses are in samples.jsonl before this entry is in the journal.
    """

    kind: ClassVar = "evaluation"
    iteration: int
    digest: str
    metrics: dict[str, float]
    rewards: dict[str, list[float]]


@dataclass
class Resumption:
    """A later start of the run, before `iteration`.

    `changes` are settings that were changed on purpose: {key: [old, new]}. `sources` and `date` are
    there if they were changed on purpose, or if the journal had none.
    """

    kind: ClassVar = "resume"
    iteration: int
    changes: dict[str, list]
    sources: dict[str, str] = field(default_factory=dict)
    date: str = ""

    def change_notes(self) -> Iterator[str]:
        """What changed in each setting; of the model's files, which."""
        for key, (old, new) in self.changes.items():
            if isinstance(old, dict) and isinstance(new, dict):
                yield f"{key}: changed in {', '.join(differing(old, new))}"
            else:
                yield f"{key}: changed from {old} to {new}"


@dataclass
class Finish:
    """The digest of the final center, after `iteration` iterations."""

    kind: ClassVar = "finish"
    iteration: int
    digest: str


Entry = Header | Reward | Record | Evaluation | Resumption | Finish
ENTRIES = {entry.kind: entry for entry in (Header, Reward, Record, Evaluation, Resumption, Finish)}
# Where a setting that begins so is changed, held-out rewards before and after do not compare.
EVALUATED_WITH = ("model.", "generation.", "task.")


@dataclass
class History:
    """The content of a journal.

    Args:
        settings: the header's, with later changes applied; `files`, `sources`, `date` likewise.
        records: by iteration.
        rewards: those of the unfinished iteration, by member.
        evaluations: by iteration.
        best: the iteration before which the center had the highest held-out reward, of those that
            compare; None if there is none.
        run: the checksum of the header, which tells this run from others.
        ends: `ends[k]` is the length in bytes of the lines up to the record of iteration k - 1.
        end: length in bytes of all complete lines; `checksum` is that of the last one.
        incomplete_line: a message about an incomplete last line, which is ignored; "" if there is
            none.
    """

    path: Path
    header: Header
    settings: dict[str, Any]
    files: dict[str, str]
    sources: dict[str, str] = field(default_factory=dict)
    date: str = ""
    records: list[Record] = field(default_factory=list)
    rewards: dict[int, Reward] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    best: int | None = None
    run: str = ""
    resumptions: list[Resumption] = field(default_factory=list)
    finish: Finish | None = None
    ends: list[int] = field(default_factory=list)
    end: int = 0
    checksum: str = ""
    incomplete_line: str = ""

    def digest(self, iteration: int) -> str | None:
        """The digest of the center before `iteration`, if the journal has it."""
        if iteration < len(self.records):
            return self.records[iteration].digest
        entries: list[Reward | Evaluation | Finish] = [*self.rewards.values()]
        entries += self.evaluations.values()
        if self.finish:
            entries.append(self.finish)
        return next((entry.digest for entry in entries if entry.iteration == iteration), None)

    @property
    def is_empty(self) -> bool:
        """Whether no iteration is recorded and no member of the unfinished one has a reward."""
        return not self.records and not self.rewards

    def change_settings(self, changes: dict[str, Any]) -> None:
        """Apply changed settings; what the unfinished iteration measured under the old ones is
        dropped.
        """
        for key, value in changes.items():
            if key == "model.path":
                self.files = value
            else:
                self.settings[key] = value
        if changes:
            self._drop_measured(any(key.startswith(EVALUATED_WITH) for key in changes))

    def change_sources(self, sources: dict[str, str], date: str) -> None:
        """Apply changed sources, and a date; what the unfinished iteration measured with others is
        dropped.
        """
        if sources and self.sources:
            self._drop_measured(True)
        self.sources, self.date = sources or self.sources, date or self.date

    def _drop_measured(self, evaluates_otherwise: bool) -> None:
        self.rewards = {}
        if evaluates_otherwise:
            self.evaluations.pop(len(self.records), None)
            self.best = None

    def _add(self, entry: Entry) -> None:
        if isinstance(entry, Record):
            if entry.iteration != len(self.records):
                raise ValueError(f"iteration {entry.iteration} follows {len(self.records) - 1}")
            self.records.append(entry)
            self.rewards, self.finish = {}, None
        elif isinstance(entry, Reward):
            if entry.iteration != len(self.records):
                raise ValueError(
                    f"a reward of iteration {entry.iteration} during iteration {len(self.records)}"
                )
            self.rewards[entry.member] = entry
        elif isinstance(entry, Evaluation):
            if len(self.records) - entry.iteration not in (0, 1):
                raise ValueError(
                    f"an evaluation of iteration {entry.iteration} during {len(self.records)}"
                )
            self.evaluations[entry.iteration] = entry
            best = None if self.best is None else self.evaluations[self.best].metrics
            if is_better(entry.metrics, best):
                self.best = entry.iteration
        elif isinstance(entry, Finish):
            self.finish = entry
        elif isinstance(entry, Resumption):
            self.resumptions.append(entry)
            self.change_settings({key: new for key, (_, new) in entry.changes.items()})
            self.change_sources(entry.sources, entry.date)
        else:
            raise ValueError("a second header")


def is_better(metrics: Mapping[str, float], best: Mapping[str, float] | None) -> bool:
    """Whether an evaluation with these metrics is better than the best before; None: there is none.

    Of equal ones, the first is the best.
    """
    return best is None or metrics["held_out_reward"] > best["held_out_reward"]


def read(path: Path) -> History | None:
    """The content of the journal at `path`; None if there is no file, or no complete header in it.

    A last line without a newline was being written when the run was killed. The run has not acted
    on it, so it is ignored.

    Raises:
        ConfigError: a line is damaged, or the journal is of another version; names the line.
    """
    if not path.exists():
        return None
    history, previous, offset = None, "", 0
    *lines, incomplete = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entry, previous = decode(line.decode(), previous)
            if history is None:
                history = _begin(path, entry)
                history.run = previous
            else:
                history._add(entry)
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path}, line {number}: damaged ({error}); all lines before it are valid. Restore "
                "the journal from a copy, or cut it before that line; then check it: "
                f"shardes journal {path.parent} verify"
            ) from None
        offset += len(line) + 1
        history.end, history.checksum = offset, previous
        if isinstance(entry, Header | Record):
            history.ends.append(offset)
    if history and incomplete:
        history.incomplete_line = (
            f"{path}, line {len(lines) + 1}: incomplete, because the run was killed while writing "
            "it; ignored"
        )
    return history


def _begin(path: Path, entry: Entry) -> History:
    if not isinstance(entry, Header):
        raise ValueError("no header")
    if entry.format not in READABLE or entry.noise not in NOISES:
        raise ConfigError(
            f"{path}: journal format {entry.format} with noise {entry.noise}; this version of "
            f"shardes uses format {FORMAT} with noise {' or '.join(NOISES)}. Continue with the "
            "version that began the run"
        )
    return History(
        path,
        entry,
        dict(entry.settings),
        dict(entry.files),
        dict(entry.sources),
        entry.date,
    )


def _encode(entry: Entry, previous: str) -> tuple[str, str]:
    """An entry's line and its checksum; `previous` is the checksum of the line before it."""
    body = json.dumps({"kind": entry.kind, **asdict(entry)}, allow_nan=False)[:-1]
    line_checksum = checksum(previous + body)
    return f'{body}{CHECKSUM_KEY}{line_checksum}"}}\n', line_checksum


def decode(line: str, previous: str) -> tuple[Entry, str]:
    """A line's entry and checksum; `previous` is the checksum of the line before it.

    Raises:
        ValueError, TypeError, KeyError: the line is damaged.
    """
    body, key, end = line.rpartition(CHECKSUM_KEY)
    line_checksum = checksum(previous + body)
    if not key or end != line_checksum + '"}':
        raise ValueError("its checksum does not match")
    values = json.loads(body + "}")
    return ENTRIES[values.pop("kind")](**values), line_checksum


class Journal:
    """A journal opened for appending.

    Args:
        history: the journal's content; None to begin a new one.
    """

    def __init__(self, path: Path, history: History | None):
        self.path = path
        self._file = open(path, "r+b" if path.exists() else "x+b", buffering=0)
        self.run = history.run if history else ""  # the checksum of the header
        self._end = history.end if history else 0
        self._checksum = history.checksum if history else ""
        self._file.truncate(self._end)
        self._file.seek(self._end)
        sync(path.parent)

    def append(self, entry: Entry) -> None:
        """Write an entry; on return it is on disk.

        Raises:
            RunError: it could not be written, and the journal is unchanged; or another process has
                written to the journal.
        """
        line, line_checksum = _encode(entry, self._checksum)
        unwritten = line.encode()
        if os.fstat(self._file.fileno()).st_size != self._end:
            raise RunError(
                f"{self.path}: another process has written to it; "
                "does a second run use this directory?"
            )
        try:
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            raise RunError(
                f"{self.path}: cannot be written ({error}). The center was not updated beyond it: "
                "once it can be written, start the same command again to continue"
            ) from error
        self._end, self._checksum = self._end + len(line.encode()), line_checksum
        self.run = self.run or line_checksum

    def close(self) -> None:
        self._file.close()
