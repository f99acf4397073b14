"""Only who knows the token reaches the run's store."""

import resource
import socket
import threading
import time
from contextlib import ExitStack, closing

import pytest
import torch.distributed as dist
from gateways import LIMITS, SECRET

from shardes.errors import ConfigError
from shardes.replicas import gateway as gateway_module
from shardes.replicas import gateway_client
from shardes.replicas.gateway import STRANGERS, StoreGateway
from shardes.replicas.gateway_client import connect


def test_who_knows_the_token_shares_the_store(store, primary, gateway):
    clients = [connect(f"127.0.0.1:{gateway.port}", SECRET, 5) for _ in range(3)]
    assert [client.wait_current(1).digest for client in clients] == ["digest"] * 3
    assert [client.take_replica_number() for client in clients] == [1, 2, 3]
    clients[0].beat(1)
    assert primary.heartbeats(1) == clients[2].heartbeats(1) == 1
    assert not store.check(["heartbeat/1"])


def test_many_requests_at_once_are_not_mixed_up(gateway, join):
    claims: list[list[int]] = []

    def client():
        queue = join().queue("iteration 0")
        claims.append([queue.claim() for _ in range(200)])

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for found in claims for number in found) == list(range(1600))
    assert all(found == sorted(found) for found in claims)


def test_threads_share_a_connection(gateway, join):
    client, claims = join(), []
    queue = client.queue("iteration 0")
    threads = [
        threading.Thread(target=lambda: claims.extend(queue.claim() for _ in range(100)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claims) == list(range(400))


@pytest.mark.parametrize("token", ["", SECRET.upper(), f"{SECRET}\n0", "ѕecret", "\udcff"])
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
        "nonce prооf\n".encode(),
        b"x" * 100_000,
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x01\x00\x00\x00",
    ],
    ids=["nothing", "a line", "words", "bytes", "no ASCII", "much", "http", "torch"],
)
def test_a_client_of_another_kind_gets_nothing(gateway, join, said, capfd):
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
    join().beat(1)  # others are not disturbed
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("answer", [b"", b"\xff\xfe\n", b"x" * 300, "prооf\n".encode()])
def test_a_gateway_that_does_not_know_the_token_is_refused(answer):
    def serve():
        with listening.accept()[0] as client:
            client.sendall(b"shardes nonce\n")
            client.recv(200)
            client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ConfigError, match="the token does not match"):
            connect(f"127.0.0.1:{listening.getsockname()[1]}", SECRET, 5)
        thread.join()


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
            connect(f"127.0.0.1:{listening.getsockname()[1]}", SECRET, 5)
        thread.join()
    assert SECRET.encode() not in heard[0]
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as client:
        client.recv(100)
        client.sendall(heard[0])
        assert client.recv(100) == b"refused\n"


def test_strangers_take_few_file_descriptors_and_keep_nobody_out(gateway, join, capfd):
    """More connections without a token than the process has file descriptors to spare."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = join()
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, limits[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        for count in range(500):
            address = ("127.0.0.1", gateway.port)
            stack.enter_context(socket.create_connection(address, timeout=5))
            if count % 100 == 99:
                client.beat(1)
                with closing(connect(f"127.0.0.1:{gateway.port}", SECRET, 5)._base) as other:
                    assert other.check(["current iteration"])
        assert len(gateway._strangers) <= STRANGERS
    assert capfd.readouterr().err == ""


def test_a_stranger_is_sent_away_after_a_while(gateway, monkeypatch):
    monkeypatch.setattr(gateway_module, "PATIENCE", 0.5)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as client:
        since = time.monotonic()
        client.recv(100)
        for _ in range(3):  # a byte now and then does not buy time
            client.sendall(b"x")
            time.sleep(0.1)
        assert client.recv(100) == b"" and time.monotonic() - since < 3


def test_scarce_file_descriptors_end_no_gateway(gateway, join):
    with ExitStack() as stack:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        first = socket.create_connection(("127.0.0.1", gateway.port), timeout=5)
        stack.enter_context(first)
        first.recv(100)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        waiting = socket.socket()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        with closing(waiting):
            waiting.connect(("127.0.0.1", gateway.port))
            time.sleep(0.3)
    join().beat(1)


@pytest.mark.parametrize(
    "address, complaint",
    [
        ("nonsense", "HOST:PORT"),
        ("host:", "HOST:PORT"),
        ("127.0.0.1:1", "cannot join"),
        ("127.0.0.1:99999", "cannot join"),
    ],
)
def test_an_address_where_no_run_is(address, complaint):
    with pytest.raises(ConfigError, match=complaint):
        connect(address, SECRET, 5)


def test_a_server_that_is_no_door(store, monkeypatch):
    monkeypatch.setattr(gateway_client, "PATIENCE", 1.0)
    with pytest.raises(ConfigError, match=r"replicas\.join="):
        connect(f"127.0.0.1:{store.port}", SECRET, 5)


def test_a_port_in_use(primary, journal, gateway):
    with pytest.raises(
        ConfigError,
        match=rf"replicas.port={gateway.port}: cannot listen there on 127.0.0.1: .*in use",
    ):
        StoreGateway("127.0.0.1", gateway.port, SECRET, primary, LIMITS, journal.path, 5, print)


def test_who_is_in_notices_that_the_door_closes(primary, gateway, join):
    client = join()
    client.beat(1)
    gateway.close()
    with pytest.raises(dist.DistError):
        client.beat(1)
    assert primary.has_left(1)
    gateway._loop = gateway_module.asyncio.new_event_loop()  # to be closed again
    gateway._thread = threading.Thread(target=lambda: None)
    gateway._thread.start()


def test_who_loses_the_connection_has_left(primary, join):
    client = join()
    client._base.close()
    until = time.monotonic() + 5
    while not primary.has_left(1):
        assert time.monotonic() < until
        time.sleep(0.01)
