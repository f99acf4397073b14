"""A rank that gives no sign of life is missed, and no other. Real ranks: tests/faults."""

import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from shardes.distributed import rank_watch
from shardes.distributed.job_store import JobStore
from shardes.distributed.rank_watch import LEFT, RankWatch, Silence
from shardes.distributed.world import Job

TIMEOUT = 1.0


@pytest.fixture
def store() -> dist.TCPStore:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))
    for rank in range(4):
        store.set(f"rendezvous/host/{rank}", "a host")
    return store


@pytest.fixture
def ended(monkeypatch) -> list[int]:
    """The exit codes with which the watch would have ended this process."""
    codes: list[int] = []

    def exit_process(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(rank_watch, "exit_process", exit_process)
    return codes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_silent_rank_is_named(store, ended, capfd):
    """Ranks 1 and 2 give signs until one of them is silent; rank 3 has done its work."""
    keys = JobStore(store.clone())
    keys.sign(3, LEFT)
    with RankWatch(Job(0, 4, store), range(4), TIMEOUT):
        until = time.monotonic() + 2 * TIMEOUT
        while time.monotonic() < until:
            keys.sign(1, 1)
            keys.sign(2, 1)
            time.sleep(0.05)
        assert not ended
        silent = time.monotonic()
        while not ended:
            keys.sign(1, 1)
            time.sleep(0.05)
            assert time.monotonic() < silent + 10
    assert ended == [1] and keys.ended() == 1
    error = "error: rank 2 on a host: no sign of life for run.timeout=1 seconds."
    assert capfd.readouterr().err.startswith(error)


def test_a_watch_that_is_closed_is_not_missed(store, ended):
    others = JobStore(store.clone())
    with RankWatch(Job(0, 2, store), range(2), TIMEOUT):
        others.sign(1, 1)
    assert others.sign(0, 0) >= LEFT and not ended
    with RankWatch(Job(1, 2, store), range(2), TIMEOUT):
        time.sleep(2 * TIMEOUT)
    assert not ended


def test_the_time_in_which_this_process_was_stopped_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rank_watch.time, "monotonic", lambda: now[0])
    silence = Silence(longest=2.0)
    silence.look(5)
    for passed, count, expected in ((1, 5, 1), (1, 5, 2), (100, 5, 4), (1, 6, 0), (1, 6, 1)):
        now[0] += passed
        silence.look(count)
        assert silence.seconds == expected
