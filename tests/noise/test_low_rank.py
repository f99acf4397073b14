"""Low-rank noise has the bits of its definition for every kernel, shape and region."""

import hashlib
import json
from math import prod, sqrt
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.noise import LowRank, add_noise, cpu, factors, reference
from shardes.noise.definition import table
from shardes.sharding.regions import Region, box_regions, cut

KNOWN = json.loads((Path(__file__).parent / "vectors_low_rank.json").read_text())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS, COEFFICIENTS = [3, 2**63 + 5, 7, 0, 12, 9], [0.5, -1.25, 0.001, 3.0, -0.2, 1e-3]
BIG = (2, 66, 520)  # more than one tile in each direction, and more than one matrix
LAYOUTS = {
    "whole": ((50, 70), [Region.contiguous(0, 3500)]),
    "starts and ends within a row": ((50, 70), [Region.contiguous(33, 3001)]),
    "within one row": ((50, 70), [Region.contiguous(75, 20)]),
    "columns": ((50, 70), [Region(10, 50, 30, 70)]),
    "rows of a region across rows of the matrix": ((50, 70), [Region(10, 20, 100, 170)]),
    "one column": ((50, 70), [Region(69, 50, 1, 70)]),
    "stack": (BIG, [Region.contiguous(0, prod(BIG))]),
    "stack, rows": (BIG, list(box_regions(BIG, (0, 20, 0), (2, 31, 520)))),
    "stack, columns": (BIG, list(box_regions(BIG, (0, 0, 3), (2, 66, 515)))),
    "stack, a part flattened": (BIG, list(cut((Region.contiguous(0, prod(BIG)),), 555, 60_001))),
    "many tiny matrices": ((90, 1, 4), [Region.contiguous(3, 350)]),
    "four dimensions": ((2, 3, 8, 9), [Region.contiguous(5, 400)]),
    "several regions": ((50, 70), [Region.contiguous(9, 13), Region(100, 5, 7, 70)]),
    "no region": ((50, 70), []),
}


