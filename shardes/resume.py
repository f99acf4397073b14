"""Where a run begins or goes on: its directory, as rank 0 finds it, and what all ranks need to know of its past."""

import difflib
import fcntl
import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shardes import journal, settings, snapshots
from shardes.checkpoint import MANIFEST, read_manifest, verify
from shardes.config import Config, ConfigError
from shardes.files import differing, sync
from shardes.journal import JOURNAL, Header, History, Journal, Record, Resumption
from shardes.population import mean
from shardes.weights import WeightFiles

DECISIVE = [  # the settings that decide the center, given the model and the machine
    "model.dtype",
    "es.population_size",
    "es.sigma",
    "es.alpha",
    "es.seed",
    "es.restore",
    "es.antithetic",
    "es.fitness",
    "es.standardize_prompts",
    "es.sigma_final",
    "es.alpha_final",
    "es.schedule",
    "es.weight_decay",
    "es.decay_to",
    "es.evolve",
    "generation.max_new_tokens",
    "generation.stop",
    "task.name",
    "task.path",
    "task.train",
    "task.template",
    "task.chat",
    "task.reward",
    "task.on_error",
    "task.prompts_per_iteration",
]


@dataclass
class Start:
    """The center before `iteration`: that of `source` (None: the base model), and `records` to be replayed on it.

    `digest` is the source's where known, `target` that before `iteration`. `rewards` are members of `iteration`
    that were evaluated already: [reward, tokens, scores]. `means` are the mean rewards of all iterations before.
    """

    iteration: int = 0
    source: str | None = None
    digest: str | None = None
    target: str | None = None
    records: list[Record] = field(default_factory=list)
    rewards: dict[int, list] = field(default_factory=dict)
    means: list[float] = field(default_factory=list)

    @property
    def origin(self) -> str:
        """Where the center comes from, in words."""
        begins = f"snapshot {self.source}" if self.source else "the base model"
        return f"{begins} and {len(self.records)} iterations replayed"

    def send(self, store: dist.Store) -> None:
        """Hand it, from rank 0, to the other ranks."""
        store.set("start", json.dumps(asdict(self)))

    @classmethod
    def receive(cls, store: dist.Store) -> "Start":
        values = json.loads(store.get("start"))
        values["records"] = [Record(**record) for record in values["records"]]
        values["rewards"] = {int(member): found for member, found in values["rewards"].items()}
        return cls(**values)


@dataclass
class Opened:
    """A run directory that is this process's: what rank 0 holds until the run ends."""

    lock: "Lock"
    journal: Journal
    start: Start
    records: list[Record]  # of all iterations so far
    notes: list[str]  # what the user should know

    def close(self) -> None:
        self.journal.close()
        self.lock.release()


