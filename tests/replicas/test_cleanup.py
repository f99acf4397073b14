"""The store of a long run holds keys and bytes that do not grow."""

import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
from gateways import LIMITS, SECRET

from shardes.clock import Clock
from shardes.config.schema import Config
from shardes.errors import RunError
from shardes.es.population import Iteration
from shardes.replicas import access, work_queue
from shardes.replicas.consistency import ConsistencyCheck
from shardes.replicas.coordinator import ClientLeader, FollowerCoordinator, PrimaryCoordinator
from shardes.replicas.gateway import StoreGateway
from shardes.replicas.gateway_client import connect
from shardes.replicas.heartbeat import Heartbeats
from shardes.replicas.member_queue import IterationResults
from shardes.replicas.protocol import KEPT_RECORDS, CurrentIteration, MemberResult, RunStore
from shardes.storage.journal import read

ITERATIONS, COMPARED, LATE = 160, 10, 120
SHARED = dict(timeout=20.0, poll=lambda: None, clock=Clock())


@pytest.fixture
def config() -> Config:
    config = Config()
    config.es.population_size = 6
    return config


def world(replica: int) -> SimpleNamespace:
    return SimpleNamespace(
        replica=replica,
        replicas=2,
        is_leader=True,
        is_primary=replica == 0,
        job=SimpleNamespace(rank=replica, size=2),
        run_on_leader=lambda work: work() or 0.0,
    )


class Replica:
    """One replica's part of a run without a model, through its coordinator."""

    def __init__(self, number: int, store: RunStore, config: Config, journal=None, measure=None):
        self.world, self.config = world(number), config
        self.measure, self.measured = measure or (lambda: None), []
        self.iteration = 0
        ignore = SimpleNamespace(
            member_finished=lambda tokens: None,
            progress=lambda iteration, done: None,
        )
        heartbeats = Heartbeats(store, store.clone(), number, 20.0)
        self.coordinator = (
            FollowerCoordinator(self.world, store, heartbeats, **SHARED)
            if number
            else PrimaryCoordinator(
                self.world,
                store,
                heartbeats,
                journal,
                config.es,
                "",  # the rule of the paper
                ignore,
                **SHARED,
            )
        )
        self.check = ConsistencyCheck(self.world, store, None, COMPARED, 20.0)

    def run(self, before_post=lambda iteration: None) -> None:
        self.coordinator.start(0, "digest", False)
        for t in range(ITERATIONS):
            self.iteration = t
            iteration = Iteration.derive(self.config, t, "digest", [[1], [2]])
            self.check.check(t, "digest")
            evaluation = self.coordinator.work_queue("evaluation", t, 2)
            for number in evaluation.claims():
                evaluation.post(number, "[]")
            queue = self.coordinator.member_queue(iteration, 1)
            for group in queue:
                before_post(t)
                number = self.world.replica
                for member in group:
                    queue.post(member, MemberResult(float(member), 1, number, time.time()))
            results = queue.results()
            for (number,) in evaluation.orphans():
                evaluation.post(number, "[]")
            self.coordinator.commit(iteration, results)
            if t % 10 == 0:
                self.measured.append(self.measure())


def finish_all(run: RunStore, config: Config, journal) -> None:
    """All iterations of a run with one replica."""
    coordinator = Replica(0, run, config, journal).coordinator
    coordinator.start(0, "digest", False)
    for t in range(ITERATIONS):
        iteration = Iteration.derive(config, t, "digest", [[1], [2]])
        coordinator.member_queue(iteration, 1)
        results = [MemberResult(float(number), 1, 0, 1.0) for number in range(6)]
        coordinator.commit(iteration, IterationResults(results))


def size(store) -> tuple[int, int]:
    """The number of a store's keys, and the bytes of their values."""
    keys = store.list_keys()
    return len(keys), sum(len(store.get(key)) for key in keys if store.check([key]))