def element(seed: int, name: str, index: int) -> np.float32:
    """One element of ε, by the definition."""
    key = [seed & 0xFFFFFFFF, seed >> 32]
    digest = hashlib.blake2b(name.encode()).digest()
    counter = [index // 8 & 0xFFFFFFFF, index // 8 >> 32]
    counter += [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")]
    for turn in range(10):
        k0, k1 = (key[0] + turn * 0x9E3779B9) % 2**32, (key[1] + turn * 0xBB67AE85) % 2**32
        p0, p1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [p1 >> 32 ^ counter[1] ^ k0, p1 % 2**32, p0 >> 32 ^ counter[3] ^ k1, p0 % 2**32]
    return table()[counter[index % 8 // 2] >> 16 * (index % 2) & 0xFFFF]


def by_definition(
    shape: tuple[int, ...], rank: int, index: int, seeds: list[int], coefficients: list[float]
) -> np.float32:
    """Σ_n Σ_k c_n'·(a_k·b_k) of element `index` of parameter w, one rounding at a time."""
    m, n = shape[-2:]
    col, row = index % n, index // n
    total = np.float32(0)
    for seed, coefficient in zip(seeds, coefficients, strict=True):
        for k in range(rank):
            a = element(seed, "w#rows", row * rank + k)
            b = element(seed, "w#cols", (row // m * n + col) * rank + k)
            total += np.float32(coefficient / sqrt(rank)) * (a * b)
    return total


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: f"{known['shape']}, {known['rank']}")
def test_known_answers(known):
    shape, rank, index = tuple(known["shape"]), known["rank"], known["index"]
    out = torch.zeros(len(known["noise"]))
    regions = [Region.contiguous(index, len(out))]
    add_noise(out, "w", regions, SEEDS, COEFFICIENTS, low_rank=LowRank(shape, rank))
    assert out.tolist() == known["noise"]
    first = by_definition(shape, rank, index, SEEDS, COEFFICIENTS)
    assert out[0].item() == first


def computed(kernel, x, regions, terms: int, low_rank: LowRank, dtype=None) -> torch.Tensor:
    """The bits of a kernel's result, in place or in another dtype."""
    x = x.clone()
    out = x if dtype is None else torch.full_like(x, 9, dtype=dtype)
    scaled = low_rank.scaled(COEFFICIENTS[:terms])
    kernel.add_low_rank_noise(x, "w", regions, SEEDS[:terms], scaled, out, low_rank)
    return out.view(torch.int32 if out.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape, regions", LAYOUTS.values(), ids=LAYOUTS)
def test_kernel_equals_reference_to_the_bit(shape, regions, rank):
    count = sum(region.numel for region in regions)
    x = torch.randn(count + 3, generator=torch.Generator().manual_seed(rank))
    x[::5] = -0.0
    slow = computed(reference, x, regions, 6, LowRank(shape, rank))
    before = numba.get_num_threads()
    for threads in {1, before}:
        numba.set_num_threads(threads)
        assert torch.equal(computed(cpu, x, regions, 6, LowRank(shape, rank)), slow)
    numba.set_num_threads(before)


@pytest.mark.parametrize("terms", [0, 1, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_number_of_terms(dtype, terms, monkeypatch):
    monkeypatch.setattr(cpu, "SCRATCH", 1000)
    regions, low_rank = [Region(10, 50, 30, 70), Region.contiguous(3, 1501)], LowRank((50, 70), 2)
    x = torch.linspace(-1, 1, 3004).to(dtype)
    for out in (None, *DTYPES):
        found = [computed(kernel, x, regions, terms, low_rank, out) for kernel in (cpu, reference)]
        assert torch.equal(*found), out


@settings(max_examples=60, deadline=None)
@given(
    stack=st.integers(1, 4),
    m=st.integers(1, 9),
    n=st.integers(1, 40),
    rank=st.integers(1, 4),
    data=st.data(),
)
def test_any_region_has_the_noise_of_the_definition(stack, m, n, rank, data):
    size = stack * m * n
    start = data.draw(st.integers(0, size - 1))
    cols = data.draw(st.integers(1, size - start))
    stride = data.draw(st.integers(cols, max(cols, n)))
    rows = data.draw(st.integers(1, 1 + (size - start - cols) // stride))
    region, low_rank = Region(start, rows, cols, stride), LowRank((stack, m, n), rank)
    x = torch.zeros(region.numel)
    found = computed(cpu, x, [region], 2, low_rank)
    assert torch.equal(found, computed(reference, x, [region], 2, low_rank))
    last = region.index(region.numel - 1)
    value = by_definition((stack, m, n), rank, last, SEEDS[:2], COEFFICIENTS[:2])
    assert found.view(torch.float32)[-1].item() == value


def test_the_factors_of_any_box_are_those_of_the_noise():
    low_rank = LowRank((4, 50, 70), 3)
    a, b = factors(5, "w", low_rank)
    noise = torch.zeros(4 * 50 * 70)
    add_noise(noise, "w", [Region.contiguous(0, 14000)], [5], [sqrt(3)], low_rank=low_rank)
    assert torch.allclose(noise.view(4, 50, 70), a @ b.mT, atol=1e-5)
    part = factors(5, "w", low_rank, (slice(1, 3), slice(7, 20), slice(60, None)))
    assert torch.equal(part[0], a[1:3, 7:20]) and torch.equal(part[1], b[1:3, 60:])
    matrix = factors(5, "w", LowRank((50, 70), 3), (slice(7, 20), slice(None)))
    assert torch.equal(matrix[0], a[0, 7:20]) and torch.equal(matrix[1], b[0])


def test_vectors_have_no_noise():
    x, out = torch.linspace(-1, 1, 100), torch.full((100,), 9.0, dtype=torch.bfloat16)
    add_noise(x, "w", [Region.contiguous(0, 90)], [1], [1.0], out, LowRank((90,), 1))
    assert torch.equal(out[:90], x[:90].bfloat16()) and torch.all(out[90:] == 9)


@pytest.mark.parametrize("rank", [1, 4])
def test_elements_have_mean_zero_and_unit_variance(rank):
    low_rank, size = LowRank((1500, 1500), rank), 1500 * 1500
    noise = torch.zeros(size)
    add_noise(noise, "w", [Region.contiguous(0, size)], [1], [1.0], low_rank=low_rank)
    # Elements of a row share a factor, so the error is that of 1500 numbers, not of their square.
    assert abs(noise.mean().item()) < 5 / 1500
    assert noise.double().var().item() == pytest.approx(1, abs=10 * sqrt(2 / 1500))


def test_factors_of_two_members_and_of_rows_and_columns_differ():
    pairs = [factors(seed, "w", LowRank((3000, 3000), 1)) for seed in (1, 2)]
    vectors = [factor.flatten() for pair in pairs for factor in pair]
    for i, one in enumerate(vectors):
        for other in vectors[:i]:
            assert abs(torch.mean(one * other).item()) < 5 / sqrt(3000)
