"""The keys that the replicas of a run share in its store, and what they hold.

The run's store is the primary job's, under a random prefix. Replicas of other jobs reach it through
the gateway, which permits them what `replicas.access` lists. T counts iterations, K replicas, N the
pieces of a work queue.

| key | value | set by |
| --- | --- | --- |
| `welcome` | `Welcome`: what a job must share with the run to join it | primary |
| `current iteration` | `CurrentIteration`: where a replica that joins begins | primary |
| `replicas` | counter: a replica that joins takes the next number | replicas that join |
| `finished` | counter: the number of finished iterations | primary |
| `record/T` | the journal's record of iteration T: the update of every center | primary |
| `heartbeat/K` | counter of replica K's heartbeats | leader of K |
| `left/K` | "": replica K has left; its pieces may be taken over at once | leader of K, gateway |
| `over` | exit code: the run has ended | primary |
| `center T/replica K` | digest of replica K's center | leader of K |
| `center T/rank R` | digests by parameter, where the centers differ | rank R |
| `Q/claimed` | counter: pieces of queue Q that have been claimed | leaders |
| `Q/claimant/N` | replica that works on piece N | leaders |
| `Q/result/N` | "K:" and the result of piece N; the first one counts | leaders |
| `Q/done` | counter of the results | leaders |

A queue Q is `iteration T` (its pieces are members, its results `MemberResult`s), `evaluation T`
(the center's responses, as token ids), or `evaluation` (of `shardes evaluate`). The keys of a queue
are deleted `KEPT_QUEUES` iterations later, a record `KEPT_RECORDS` iterations later, and the keys
of a comparison after the next one; a queue is over once its iteration is finished. A replica that
joined reads records through the gateway, from the journal. The other keys of the store belong to
the primary job's own ranks: see `distributed.job_store`.
"""

import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from shardes.distributed.store import (
    KeyValueStore,
    PrefixStore,
    clone_store,
    no_poll,
    tcp_store,
    wait_for_keys,
    wait_until,
)
from shardes.distributed.world import Job
from shardes.errors import RunError
from shardes.storage.journal import Header, Record

NOBODY = -1  # in place of a replica's number: it never sends a heartbeat
KEPT_QUEUES = 2  # iterations
KEPT_RECORDS = 64  # iterations: a replica of the same launch cannot be later
GONE = "?"  # in place of a record that is not there


@dataclass(frozen=True)
class MemberResult:
    """What a replica reports of a member that it evaluated.

    `reward` is the mean of its rewards over prompts, and `scores` those rewards where each prompt
    is standardized. `finished` is in seconds since the epoch, by the replica's clock. `failures`
    counts responses that could not be scored, by metric. `parts` are the means over prompts of the
    other named numbers of its rewards.
    """

    reward: float
    tokens: int  # generated
    replica: int
    finished: float
    scores: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """The fields' values, without their names and without empty ones at the end: many of these
        cross the network.
        """
        failures = {name: count for name, count in self.failures.items() if count}
        values: list[Any] = [self.reward, self.tokens, self.replica, self.finished]
        values += [self.scores, failures, self.parts]
        while not values[-1] and len(values) > 4:
            values.pop()
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "MemberResult":
        return cls(*json.loads(text))


@dataclass(frozen=True)
class Welcome:
    """What a job must have in common with the run, and the primary job's number of replicas."""

    header: Header
    replicas: int


@dataclass(frozen=True)
class CurrentIteration:
    """The iteration that a replica which joins now begins with, the digest of the center before it,
    and whether that center was evaluated before the run started.
    """

    iteration: int
    digest: str
    evaluated: bool = False


