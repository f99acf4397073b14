"""The requests to a real store; nothing is timed."""

import time
from contextlib import closing
from datetime import timedelta

import pytest
import torch.distributed as dist

from benchmarks.replicas import Setting
from benchmarks.simulate import simulate
from benchmarks.store_load import (
    begin_run,
    busiest,
    flood,
    open_gateway,
    record_of,
    replay,
    requests,
)
from shardes.replicas.protocol import RunStore


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False
    )


@pytest.fixture(params=[False, True], ids=["store", "gateway"])
def server(request, store, tmp_path):
    """A port, and whether it is a gateway's; it leads to a store either way."""
    run = RunStore(store, "run")
    begin_run(run, [40])
    if not request.param:
        yield store.port, False
        return
    with closing(open_gateway(run, [40], tmp_path)) as gateway:
        yield gateway.port, True


def test_every_kind_of_request_is_answered(server):
    for kind, send in requests(*server, record=0).items():
        for number in range(4):
            send(number)
        assert kind != "records" or send(0) == record_of(0, 40)


def test_a_simulated_second_is_replayed_in_full(server):
    outcome = simulate(Setting(8, 16, mean=2.0))
    trace = busiest(outcome, 1)
    assert trace == sorted(trace) and all(0 <= when < 1 for when, _ in trace)
    assert len(trace) == outcome.rate()[1]
    times = replay(*server, trace, threads=2, speed=1.0, begin=time.time())
    assert times.shape == (len(trace), 2) and (times[:, 0] >= times[:, 1] - 1e-3).all()


def test_a_flood_times_each_of_its_requests(store, server):
    before = store.num_keys()
    times = flood(*server, "claims", None, 0.05, time.time())
    assert len(times) > 0 and min(times) > 0
    through_gateway = server[1]
    until = time.monotonic() + 10
    while through_gateway and not RunStore(store, "run").has_left(1):  # one more key
        assert time.monotonic() < until
        time.sleep(0.01)
    added = store.num_keys() - before - through_gateway
    # One key for the counter of claims, and one for every other request, which stores a claimant.
    assert added == 1 + -(-len(times) // 2) - (len(times) == 1)
