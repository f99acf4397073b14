"""Snapshots: the center, every few iterations, as a Hugging Face checkpoint in the run directory.

The ranks of replica 0 write a snapshot, each its own regions, while the next iteration's members
are evaluated. The snapshot is published only if its digest, read back from disk, is the center's.
"""

import re
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from shardes.config.schema import CheckpointConfig
from shardes.distributed.job_store import SnapshotFailed, SnapshotProgress
from shardes.distributed.store import no_poll
from shardes.distributed.world import World
from shardes.errors import ConfigError, RunError, one_line
from shardes.es.center import Center
from shardes.sharding.digest import format_digest
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.checkpoint import (
    MANIFEST,
    PARTIAL,
    Checkpoint,
    Manifest,
    read_manifest,
    verify,
)

POLL = 0.2  # seconds between two looks whether the run is to stop
BEST = "best"  # a symbolic link to the snapshot with the highest held-out reward


def snapshot_directory(run: Path) -> Path:
    """The directory of a run's snapshots."""
    return run / "snapshots"


def by_iteration(run: Path) -> dict[int, Path]:
    """A run's snapshots, the newest first; their files are not checked."""
    paths = {
        int(path.name.partition("_")[2]): path
        for path in snapshot_directory(run).glob("iteration_*")
        if re.fullmatch(r"iteration_\d+", path.name) and (path / MANIFEST).exists()
    }
    return dict(sorted(paths.items(), reverse=True))


def best_iteration(run: Path) -> int | None:
    """The iteration of the snapshot that `best` points to."""
    link = snapshot_directory(run) / BEST
    return int(link.readlink().name.partition("_")[2]) if link.is_symlink() else None


