"""The simulation of many replicas, against answers in closed form and against the real exchange."""

import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.replicas import Draw, Looks, Setting, fixed_rounds
from benchmarks.simulate import claimed
from shardes.meeting import BEATS
from shardes.population import Population, idle_seconds

NEVER = 1e9


def scripted(times, slowness) -> tuple[Setting, Draw]:
    """A run of one iteration whose members take so long, on replicas so slow."""
    draw = Draw(np.array([times], float), np.array(slowness, float))
    return Setting(len(slowness), len(times), restart=NEVER), draw


def test_one_replica_is_busy_but_for_exchange_and_update():
    setting = Setting(1, 7, iterations=3, times=np.array([1.0, 2.0, 5.0]), mean=10.0, exchange=0.5, update=2.0, seed=3)
    draw = Draw.of(setting)
    outcome = claimed(setting, draw)
    work = draw.times.sum() * draw.slowness[0]
    assert outcome.elapsed == pytest.approx(work + 3 * (0.5 + 2.0))
    assert outcome.efficiency == pytest.approx(work / outcome.elapsed)
    assert outcome.seconds == pytest.approx({"useful": work, "waiting": 0.0, "exchange": 1.5, "update": 6.0})
    assert fixed_rounds(setting, draw) == pytest.approx(outcome.efficiency)


@pytest.mark.parametrize("replicas, members", [(4, 8), (4, 10), (5, 5), (8, 3)])
def test_equal_times_give_whole_rounds(replicas, members):
    setting = Setting(replicas, members, mean=30.0)
    outcome = claimed(setting)
    rounds = -(-members // replicas)
    assert outcome.ends == [30.0 * rounds]
    assert outcome.seconds["useful"] == pytest.approx(30.0 * members)
    assert outcome.seconds["waiting"] == pytest.approx(30.0 * (replicas * rounds - members))
    assert fixed_rounds(setting) == pytest.approx(members / (replicas * rounds))


def test_a_replica_three_times_as_slow_takes_a_third_of_the_members():
    outcome = claimed(*scripted([10.0] * 8, [1.0, 3.0]))
    assert outcome.ends == [60.0]
    assert outcome.seconds["useful"] == pytest.approx(60 + 60)
    setting, draw = scripted([10.0] * 8, [1.0, 3.0])
    assert fixed_rounds(setting, draw) == pytest.approx(4 * 40 / (2 * 4 * 30))


def test_who_is_slow_at_the_end_makes_the_others_wait():
    setting, draw = scripted([10.0, 10.0, 25.0], [1.0, 1.0])
    outcome = claimed(setting, draw)
    assert outcome.ends == [35.0]
    assert outcome.seconds["waiting"] == pytest.approx(25.0)


@pytest.mark.parametrize("death", [4.0, 9.99])
def test_a_dead_replicas_member_is_taken_over_after_the_timeout(death):
    setting, draw = scripted([10.0, 10.0], [1.0, 1.0])
    setting.deaths = ((1, death),)
    outcome = claimed(setting, draw)
    knows = 10.0 + setting.looks.after(setting.timeout)  # it looks from its own end on, when the other was dead
    assert outcome.ends == [pytest.approx(knows + 10.0)]
    assert outcome.takeovers == outcome.deaths == 1 and outcome.evaluations == 3
    assert outcome.seconds["lost"] == pytest.approx(death)
    assert outcome.seconds["down"] == pytest.approx(outcome.elapsed - death)


def test_where_heartbeats_are_watched_the_next_claim_takes_a_dead_replicas_member():
    setting, draw = scripted([10.0] * 20, [1.0, 1.0])
    setting.deaths, setting.watched = ((1, 4.0),), True
    outcome = claimed(setting, draw)
    assert outcome.takeovers == 1 and outcome.ends == [200.0]
    setting.watched = False
    assert claimed(setting, draw).ends == [190.0 + setting.looks.after(60.0) + 10.0]


def test_who_waits_already_counts_from_the_last_heartbeat():
    setting, draw = scripted([10.0, 100.0], [1.0, 1.0])
    setting.deaths = ((1, 80.0),)
    outcome = claimed(setting, draw)
    taken = outcome.ends[0] - 100.0
    every = setting.timeout / BEATS
    assert 80.0 - every + setting.timeout <= taken <= 80.0 + setting.timeout + setting.looks.longest


def test_one_that_returns_rebuilds_the_center_and_works_again():
    setting = Setting(2, 10, iterations=4, mean=10.0, update=3.0, deaths=((1, 60.0),), restart=7.0, snapshots=1000)
    outcome = claimed(setting)
    # One iteration was recorded when it died, at 50, and is replayed from the base; by then the second is not over.
    assert outcome.seconds["down"] == pytest.approx(7.0 + 3.0)
    assert outcome.seconds["lost"] == pytest.approx(7.0)
    assert outcome.takeovers == 1 and len(outcome.requests["records"]) == 4 + 4 + 1


def test_one_that_joins_takes_members():
    alone = claimed(Setting(1, 40, mean=10.0))
    joined = claimed(Setting(1, 40, mean=10.0, joins=(100.0,)))
    assert alone.ends == [400.0] and joined.ends == [100.0 + 300.0 / 2]


def test_the_slowest_of_each_round_counts_where_rounds_are_fixed():
    setting, draw = scripted([1.0, 5.0, 4.0, 2.0], [1.0, 1.0])
    assert fixed_rounds(setting, draw) == pytest.approx(12 / (2 * (5 + 4)))
    assert claimed(setting, draw).ends == [5.0 + setting.looks.after(2.0)]  # the home has waited since 5


def test_looks_back_off():
    waited, expected = 0.0, []
    while waited < 40:
        expected.append(waited)
        waited += min(max(waited / 10, 0.02), 1.0)
    looks = Looks()
    assert looks.until(expected[-1] + 1e-6) == pytest.approx(expected)
    for when in (0.0, 0.01, 0.3, 9.7, 10.3, 33.33):
        assert looks.after(when) == pytest.approx(min(offset for offset in expected if offset >= when))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 30), st.integers(1, 4), st.floats(0, 0.6), st.integers(0, 99), st.booleans(),
    st.floats(0, 20), st.booleans(),
)  # fmt: skip
def test_seconds_and_requests_add_up(replicas, members, iterations, spread, seed, failing, update, watched):
    setting = Setting(
        replicas, members, iterations, np.array([1.0, 1.5, 3.0]), spread=spread, seed=seed, update=update,
        mtbf=400.0 if failing else np.inf, restart=90.0, exchange=0.2, watched=watched,
    )  # fmt: skip
    outcome = claimed(setting)
    assert sum(outcome.seconds.values()) == pytest.approx(replicas * outcome.elapsed)
    assert min(outcome.seconds.values()) >= 0
    posts = members * iterations
    assert len(outcome.requests["posts"]) == 2 * posts
    assert posts <= outcome.evaluations <= posts + outcome.deaths
    assert outcome.takeovers == outcome.evaluations - posts
    assert sorted(outcome.ends) == outcome.ends and outcome.ends[-1] <= outcome.elapsed
    again = claimed(setting)
    assert (again.elapsed, again.seconds) == (outcome.elapsed, outcome.seconds)
    if not failing:
        assert len(outcome.requests["records"]) == replicas * iterations
        assert outcome.seconds["update"] == pytest.approx(update * Draw.of(setting).slowness.sum() * iterations)


