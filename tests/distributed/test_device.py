"""Which device and which backends a rank gets, told of devices that this machine does not have."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from shardes.distributed.device import choose_backend, choose_device, unique_name
from shardes.distributed.job_store import JobStore

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "kind, visible, local_rank, expected",
    [
        ("cuda", 8, 3, torch.device("cuda", 3)),
        ("cuda", 1, 3, torch.device("cuda", 0)),  # a scheduler shows each task its own device
        ("cuda", 2, 3, torch.device("cuda", 1)),
        ("xpu", 4, 2, torch.device("xpu", 2)),
        ("mps", 1, 0, torch.device("cpu")),
        (None, 0, 5, torch.device("cpu")),
    ],
)
def test_the_device_of_a_rank(monkeypatch, kind, visible, local_rank, expected):
    current = []
    accelerator = SimpleNamespace(
        is_available=lambda: kind is not None,
        current_accelerator=lambda: torch.device(kind),
        device_count=lambda: visible,
        set_device_index=current.append,
    )
    monkeypatch.setattr(torch, "accelerator", accelerator)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert choose_device() == expected
    on_device = expected.type != "cpu"
    assert current == ([expected.index] if on_device else [])
    assert os.environ["LOCAL_RANK"] == str(expected.index if on_device else local_rank)


@pytest.mark.parametrize(
    "uuids, backend, said",
    [
        (["a", "b"], "cpu:gloo,cuda:nccl", ""),
        (["a", "a"], "cpu:gloo,cuda:gloo", "WARNING: ranks [4, 5] share one device"),
        (["a", "b", "b"], "cpu:gloo,cuda:gloo", "WARNING: ranks [5, 6] share one device"),
        (["a"], "cpu:gloo,cuda:nccl", ""),
    ],
)
def test_ranks_that_share_a_device_talk_through_gloo(monkeypatch, capsys, uuids, backend, said):
    """torch's NCCL refuses two ranks of a group on one device; a replica's ranks are a group."""
    keys, replica, seen = JobStore(dist.HashStore()), range(4, 4 + len(uuids)), list(uuids)
    device = SimpleNamespace(get_device_properties=lambda _: SimpleNamespace(uuid=seen.pop()))
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    for rank in reversed(replica[1:]):
        keys.post_device(rank, unique_name(CUDA))
    assert choose_backend(CUDA, keys, 4, replica) == (backend, uuids.count(uuids[0]))
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == bool(said)


def test_collectives_on_cpus_are_gloos():
    store = JobStore(dist.HashStore())
    assert choose_backend(torch.device("cpu"), store, 0, range(2)) == ("gloo", 1)
