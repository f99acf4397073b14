"""Opens a run directory, and finds the point at which the run starts or resumes."""

import fcntl
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shardes.config.limits import REWARD_RANGE, is_reward
from shardes.config.loading import center_settings, to_yaml
from shardes.config.schema import CENTER_SETTINGS, SCHEDULED_CENTER_SETTINGS, Config, Noise
from shardes.errors import ConfigError, RunError, suggestion
from shardes.es.statistics import mean
from shardes.noise.definition import LOW_RANK_NOISE, NOISE
from shardes.sharding.weight_files import WeightFiles
from shardes.storage import journal, snapshots
from shardes.storage.branches import own_history, read_history, source_run
from shardes.storage.files import differing, fingerprint, make_directory, write_whole
from shardes.storage.journal import (
    JOURNAL,
    Header,
    History,
    Journal,
    Record,
    Resumption,
    Reward,
)
from shardes.storage.snapshots import Snapshot, latest_valid_snapshot
from shardes.storage.sources import PROMPTS, check_sources
from shardes.words import counted

# A run has one kind of noise, which its header names, and one rule, which replays all its updates.
UNCHANGEABLE = ("es.noise", "es.rank", "es.update")
ANOTHER_RUN = "for another value, export the center (shardes export) and start a run from it"


@dataclass
class ResumePoint:
    """The iteration at which a start of the run begins, and how its center is rebuilt.

    Args:
        source: directory of the snapshot to load; None: the base model.
        digest: that of the source, if known.
        target: digest of the center before `iteration`, if known.
        records: iterations to replay on the source.
        rewards: those of the members of `iteration` that have been evaluated already.
        reward_means: the mean rewards of all iterations before.
        evaluations: the metrics of the centers that have been evaluated, by iteration.
        best: the iteration before which the center was the best; None if none was evaluated.
    """

    iteration: int = 0
    source: str | None = None
    digest: str | None = None
    target: str | None = None
    records: list[Record] = field(default_factory=list)
    rewards: dict[int, Reward] = field(default_factory=dict)
    reward_means: list[float] = field(default_factory=list)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    best: int | None = None

    @classmethod
    def after(
        cls, records: Sequence[Record], snapshot: Snapshot | None, target: str | None, **known: Any
    ) -> "ResumePoint":
        """The point after `records`, those of all iterations so far; `known` are further fields."""
        return cls(
            len(records),
            str(snapshot.directory) if snapshot else None,
            snapshot.digest if snapshot else None,
            target,
            list(records[snapshot.iteration if snapshot else 0 :]),
            reward_means=[mean(record.rewards) for record in records],
            **known,
        )

    @property
    def source_iteration(self) -> int:
        """The iteration before which the center is read from the source."""
        return self.iteration - len(self.records)

    @property
    def origin(self) -> str:
        """How the center is rebuilt, for messages."""
        source = f"snapshot {self.source}" if self.source else "the base model"
        replayed = f" and {counted(len(self.records), 'iteration')} replayed"
        return source + (replayed if self.records else "")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ResumePoint":
        values = json.loads(text)
        values["records"] = [Record(**record) for record in values["records"]]
        values["rewards"] = {
            int(member): Reward(**reward) for member, reward in values["rewards"].items()
        }
        values["evaluations"] = {int(t): metrics for t, metrics in values["evaluations"].items()}
        return cls(**values)


@dataclass
class RunDirectory:
    """A run directory that this process has locked, and its journal.

    `begin` must be called before the run does anything.
    """

    lock: "Lock"
    journal: Journal
    resume: ResumePoint
    notes: list[str]  # for the user
    sources: dict[str, str] = field(default_factory=dict)  # what else decides the run
    date: str = ""  # that chat templates show, in ISO format
    entry: Header | Resumption | None = None  # the journal's next
    settings: str = ""  # all of them, as YAML

    def begin(self) -> None:
        """Record the start in the journal, and the settings in config.yaml.

        Raises:
            RunError: they cannot be written.
        """
        assert self.entry
        self.journal.append(self.entry)
        file = self.journal.path.with_name("config.yaml")
        try:
            write_whole(file, self.settings)
        except OSError as error:
            raise RunError(
                f"{file}: cannot be written ({error}); once it can, start the same command again"
            ) from error

    def close(self) -> None:
        self.journal.close()
        self.lock.release()

    def abandon(self) -> None:
        """Close without having begun: what opening has created is removed."""
        self.journal.close()
        if isinstance(self.entry, Header):  # a new run's journal, still empty
            self.journal.path.unlink(missing_ok=True)
        self.lock.undo()


