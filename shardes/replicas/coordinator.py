"""Keeps all ranks of a run on the same iterations: the roles of a rank.

| role | rank | what it does |
| --- | --- | --- |
| `PrimaryCoordinator` | rank 0 of replica 0 | computes each update, journals and publishes it |
| `FollowerCoordinator` | other ranks of the primary job | receives the updates |
| `ClientCoordinator` | ranks of a job that joined | also compares its center with the run's |
| `ClientLeader` | rank 0 of such a job | also repeats the records for the job's other ranks |

A rank's role is chosen once, in `shardes.roles`. The trainer makes the same calls on all of them.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from shardes.clock import Clock
from shardes.config.schema import ESConfig
from shardes.distributed.world import NOTHING, World
from shardes.errors import ConfigError
from shardes.es.fitness import coefficients, fitness
from shardes.es.population import Iteration, noise_rank
from shardes.es.statistics import mean
from shardes.replicas.consistency import check_digest
from shardes.replicas.heartbeat import Heartbeats
from shardes.replicas.member_queue import (
    IterationResults,
    MemberObserver,
    MemberQueue,
    PrimaryMemberQueue,
)
from shardes.replicas.protocol import KEPT_QUEUES, CurrentIteration, MemberResult, RunStore
from shardes.replicas.work_queue import WorkQueue
from shardes.storage.journal import Finish, Journal, Record


class Coordinator(ABC):
    """What all roles share.

    Args:
        store: the run's. Ranks other than leaders read only records from it.
        heartbeats: those of this replica, on its leader.
        known: results of the iteration at which this start resumes, by member.
        timeout: seconds that a rank waits for another.
        poll: called while waiting; what it raises ends the wait.
        clock: waiting counts as its part "exchange".
    """

    def __init__(
        self,
        world: World,
        store: RunStore,
        heartbeats: Heartbeats | None,
        *,
        known: Mapping[int, MemberResult] = NOTHING,
        timeout: float,
        poll: Callable[[], None],
        clock: Clock,
    ):
        self._world, self._store, self._heartbeats = world, store, heartbeats
        self._known, self._timeout, self._poll, self._clock = known, timeout, poll, clock

    def start(self, iteration: int, digest: str, evaluated: bool) -> None:  # noqa: B027
        """The journal is replayed. The primary rank tells jobs that join where the run stands."""

    def work_queue(
        self, kind: str, iteration: int, count: int, known: Mapping[int, str] = NOTHING
    ) -> WorkQueue:
        """A queue of `count` pieces of an iteration that all replicas share out."""
        name = f"{kind} {iteration}"
        return WorkQueue(
            self._world,
            self._store.queue(name),
            name,
            count,
            self._timeout,
            known=known,
            finished=partial(self._is_finished, iteration),
            heartbeats=self._heartbeats,
            poll=self._poll,
            clock=self._clock,
        )

    def _is_finished(self, iteration: int) -> bool:
        return self._store.is_finished(iteration)

    def member_queue(self, iteration: Iteration, size: int) -> MemberQueue:
        """The iteration's members, in groups of at most `size`."""
        return MemberQueue(self._member_work(iteration), iteration, size, self._poll)

    def _member_work(self, iteration: Iteration) -> WorkQueue:
        known = {number: result.to_json() for number, result in self._known.items()}
        self._known = NOTHING  # later iterations start with none
        return self.work_queue("iteration", iteration.index, len(iteration.members), known)

    def commit(self, iteration: Iteration, results: IterationResults) -> Record:
        """The iteration's record, once it is in the journal: the center may be updated by it."""
        with self._clock("exchange"):
            return self._commit(iteration, results)

    @abstractmethod
    def _commit(self, iteration: Iteration, results: IterationResults) -> Record: ...

    def finish(self, iterations: int, digest: str) -> None:  # noqa: B027
        """Journal the final center's digest. For the primary rank."""