def test_the_real_exchange_idles_as_long():
    sleeps, slowness = [0.5, 0.9, 0.6, 0.7, 0.4, 0.8], [1.0, 1.3, 2.1]
    job = SimpleNamespace(store=dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20)))
    took = [0.0] * len(sleeps)  # as it came out on this machine, from the replica's last post
    ends: dict[int, float] = {}
    evaluations = {}
    start = time.monotonic()

    def replica(who: int) -> None:
        world = SimpleNamespace(
            job=job, store=job.store, replica=who, leads=True, speaks=who == 0, broadcast=lambda values, _: values
        )
        population = Population(world, 0, list(range(len(sleeps))), timeout=20)
        time.sleep(0.1 * who)  # so that they claim in order
        ends[who] = start
        for member in population.claim():
            time.sleep(sleeps[member] * slowness[who])
            population.post_reward(member, 1.0, 1)
            took[member], ends[who] = time.monotonic() - ends[who], time.monotonic()
        evaluations[who] = population.evaluations()

    threads = [threading.Thread(target=replica, args=(who,)) for who in range(len(slowness))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    simulated = claimed(*scripted(took, [1.0] * len(slowness)))
    last = max(ends.values())
    assert sum(last - end for end in ends.values()) == pytest.approx(simulated.seconds["waiting"], abs=0.1)
    assert idle_seconds(evaluations[0]) == pytest.approx(simulated.idle[0], abs=0.1)
    assert simulated.idle[0] > 0.3