def noise_name(config: Config) -> str:
    """The definition of the noise that a run with these settings has, for its header."""
    return LOW_RANK_NOISE if config.es.noise is Noise.low_rank else NOISE


def recorded_date(config: Config) -> str:
    """The date that the run's chat templates show, in ISO format; "" if there is no run yet."""
    runs, source = [Path(config.run.dir)], Path(config.resume.source)
    if config.resume.source not in ("auto", "never"):
        runs += [source, source.parent.parent]
    histories = (journal.read(run / JOURNAL) for run in runs)
    return next((history.date for history in histories if history and not history.is_empty), "")


def open_run_directory(
    config: Config,
    base: WeightFiles,
    sources: dict[str, str] | None = None,
    date: str = "",
    stateful: bool = False,
) -> RunDirectory:
    """Lock the run directory, open its journal, and find where the run starts or resumes.

    Args:
        sources: what decides the run besides settings and model: see `run_sources`.
        date: the one that chat templates show, in ISO format.
        stateful: whether es.update keeps values. Snapshots do not have them, so the center is
            rebuilt from the base model.

    Raises:
        ConfigError: the directory cannot be written, is in use, is damaged, or holds a run with
            other settings.
    """
    sources = sources or {}
    directory = Path(config.run.dir)
    lock = None
    try:
        lock = Lock(directory)
        history, runs = read_history(config, directory)
        notes: list[str] = []
        model, settings = str(base.directory.resolve()), center_settings(config)
        known: dict[str, Any] = dict(noise=noise_name(config), sources=sources, date=date)
        header = Header(model, fingerprint(base), settings, **known)
        if history is None:
            resume = ResumePoint()
            entry: Header | Resumption = header
        else:
            resume, notes, entry = _resume(config, history, header, runs, stateful)
        run_journal = Journal(directory / JOURNAL, history)
    except Exception as error:
        if lock:
            lock.undo()
        if not isinstance(error, OSError):
            raise
        raise ConfigError(
            f"run.dir={directory}: cannot be written: {error}; choose another directory"
        ) from error
    if lock.note:
        notes = [lock.note, *notes]
    text = to_yaml(config)
    return RunDirectory(lock, run_journal, resume, notes, sources, date, entry, text)


def _resume(
    config: Config, history: History, header: Header, runs: list[Path], stateful: bool
) -> tuple[ResumePoint, list[str], Resumption]:
    """Where the run resumes, notes for the user, and the journal's next entry.

    `header` is what a new run would have; `history` receives what it changes.
    """
    changes = _setting_changes(config, history, header)
    history.change_settings({key: new for key, (_, new) in changes.items()})
    source_notes, sources = _changed_sources(config, history, header.sources)
    date = "" if history.date else header.date
    history.change_sources(sources, date)
    snapshots.remove_partial(Path(config.run.dir))
    resume, notes = _resume_point(config, history, [] if stateful else runs)
    notes += source_notes
    resumption = Resumption(resume.iteration, changes, sources, date)
    return resume, [*notes, *resumption.change_notes()], resumption


def describe_run_directory(config: Config, sources: dict[str, str]) -> str:
    """What a start would do with the run directory. Changes nothing and reads no weights.

    Raises:
        ConfigError: the directory holds a run that cannot be resumed with these settings, or there
            is no run to start from.
    """
    history, _ = own_history(config, Path(config.run.dir))
    if history is None and config.resume.source in ("auto", "never"):
        return "a new run"
    if history is None:
        source_run(config)
        return f"a run that starts from {config.resume.source}"
    header = Header(history.header.model, history.files, center_settings(config))
    _setting_changes(config, history, header)
    _changed_sources(config, history, sources)
    return f"a run of {counted(len(history.records), 'iteration')} so far, to be resumed"