class PrimaryCoordinator(Coordinator):
    """Owns the journal: rewards and records are on disk before other ranks act on them."""

    def __init__(
        self,
        world: World,
        store: RunStore,
        heartbeats: Heartbeats,
        journal: Journal,
        es: ESConfig,
        rule: str,
        observer: MemberObserver,
        **shared,
    ):
        super().__init__(world, store, heartbeats, **shared)
        self._journal, self._es, self._rule, self._observer = journal, es, rule, observer
        self._queues: list[tuple[int, str, int]] = []  # iteration, name and pieces
        self._announced = -1  # iteration

    def start(self, iteration: int, digest: str, evaluated: bool) -> None:
        self._store.begin(iteration)
        self._announce(CurrentIteration(iteration, digest, evaluated))

    def _announce(self, current: CurrentIteration) -> None:
        self._announced = current.iteration
        self._store.announce(current)

    def work_queue(
        self, kind: str, iteration: int, count: int, known: Mapping[int, str] = NOTHING
    ) -> WorkQueue:
        self._queues.append((iteration, f"{kind} {iteration}", count))
        return super().work_queue(kind, iteration, count, known)

    def _is_finished(self, iteration: int) -> bool:
        return False  # this rank itself finishes it

    def member_queue(self, iteration: Iteration, size: int) -> MemberQueue:
        if iteration.index > self._announced:
            self._announce(CurrentIteration(iteration.index, iteration.digest))
        work = self._member_work(iteration)
        return PrimaryMemberQueue(work, iteration, size, self._poll, self._journal, self._observer)

    def _commit(self, iteration: Iteration, results: IterationResults) -> Record:
        record = iteration_record(self._es, self._rule, iteration, results.members)
        self._journal.append(record)
        self._store.publish(record)
        self._delete_queues(iteration.index - KEPT_QUEUES)
        return record

    def _delete_queues(self, last: int) -> None:
        """Delete the keys of the queues up to iteration `last`: the store must not grow."""
        while self._queues and self._queues[0][0] <= last:
            _, name, pieces = self._queues.pop(0)
            self._store.queue(name).delete(pieces)

    def finish(self, iterations: int, digest: str) -> None:
        self._journal.append(Finish(iterations, digest))


class FollowerCoordinator(Coordinator):
    """Receives the records that the primary rank publishes."""

    def _commit(self, iteration: Iteration, results: IterationResults) -> Record:
        return self._store.wait_record(iteration.index, self._timeout, self._poll)


class ClientCoordinator(Coordinator):
    """A rank of a job that joined; `local` is a store of this job, in which its leader repeats the
    records.
    """

    def __init__(
        self,
        world: World,
        store: RunStore,
        heartbeats: Heartbeats | None,
        local: RunStore,
        **shared,
    ):
        super().__init__(world, store, heartbeats, **shared)
        self._local = local

    def _commit(self, iteration: Iteration, results: IterationResults) -> Record:
        record = self._receive(iteration.index)
        check_digest(
            f"the center before iteration {iteration.index}", iteration.digest, record.digest
        )
        return record

    def _receive(self, iteration: int) -> Record:
        return self._local.wait_record(iteration, self._timeout, self._poll)


class ClientLeader(ClientCoordinator):
    """The leader of a job that joined: it alone is connected to the run's store."""

    def start(self, iteration: int, digest: str, evaluated: bool) -> None:
        self._local.begin(iteration)

    def _receive(self, iteration: int) -> Record:
        record = self._store.wait_record(iteration, self._timeout, self._poll)
        self._local.publish(record)
        return record


def iteration_record(
    es: ESConfig, rule: str, iteration: Iteration, results: list[MemberResult]
) -> Record:
    """What the journal says of an iteration: the members' rewards and the update that follows from
    them.

    Args:
        rule: the name of the user's, or "".
    """
    weights = fitness(es, [result.scores or [result.reward] for result in results])
    failures: Counter[str] = Counter()
    for result in results:
        failures.update(result.failures)
    return Record(
        iteration.index,
        iteration.seeds,
        [result.reward for result in results],
        coefficients(es, iteration.alpha, weights),
        iteration.sigma,
        iteration.alpha,
        iteration.digest,
        es.weight_decay,
        es.decay_to.value,
        es.evolve,
        iteration.prompt_numbers,
        sum(result.tokens for result in results),
        dict(+failures),  # those that happened
        noise_rank(es),
        mean_parts([result.parts for result in results]),
        rule,
    )


def mean_parts(members: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over members of each named part of their rewards. A member without any, whose
    responses all failed, does not count.

    Raises:
        ConfigError: members have different ones.
    """
    having = [parts for parts in members if parts]
    names = sorted({name for parts in having for name in parts})
    if lacking := [name for name in names if not all(name in parts for parts in having)]:
        raise ConfigError(
            f"task: only some members' rewards have a number {lacking[0]}; every reward must have "
            "the same named numbers"
        )
    return {name: mean([parts[name] for parts in having]) for name in names}