def test_the_store_of_a_long_run_does_not_grow(store, config, journal, monkeypatch):
    """One of the replicas counts as dead, but lives, and misses several iterations: late, it finds
    them done.
    """
    monkeypatch.setattr(work_queue, "backoff_sleep", lambda since: time.sleep(0.001))
    run = RunStore(store, "prefix")
    primary = Replica(0, run, config, journal, lambda: size(store.clone()))
    late = Replica(1, run.clone(), config)
    missed: list[int] = []

    def miss_iterations(t: int) -> None:
        if t >= LATE and t % COMPARED < 3 and not missed:
            while primary.iteration < t + 5:
                time.sleep(0.001)
            missed.append(t)

    run.leave(1)
    threads = [
        threading.Thread(target=primary.run),
        threading.Thread(target=late.run, args=(miss_iterations,)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert primary.iteration == late.iteration == ITERATIONS - 1 and missed
    queues = 3 * (2 + 2 * 6) + 3 * (2 + 2 * 2) + 2 * 2 + 16  # three iterations', and the run's own
    keys, values = zip(*primary.measured, strict=True)
    assert max(keys) <= KEPT_RECORDS + queues, keys
    assert max(values[10:]) < 1.1 * max(values[8:10]), values


def test_a_replica_that_is_too_late_says_so(store, config, journal):
    run = RunStore(store, "prefix")
    late = Replica(1, run.clone(), config)
    finish_all(run, config, journal)
    iteration = Iteration.derive(config, ITERATIONS - KEPT_RECORDS, "digest", [[1], [2]])
    assert late.coordinator.commit(iteration, None).iteration == iteration.index
    iteration = Iteration.derive(config, ITERATIONS - KEPT_RECORDS - 1, "digest", [[1], [2]])
    with pytest.raises(RunError, match=f"more than {KEPT_RECORDS} iterations late"):
        late.coordinator.commit(iteration, None)


def test_who_joins_late_reads_all_records_from_the_journal(store, config, journal, monkeypatch):
    monkeypatch.setattr(access, "REPLY", 5000)  # several records
    run = RunStore(store, "prefix")
    finish_all(run, config, journal)
    written = read(journal.path).records
    gateway = StoreGateway("", 0, SECRET, run, LIMITS, journal.path, 5, print)
    with closing(gateway):
        client = connect(f"127.0.0.1:{gateway.port}", SECRET, 5)
        assert client.wait_current(1) == CurrentIteration(ITERATIONS - 1, "digest")
        assert [client.record(t) for t in range(ITERATIONS)] == written
        assert client.record(3) == client.wait_record(3, 1) == written[3]
        keys = store.num_keys()
        leader = ClientLeader(world(2), client, None, local := RunStore(store, "local"), **SHARED)
        leader.start(0, "digest", False)
        for t in range(ITERATIONS):
            iteration = Iteration.derive(config, t, "digest", [[1], [2]])
            assert leader.commit(iteration, None) == written[t]
        assert local.number_finished() == ITERATIONS
        assert store.num_keys() == keys + KEPT_RECORDS + 1


def test_a_late_replica_finds_a_deleted_queue_done(store, config, journal):
    run = RunStore(store, "prefix")
    late = Replica(1, run.clone(), config)
    iteration = Iteration.derive(config, 0, "digest", [[1], [2]])
    queue = late.coordinator.member_queue(iteration, 1)
    claimed = next(iter(queue))
    primary = Replica(0, run, config, journal)
    for number in range(6):
        run.queue("iteration 0").post(number, 0, MemberResult(0.5, 1, 0, 1.0).to_json())
    results = primary.coordinator.member_queue(iteration, 1).results()
    primary.coordinator.commit(iteration, results)
    run.queue("iteration 0").delete(6)
    keys = store.num_keys()
    queue.post(claimed[0], MemberResult(0.5, 1, 1, 1.0))
    assert list(queue) == [[]]  # nothing is left, so what was claimed must be posted
    assert late.coordinator.commit(iteration, results).iteration == 0
    assert store.num_keys() == keys
