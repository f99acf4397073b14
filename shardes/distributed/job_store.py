"""The keys that the ranks of one job share in its store, and what they hold.

A job is what one launcher starts. Its store is the TCPStore at MASTER_ADDR:MASTER_PORT; its keys
begin with `start A/`, where A is torchrun's restart count. Replicas, also those of other jobs,
share further keys under the run's prefix: see `replicas.protocol`.

| key | value | set by |
| --- | --- | --- |
| `rendezvous/size` | number of ranks | the first rank |
| `rendezvous/rank/R` | counter of the processes that claim to be rank R | each rank |
| `rendezvous/host/R` | host name of rank R | rank R on arrival |
| `rendezvous/arrived` | counter of the ranks that arrived | each rank |
| `rendezvous/complete` | "yes", or "" where ranks are missing | rank 0 |
| `checked/R` | `CheckResult` of rank R: its checks before heavy work | rank R |
| `date` | the date that chat templates show, in ISO format | rank 0 |
| `agreed` | "yes", or "" where a rank reported a problem | rank 0 |
| `run prefix` | prefix of the run's keys in this store | rank 0 |
| `device/R` | host, kind and UUID of the device of rank R | rank R |
| `replica number` | the number that a run gave to this job, which joined it | rank 0 |
| `resume point` | the center from which this start goes on | rank 0 |
| `stop` | exit code; a rank asks for the job's end | any rank |
| `end` | exit code; rank 0 has ended, or a rank is lost: the others must end | any rank |
| `left/R` | "": rank R has left | rank R |
| `alive/R` | counter of rank R's signs of life | rank R |
| `collective failed/R` | "": rank R waited for another in vain | rank R |
| `records/...` | the run's records, repeated in a job that joined the run | rank 0 |
| `snapshot T/created` | "": the directory of the snapshot of iteration T is there | rank 0 |
| `snapshot T/written/R` | "": rank R has written its regions to disk | rank R of replica 0 |
| `snapshot T/hashes/R` | {file: [SHA-256, digest]}, read back from disk | rank R of replica 0 |
| `snapshot T/failed` | why the snapshot is given up | any of these ranks |
| `replicaK/...` | torch's keys for the process group of replica K | torch |

The keys of a snapshot are deleted when all ranks have written their regions of the next one.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch.distributed as dist

from shardes.distributed.store import clone_store, wait_for_keys


@dataclass(frozen=True)
class CheckResult:
    """A rank's checks before heavy work: a problem ("": none), the resolved settings as YAML, and
    the SHA-256s of what else decides the run.
    """

    problem: str
    settings: str
    sources: dict[str, str] = field(default_factory=dict)


class JobStore:
    """Typed access to the keys above, but for the rendezvous."""

    def __init__(self, store: dist.Store):
        self._store = store

    def post_check(self, rank: int, result: CheckResult) -> None:
        self._store.set(f"checked/{rank}", json.dumps(asdict(result)))

    def checks(self, size: int) -> list[CheckResult]:
        """The results of all ranks, in order; waits for them."""
        texts = [self._store.get(f"checked/{rank}") for rank in range(size)]
        return [CheckResult(**json.loads(text)) for text in texts]

    def set_date(self, date: str) -> None:
        self._store.compare_set("date", "", date)

    def date(self) -> str:
        """Waits for rank 0."""
        return self._store.get("date").decode()

    def set_agreed(self, agreed: bool) -> None:
        self._store.set("agreed", "yes" if agreed else "")

    def agreed(self) -> bool:
        """Waits for rank 0."""
        return bool(self._store.get("agreed"))

    def post_device(self, rank: int, name: str) -> None:
        self._store.set(f"device/{rank}", name)

    def devices(self, ranks: Iterable[int]) -> list[str]:
        """The names of these ranks' devices; waits for them."""
        return [self._store.get(f"device/{rank}").decode() for rank in ranks]

    def set_run_prefix(self, prefix: str) -> None:
        self._store.set("run prefix", prefix)

    def run_prefix(self) -> str:
        """Waits for rank 0."""
        return self._store.get("run prefix").decode()

    def set_replica_number(self, replica: int, replicas: int) -> None:
        self._store.set("replica number", json.dumps([replica, replicas]))

    def replica_number(self) -> tuple[int, int]:
        """This job's number in the run that it joined, and the primary job's number of replicas;
        waits for rank 0.
        """
        replica, replicas = json.loads(self._store.get("replica number"))
        return replica, replicas

    def set_resume_point(self, text: str) -> None:
        self._store.set("resume point", text)

    def resume_point(self) -> str:
        """Waits for rank 0."""
        return self._store.get("resume point").decode()

    def request_stop(self, code: int) -> None:
        self._store.set("stop", str(code))

    def stop_requested(self) -> int | None:
        return self._code("stop")

    def end(self, code: int) -> None:
        self._store.set("end", str(code))

    def ended(self) -> int | None:
        return self._code("end")

    def leave(self, rank: int) -> None:
        self._store.set(f"left/{rank}", "")

    def has_left(self, rank: int) -> bool:
        return self._store.check([f"left/{rank}"])

    def sign(self, rank: int, amount: int) -> int:
        """The signs of life of a rank, after `amount` more."""
        return self._store.add(f"alive/{rank}", amount)

    def set_collective_failed(self, rank: int) -> None:
        self._store.set(f"collective failed/{rank}", "")

    def collective_failed(self, rank: int) -> bool:
        return self._store.check([f"collective failed/{rank}"])

    def _code(self, key: str) -> int | None:
        return int(self._store.get(key)) if self._store.check([key]) else None


