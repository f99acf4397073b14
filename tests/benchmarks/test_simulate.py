"""The simulation of many replicas, compared with closed-form answers and the real work queue."""

import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.replicas import Draw, Polls, Setting, fixed_rounds
from benchmarks.simulate import simulate
from shardes.replicas.heartbeat import BEATS
from shardes.replicas.member_queue import IterationResults
from shardes.replicas.protocol import MemberResult, RunStore
from shardes.replicas.work_queue import WorkQueue

NEVER = 1e9


def scripted(times, slowness) -> tuple[Setting, Draw]:
    """A run of one iteration with these members' times and replicas' slowness."""
    draw = Draw(np.array([times], float), np.array(slowness, float))
    return Setting(len(slowness), len(times), restart=NEVER), draw


def test_one_replica_is_busy_but_for_exchange_and_update():
    setting = Setting(
        1,
        7,
        iterations=3,
        times=np.array([1.0, 2.0, 5.0]),
        mean=10.0,
        exchange=0.5,
        update=2.0,
        seed=3,
    )
    draw = Draw.of(setting)
    outcome = simulate(setting, draw)
    work = draw.times.sum() * draw.slowness[0]
    assert outcome.elapsed == pytest.approx(work + 3 * (0.5 + 2.0))
    assert outcome.efficiency == pytest.approx(work / outcome.elapsed)
    assert outcome.seconds == pytest.approx(
        {"useful": work, "waiting": 0.0, "exchange": 1.5, "update": 6.0}
    )
    assert fixed_rounds(setting, draw) == pytest.approx(outcome.efficiency)


