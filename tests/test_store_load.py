"""What asks the real store; nothing is timed."""

import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from benchmarks.replicas import Setting
from benchmarks.simulate import claimed
from benchmarks.store_load import busiest, connect, flood, replay, requests
from shardes.door import Door


@pytest.fixture(params=[False, True], ids=["store", "door"])
def place(request):
    """A port, and whether a door is there; both lead to a store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)
    if not request.param:
        yield store.port, False
        return
    door = Door("127.0.0.1", 0, "benchmark", store, "room", 60)
    yield door.port, True
    door.close()


def test_every_kind_of_request_is_answered(place):
    for kind, ask in requests(*place, record=40).items():
        for number in range(4):
            ask(number)
        assert kind != "records" or ask(0) == b"r" * 40


def test_a_simulated_second_is_replayed_in_full(place):
    outcome = claimed(Setting(8, 16, mean=2.0))
    trace = busiest(outcome, 1)
    assert trace == sorted(trace) and all(0 <= when < 1 for when, _ in trace)
    assert len(trace) == outcome.rate()[1]
    found = replay(*place, trace, threads=2, speed=1.0, begin=time.time())
    assert found.shape == (len(trace), 2) and (found[:, 0] >= found[:, 1] - 1e-3).all()


def test_a_flood_counts_what_it_asked(place):
    before = connect(*place).num_keys()
    took = flood(*place, "claims", 0, 0.05, time.time())
    assert len(took) > 0 and min(took) > 0
    # One key for what is claimed, and one for every other request, which says whose it is.
    assert connect(*place).num_keys() - before == 1 + -(-len(took) // 2) - (len(took) == 1)