def open_run(config: Config, base: WeightFiles) -> Opened:
    """Take the run directory, and find out where the run begins or goes on.

    Raises:
        ConfigError: the directory cannot be used, is in use, holds what is damaged, or a run of other settings.
    """
    directory = Path(config.run.dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = Lock(directory)
        notes = [lock.note] if lock.note else []
        history, places = _history(config, directory)
        header = Header(str(base.directory.resolve()), base.fingerprint(), decisive(config))
        start = Start()
        if history:
            changes = _changes(config, history, header)
            history.apply({key: new for key, (_, new) in changes.items()})
            snapshots.clear(directory)
            notes += [history.torn] if history.torn else []
            start, more = _start(config, history, places)
            notes += [*more, *(f"{key}: changed from {old} to {new}" for key, (old, new) in changes.items())]
            written = Journal(directory / JOURNAL, history)
            written.append(Resumption(start.iteration, changes))
        else:
            written = Journal(directory / JOURNAL, None)
            written.append(header)
        (directory / "config.yaml").write_text(settings.to_yaml(config))
    except OSError as error:
        raise ConfigError(f"run.dir={directory}: cannot be written: {error}; choose another directory") from error
    return Opened(lock, written, start, history.records if history else [], notes)


def outlook(config: Config) -> str:
    """What a start would find in the run directory, in words. Nothing is changed, and no weights are read.

    Raises:
        ConfigError: it holds a run that cannot go on with these settings.
    """
    if config.resume.source not in ("auto", "never"):
        return f"a run that begins from {config.resume.source}"
    history, _ = _history(config, Path(config.run.dir))
    if history is None:
        return "a new run"
    _changes(config, history, Header(history.header.model, history.files, decisive(config)))
    return f"a run of {len(history.records)} iterations so far, which goes on"


def values(config: Config, keys: Sequence[str]) -> dict[str, Any]:
    """Settings by key, as JSON has them."""
    found = {}
    for key in keys:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        found[key] = getattr(value, "value", value)
    return found


def decisive(config: Config) -> dict[str, Any]:
    """The settings that decide the center, as JSON has them."""
    found = values(config, DECISIVE)
    if config.es.sigma_final is not None or config.es.alpha_final is not None:
        found["es.iterations"] = config.es.iterations  # schedules span them
    return found


def _history(config: Config, directory: Path) -> tuple[History | None, list[Path]]:
    """The journal that the run goes on from, in its directory now, and the runs whose snapshots may serve."""
    history, source = journal.read(directory / JOURNAL), config.resume.source
    if history and history.begun == 0:
        history = None  # only a header: nothing is lost by beginning anew
    if source == "never" and history:
        raise ConfigError(
            f"run.dir={directory}: holds a run already, and resume=never; choose another directory, or resume=auto"
        )
    if source in ("auto", "never"):
        return history, [directory]
    given = Path(source)
    run = given.parent.parent if (given / MANIFEST).exists() else given
    if history:
        if run.resolve() != directory.resolve() or run != given:
            raise ConfigError(
                f"run.dir={directory}: holds a run already, and resume={source} begins one from another's journal; "
                "choose another directory"
            )
        return history, [directory]
    origin = journal.read(run / JOURNAL)
    if origin is None:
        raise ConfigError(f"resume={source}: neither a run directory with a journal nor a snapshot in one")
    end = origin.end if run == given else origin.ends[read_manifest(given).iteration]
    copied = directory / (JOURNAL + ".partial")
    copied.write_bytes(origin.path.read_bytes()[:end])
    sync(copied)
    copied.rename(directory / JOURNAL)
    return journal.read(directory / JOURNAL), [directory, run]


def _changes(config: Config, history: History, header: Header) -> dict[str, list]:
    """What differs from the settings in force at the journal's end: {key: [old, new]}; all of it is allowed."""
    allowed = config.resume.allow_changes
    for key in allowed:
        if key not in (*DECISIVE, "model.path"):
            near = difflib.get_close_matches(key, [*DECISIVE, "model.path"], n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(DECISIVE)}, model.path"
            raise ConfigError(f"resume.allow_changes: {key} is no setting that decides the center; {hint}")
    changes: dict[str, list] = {}
    if differ := differing(history.files, header.files):
        name = differ[0]
        then, now = (files.get(name, "missing")[:16] for files in (history.files, header.files))
        if "model.path" not in allowed:
            raise ConfigError(
                f"model.path={config.model.path}: {name} is not what the run began with (SHA-256 {now}, then {then}); "
                "put it back, or list model.path in resume.allow_changes"
            )
        changes["model.path"] = [history.files, header.files]
    before = decisive(Config()) | history.settings
    for key, new in header.settings.items():
        old = before.get(key)
        if old != new:
            if key not in allowed:
                raise ConfigError(
                    f"{key}={new}: the run in {history.path.parent} has {old}; set it so, list {key} in "
                    "resume.allow_changes to change it on purpose, or choose another run.dir"
                )
            changes[key] = [old, new]
    return changes


def _start(config: Config, history: History, runs: list[Path]) -> tuple[Start, list[str]]:
    """Where the run goes on: from the newest snapshot that is sound, or from the base model."""
    iteration = len(history.records)
    if iteration > config.es.iterations:
        raise ConfigError(
            f"es.iterations={config.es.iterations}: the run in {history.path.parent} has {iteration} already; "
            "shardes export --iteration exports the center of an earlier one"
        )
    start = Start(
        iteration,
        target=history.digest(iteration),
        rewards={member: [found.reward, found.tokens, found.scores] for member, found in history.rewards.items()},
        means=[mean(record.rewards) for record in history.records],
    )
    begin = newest_sound(runs, iteration, history.digest)
    start.source, start.digest = begin.source, begin.digest
    start.records = history.records[begin.iteration :]
    known = f", of which {len(start.rewards)} members are evaluated" if start.rewards else ""
    return start, [*begin.notes, f"resuming at iteration {iteration}{known}: {start.origin}"]


@dataclass
class Beginning:
    """The center before `iteration`: that of the snapshot `source`, of that digest; None: the base model."""

    iteration: int = 0
    source: str | None = None
    digest: str | None = None
    notes: list[str] = field(default_factory=list)


def newest_sound(runs: Sequence[Path], iteration: int, digest: Callable[[int], str | None]) -> Beginning:
    """The newest sound snapshot in run directories of a center before `iteration` or earlier.

    `digest` says which a center must have, where that is known.
    """
    found = Beginning()
    candidates = [item for run in runs for item in snapshots.found(run).items() if item[0] <= iteration]
    for number, path in sorted(candidates, reverse=True):
        try:
            manifest = verify(path)
            if manifest.iteration != number or digest(number) not in (None, manifest.digest):
                raise ConfigError(f"{path}: not a snapshot of this run's iteration {number}")
        except ConfigError as error:
            found.notes.append(f"WARNING: a snapshot is not used: {error}")
            continue
        found.iteration, found.source, found.digest = number, str(path), manifest.digest
        break
    return found


class Lock:
    """A run directory's lock. The system frees it when its process ends, however that ends.

    Raises:
        ConfigError: another process holds it; names the process and its host.
    """

    def __init__(self, directory: Path):
        self._file = open(directory / "lock", "a+", encoding="utf-8")
        self._file.seek(0)
        holder = self._file.read().strip()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"run.dir={directory}: in use by {holder or 'another process'}; "
                "wait for it to end, or choose another directory"
            ) from None
        self.note = f"taking over the lock that {holder} left behind" if holder else ""
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.truncate(0)
        self._file.close()
