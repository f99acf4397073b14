"""Which journal a start continues: its directory's, or a copy of the one that `resume` names."""

import json
from pathlib import Path

from shardes.config.schema import Config
from shardes.errors import ConfigError
from shardes.storage import journal
from shardes.storage.checkpoint import PARTIAL, read_manifest
from shardes.storage.files import sync
from shardes.storage.journal import JOURNAL, History, Record, Resumption


def read_history(config: Config, directory: Path) -> tuple[History | None, list[Path]]:
    """The journal to resume from, and the run directories whose snapshots belong to it.

    If `resume` names another run, its journal is first copied to `directory`, unless an earlier
    start has done so.
    """
    history, runs = own_history(config, directory)
    if history or config.resume.source in ("auto", "never"):
        return history, runs
    run = source_run(config)
    _copy_journal(config, run, directory)
    return journal.read(directory / JOURNAL), [directory, run]


def own_history(config: Config, directory: Path) -> tuple[History | None, list[Path]]:
    """The journal in `directory`, None if it records nothing, and the run directories whose
    snapshots belong to it.

    Raises:
        ConfigError: `resume` does not allow to continue it.
    """
    history, source = journal.read(directory / JOURNAL), config.resume.source
    if history is None or history.is_empty:  # it may start again with other settings
        return None, [directory]
    if source == "never":
        raise ConfigError(
            f"run.dir={directory}: holds a run already, and resume=never; "
            "choose another directory, or resume=auto"
        )
    if source == "auto" or Path(source).resolve() == directory.resolve():
        return history, [directory]
    run = source_run(config)
    shared = None if run.resolve() == directory.resolve() else _shared_iterations(history, run)
    if shared is None:
        raise ConfigError(
            f"run.dir={directory}: holds a run already, and not one that began from {source}; "
            "choose another directory, or resume=auto to continue that run"
        )
    # Another center of the same iteration would be taken for this run's if its digest is unknown.
    iteration = len(history.records)
    known = iteration == shared or history.digest(iteration) is not None
    return history, [directory, run] if known else [directory]


def source_run(config: Config) -> Path:
    """The run directory that `resume` names, itself or by a snapshot, which may be gone since."""
    source = Path(config.resume.source)
    candidates = [source, source.parent.parent]
    run = next((path for path in candidates if (path / JOURNAL).exists()), None)
    if run is None:
        raise ConfigError(
            f"resume={source}: neither a run directory with a journal nor a snapshot in one"
        )
    return run


def _shared_iterations(history: History, run: Path) -> int | None:
    """The number of iterations that a journal shares with that of `run`, of which it began as a
    copy; None if it did not.
    """
    own = history.path.read_bytes()[: history.end].splitlines(keepends=True)
    other = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    pairs = zip(own, other, strict=False)
    shared = next((number for number, (a, b) in enumerate(pairs) if a != b), None)
    if shared is None:
        shared = min(len(own), len(other))
    # What follows the copy is the entry of the start that made it.
    kinds = [json.loads(line)["kind"] for line in own[: shared + 1]]
    if not shared or (shared < len(own) and Resumption.kind not in kinds):
        return None
    return kinds[:shared].count(Record.kind)


def _copy_journal(config: Config, run: Path, directory: Path) -> None:
    """Copy a run's journal to `directory`: all of it, or up to the snapshot's iteration."""
    source = Path(config.resume.source)
    history = journal.read(run / JOURNAL)
    if history is None:
        raise ConfigError(f"resume={source}: its journal has no header; nothing is recorded there")
    end = history.end
    if run != source:
        iteration = read_manifest(source).iteration
        if iteration >= len(history.ends):
            raise ConfigError(
                f"resume={source}: {history.path} ends before iteration {iteration}; restore the "
                "journal that belongs to the snapshot"
            )
        end = history.ends[iteration]
    partial = directory / (JOURNAL + PARTIAL)
    partial.write_bytes(history.path.read_bytes()[:end])
    sync(partial)
    partial.rename(directory / JOURNAL)
