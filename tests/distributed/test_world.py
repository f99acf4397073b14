"""Ranks agree before any of them starts heavy work."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from shardes.distributed.world import Job, agree, leave_job

SAME = [{"task.prompts/train": "1"}] * 3
OTHER = [*SAME[:2], {"task.prompts/train": "2"}]


@pytest.mark.parametrize(
    "problems, settings, sources, said",
    [
        (["", "", ""], ["a", "a", "a"], SAME, None),
        (["bad key", "bad key", "bad key"], ["", "", ""], SAME, "bad key"),
        (["", "", "no such file"], ["a", "a", ""], SAME, "no such file (seen by rank 2)"),
        (["", "", ""], ["a", "b", "a"], SAME, "rank 1 has other settings than rank 0"),
        (["", "", ""], ["a", "a", "a"], OTHER, "rank 2 has another task.prompts/train than rank 0"),
    ],
    ids=["all is well", "one mistake", "one host", "other settings", "other prompts"],
)
def test_agreement(problems, settings, sources, said):
    limit = timedelta(seconds=20)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=limit)
    spoken: list[str] = []
    verdicts: dict[int, bool] = {}

    def rank(number: int):
        job = Job(
            number, 3, dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=limit)
        )
        verdicts[number] = agree(
            job, problems[number] or None, settings[number], spoken.append, sources[number]
        )

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(verdicts.values()) == {said is None}
    assert len(spoken) == (said is not None)
    assert said is None or spoken[0].startswith(said)


def test_rank_0_leaves_after_the_slowest_or_names_who_is_missing():
    limit = timedelta(seconds=20)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=limit)
    left: dict[int, float] = {}

    def rank(number: int):
        job = Job(
            number, 3, dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=limit)
        )
        time.sleep(0.3 * number)
        left[number] = time.monotonic()
        assert leave_job(job, 10) == []

    threads = [threading.Thread(target=rank, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    assert leave_job(Job(0, 3, server), 10) == []
    assert time.monotonic() >= max(left.values()) and set(left) == {1, 2}
    for thread in threads:
        thread.join()
    assert leave_job(Job(0, 5, server), 0.2) == [3, 4]


def test_a_rank_leaves_quietly_when_rank_0_is_gone():
    limit = timedelta(seconds=20)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=limit)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=limit)
    del server
    client.set("the first write to a closed connection", "")  # raises nothing yet
    time.sleep(0.2)
    assert leave_job(Job(1, 2, client), 10) == []
