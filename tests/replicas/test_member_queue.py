"""Members shared out between replicas through a store."""

import math
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice

import pytest
import torch.distributed as dist

from shardes.errors import ConfigError, RunError
from shardes.es.population import Iteration, Member, member_seeds
from shardes.replicas import member_queue, work_queue
from shardes.replicas.heartbeat import Heartbeats
from shardes.replicas.member_queue import IterationResults, PrimaryMemberQueue
from shardes.replicas.protocol import MemberResult, RunStore
from shardes.replicas.work_queue import WorkQueue
from shardes.storage.journal import Reward


@dataclass
class OneRank:
    """The world of a replica of one rank, as a queue sees it."""

    replica: int
    is_leader: bool = True

    def run_on_leader(self, work):
        return work() or 0.0


@dataclass
class Log:
    """A journal and an observer that keep what they are told."""

    rewards: list[Reward]
    tokens: int = 0

    def append(self, reward):
        self.rewards.append(reward)

    def member_finished(self, tokens):
        self.tokens += tokens

    def progress(self, iteration, done):
        pass


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))


def replica(
    store: dist.Store,
    number: int,
    seeds: list[int],
    index: int = 0,
    timeout: float = 20,
    heartbeats: Heartbeats | None = None,
    known: dict[int, MemberResult] | None = None,
    size: int = 1,
) -> PrimaryMemberQueue:
    """A replica's queue of an iteration's members."""
    members = [Member(seed, 0.1) for seed in seeds]
    iteration = Iteration(index, "digest", 0.1, 0.1, seeds, members, None, [])
    name = f"iteration {index}"
    texts = {member: result.to_json() for member, result in (known or {}).items()}
    queue = WorkQueue(
        OneRank(number),
        RunStore(store).queue(name),
        name,
        len(seeds),
        timeout,
        known=texts,
        heartbeats=heartbeats,
    )
    log = Log([])
    members_queue = PrimaryMemberQueue(queue, iteration, size, lambda: None, log, log)
    members_queue.log = log
    return members_queue


def heartbeats(store: dist.Store, number: int, timeout: float = 1.0) -> Heartbeats:
    return Heartbeats(RunStore(store), RunStore(store).clone(), number, timeout)


def result(number: int, reward: float, tokens: int = 1) -> MemberResult:
    return MemberResult(reward, tokens, number, time.time())


def claims(queue: PrimaryMemberQueue):
    return queue._queue.claims()