class RunStore:
    """Typed access to the keys of the run; each thread needs its own connection.

    Args:
        store: the primary job's, or the gateway's, which adds the prefix itself.
    """

    def __init__(self, store: KeyValueStore, prefix: str = ""):
        self.prefix = prefix
        self._base = store
        self._store = PrefixStore(prefix, store) if prefix else store

    @classmethod
    def of_job(cls, job: Job) -> "RunStore":
        """The run's store in the store of the primary job. Every rank of the job calls this."""
        # torchrun keeps one store when it starts ranks again: the keys of another start are stale.
        if job.rank == 0:
            job.keys.set_run_prefix(secrets.token_hex(8))
        return cls(tcp_store(job.store), job.keys.run_prefix())

    def clone(self) -> "RunStore":
        """Another connection; not through the gateway."""
        assert isinstance(self._base, dist.Store)
        return RunStore(clone_store(self._base), self.prefix)

    @property
    def keys(self) -> KeyValueStore:
        """The keys, without types."""
        return self._store

    def queue(self, name: str) -> "QueueStore":
        return QueueStore(PrefixStore(name, self._store))

    def welcome(self, welcome: Welcome) -> None:
        """Let replicas join: they are numbered from `welcome.replicas` on."""
        self._store.add("replicas", welcome.replicas)
        self._store.set("welcome", json.dumps(asdict(welcome)))

    def read_welcome(self) -> Welcome:
        values = json.loads(self._store.get("welcome"))
        return Welcome(Header(**values["header"]), values["replicas"])

    def take_replica_number(self) -> int:
        return self._store.add("replicas", 1) - 1

    def number_of_replicas(self) -> int:
        """The number of replicas, including those that left. 0 if no replica can join."""
        return self._store.add("replicas", 0)

    def announce(self, current: CurrentIteration) -> None:
        self._store.set("current iteration", json.dumps(asdict(current)))

    def wait_current(self, timeout: float) -> CurrentIteration:
        """Wait for the primary job's announcement.

        Raises:
            RunError: there was none within `timeout` seconds.
        """
        key = "current iteration"
        wait_for_keys(self._store, [key], timeout, "the run's primary job is not ready")
        return CurrentIteration(**json.loads(self._store.get(key)))

    def begin(self, iteration: int) -> None:
        """Say, once, that the iterations before this one were finished earlier."""
        self._store.add("finished", iteration)

    def publish(self, record: Record) -> None:
        """Publish the record of the first iteration that is not finished: then it is."""
        self._store.set(f"record/{record.iteration}", json.dumps(asdict(record)))
        finished = self._store.add("finished", 1)
        assert finished == record.iteration + 1
        self._store.delete_key(f"record/{record.iteration - KEPT_RECORDS}")

    def number_finished(self) -> int:
        """The number of finished iterations."""
        return self._store.add("finished", 0)

    def is_finished(self, iteration: int) -> bool:
        return self.number_finished() > iteration

    def record(self, iteration: int) -> Record:
        """The record of an iteration that is finished.

        Raises:
            RunError: it has been deleted.
        """
        # A comparison in place of `get`, which would wait if the record were deleted meanwhile.
        text = self._store.compare_set(f"record/{iteration}", GONE, GONE).decode()
        if text == GONE:
            raise RunError(
                f"this replica is more than {KEPT_RECORDS} iterations late: the store no longer "
                f"has the record of iteration {iteration}; start the same command again to go on"
            )
        return Record(**json.loads(text))

    def wait_record(
        self, iteration: int, timeout: float, poll: Callable[[], None] = no_poll
    ) -> Record:
        """Wait for a record, calling `poll` meanwhile.

        Raises:
            RunError: it was not published within `timeout` seconds, or it has been deleted since.
        """
        wait_until(
            lambda: self.is_finished(iteration),
            timeout,
            f"the primary rank's record of iteration {iteration}",
            lambda: f"record/{iteration}",
            poll,
        )
        return self.record(iteration)

    def beat(self, replica: int) -> None:
        self._store.add(f"heartbeat/{replica}", 1)

    def heartbeats(self, replica: int) -> int:
        return self._store.add(f"heartbeat/{replica}", 0)

    def leave(self, replica: int) -> None:
        self._store.set(f"left/{replica}", "")

    def has_left(self, replica: int) -> bool:
        return self._store.check([f"left/{replica}"])

    def end(self, code: int) -> None:
        self._store.set("over", str(code))

    def ended(self) -> int | None:
        """The exit code with which the run has ended."""
        return int(self._store.get("over")) if self._store.check(["over"]) else None

    def compare_centers(self, iteration: int) -> "CenterStore":
        return CenterStore(PrefixStore(f"center {iteration}", self._store), iteration)


