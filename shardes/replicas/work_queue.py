"""A queue of pieces of work that replicas share out among themselves.

A replica claims the next piece and posts its result. A faster replica claims more pieces. The piece
of a replica that died is taken over by another; of two results the first counts. What crosses does
not depend on the size of the model.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from shardes.clock import Clock
from shardes.distributed.store import backoff_sleep, no_poll
from shardes.distributed.world import NOTHING, World
from shardes.errors import RunError
from shardes.replicas.heartbeat import Heartbeats
from shardes.replicas.protocol import NOBODY, QueueStore

DONE, WAITING = -1, -2  # in place of the number of a piece to take over
ORPHAN_CHECKS = 32  # pieces that a waiting replica looks up at a time: it may be one of thousands
NEWS_CHECKS = 1024  # pieces that the primary rank looks up at a time, between two members


def never() -> bool:
    """A queue that is not deleted while this rank may use it."""
    return False


class WorkQueue:
    """Pieces numbered from 0 and their results, which are texts.

    Every rank of a replica makes the same calls; only its leader uses the store.

    Args:
        name: of the queue, in messages.
        count: number of pieces.
        timeout: seconds without a new result after which a wait fails.
        known: results that were known before, by piece; no replica is to work on these.
        finished: whether the queue is over, for a leader that may be late: its keys may be deleted.
        heartbeats: on a leader whose replica may take over pieces of dead replicas.
        poll: called while waiting; what it raises ends the wait.
        clock: waiting counts as its part "exchange".
    """

    def __init__(
        self,
        world: World,
        store: QueueStore,
        name: str,
        count: int,
        timeout: float,
        *,
        known: Mapping[int, str] = NOTHING,
        finished: Callable[[], bool] = never,
        heartbeats: Heartbeats | None = None,
        poll: Callable[[], None] = no_poll,
        clock: Clock | None = None,
    ):
        self._world, self._store, self._name = world, store, name
        self._count, self._timeout, self._known = count, timeout, known
        self._finished, self._heartbeats, self.poll, self._clock = (
            finished,
            heartbeats,
            poll,
            clock or Clock(),
        )
        self._unreported = deque(number for number in range(count) if number not in known)
        self._progress = (-1, 0.0)  # results so far, and since when
        self._unposted = deque(range(count))  # pieces whose result this replica has not seen
        self._unposted.rotate(-ORPHAN_CHECKS * world.replica)

    @property
    def bytes(self) -> int:
        """Keys and values that this rank has exchanged with the store."""
        return self._store.bytes

    def post_known(self) -> None:
        """Post the results that were known before; for one rank of the run."""
        for number, result in self._known.items():
            self.post(number, result)

    def claims(self) -> Iterator[int]:
        """Claim pieces for this replica, one at a time, until none is left."""
        while True:
            number = int(self._world.run_on_leader(self._claim))
            if number >= self._count:
                return
            yield number

    def _claim(self) -> int:
        if self._finished():
            return self._count
        number = self._store.claim()
        while number in self._known:
            number = self._store.claim()
        if number < self._count:
            self._store.set_claimant(number, self._world.replica)
        return number

    def orphans(self, size: int = 1) -> Iterator[list[int]]:
        """Wait until all results are there; take over the pieces of replicas that died, at most
        `size` at a time.

        Raises:
            RunError: no result was posted for `timeout` seconds; names pieces and replicas.
        """
        since = time.monotonic()
        while True:
            with self._clock("exchange"):
                taken: list[int] = []
                while len(taken) < size:
                    orphan = partial(self._orphan, since, wait=not taken)
                    number = int(self._world.run_on_leader(orphan))
                    if number >= 0:
                        taken.append(number)
                    elif taken or number == DONE:
                        break
            if not taken:
                return
            yield taken
            since = time.monotonic()

    def _orphan(self, since: float, wait: bool) -> int:
        """A piece of a dead replica; if there is none, DONE, or WAITING, after a while with `wait`.

        Args:
            since: when the wait began.
        """
        assert self._heartbeats
        if self._finished():
            return DONE
        if self._wait_done(since, self._heartbeats.timeout / 4 if wait else -1.0):
            return DONE
        for number, posted in self._look_up(self._unposted, ORPHAN_CHECKS):
            if posted:
                continue
            claimant = self._store.claimant(number)
            dead = self._heartbeats.is_dead(claimant)
            if dead and self._store.take_over(number, claimant, self._world.replica):
                return number
        # A replica may have died between posting a result and counting it.
        return WAITING if self._unposted else DONE

    def post(self, number: int, result: str) -> None:
        """Post a result, unless a replica that took the piece over was first."""
        if self._world.is_leader and not self._finished():
            self._store.post(number, self._world.replica, result)

    def number_done(self) -> int:
        return self._store.number_done()

    def news(self) -> Iterator[tuple[int, str]]:
        """Results that earlier calls did not yield and that were not known, by piece; not all at
        once.
        """
        if self.number_done() > self._count - len(self._unreported):
            for number, posted in self._look_up(self._unreported, NEWS_CHECKS):
                if posted:
                    yield number, self._store.result(number)

    def _look_up(self, pieces: deque[int], limit: int) -> Iterator[tuple[int, bool]]:
        """At most `limit` of the pieces, and whether their results are posted: these leave the
        deque.
        """
        for _ in range(min(limit, len(pieces))):
            number = pieces.popleft()
            posted = self._store.is_posted(number)
            if not posted:
                pieces.append(number)
            yield number, posted

    def collect(self) -> list[str]:
        """All results in order, on a leader; waits for the other replicas.

        Raises:
            RunError: no result was posted for `timeout` seconds; names pieces and replicas.
        """
        with self._clock("exchange"):
            self._wait_done(time.monotonic())
            return [self._store.result(number) for number in range(self._count)]

    def _wait_done(self, since: float, seconds: float = math.inf) -> bool:
        """Wait for at most `seconds`; whether all results are there."""
        deadline = time.monotonic() + seconds
        while self._unposted and (done := self.number_done()) < self._count:
            now = time.monotonic()
            if done > self._progress[0]:
                self._progress = done, now
            if now - self._progress[1] > self._timeout:
                raise RunError(
                    f"{self._name}: nothing new for {self._timeout:.0f} s; "
                    f"missing: {self._missing()}; end what hangs, or raise run.timeout"
                )
            if now > deadline:
                return False
            self.poll()
            backoff_sleep(since)
        return True

    def _missing(self) -> str:
        """The pieces without a result, each with its replica."""
        missing = [n for n in range(self._count) if not self._store.is_posted(n)]
        claimants = {number: self._store.claimant(number) for number in missing}
        return ", ".join(
            f"{number} (replica {'?' if claimant == NOBODY else claimant})"
            for number, claimant in claimants.items()
        )