@pytest.mark.parametrize("replicas, members", [(4, 8), (4, 10), (5, 5), (8, 3)])
def test_equal_times_give_whole_rounds(replicas, members):
    setting = Setting(replicas, members, mean=30.0)
    outcome = simulate(setting)
    rounds = -(-members // replicas)
    assert outcome.ends == [30.0 * rounds]
    assert outcome.seconds["useful"] == pytest.approx(30.0 * members)
    assert outcome.seconds["waiting"] == pytest.approx(30.0 * (replicas * rounds - members))
    assert fixed_rounds(setting) == pytest.approx(members / (replicas * rounds))


def test_a_replica_three_times_as_slow_takes_a_third_of_the_members():
    outcome = simulate(*scripted([10.0] * 8, [1.0, 3.0]))
    assert outcome.ends == [60.0]
    assert outcome.seconds["useful"] == pytest.approx(60 + 60)
    setting, draw = scripted([10.0] * 8, [1.0, 3.0])
    assert fixed_rounds(setting, draw) == pytest.approx(4 * 40 / (2 * 4 * 30))


def test_a_long_last_member_makes_the_other_replica_wait():
    setting, draw = scripted([10.0, 10.0, 25.0], [1.0, 1.0])
    outcome = simulate(setting, draw)
    assert outcome.ends == [35.0]
    assert outcome.seconds["waiting"] == pytest.approx(25.0)


@pytest.mark.parametrize("death", [4.0, 9.99])
def test_a_dead_replicas_member_is_taken_over_after_the_timeout(death):
    setting, draw = scripted([10.0, 10.0], [1.0, 1.0])
    setting.deaths = ((1, death),)
    outcome = simulate(setting, draw)
    # The other replica watches from its own end on; by then this one was dead.
    knows = 10.0 + setting.polls.after(setting.timeout)
    assert outcome.ends == [pytest.approx(knows + 10.0)]
    assert outcome.takeovers == outcome.deaths == 1 and outcome.evaluations == 3
    assert outcome.seconds["lost"] == pytest.approx(death)
    assert outcome.seconds["down"] == pytest.approx(outcome.elapsed - death)


def test_with_watched_heartbeats_the_next_claim_takes_a_dead_replicas_member():
    setting, draw = scripted([10.0] * 20, [1.0, 1.0])
    setting.deaths, setting.watched = ((1, 4.0),), True
    outcome = simulate(setting, draw)
    assert outcome.takeovers == 1 and outcome.ends == [200.0]
    setting.watched = False
    assert simulate(setting, draw).ends == [190.0 + setting.polls.after(60.0) + 10.0]


def test_a_replica_that_waits_already_counts_from_the_last_heartbeat():
    setting, draw = scripted([10.0, 100.0], [1.0, 1.0])
    setting.deaths = ((1, 80.0),)
    outcome = simulate(setting, draw)
    waited = outcome.ends[0] - 100.0
    interval = setting.timeout / BEATS
    assert (
        80.0 - interval + setting.timeout
        <= waited
        <= 80.0 + setting.timeout + setting.polls.longest
    )


def test_a_replica_that_returns_rebuilds_the_center_and_works_again():
    setting = Setting(
        2, 10, iterations=4, mean=10.0, update=3.0, deaths=((1, 60.0),), restart=7.0, snapshots=1000
    )
    outcome = simulate(setting)
    # When it dies, the record of one iteration exists, since second 50. It is replayed from the
    # base. The second iteration has not ended by then.
    assert outcome.seconds["down"] == pytest.approx(7.0 + 3.0)
    assert outcome.seconds["lost"] == pytest.approx(7.0)
    assert outcome.takeovers == 1 and len(outcome.requests["records"]) == 4 + 4 + 1


def test_a_replica_that_joins_takes_members():
    alone = simulate(Setting(1, 40, mean=10.0))
    joined = simulate(Setting(1, 40, mean=10.0, joins=(100.0,)))
    assert alone.ends == [400.0] and joined.ends == [100.0 + 300.0 / 2]


def test_fixed_rounds_take_as_long_as_their_slowest_members():
    setting, draw = scripted([1.0, 5.0, 4.0, 2.0], [1.0, 1.0])
    assert fixed_rounds(setting, draw) == pytest.approx(12 / (2 * (5 + 4)))
    # The primary has waited since second 5.
    assert simulate(setting, draw).ends == [5.0 + setting.polls.after(2.0)]


def test_polls_back_off():
    waited, expected = 0.0, []
    while waited < 40:
        expected.append(waited)
        waited += min(max(waited / 10, 0.02), 1.0)
    polls = Polls()
    assert polls.until(expected[-1] + 1e-6) == pytest.approx(expected)
    for when in (0.0, 0.01, 0.3, 9.7, 10.3, 33.33):
        assert polls.after(when) == pytest.approx(
            min(offset for offset in expected if offset >= when)
        )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 30),
    st.integers(1, 4),
    st.floats(0, 0.6),
    st.integers(0, 99),
    st.booleans(),
    st.floats(0, 20),
    st.booleans(),
)
def test_seconds_and_requests_add_up(
    replicas, members, iterations, spread, seed, failing, update, watched
):
    setting = Setting(
        replicas,
        members,
        iterations,
        np.array([1.0, 1.5, 3.0]),
        spread=spread,
        seed=seed,
        update=update,
        mtbf=400.0 if failing else np.inf,
        restart=90.0,
        exchange=0.2,
        watched=watched,
    )
    outcome = simulate(setting)
    assert sum(outcome.seconds.values()) == pytest.approx(replicas * outcome.elapsed)
    assert min(outcome.seconds.values()) >= 0
    posts = members * iterations
    assert len(outcome.requests["posts"]) == 2 * posts
    assert posts <= outcome.evaluations <= posts + outcome.deaths
    assert outcome.takeovers == outcome.evaluations - posts
    assert sorted(outcome.ends) == outcome.ends and outcome.ends[-1] <= outcome.elapsed
    again = simulate(setting)
    assert (again.elapsed, again.seconds) == (outcome.elapsed, outcome.seconds)
    if not failing:
        assert len(outcome.requests["records"]) == replicas * iterations
        assert outcome.seconds["update"] == pytest.approx(
            update * Draw.of(setting).slowness.sum() * iterations
        )


def test_the_real_work_queue_idles_as_long():
    sleeps, slowness = [0.5, 0.9, 0.6, 0.7, 0.4, 0.8], [1.0, 1.3, 2.1]
    store = RunStore(
        dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20)), "run"
    )
    times = [0.0] * len(sleeps)  # measured here, from the replica's last post
    ends: dict[int, float] = {}
    results: dict[int, IterationResults] = {}
    start = time.monotonic()

    def replica(number: int) -> None:
        world = SimpleNamespace(
            replica=number, is_leader=True, run_on_leader=lambda work: work() or 0.0
        )
        queue = WorkQueue(world, store.queue("iteration 0"), "iteration 0", len(sleeps), timeout=20)
        time.sleep(0.1 * number)  # so that they claim in order
        ends[number] = start
        for member in queue.claims():
            time.sleep(sleeps[member] * slowness[number])
            queue.post(member, MemberResult(1.0, 1, number, time.time()).to_json())
            times[member], ends[number] = time.monotonic() - ends[number], time.monotonic()
        results[number] = IterationResults(list(map(MemberResult.from_json, queue.collect())))

    threads = [threading.Thread(target=replica, args=(number,)) for number in range(len(slowness))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    simulated = simulate(*scripted(times, [1.0] * len(slowness)))
    last = max(ends.values())
    assert sum(last - end for end in ends.values()) == pytest.approx(
        simulated.seconds["waiting"], abs=0.1
    )
    assert results[0].idle_seconds == pytest.approx(simulated.idle[0], abs=0.1)
    assert simulated.idle[0] > 0.3