class CenterStore:
    """The keys with which replicas compare their centers before one iteration."""

    def __init__(self, store: KeyValueStore, iteration: int):
        self._store, self._what = store, f"iteration {iteration}: comparing centers"

    def post_digest(self, replica: int, digest: str) -> None:
        self._store.set(f"replica {replica}", digest)

    def digests(
        self, replicas: int, timeout: float, poll: Callable[[], None] = no_poll
    ) -> list[str]:
        """The digest of each replica's center; waits for them, calling `poll` meanwhile.

        Raises:
            RunError: a replica has posted none after `timeout` seconds.
        """
        keys = [f"replica {replica}" for replica in range(replicas)]
        wait_for_keys(self._store, keys, timeout, self._what, poll)
        return [self._store.get(key).decode() for key in keys]

    def post_tensor_digests(self, rank: int, digests: dict[str, str]) -> None:
        self._store.set(f"rank {rank}", json.dumps(digests))

    def tensor_digests(self, ranks: int, timeout: float) -> list[dict[str, str]]:
        """Each rank's digests by parameter; waits for them.

        Raises:
            RunError: a rank has posted none after `timeout` seconds.
        """
        keys = [f"rank {rank}" for rank in range(ranks)]
        wait_for_keys(self._store, keys, timeout, self._what)
        return [json.loads(self._store.get(key)) for key in keys]

    def delete_digests(self, replicas: int) -> None:
        for replica in range(replicas):
            self._store.delete_key(f"replica {replica}")


class QueueStore:
    """The keys of one work queue. `bytes` counts keys and values, sent and received."""

    def __init__(self, store: KeyValueStore):
        self._store = store
        self.bytes = 0

    def claim(self) -> int:
        """The next piece that no replica has claimed; beyond the last one, there is none."""
        return self._add("claimed", 1) - 1

    def set_claimant(self, piece: int, replica: int) -> None:
        self._set(f"claimant/{piece}", str(replica))

    def claimant(self, piece: int) -> int:
        """The replica that works on a piece; NOBODY if none does or if it died while claiming."""
        # A comparison in place of `get`, which would wait if the queue were deleted meanwhile.
        return int(self._compare_set(f"claimant/{piece}", str(NOBODY), str(NOBODY)))

    def take_over(self, piece: int, claimant: int, replica: int) -> bool:
        """Whether `replica` becomes the claimant: the first of several replicas that ask does."""
        before = "" if claimant == NOBODY else str(claimant)
        return self._compare_set(f"claimant/{piece}", before, str(replica)) == str(replica)

    def post(self, piece: int, replica: int, result: str) -> None:
        """Post a result, unless there is one already."""
        text = f"{replica}:{result}"
        if self._compare_set(f"result/{piece}", "", text) == text:
            self._add("done", 1)

    def is_posted(self, piece: int) -> bool:
        return self._store.check([f"result/{piece}"])

    def result(self, piece: int) -> str:
        """A result that has been posted."""
        return self._get(f"result/{piece}").partition(":")[2]

    def number_done(self) -> int:
        return self._add("done", 0)

    def delete(self, pieces: int) -> None:
        """Delete the keys of a queue of so many pieces, of which nobody makes use any more."""
        for key in ("claimed", "done"):
            self._store.delete_key(key)
        for piece in range(pieces):
            self._store.delete_key(f"claimant/{piece}")
            self._store.delete_key(f"result/{piece}")

    def _compare_set(self, key: str, expected: str, value: str) -> str:
        now = self._store.compare_set(key, expected, value)
        self.bytes += len(key) + len(expected) + len(value) + len(now)
        return now.decode()

    def _set(self, key: str, value: str) -> None:
        self.bytes += len(key) + len(value.encode())
        self._store.set(key, value)

    def _get(self, key: str) -> str:
        value = self._store.get(key)
        self.bytes += len(key) + len(value)
        return value.decode()

    def _add(self, key: str, amount: int) -> int:
        self.bytes += len(key) + 16  # the amount, and the sum that comes back
        return self._store.add(key, amount)
