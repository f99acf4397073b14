"""Ranks find each other, or are told who is missing."""

import os
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from shardes.distributed import rendezvous
from shardes.distributed.job_store import keys_of_this_start
from shardes.distributed.ports import free_port
from shardes.distributed.rendezvous import wait_for_ranks, wait_for_store
from shardes.distributed.world import join_job
from shardes.errors import ConfigError, RunError

LIMIT = timedelta(seconds=20)


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=LIMIT)


@pytest.fixture
def environ(monkeypatch):
    """Two ranks on a node, host names by no launcher; a notice after a moment."""
    for name in ("LOCAL_SIZE", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(rendezvous, "NOTICE", 0.3)


def together(store, ranks: list[int], size: int, timeout: float) -> dict[int, Exception | None]:
    """What `wait_for_ranks` raises on each of some ranks."""
    ends: dict[int, Exception | None] = {}

    def rank(number: int):
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=LIMIT)
        try:
            wait_for_ranks(keys_of_this_start(client), number, size, "here:1", timeout)
            ends[number] = None
        except (ConfigError, RunError) as error:
            ends[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_all_ranks_arrive(store, environ, capsys):
    assert together(store, [0, 1, 2, 3], 4, 10) == dict.fromkeys(range(4))
    assert capsys.readouterr().err == ""


def test_the_missing_are_named_while_and_after_they_are_waited_for(store, environ, capsys):
    ends = together(store, [0, 2], 6, 1)
    host = socket.gethostname()
    missing = f"rank 1 of node 0 ({host}); rank 3 of node 1 ({host}); ranks 4, 5 of node 2"
    assert str(ends[0]) == f"after 1 s not arrived at here:1: {missing}"
    assert isinstance(ends[0], RunError)
    assert "rank 2 of 6 on" in str(ends[2]) and "rank 0 names the missing ones" in str(ends[2])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"waiting at here:1 on {host}, for 1 s more, for {missing}")


def test_a_stranger_is_refused(store, environ):
    assert together(store, [0, 1], 2, 10) == {0: None, 1: None}
    assert "is used by another rank 1" in str(together(store, [1], 2, 10)[1])
    (error,) = together(store, [3], 4, 10).values()
    assert (
        "rank 3 of 4" in str(error)
        and "a job of 2 ranks" in str(error)
        and isinstance(error, ConfigError)
    )


def test_ranks_that_an_agent_restarts_arrive_again(store, environ, monkeypatch):
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        assert together(store, [0, 1], 2, 10) == {0: None, 1: None}


def test_an_address_where_nobody_listens_is_named(environ, capsys):
    port, since = free_port(), time.monotonic()
    with pytest.raises(
        RunError, match=rf"me: no answer at MASTER_ADDR:MASTER_PORT=127.0.0.1:{port} .*refused"
    ):
        wait_for_store("127.0.0.1", port, "me", 1)
    assert time.monotonic() - since < 10
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"me: no answer at MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}")


def test_a_host_without_an_address_is_named(environ):
    with pytest.raises(RunError, match=r"=no-such-host\.invalid:1 for"):
        wait_for_store("no-such-host.invalid", 1, "me", 0.1)


def test_a_listener_that_comes_late_is_found():
    port = free_port()
    waiting = threading.Thread(target=wait_for_store, args=("127.0.0.1", port, "me", 20))
    waiting.start()
    time.sleep(0.5)
    with socket.create_server(("127.0.0.1", port)):
        waiting.join(10)
    assert not waiting.is_alive()


@pytest.mark.parametrize("spoiled", [{"MASTER_PORT": "x"}, {"WORLD_SIZE": ""}], ids=str)
def test_an_environment_that_no_launcher_made(monkeypatch, spoiled):
    launched = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (launched | spoiled).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="not as a launcher sets them"):
        join_job(1)


def test_a_world_of_one(monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_USE_AGENT_STORE",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    job = join_job(10)
    assert (job.rank, job.size, os.environ["WORLD_SIZE"]) == (0, 1, "1")
