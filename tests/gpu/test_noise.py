"""The device's kernels have the bits of the definition, as the CPU's have (tests/noise)."""

import json
from math import prod

import pytest
import torch

from launch import ROOT
from shardes.noise import LowRank, add_noise
from shardes.sharding.regions import Region, box_regions, cut

pytestmark = pytest.mark.gpu
KNOWN = json.loads((ROOT / "tests/noise/vectors.json").read_text())["vectors"]
KNOWN_LOW_RANK = json.loads((ROOT / "tests/noise/vectors_low_rank.json").read_text())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS, COEFFICIENTS = [3, 2**63 + 5, 7, 0, 12, 9], [0.5, -1.25, 0.001, 3.0, -0.2, 1e-3]
STACK = (3, 70, 260)  # several tiles in each direction
LAYOUTS = {
    "one element": [Region.contiguous(5, 1)],
    "many blocks, odd start": [Region.contiguous(3, 100_003)],
    "short rows": [Region(2, 301, 3, 17)],
    "rows of one element": [Region(11, 500, 1, 9)],
    "rows across counters": [Region(7, 37, 2091, 5003)],
    "beyond 32 bits": [Region.contiguous(8 * 2**32 - 300, 603), Region.contiguous(2**45 + 5, 99)],
    "no region": [],
}
LOW_RANK_LAYOUTS = {
    "whole": ((50, 700), [Region.contiguous(0, 35_000)]),
    "starts and ends within a row": ((50, 70), [Region.contiguous(33, 3001)]),
    "columns": ((500, 70), [Region(10, 500, 30, 70)]),
    "stack": (STACK, [Region.contiguous(0, prod(STACK))]),
    "stack, columns": (STACK, list(box_regions(STACK, (0, 0, 3), (3, 70, 255)))),
    "stack, flattened": (STACK, list(cut((Region.contiguous(0, prod(STACK)),), 555, 30_001))),
    "beyond 32 bits": ((2**20, 2**20), [Region(2**39 + 2**20 - 3, 3, 3, 2**20)]),
    "no region": ((50, 70), []),
}


def test_the_kernels_are_compiled_ones(device):
    if device.type == "cuda":
        pytest.importorskip("triton", reason="triton is not installed: noise in plain torch")
        from shardes.noise import _kernel, cuda

        assert _kernel(device) is cuda and not cuda.INTERPRETED


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known["name"])
def test_known_answers(device, known):
    x = torch.zeros(len(known["noise"]), device=device)
    add_noise(x, known["name"], [Region.contiguous(known["start"], len(x))], [known["seed"]], [1.0])
    assert x.tolist() == known["noise"]


@pytest.mark.parametrize("known", KNOWN_LOW_RANK, ids=lambda known: str(known["shape"]))
def test_known_answers_of_low_rank(device, known):
    x = torch.zeros(len(known["noise"]), device=device)
    regions = [Region.contiguous(known["index"], len(x))]
    low_rank = LowRank(tuple(known["shape"]), known["rank"])
    add_noise(x, "w", regions, SEEDS, COEFFICIENTS, low_rank=low_rank)
    assert x.tolist() == known["noise"]


def compare(device, regions, dtype, out_dtype, terms: int, low_rank: LowRank | None) -> None:
    """Assert that the device computes the CPU's bits; zeros have signs."""
    count = sum(region.numel for region in regions)
    x = torch.randn(count + 3, generator=torch.Generator().manual_seed(terms)).to(dtype)
    bits = []
    for place in (torch.device("cpu"), device):
        theta = x.to(place, copy=True)
        out = theta if out_dtype is None else torch.full_like(theta, 9, dtype=out_dtype)
        add_noise(theta, "w", regions, SEEDS[:terms], COEFFICIENTS[:terms], out, low_rank)
        bits.append(out.cpu().view(torch.int32 if out.dtype == torch.float32 else torch.int16))
    assert torch.equal(*bits), (dtype, out_dtype, terms)


@pytest.mark.parametrize("regions", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_full_noise_has_the_cpus_bits(device, regions):
    for dtype in DTYPES:
        for out_dtype in (None, *DTYPES):
            for terms in (1, 6):
                compare(device, regions, dtype, out_dtype, terms, None)


@pytest.mark.parametrize("layout", LOW_RANK_LAYOUTS.values(), ids=LOW_RANK_LAYOUTS.keys())
def test_low_rank_noise_has_the_cpus_bits(device, layout):
    shape, regions = layout
    for rank in (1, 3):
        for dtype, out_dtype in ((DTYPES[0], None), (DTYPES[0], DTYPES[1]), (DTYPES[1], None),
                                 (DTYPES[2], DTYPES[0]), (DTYPES[1], DTYPES[2])):  # fmt: skip
            compare(device, regions, dtype, out_dtype, 6, LowRank(shape, rank))


@pytest.mark.parametrize("is_low_rank", [False, True], ids=["full", "low rank"])
def test_a_shard_of_more_than_31_bits(device, is_low_rank):
    """The last elements of a shard have their own noise, not that of elements 2**32 earlier."""
    before = 2**31 + 1001
    if device.type == "cpu":
        before = 2**20 + 1001
    elif torch.cuda.mem_get_info(device)[0] < 2.5 * before:
        pytest.skip(f"needs {2.5 * before / 1e9:.0f} GB of free device memory")
    tail = 5000
    shape = (-(-(before + tail) // 4096), 4096)
    low_rank = LowRank(shape, 1) if is_low_rank else None
    x = torch.zeros(before + tail, dtype=torch.bfloat16, device=device)
    add_noise(x, "w", [Region.contiguous(0, before + tail)], SEEDS[:2], COEFFICIENTS[:2],
              low_rank=low_rank)  # fmt: skip
    for start in (0, before // 2, before):
        expected = torch.zeros(tail, dtype=torch.bfloat16)
        add_noise(expected, "w", [Region.contiguous(start, tail)], SEEDS[:2], COEFFICIENTS[:2],
                  low_rank=low_rank)  # fmt: skip
        assert torch.equal(x[start : start + tail].cpu(), expected), start