def remove_partial(run: Path) -> None:
    """Remove incomplete snapshots of writers that were killed."""
    for path in snapshot_directory(run).glob(f"*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that has been verified: the center before `iteration`."""

    iteration: int
    directory: Path
    digest: str


def verify_snapshot(directory: Path, iteration: int, digest: str | None, run: str = "") -> Snapshot:
    """Check a snapshot's files, and that it is the center before `iteration`.

    Args:
        digest: the digest that the center must have; None if unknown.
        run: the checksum of the run's header; "" if unknown.

    Raises:
        ConfigError: a file is damaged, or it is another center; names the file or directory.
    """
    manifest = read_manifest(directory)
    if "" not in (run, manifest.run) and manifest.run != run:
        raise ConfigError(f"{directory}: belongs to another run that had this directory")
    if manifest.iteration != iteration:
        raise ConfigError(f"{directory}: holds the center before iteration {manifest.iteration}")
    if digest not in (None, manifest.digest):
        raise ConfigError(
            f"{directory}: its digest is {manifest.digest}, the journal's is {digest}"
        )
    verify(directory)
    return Snapshot(iteration, directory, manifest.digest)


def latest_valid_snapshot(
    runs: Sequence[Path], iteration: int, digest: Callable[[int], str | None], run: str = ""
) -> tuple[Snapshot | None, list[str]]:
    """The latest valid snapshot of the center before `iteration`, or before an earlier one.

    Args:
        runs: the run directories to search.
        digest: returns the digest that the center before an iteration must have; None if unknown.
        run: the checksum of the run's header; "" if unknown.

    Returns:
        The snapshot, and a warning for each later one that is invalid.
    """
    warnings: list[str] = []
    candidates = [
        (number, path)
        for directory in runs
        for number, path in by_iteration(directory).items()
        if number <= iteration
    ]
    for number, path in sorted(candidates, reverse=True):
        try:
            return verify_snapshot(path, number, digest(number), run), warnings
        except ConfigError as error:
            warnings.append(f"WARNING: a snapshot is not used: {error}")
    return None, warnings


class Snapshots(ABC):
    """Saves the center. The trainer makes the same calls on every rank, whatever its role."""

    @abstractmethod
    def due(self, iteration: int) -> bool:
        """Whether the center before `iteration` is to be saved."""

    @abstractmethod
    def begin(self, iteration: int, digest: str) -> None:
        """Start saving the center, which has this digest.

        `wait_written` must be called before the center changes.
        """

    @abstractmethod
    def wait_written(self) -> None:
        """Wait until this rank no longer reads the center.

        Raises:
            RunError: it still does after the time limit.
        """

    @abstractmethod
    def keep_best(self, iteration: int) -> None:
        """Keep the snapshot of `iteration`, which exists or has been begun, as the best one."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until the snapshot that was begun has been published or given up; a stop of the run
        ends the wait.
        """

    @abstractmethod
    def close(self) -> None:
        """As `finish`, but nothing ends the wait."""


class NoSnapshots(Snapshots):
    """For ranks that write none: those of replicas other than 0."""

    def due(self, iteration: int) -> bool:
        return False

    def begin(self, iteration: int, digest: str) -> None:
        pass

    def wait_written(self) -> None:
        pass

    def keep_best(self, iteration: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class SnapshotWriter(Snapshots):
    """For the ranks of replica 0: writes snapshots in a background thread.

    Args:
        base: the base model, whose config and tokenizer are copied to each snapshot.
        run_id: the checksum of the journal's header, on the primary rank.
        best: the iteration before which the center was the best so far; None if unknown.
        warn: reports a snapshot that could not be written.
        timeout: seconds that a rank waits for another.
        poll: called while waiting; what it raises ends the wait.
    """

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        world: World,
        center: Center,
        base: WeightFiles,
        run_id: str,
        best: int | None,
        warn: Callable[[str], None],
        timeout: float,
        poll: Callable[[], None] = no_poll,
    ):
        self._poll = poll
        self._run, self._config, self._world, self._center = run, config, world, center
        self._base, self._run_id, self._warn, self._timeout = base, run_id, warn, timeout
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._best = best
        self._linking = threading.Lock()
        self._link_best()
        self._progress: list[SnapshotProgress] = []  # of earlier snapshots, on the primary rank

    def due(self, iteration: int) -> bool:
        return self._config.every > 0 and iteration > 0 and iteration % self._config.every == 0

    def begin(self, iteration: int, digest: str) -> None:
        self.finish()
        self._written.clear()
        self._thread = threading.Thread(target=self._save, args=(iteration, digest), daemon=True)
        self._thread.start()

    def wait_written(self) -> None:
        since = time.monotonic()
        while self._thread and not self._written.wait(POLL):
            self._poll()
            if time.monotonic() - since > self._timeout:
                raise RunError(
                    f"rank {self._world.job.rank}: a snapshot was not written within "
                    f"{self._timeout:.0f} s"
                )

    def keep_best(self, iteration: int) -> None:
        self._best = iteration
        self._link_best()

    def close(self) -> None:
        if self._thread:
            self._thread.join()  # each of its waits has a limit
            self._thread = None

    def finish(self) -> None:
        while self._thread and self._thread.is_alive():
            self._thread.join(POLL)
            self._poll()
        self._thread = None

    def _save(self, iteration: int, digest: str) -> None:
        try:
            # Collectives belong to the main thread: these threads wait for each other in the store.
            progress = SnapshotProgress(self._world.job.store, iteration, self._timeout)
            self._save_or_report(iteration, digest, progress)
        finally:
            self._written.set()

    def _save_or_report(self, iteration: int, digest: str, progress: SnapshotProgress) -> None:
        checkpoint: Checkpoint | None = None
        try:
            checkpoint = Checkpoint(
                self._path(iteration),
                self._base,
                self._center.names,
                torch.float32,
                self._config.shard_size,
            )
            self._write(checkpoint, progress, iteration)
            self._read_back(checkpoint, progress)
            if self._world.is_primary:
                self._publish(checkpoint, progress, iteration, digest)
        except SnapshotFailed:
            pass  # the primary rank reports the error of the rank that failed
        except Exception as error:  # whatever it is, other ranks wait for this one
            progress.fail(f"rank {self._world.job.rank}: {one_line(error)}")
        finally:
            if checkpoint:
                checkpoint.close()
            if self._world.is_primary:
                self._progress.append(progress)
                self._finish_files(iteration, checkpoint, progress.failure())

    def _finish_files(
        self, iteration: int, checkpoint: Checkpoint | None, failure: str | None
    ) -> None:
        """Link and remove snapshots, or remove what is left of one that failed."""
        if failure is None:
            self._link_best()
            with self._reported("an old snapshot cannot be removed"):
                self._prune()
            return
        if checkpoint:
            checkpoint.discard()
        self._warn(
            f"WARNING: no snapshot of iteration {iteration}: {failure}. "
            "The journal is complete; the run continues"
        )

    @contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        """A context in which an OSError is a warning."""
        try:
            yield
        except OSError as error:
            self._warn(f"WARNING: {what}: {error}")

    def _write(self, checkpoint: Checkpoint, progress: SnapshotProgress, iteration: int) -> None:
        """Write this rank's regions."""
        if self._world.is_primary:
            # A directory of this name is invalid, or another run's.
            shutil.rmtree(self._path(iteration), ignore_errors=True)
            checkpoint.create()
            progress.set_created()
        progress.wait_created()
        for name, regions, values in self._center.parts():
            checkpoint.write(name, regions, values)
        self._written.set()
        checkpoint.flush()
        progress.set_written(dist.get_rank())
        progress.wait_written(dist.get_world_size())
        # Each rank's thread has ended its earlier snapshots before it began this one.
        while self._progress:
            self._progress.pop().delete(dist.get_world_size())

    def _read_back(self, checkpoint: Checkpoint, progress: SnapshotProgress) -> None:
        """Read the files that fall to this rank back from disk."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        hashes = {file: checkpoint.read_back(file) for file in checkpoint.files[rank::ranks]}
        progress.post_hashes(rank, hashes)

    def _publish(
        self, checkpoint: Checkpoint, progress: SnapshotProgress, iteration: int, digest: str
    ) -> None:
        hashes = progress.wait_hashes(dist.get_world_size())
        digest_on_disk = format_digest(sum(total for _, total in hashes.values()))
        if digest_on_disk != digest:
            raise RunError(f"its digest on disk is {digest_on_disk}, the center's is {digest}")
        shas = {file: sha for file, (sha, _) in hashes.items()}
        checkpoint.publish(Manifest(iteration, digest, shas, self._run_id))

    def _path(self, iteration: int) -> Path:
        return snapshot_directory(self._run) / f"iteration_{iteration}"

    def _own(self) -> dict[int, Path]:
        """This run's snapshots, the newest first: others may be left from an earlier run."""
        own = {}
        for iteration, path in by_iteration(self._run).items():
            with suppress(ConfigError):  # a damaged manifest
                if read_manifest(path).run in ("", self._run_id):
                    own[iteration] = path
        return own

    def _link_best(self) -> None:
        """Let the link `best` point to the best snapshot, if that has been published.

        Called when a snapshot is published and when the best one is known, whichever comes first.
        """
        if not (self._world.is_primary and self._config.best):
            return
        with self._linking, self._reported(f"snapshots/{BEST} cannot be linked"):
            if self._best not in self._own():
                return
            link = snapshot_directory(self._run) / BEST
            partial = link.with_name(BEST + PARTIAL)
            partial.unlink(missing_ok=True)
            partial.symlink_to(self._path(self._best).name)
            partial.rename(link)  # replaces the old link atomically

    def _prune(self) -> None:
        """Remove all but the newest snapshots of this run and the best one."""
        best = best_iteration(self._run)
        for iteration, path in list(self._own().items())[self._config.keep :]:
            if iteration != best:
                removed = path.with_name(path.name + PARTIAL)
                path.rename(removed)
                shutil.rmtree(removed, ignore_errors=True)
