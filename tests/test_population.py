"""Seeds, fitness, and members shared out between replicas through a store."""

import math
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from models import paper_coefficients
from shardes import population
from shardes.config import ConfigError
from shardes.meeting import Meeting
from shardes.population import Evaluation, Population, idle_seconds, member_seeds, standardize


@dataclass
class Replica:
    """A replica of one rank, as a population sees it."""

    store: dist.Store
    replica: int
    replicas: int = 2
    leads: bool = True
    speaks: bool = False

    @property
    def joined(self) -> bool:
        return self.replica >= self.replicas

    def broadcast(self, values, count):
        assert len(values) == count
        return values


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))


def alive(store: dist.Store, replica: int, timeout: float = 1.0) -> Meeting:
    """A replica that shows signs of life."""
    return Meeting(Replica(store, replica), store.clone(), timeout, patience=10)


def test_seeds_follow_from_run_seed_and_iteration_alone():
    assert member_seeds(3, 5, 8) == member_seeds(3, 5, 8)
    assert member_seeds(3, 5, 12)[:8] == member_seeds(3, 5, 8)
    everything = [seed for run in range(20) for it in range(20) for seed in member_seeds(run, it, 8)]
    assert len(set(everything)) == len(everything)
    assert max(everything) > 2**63
    assert member_seeds(0, 0, 2) == np.random.SeedSequence([0, 0]).generate_state(2, np.uint64).tolist()


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40))
def test_standardized_rewards_are_the_papers_z_scores(rewards):
    z = standardize(rewards)
    if len(set(rewards)) == 1:
        assert z == [0.0] * len(rewards)
    else:
        expected = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) + 1e-8)
        assert z == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)


def test_coefficients_are_float32():
    coefficients = paper_coefficients([1.0, 2.0, 4.0], 0.3)
    assert coefficients == [float(np.float32(0.1 * z)) for z in standardize([1.0, 2.0, 4.0])]
    assert paper_coefficients([2.5, 2.5], 0.3) == [0.0, 0.0]


def test_every_member_is_evaluated_once_and_the_faster_replica_takes_more(store):
    seeds = member_seeds(0, 0, 12)
    taken: dict[int, list[int]] = {}
    collected, sizes = {}, {}

    def replica(number: int, seconds: float):
        population = Population(Replica(store, number), 0, seeds, timeout=10)
        taken[number] = []
        for n in population.claim():
            time.sleep(seconds)
            taken[number].append(n)
            population.post_reward(n, n * 1.5, 10 + n)
        collected[number] = population.evaluations()
        sizes[number] = population.bytes

    threads = [threading.Thread(target=replica, args=(i, s)) for i, s in enumerate((0.02, 0.1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken[0] + taken[1]) == list(range(12))
    assert len(taken[0]) > len(taken[1]) > 0
    assert collected[0] == collected[1]
    assert [(e.reward, e.tokens) for e in collected[0]] == [(n * 1.5, 10 + n) for n in range(12)]
    assert all(n in taken[e.replica] for n, e in enumerate(collected[0]))
    assert 0 <= idle_seconds(collected[0]) < 0.5
    assert max(sizes.values()) < 12 * 500


def test_idle_time_is_that_of_the_first_replica_to_run_out():
    finished = [(0, 10.0), (1, 11.0), (0, 12.0), (1, 14.5)]
    assert idle_seconds([Evaluation(0.0, 1, replica, when) for replica, when in finished]) == 2.5
    assert idle_seconds([Evaluation(0.0, 1, 0, 3.0)]) == 0.0


def test_iterations_do_not_mix(store):
    for iteration in range(2):
        population = Population(Replica(store, 0), iteration, [1, 2], timeout=1)
        assert list(population.claim()) == [0, 1]


def test_every_reward_becomes_known_once_whoever_posts_it_and_however_many_there_are(store, monkeypatch):
    """Looking for a few at a time."""
    monkeypatch.setattr(population, "NEWS", 3)
    known = {4: (0.5, 7, [])}
    home, other = (Population(Replica(store, n, speaks=n == 0), 0, range(10), 5, known) for n in (0, 1))
    found = []
    for number in (9, 0, 5, 2, 8, 1, 3, 7, 6):
        (other if number % 2 else home).post_reward(number, float(number), 10 * number)
        found += home.new_rewards()
    for _ in range(4):
        found += home.new_rewards()
    assert sorted(found) == [(n, float(n), 10 * n, []) for n in range(10) if n != 4]


def test_a_dead_replicas_member_is_taken_over_and_a_live_ones_is_not(store):
    mine, dead, slow = (Population(Replica(store, r), 0, [7, 8, 9, 10], timeout=20) for r in range(3))
    with alive(store, 0) as meeting, alive(store, 2):
        claims = mine.claim()
        mine.post_reward(next(claims), 0.0, 1)
        assert (next(dead.claim()), next(slow.claim())) == (1, 2)
        for number in claims:
            mine.post_reward(number, 3.0, 1)
        orphans = mine.take_over(meeting)
        since = time.monotonic()
        assert next(orphans) == 1
        assert time.monotonic() - since > 1.0
        mine.post_reward(1, 1.0, 1)
        slow.post_reward(2, 2.0, 1)
        assert list(orphans) == []
    dead.post_reward(1, -1.0, 1)  # late, so it is ignored
    found = mine.evaluations()
    assert [(e.reward, e.replica) for e in found] == [(0.0, 0), (1.0, 0), (2.0, 2), (3.0, 0)]
    assert mine.done() == 4


def test_the_member_of_a_replica_that_leaves_is_taken_over_at_once(store):
    mine, other = (Population(Replica(store, r), 0, [7, 8], timeout=20) for r in range(2))
    with alive(store, 0, timeout=60.0) as meeting:
        with alive(store, 1):
            assert next(other.claim()) == 0
        for number in mine.claim():
            mine.post_reward(number, 1.0, 1)
        meeting.timeout = 0.4  # how often it looks; nobody is silent for long here
        for number in mine.take_over(meeting):
            mine.post_reward(number, 0.0, 1)
    assert [evaluation.reward for evaluation in mine.evaluations()] == [0.0, 1.0]


def test_a_replica_that_died_between_posting_and_counting_holds_nobody_up(store):
    mine, other = (Population(Replica(store, r), 0, [7, 8], timeout=20) for r in range(2))
    assert next(other.claim()) == 0
    dist.PrefixStore("iteration 0", store).set("found/0", "1:[5.0, 1, 1, 0.0]")
    with alive(store, 0, timeout=0.4) as meeting:
        for number in mine.claim():
            mine.post_reward(number, 1.0, 1)
        assert list(mine.take_over(meeting)) == []
    assert [evaluation.reward for evaluation in mine.evaluations()] == [5.0, 1.0]


def test_a_missing_member_is_named_with_its_replica(store):
    mine, other = (Population(Replica(store, r), 3, [7, 8, 9], timeout=0.3) for r in (0, 1))
    claims = mine.claim()
    mine.post_reward(next(claims), 1.0, 1)
    assert next(other.claim()) == 1
    mine.post_reward(next(claims), 1.0, 1)
    with pytest.raises(TimeoutError, match=r"iteration 3: .*1 \(replica 1\)"):
        mine.collect()


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_stops_the_run(store, reward):
    population = Population(Replica(store, 0), 4, [70, 80], timeout=1)
    with pytest.raises(ConfigError, match=r"member 1 of iteration 4 \(seed 80\)"):
        population.post_reward(1, reward, 5)
