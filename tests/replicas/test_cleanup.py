"""The store of a long run holds records, and a number of other keys that does not grow."""

import threading
import time
from types import SimpleNamespace

import pytest

from shardes.clock import Clock
from shardes.config.schema import Config
from shardes.es.population import Iteration
from shardes.replicas import work_queue
from shardes.replicas.consistency import ConsistencyCheck
from shardes.replicas.coordinator import FollowerCoordinator, PrimaryCoordinator
from shardes.replicas.heartbeat import Heartbeats
from shardes.replicas.protocol import MemberResult, RunStore

ITERATIONS, COMPARED, LATE = 200, 10, 50


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

    def __init__(self, number: int, store: RunStore, config: Config, keys=lambda: 0):
        self.world, self.config, self.keys = world(number), config, keys
        self.counts: list[int] = []
        self.iteration = 0
        ignore = SimpleNamespace(
            append=lambda entry: None,
            member_finished=lambda tokens: None,
            progress=lambda iteration, done: None,
        )
        heartbeats = Heartbeats(store, store.clone(), number, 20.0)
        shared = dict(timeout=20.0, poll=lambda: None, clock=Clock())
        self.coordinator = (
            FollowerCoordinator(self.world, store, heartbeats, **shared)
            if number
            else PrimaryCoordinator(
                self.world,
                store,
                heartbeats,
                ignore,
                config.es,
                ignore,
                **shared,
            )
        )
        self.check = ConsistencyCheck(self.world, store, None, COMPARED, 20.0)

    def run(self, before_post=lambda iteration: None) -> None:
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
                queue.post(group[0], MemberResult(float(group[0]), 1, number, time.time()))
            results = queue.results()
            for number in evaluation.orphans():
                evaluation.post(number, "[]")
            self.coordinator.commit(iteration, results)
            self.counts.append(self.keys() - (t + 1))  # without the records


def test_two_hundred_iterations_leave_records_and_nothing_else(store, config, monkeypatch):
    """One of the replicas counts as dead, but lives, and misses several iterations: late, it finds
    them done.
    """
    monkeypatch.setattr(work_queue, "backoff_sleep", lambda since: time.sleep(0.001))
    run = RunStore(store, "prefix")
    primary = Replica(0, run, config, store.num_keys)
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
    most = 3 * (2 + 2 * 6) + 3 * (2 + 2 * 2) + 2 * 2 + 14  # three iterations', and the run's own
    assert max(primary.counts) <= most, primary.counts


def test_a_late_replica_finds_a_deleted_queue_done(store, config):
    run = RunStore(store, "prefix")
    late = Replica(1, run.clone(), config)
    iteration = Iteration.derive(config, 0, "digest", [[1], [2]])
    queue = late.coordinator.member_queue(iteration, 1)
    claimed = next(iter(queue))
    primary = Replica(0, run, config)
    for number in range(6):
        run.queue("iteration 0").post(number, 0, MemberResult(0.5, 1, 0, 1.0).to_json())
    results = primary.coordinator.member_queue(iteration, 1).results()
    primary.coordinator.commit(iteration, results)
    run.queue("iteration 0").delete(6)
    keys = store.num_keys()
    queue.post(claimed[0], MemberResult(0.5, 1, 1, 1.0))
    assert list(queue) == []
    assert late.coordinator.commit(iteration, results).iteration == 0
    assert store.num_keys() == keys
