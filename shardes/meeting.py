"""Where a run's replicas meet: what was decided, who is alive, and when it is over.

The *home* is the launch that owns the run directory. Its rank 0 decides what an iteration comes to, writes it to the
journal and publishes it here; every other rank applies what it reads. Replicas of other launches join through the
home's door (`shardes.door`), and may leave or die at any time: whose signs of life cease loses its members to others.
"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

import torch.distributed as dist

from shardes.journal import Record
from shardes.stop import HOME_LOST, Stopped
from shardes.world import World, await_keys

BEATS = 12  # signs of life per `replicas.timeout`


class Meeting:
    """A rank's part in it. Only ranks that lead their replica show signs of life.

    Args:
        store: another connection to the store in which `world.store` is; None on ranks that lead no replica.
        timeout: seconds without a sign of life after which a replica is dead.
        patience: seconds that a rank waits for what another must do.
        stop: what to call, with an exit code, where the run ends without this replica's doing. From a thread.
    """

    def __init__(
        self,
        world: World,
        store: dist.Store | None,
        timeout: float,
        patience: float,
        stop: Callable[[int], None] = lambda code: None,
    ):
        self._world, self._store, self._patience, self._stop = world, store, patience, stop
        self.timeout = timeout
        self._seen: dict[str, tuple[int, float]] = {}  # beats of other replicas, and since when they are so many
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        if store is not None:
            self._thread.start()

    def begin(self, iteration: int, digest: str) -> None:
        """Say, on the rank that keeps the journal, which iteration is under way, and the digest of its center."""
        self._world.store.set("now", json.dumps([iteration, digest]))

    def publish(self, record: Record) -> None:
        """Tell all replicas what an iteration came to, once it is in the journal."""
        self._world.store.set(f"record/{record.iteration}", json.dumps(asdict(record)))

    def await_record(self, iteration: int, poll: Callable[[], None]) -> Record:
        """What an iteration came to; every rank that did not publish it calls this.

        Raises:
            RunError: it was not published in time.
        """
        key, what = f"record/{iteration}", "what the run's home made of the iteration"
        near = self._world.near
        if self._world.joined and self._world.leads:
            await_keys(self._world.store, [key], self._patience, what, poll)
            near.set(key, self._world.store.get(key).decode())
        await_keys(near, [key], self._patience, what, poll)
        return Record(**json.loads(near.get(key)))

    def dead(self, replica: str) -> bool:
        """Whether a replica has left, or has shown no sign of life for `timeout` seconds of looking."""
        if self._world.store.check([f"gone/{replica}"]):
            return True
        now, beats = time.monotonic(), self._world.store.add(f"alive/{replica}", 0)
        before, since = self._seen.get(replica, (None, now))
        self._seen[replica] = (beats, since if beats == before else now)
        return now - self._seen[replica][1] > self.timeout

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Leave: what this replica has begun may be taken over at once. With the home's rank 0 the run is over."""
        if self._store is None:
            return
        self._closed.set()
        self._thread.join(self.timeout)
        with suppress(dist.DistError):
            self._world.store.set(f"gone/{self._world.replica}", "")
            if self._world.speaks:
                self._end(0 if error is None else error.code if isinstance(error, Stopped) else 1)

    def _end(self, code: int) -> None:
        """Tell the replicas that have joined that the run ends with `code`, and wait, not for long, till they leave."""
        store = self._world.store
        store.set("over", str(code))
        staying = [str(n) for n in range(self._world.replicas, store.add("replicas", 0))]
        until = time.monotonic() + 2 * self.timeout / BEATS
        while staying and time.monotonic() < until:
            time.sleep(0.05)
            staying = [replica for replica in staying if not store.check([f"gone/{replica}"])]

    def _live(self) -> None:
        assert self._store is not None
        try:
            while True:
                self._store.add(f"alive/{self._world.replica}", 1)
                if self._world.joined and self._store.check(["over"]):
                    self._stop(int(self._store.get("over")))
                    return
                if self._closed.wait(self.timeout / BEATS):
                    return
        except dist.DistError:
            if self._world.joined and not self._closed.is_set():  # a home's ranks hear of it otherwise
                self._stop(HOME_LOST)
