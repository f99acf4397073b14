"""What a GPU computes, beside what the CPU computes: `pytest -m gpu`.

`--device cpu` puts the CPU in the GPU's place, so that the tests themselves can be tested.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from launch import NO_GPU


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    device = torch.device(request.config.getoption("device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU; --device cpu rehearses this test on the CPU")
    return device


@pytest.fixture(scope="session")
def environ(device) -> dict[str, str]:
    """Variables for processes that are to use the device."""
    return NO_GPU if device.type == "cpu" else {}


@pytest.fixture(scope="session")
def pool():
    """Threads that start processes: several at a time where there are cores for them."""
    with ThreadPoolExecutor(max(len(os.sched_getaffinity(0)) // 4, 1)) as pool:
        yield pool


@pytest.fixture(scope="module")
def chosen(request) -> set[str]:
    """The parameters of this module's tests that are to be run."""
    items = (item for item in request.session.items if item.path == request.path)
    return {
        str(value)
        for item in items
        for value in (item.callspec.params.values() if hasattr(item, "callspec") else ())
    }


@pytest.fixture(scope="session")
def most_ranks(device) -> int:
    """How many ranks a test may start; two share a device where there is one."""
    return max(torch.cuda.device_count(), 2) if device.type == "cuda" else 2