def test_every_member_is_evaluated_once_and_the_faster_replica_takes_more(store):
    seeds = member_seeds(0, 0, 12)
    taken: dict[int, list[int]] = {}
    collected: dict[int, IterationResults] = {}

    def work(number: int, seconds: float):
        queue = replica(store, number, seeds, timeout=10)
        taken[number] = []
        for member in claims(queue):
            time.sleep(seconds)
            taken[number].append(member)
            queue.post(member, result(number, member * 1.5, 10 + member))
        collected[number] = queue.results()

    threads = [threading.Thread(target=work, args=(i, s)) for i, s in enumerate((0.02, 0.1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken[0] + taken[1]) == list(range(12))
    assert len(taken[0]) > len(taken[1]) > 0
    members = collected[0].members
    assert members == collected[1].members
    assert [(m.reward, m.tokens) for m in members] == [(n * 1.5, 10 + n) for n in range(12)]
    assert all(n in taken[m.replica] for n, m in enumerate(members))
    assert 0 <= collected[0].idle_seconds < 0.5
    assert max(results.exchanged_bytes for results in collected.values()) < 12 * 500


def test_idle_time_is_that_of_the_first_replica_to_run_out():
    finished = [(0, 10.0), (1, 11.0), (0, 12.0), (1, 14.5)]
    members = [MemberResult(0.0, 1, number, when) for number, when in finished]
    assert IterationResults(members).idle_seconds == 2.5
    assert IterationResults([MemberResult(0.0, 1, 0, 3.0)]).idle_seconds == 0.0


def test_iterations_do_not_mix(store):
    for index in range(2):
        assert list(claims(replica(store, 0, [1, 2], index, timeout=1))) == [0, 1]


def test_members_are_handed_out_in_groups_and_an_empty_one_asks_for_their_results(store):
    with heartbeats(store, 0) as beating:
        queue = replica(store, 0, [7, 8], heartbeats=beating)
        groups, unposted = [], []
        for group in queue:
            groups.append(list(group))
            for member in unposted:
                queue.post(member, result(0, 1.0))
            unposted = group
    assert groups == [[0], [1], []]


def test_every_reward_is_journaled_once_whoever_posts_it_and_however_many_there_are(
    store, monkeypatch
):
    """Looking up a few at a time."""
    monkeypatch.setattr(work_queue, "NEWS_CHECKS", 3)
    known = {4: MemberResult(0.5, 7, 0, 0.0)}
    primary, other = (replica(store, n, list(range(10)), timeout=5, known=known) for n in (0, 1))
    for number in (9, 0, 5, 2, 8, 1, 3, 7, 6):
        queue = other if number % 2 else primary
        queue.post(number, result(0, float(number), 10 * number))
        primary._journal_rewards()
    for _ in range(4):
        primary._journal_rewards()
    journaled = sorted((r.member, r.reward, r.tokens, r.scores) for r in primary.log.rewards)
    assert journaled == [(n, float(n), 10 * n, []) for n in range(10) if n != 4]
    assert primary.log.tokens == sum(10 * n for n in range(10) if n != 4)
    assert primary.results().members[4] == known[4]


def test_rewards_are_journaled_while_the_primary_rank_waits(store, monkeypatch):
    monkeypatch.setattr(member_queue, "REPORT_INTERVAL", 0.1)
    with heartbeats(store, 0, timeout=60.0) as beating:
        primary, other = (replica(store, r, [7, 8, 9], heartbeats=beating) for r in range(2))
        assert [next(claims(other)), next(claims(other))] == [0, 1]
        for number in claims(primary):
            primary.post(number, result(0, 2.0))
        waiting = threading.Thread(target=lambda: list(primary._queue.orphans()))
        waiting.start()
        other.post(0, result(1, 0.0))
        time.sleep(1.5)
        assert sorted(reward.member for reward in primary.log.rewards) == [0, 2]
        other.post(1, result(1, 1.0))
        waiting.join()


def test_a_dead_replicas_member_is_taken_over_and_a_live_ones_is_not(store):
    with heartbeats(store, 0) as beating, heartbeats(store, 2):
        mine, dead, slow = (replica(store, r, [7, 8, 9, 10], heartbeats=beating) for r in range(3))
        own = claims(mine)
        mine.post(next(own), result(0, 0.0))
        assert (next(claims(dead)), next(claims(slow))) == (1, 2)
        for number in own:
            mine.post(number, result(0, 3.0))
        orphans = mine._queue.orphans()
        since = time.monotonic()
        assert next(orphans) == [1]
        assert time.monotonic() - since > 1.0
        mine.post(1, result(0, 1.0))
        slow.post(2, result(2, 2.0))
        assert list(orphans) == []
    dead.post(1, result(1, -1.0))  # late, so it is ignored
    members = mine.results().members
    assert [(m.reward, m.replica) for m in members] == [(0.0, 0), (1.0, 0), (2.0, 2), (3.0, 0)]
    assert mine._queue.number_done() == 4


def test_the_member_of_a_replica_that_leaves_is_taken_over_at_once(store):
    with heartbeats(store, 0, timeout=60.0) as beating:
        mine, other = (replica(store, r, [7, 8], heartbeats=beating) for r in range(2))
        with heartbeats(store, 1, timeout=60.0):
            assert next(claims(other)) == 0
        for number in claims(mine):
            mine.post(number, result(0, 1.0))
        beating.timeout = 0.4  # how often it looks; no replica is silent for long here
        for (number,) in mine._queue.orphans():
            mine.post(number, result(0, 0.0))
    assert [member.reward for member in mine.results().members] == [0.0, 1.0]


def test_the_members_of_dead_replicas_are_taken_over_in_groups(store):
    """Of at most as many as answer together, whoever claimed them."""
    with heartbeats(store, 0, timeout=0.4) as beating:
        mine, dead, other = (
            replica(store, r, list(range(12)), heartbeats=beating, size=4) for r in range(3)
        )
        claimed = [islice(claims(queue), count) for queue, count in ((dead, 5), (other, 1))]
        assert [list(numbers) for numbers in claimed] == [[0, 1, 2, 3, 4], [5]]
        groups = []
        for group in mine:
            groups.append(list(group))
            for number in group:
                mine.post(number, result(0, float(number)))
    assert groups[:2] == [[6, 7, 8, 9], [10, 11]]
    assert [len(group) for group in groups[2:]] == [0, 4, 0, 2, 0]
    assert sorted(sum(groups[2:], [])) == [0, 1, 2, 3, 4, 5]
    assert [member.reward for member in mine.results().members] == list(map(float, range(12)))


def test_a_replica_that_died_between_posting_and_counting_holds_nobody_up(store):
    with heartbeats(store, 0, timeout=0.4) as beating:
        mine, other = (replica(store, r, [7, 8], heartbeats=beating) for r in range(2))
        assert next(claims(other)) == 0
        posted = f"1:{result(1, 5.0).to_json()}"
        dist.PrefixStore("iteration 0", store).set("result/0", posted)
        for number in claims(mine):
            mine.post(number, result(0, 1.0))
        assert list(mine._queue.orphans()) == []
    assert [member.reward for member in mine.results().members] == [5.0, 1.0]


def test_a_replica_that_died_between_claiming_and_saying_so_loses_its_member(store):
    with heartbeats(store, 0, timeout=0.4) as beating:
        mine = replica(store, 0, [7, 8], heartbeats=beating)
        RunStore(store).queue("iteration 0").claim()
        for number in claims(mine):
            mine.post(number, result(0, 1.0))
        since = time.monotonic()
        for (number,) in mine._queue.orphans():
            mine.post(number, result(0, 2.0))
        assert time.monotonic() - since > 0.4  # it may just not have said so yet
    assert [member.reward for member in mine.results().members] == [2.0, 1.0]


def test_a_missing_member_is_named_with_its_replica(store):
    mine, other = (replica(store, r, [7, 8, 9], 3, timeout=0.3) for r in (0, 1))
    own = claims(mine)
    mine.post(next(own), result(0, 1.0))
    assert next(claims(other)) == 1
    mine.post(next(own), result(0, 1.0))
    with pytest.raises(RunError, match=r"iteration 3: .*1 \(replica 1\)"):
        mine.results()


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_stops_the_run(store, reward):
    queue = replica(store, 0, [70, 80], 4, timeout=1)
    with pytest.raises(ConfigError, match=r"member 1 of iteration 4 \(seed 80\)"):
        queue.post(1, result(0, reward, 5))
