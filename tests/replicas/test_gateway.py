"""Only who knows the token reaches the run's store."""

import socket
import threading
from contextlib import closing
from datetime import timedelta

import pytest
import torch.distributed as dist

from shardes.errors import ConfigError
from shardes.replicas import gateway as gateway_module
from shardes.replicas.gateway import TOKEN, StoreGateway, connect, run_token
from shardes.replicas.protocol import RunStore


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))


@pytest.fixture
def gateway(store):
    with closing(StoreGateway("127.0.0.1", 0, "secret", RunStore(store, "prefix"), 5)) as gateway:
        yield gateway


def test_who_knows_the_token_shares_the_store(store, gateway):
    primary = dist.PrefixStore("prefix", store)
    primary.set("key", "from the primary")
    clients = [connect(f"127.0.0.1:{gateway.port}", "secret", 5) for _ in range(3)]
    assert [client._store.get("key") for client in clients] == [b"from the primary"] * 3
    clients[0]._store.set("answer", "x" * 1_000_000)
    assert primary.get("answer") == b"x" * 1_000_000 and not store.check(["answer"])


def test_many_requests_at_once_are_not_mixed_up(store, gateway):
    sums: list[list[int]] = []

    def client():
        mine = connect(f"127.0.0.1:{gateway.port}", "secret", 10)
        sums.append([mine._store.add("counter", 1) for _ in range(200)])

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for found in sums for number in found) == list(range(1, 1601))
    assert all(found == sorted(found) for found in sums)


@pytest.mark.parametrize("token", ["", "Secret", "secret\n0", "ѕecret"])
def test_another_token_is_refused(gateway, token):
    with pytest.raises(ConfigError, match="the token does not match"):
        connect(f"127.0.0.1:{gateway.port}", token, 5)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\n",
        b"no token\n",
        b"\xff\xfe \xff\n",
        b"x" * 100_000,
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x01\x00\x00\x00",
    ],
    ids=["nothing", "a line", "words", "bytes", "much", "http", "torch"],
)
def test_a_client_of_another_kind_gets_nothing(store, gateway, said):
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as client:
        greeting = client.recv(100)
        client.sendall(said)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while data := client.recv(1000):
                answer += data
        except ConnectionResetError:
            pass
    assert greeting.startswith(b"shardes ") and answer in (b"", b"refused\n")
    assert (
        connect(f"127.0.0.1:{gateway.port}", "secret", 5)._store.add("key", 1) == 1
    )  # others are not disturbed


def test_a_proof_cannot_be_used_again(gateway):
    heard: list[bytes] = []

    def listen():
        with (
            listening.accept()[0] as client,
            socket.create_connection(("127.0.0.1", gateway.port)) as inside,
        ):
            client.sendall(inside.recv(100))
            heard.append(client.recv(200))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=listen)
        thread.start()
        with pytest.raises(ConfigError):
            connect(f"127.0.0.1:{listening.getsockname()[1]}", "secret", 5)
        thread.join()
    assert b"secret" not in heard[0]
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as client:
        client.recv(100)
        client.sendall(heard[0])
        assert client.recv(100) == b"refused\n"


@pytest.mark.parametrize(
    "address, complaint",
    [
        ("nonsense", "HOST:PORT"),
        ("host:", "HOST:PORT"),
        ("127.0.0.1:1", "cannot join"),
    ],
)
def test_an_address_where_no_run_is(address, complaint):
    with pytest.raises(ConfigError, match=complaint):
        connect(address, "secret", 5)


def test_a_server_that_is_no_door(store, monkeypatch):
    monkeypatch.setattr(gateway_module, "PATIENCE", 1.0)
    with pytest.raises(ConfigError, match=r"replicas\.join="):
        connect(f"127.0.0.1:{store.port}", "secret", 5)


def test_a_port_in_use(store, gateway):
    with pytest.raises(
        ConfigError,
        match=rf"replicas.port={gateway.port}: cannot listen there on 127.0.0.1: .*in use",
    ):
        StoreGateway("127.0.0.1", gateway.port, "secret", RunStore(store, "prefix"), 5)


def test_who_is_in_notices_that_the_door_closes(store):
    gateway = StoreGateway("127.0.0.1", 0, "secret", RunStore(store, "prefix"), 5)
    client = connect(f"127.0.0.1:{gateway.port}", "secret", 5)
    client._store.add("key", 1)
    gateway.close()
    with pytest.raises(dist.DistError):
        client._store.add("key", 1)


def test_the_token_is_the_users_or_made_for_the_owner_alone(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ConfigError, match=TOKEN):
        run_token(tmp_path)
    made = run_token(tmp_path, create=True)
    assert len(made) > 40 and run_token(tmp_path) == run_token(tmp_path, create=True) == made
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv(TOKEN, "mine")
    assert run_token(tmp_path, create=True) == "mine"
