"""Heartbeats: a replica shows that it is alive, and finds out which others are not."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from shardes.errors import PRIMARY_LOST
from shardes.replicas.protocol import RunStore

BEATS = 12  # heartbeats per `replicas.timeout`


class Heartbeats:
    """Sends the heartbeats of one replica from a thread of its leader, while the context is open.

    Args:
        store: the run's store.
        connection: for the thread: another one to torch's store, on which the main thread may wait.
        replica: this replica's number.
        timeout: seconds without a heartbeat after which a replica counts as dead.
    """

    def __init__(self, store: RunStore, connection: RunStore, replica: int, timeout: float):
        self.timeout = timeout
        self._store, self._connection, self._replica = store, connection, replica
        self._seen: dict[int, tuple[int, float]] = {}  # heartbeats of a replica, and since when
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Heartbeats":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave: other replicas may take over this one's pieces at once."""
        self._closed.set()
        self._thread.join(self.timeout)
        with suppress(dist.DistError):
            self._store.leave(self._replica)

    def is_dead(self, replica: int) -> bool:
        """Whether a replica has left, or its heartbeats have stood still for `timeout` seconds.

        The time counts from the first call for that replica.
        """
        if self._store.has_left(replica):
            return True
        now, beats = time.monotonic(), self._store.heartbeats(replica)
        before, since = self._seen.get(replica, (None, now))
        self._seen[replica] = (beats, since if beats == before else now)
        return now - self._seen[replica][1] > self.timeout

    def _run(self) -> None:
        try:
            self._beat()
            while not self._closed.wait(self.timeout / BEATS):
                self._beat()
        except dist.DistError:
            if not self._closed.is_set():
                self._on_lost_store()

    def _beat(self) -> None:
        self._connection.beat(self._replica)

    def _on_lost_store(self) -> None:
        """Do nothing: ranks of the primary job are stopped by their `ShutdownWatcher`."""


class ClientHeartbeats(Heartbeats):
    """Those of a replica that joined: it ends when the run ends, or when the primary job is gone.

    Args:
        stop: called from the thread with the exit code.
    """

    def __init__(
        self,
        store: RunStore,
        connection: RunStore,
        replica: int,
        timeout: float,
        stop: Callable[[int], None],
    ):
        super().__init__(store, connection, replica, timeout)
        self._stop = stop

    def _beat(self) -> None:
        super()._beat()
        code = self._connection.ended()
        if code is not None:
            self._closed.set()
            self._stop(code)

    def _on_lost_store(self) -> None:
        self._stop(PRIMARY_LOST)


def end_run(store: RunStore, replicas: int, timeout: float, code: int) -> None:
    """Tell the replicas that joined that the run ends with `code`, and wait briefly until they have
    left.

    Args:
        replicas: the primary job's number of replicas.
        timeout: as for `Heartbeats`.
    """
    with suppress(dist.DistError):
        store.end(code)
        joined = list(range(replicas, store.number_of_replicas()))
        deadline = time.monotonic() + 2 * timeout / BEATS
        while joined and time.monotonic() < deadline:
            time.sleep(0.05)
            joined = [replica for replica in joined if not store.has_left(replica)]
