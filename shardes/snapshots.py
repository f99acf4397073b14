"""Snapshots: the center, every so many iterations, as an ordinary model directory of the run's.

A snapshot is written while the next iteration's members are evaluated, by the ranks of replica 0, each what it
holds. It counts only once it has been read back whole, with the digest that the center had.
"""

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from shardes.center import Center
from shardes.checkpoint import MANIFEST, PARTIAL, Checkpoint
from shardes.config import CheckpointConfig, RunError
from shardes.weights import WeightFiles
from shardes.world import World, await_keys, connect_anew


def directory(run: Path) -> Path:
    """Where a run keeps its snapshots."""
    return run / "snapshots"


def found(run: Path) -> dict[int, Path]:
    """A run's snapshots by iteration, the newest first; whether they are sound is not looked at."""
    paths = (path for path in directory(run).glob("iteration_*") if re.fullmatch(r"iteration_\d+", path.name))
    by_iteration = {int(path.name.partition("_")[2]): path for path in paths if (path / MANIFEST).exists()}
    return dict(sorted(by_iteration.items(), reverse=True))


def best(run: Path) -> int | None:
    """The iteration of the snapshot that a run keeps for its held-out reward."""
    link = directory(run) / BEST
    return int(link.readlink().name.partition("_")[2]) if link.is_symlink() else None


def clear(run: Path) -> None:
    """Remove what writers that were killed have left."""
    for path in directory(run).glob(f"*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


BEST = "best"


class Failed(Exception):
    """Another rank could not write its part of a snapshot."""


class Snapshots:
    """Writes a run's snapshots. Every rank of replica 0 makes the same calls; on others nothing happens.

    Args:
        base: the base model's files, whose config and tokenizer go along.
        say: tells the user of a snapshot that could not be written.
        timeout: seconds that a rank waits for another.
    """

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        world: World,
        center: Center,
        base: WeightFiles,
        say: Callable[[str], None],
        timeout: float,
    ):
        self._run, self._config, self._world, self._center = run, config, world, center
        self._base, self._say, self._timeout = base, say, timeout
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._best: int | None = best(run)

    def keep_best(self, iteration: int) -> None:
        """From now on `best` is the snapshot of `iteration`, which is there or was begun; it is not removed."""
        self._best = iteration
        if self._thread is None:
            self._link()

    def due(self, iteration: int) -> bool:
        """Whether the center before `iteration` is to be kept."""
        return self._config.every > 0 and iteration > 0 and iteration % self._config.every == 0

    def begin(self, iteration: int, digest: str) -> None:
        """Start writing the present center, of that digest. `wait_written` must follow before it changes."""
        if self._world.replica != 0:
            return
        self.finish()
        self._written.clear()
        self._thread = threading.Thread(target=self._write, args=(iteration, digest), daemon=True)
        self._thread.start()

    def wait_written(self) -> None:
        """Wait until this rank's part of the center has been copied to the files.

        Raises:
            RunError: it was not within the time limit.
        """
        if self._thread and not self._written.wait(self._timeout):
            raise RunError(f"rank {self._world.job.rank}: a snapshot was not written within {self._timeout:.0f} s")

    def finish(self) -> None:
        """Wait until the snapshot that was begun is complete or given up."""
        if self._thread:
            self._thread.join()
            self._thread = None
            self._link()

    def _write(self, iteration: int, digest: str) -> None:
        # Ranks meet through the store alone, by looking: collectives are the main thread's.
        store = dist.PrefixStore(f"snapshot {iteration}", connect_anew(self._world.job.store))
        rank, ranks = dist.get_rank(), dist.get_world_size()
        home = directory(self._run) / f"iteration_{iteration}"
        checkpoint = Checkpoint(home, self._base, self._center.names, torch.float32, self._config.shard_size)
        try:
            if rank == 0:
                shutil.rmtree(home, ignore_errors=True)  # one that did not verify, or of another branch
                checkpoint.create()
                store.set("created", "")
            self._await(store, ["created"])
            for name, regions, values in self._center.parts():
                checkpoint.write(name, regions, values)
            self._written.set()
            checkpoint.flush()
            store.set(f"written/{rank}", "")
            self._await(store, [f"written/{other}" for other in range(ranks)])
            mine = {file: checkpoint.read_back(file) for file in checkpoint.files[rank::ranks]}
            store.set(f"read/{rank}", json.dumps(mine))
            if rank == 0:
                self._await(store, [f"read/{other}" for other in range(ranks)])
                read: dict[str, tuple[str, int]] = {}
                for other in range(ranks):
                    read |= json.loads(store.get(f"read/{other}"))
                total = f"{sum(part for _, part in read.values()) % 2**64:016x}"
                if total != digest:
                    raise RunError(f"read back, its digest is {total}, where the center's is {digest}")
                checkpoint.publish(iteration, digest, {file: sha for file, (sha, _) in read.items()})
                self._prune()
        except Failed:
            pass
        except (OSError, RuntimeError) as error:
            store.set("failed", f"rank {self._world.job.rank}: {error}")
        finally:
            self._written.set()
            checkpoint.close()
            if rank == 0 and store.check(["failed"]):
                checkpoint.discard()
                reason = store.get("failed").decode()
                self._say(
                    f"WARNING: no snapshot of iteration {iteration}: {reason}. The journal is whole; the run goes on"
                )

    def _await(self, store: dist.Store, keys: list[str]) -> None:
        def give_up():
            if store.check(["failed"]):
                raise Failed

        await_keys(store, keys, self._timeout, "its ranks", give_up)

    def _link(self) -> None:
        """Let `best` point to the snapshot that is, once it is there."""
        home = directory(self._run) / f"iteration_{self._best}"
        if self._world.speaks and self._config.best and home.is_dir():
            beside = directory(self._run) / (BEST + PARTIAL)
            beside.unlink(missing_ok=True)
            beside.symlink_to(home.name)
            beside.rename(directory(self._run) / BEST)

    def _prune(self) -> None:
        kept = best(self._run)
        for number, path in list(found(self._run).items())[self._config.keep :]:
            if number == kept:
                continue
            doomed = path.with_name(path.name + PARTIAL)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