def _setting_changes(config: Config, history: History, header: Header) -> dict[str, list]:
    """The settings that differ from the journal's latest: {key: [old, new]}.

    Raises:
        ConfigError: resume.allow_changes lacks one of them.
    """
    allowed = config.resume.allow_changes
    known = [*CENTER_SETTINGS, *SCHEDULED_CENTER_SETTINGS, "model.path", PROMPTS]
    for key in allowed:
        if key in UNCHANGEABLE:
            raise ConfigError(
                f"resume.allow_changes: {key} cannot change within a run; {ANOTHER_RUN}"
            )
        if key not in known:
            raise ConfigError(
                f"resume.allow_changes: {key} is not a setting that decides the center; "
                f"{suggestion(key, known)}"
            )
    changes: dict[str, list] = {}
    if names := differing(history.files, header.files):
        old, new = (files.get(names[0], "missing")[:16] for files in (history.files, header.files))
        if "model.path" not in allowed:
            raise ConfigError(
                f"model.path={config.model.path}: {names[0]} is not what the run began with "
                f"(SHA-256 {new}, before {old}); put it back, or list model.path in "
                "resume.allow_changes"
            )
        changes["model.path"] = [history.files, header.files]
    settings = center_settings(Config()) | history.settings
    for key, value in header.settings.items():
        if settings.get(key) != value:
            if key in UNCHANGEABLE:
                raise ConfigError(
                    f"{key}={value}: the run in {history.path.parent} has {settings.get(key)}; use "
                    f"that value, since {key} cannot change within a run, or {ANOTHER_RUN}"
                )
            # A run that had no schedule so far has recorded nothing for these.
            if key not in allowed and key in settings:
                raise ConfigError(
                    f"{key}={value}: the run in {history.path.parent} has {settings.get(key)}; use "
                    f"that value, list {key} in resume.allow_changes to change it on purpose, or "
                    "choose another run.dir"
                )
            changes[key] = [settings.get(key), value]
    return changes


def _changed_sources(
    config: Config, history: History, sources: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Notes for the user, and the sources if they differ from the journal's, else {}.

    Raises:
        ConfigError: resume.allow_changes lacks one that differs.
    """
    if sources == history.sources:
        return [], {}
    notes: list[str] = []
    if history.sources:  # a journal of format 1 has none
        allowed, run = config.resume.allow_changes, history.path.parent
        notes = check_sources(history.sources, sources, allowed, run)
    return notes, sources


def _resume_point(
    config: Config, history: History, runs: list[Path]
) -> tuple[ResumePoint, list[str]]:
    """Where the run resumes, and notes for the user."""
    iteration = len(history.records)
    if iteration > config.es.iterations:
        raise ConfigError(
            f"es.iterations={config.es.iterations}: the run in {history.path.parent} has "
            f"{iteration} already; shardes export --iteration exports the center of an earlier one"
        )
    snapshot, warnings = latest_valid_snapshot(runs, iteration, history.digest, history.run)
    rewards = {
        member: entry
        for member, entry in history.rewards.items()
        if all(map(is_reward, [entry.reward, *entry.scores]))
    }
    resume = ResumePoint.after(
        history.records,
        snapshot,
        history.digest(iteration),
        rewards=rewards,
        evaluations={t: evaluation.metrics for t, evaluation in history.evaluations.items()},
        best=history.best,
    )
    for member in sorted(history.rewards.keys() - rewards.keys()):
        warnings.append(
            f"member {member} of iteration {iteration} is evaluated again: its reward in the "
            f"journal, {history.rewards[member].reward}, is not {REWARD_RANGE}"
        )
    members = len(resume.rewards)
    verb = "is" if members == 1 else "are"
    evaluated = f", of which {counted(members, 'member')} {verb} evaluated" if members else ""
    begins = f"resuming at iteration {iteration}{evaluated}"
    if iteration == config.es.iterations:
        begins = "the final center"
    notes = [history.incomplete_line] if history.incomplete_line else []
    return resume, [*notes, *warnings, f"{begins}: {resume.origin}"]


class Lock:
    """A run directory's lock. The operating system releases it when the process ends.

    The directory is created if it is missing.

    Raises:
        ConfigError: another process holds it; names the process and its host.
        OSError: the directory or the lock cannot be written.
    """

    def __init__(self, directory: Path):
        self._made = make_directory(directory)
        self._path = directory / "lock"
        self._is_new = not self._path.exists()
        self._file = open(self._path, "a+", encoding="utf-8")
        self._file.seek(0)
        holder = self._file.read().strip()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:  # locked, or removed by a start that was refused in the meantime
            self._file.close()
            raise ConfigError(
                f"run.dir={directory}: in use by {holder or 'another process'}; "
                "wait for it to end, or choose another directory"
            )
        self.note = f"taking over the lock that {holder} left behind" if holder else ""
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.truncate(0)
        self._file.close()

    def undo(self) -> None:
        """Release, and remove what was created for the lock, unless it is used since."""
        if self._is_new:
            self._path.unlink(missing_ok=True)  # before the release: no one else can hold it
        self.release()
        for folder in self._made:
            with suppress(OSError):  # something else is in it
                folder.rmdir()
