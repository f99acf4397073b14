"""A store as the primary job has it, and a gateway to it."""

from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta

import pytest
import torch.distributed as dist
from gateways import LIMITS, SECRET

from shardes.replicas.gateway import StoreGateway
from shardes.replicas.gateway_client import connect
from shardes.replicas.protocol import CurrentIteration, RunStore, Welcome
from shardes.storage.journal import Header, Journal


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))


@pytest.fixture
def primary(store) -> RunStore:
    """The run's store, with one replica, before iteration 0."""
    run = RunStore(store, "prefix")
    run.welcome(Welcome(Header("model", {}, {}), 1))
    run.announce(CurrentIteration(0, "digest"))
    return run


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def journal(tmp_path) -> Iterator[Journal]:
    """That of the run, with its header."""
    journal = Journal(tmp_path / "journal.jsonl", None)
    journal.append(Header("model", {}, {}))
    with closing(journal):
        yield journal


@pytest.fixture
def gateway(primary, journal, warnings):
    gateway = StoreGateway(
        "127.0.0.1", 0, SECRET, primary, LIMITS, journal.path, 5, warnings.append
    )
    with closing(gateway):
        yield gateway


@pytest.fixture
def join(gateway):
    """Connects a client, which takes a replica's number."""

    def joined() -> RunStore:
        client = connect(f"127.0.0.1:{gateway.port}", SECRET, 5)
        client.take_replica_number()
        return client

    return joined