def keys_of_this_start(store: dist.Store) -> dist.Store:
    """The keys of the job in the store at MASTER_ADDR:MASTER_PORT.

    torchrun's agents keep one store when they start their ranks again: all keys of another start
    are stale.
    """
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class RendezvousStore:
    """Typed access to the keys of the rendezvous."""

    def __init__(self, store: dist.Store):
        self._store = dist.PrefixStore("rendezvous", store)

    def agree_on_size(self, size: int) -> int:
        """The number of ranks that the first caller named."""
        return int(self._store.compare_set("size", "", str(size)))

    def claim_rank(self, rank: int) -> bool:
        """Whether no other process has claimed this rank."""
        return self._store.add(f"rank/{rank}", 1) == 1

    def arrive(self, rank: int, host: str) -> None:
        self._store.set(f"host/{rank}", host)
        self._store.add("arrived", 1)

    def arrived(self) -> int:
        return self._store.add("arrived", 0)

    def host(self, rank: int) -> str | None:
        """The host of a rank that has arrived."""
        key = f"host/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def set_complete(self, complete: bool) -> None:
        self._store.set("complete", "yes" if complete else "")

    def wait_complete(self, timeout: float) -> bool:
        self._store.wait(["complete"], timedelta(seconds=timeout))
        return bool(self._store.get("complete"))


class SnapshotFailed(Exception):
    """Another rank could not write its part of a snapshot."""


class SnapshotProgress:
    """Typed access to the keys of one snapshot, for the thread that writes it.

    Waiting raises RunError after `timeout` seconds, and SnapshotFailed if a rank has failed.
    """

    def __init__(self, store: dist.Store, iteration: int, timeout: float):
        self._store = dist.PrefixStore(f"snapshot {iteration}", clone_store(store))
        self._timeout = timeout

    def set_created(self) -> None:
        self._store.set("created", "")

    def wait_created(self) -> None:
        self._wait(["created"])

    def set_written(self, rank: int) -> None:
        self._store.set(f"written/{rank}", "")

    def wait_written(self, ranks: int) -> None:
        self._wait([f"written/{rank}" for rank in range(ranks)])

    def post_hashes(self, rank: int, hashes: dict[str, tuple[str, int]]) -> None:
        """Report the SHA-256 and the digest of each file that this rank has read back."""
        self._store.set(f"hashes/{rank}", json.dumps(hashes))

    def wait_hashes(self, ranks: int) -> dict[str, tuple[str, int]]:
        """The reports of all ranks."""
        keys = [f"hashes/{rank}" for rank in range(ranks)]
        self._wait(keys)
        hashes: dict[str, tuple[str, int]] = {}
        for key in keys:
            for file, (sha, total) in json.loads(self._store.get(key)).items():
                hashes[file] = (sha, total)
        return hashes

    def fail(self, reason: str) -> None:
        self._store.set("failed", reason)

    def delete(self, ranks: int) -> None:
        """Delete the keys of a snapshot of which no rank makes use any more."""
        for key in ("created", "failed"):
            self._store.delete_key(key)
        for rank in range(ranks):
            self._store.delete_key(f"written/{rank}")
            self._store.delete_key(f"hashes/{rank}")

    def failure(self) -> str | None:
        return self._store.get("failed").decode() if self._store.check(["failed"]) else None

    def _wait(self, keys: list[str]) -> None:
        wait_for_keys(self._store, keys, self._timeout, "snapshot", self._raise_failure)

    def _raise_failure(self) -> None:
        if self.failure() is not None:
            raise SnapshotFailed
