"""The noise has the bits of its definition on every device, and the right distribution."""

import json
from itertools import pairwise
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shardes.noise import add_noise, cpu, definition, gaussian, reference
from shardes.noise.definition import table
from shardes.sharding.regions import Region

KNOWN = json.loads((Path(__file__).parent / "vectors.json").read_text())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASTS = [(dtype, out) for dtype in DTYPES for out in (None, torch.float32, torch.bfloat16)]
LAYOUTS = {
    "one element": [Region.contiguous(5, 1)],
    "odd start and length": [Region.contiguous(3, 1001)],
    "several stretches of a thread": [Region.contiguous(1, 2 * cpu.STRETCH + 77)],
    "short rows": [Region(2, 301, 3, 17)],
    "rows of one element": [Region(11, 50, 1, 9)],
    "rows across counters": [Region(7, 37, 91, 1003)],
    "counters beyond 32 bits": [
        Region.contiguous(8 * 2**32 - 300, 603),
        Region.contiguous(2**45 + 5, 99),
    ],
    "several regions": [
        Region.contiguous(9, 13),
        Region(100, 5, 7, 64),
        Region.contiguous(2**40 + 3, 29),
    ],
    "no region": [],
}


@pytest.mark.parametrize("vector", KNOWN["vectors"], ids=lambda vector: vector["name"])
def test_known_answers(vector):
    seed, name, start, noise = vector["seed"], vector["name"], vector["start"], vector["noise"]
    assert gaussian(seed, name, start, len(noise)).tolist() == noise
    assert reference.gaussian(seed, name, torch.arange(start, start + len(noise))).tolist() == noise


def test_philox_of_zero():
    words = reference.philox([torch.zeros(1, dtype=torch.long)] * 4, 0, 0)
    assert [f"{word.item():08x}" for word in words] == KNOWN["philox_zero"]


def test_the_table_has_unit_variance_and_odd_symmetry():
    values = table()
    assert values.astype(np.float64).var() == pytest.approx(1, abs=1e-7)
    assert np.array_equal(values[::-1], -values)
    assert np.all(np.diff(values) > 0)


def test_a_different_table_is_an_error(monkeypatch):
    monkeypatch.setattr(definition, "TABLE_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="table"):
        table.__wrapped__()


def computed(kernel, x, regions, seeds, coefficients, out=None):
    """The bits of a kernel's result, in place or in another dtype; zeros have signs."""
    x = x.clone()
    out = x if out is None else torch.full_like(x, 9, dtype=out)
    kernel.add_noise(x, "w", regions, seeds, [float(np.float32(c)) for c in coefficients], out)
    return out.view(torch.int32 if out.dtype == torch.float32 else torch.int16)


@pytest.fixture
def set_threads():
    before = numba.get_num_threads()
    yield lambda count: numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(before)


@pytest.mark.parametrize("terms", [0, 1, 2, 30])
@pytest.mark.parametrize("regions", LAYOUTS.values(), ids=LAYOUTS)
def test_kernel_equals_reference_to_the_bit(regions, terms, set_threads):
    x = torch.randn(
        sum(r.numel for r in regions) + 3, generator=torch.Generator().manual_seed(terms)
    )
    x[::5] = -0.0
    sums = member_like_seeds(terms), np.linspace(-1, 1.5, terms)
    for dtype, out in CASTS:
        slow = computed(reference, x.to(dtype), regions, *sums, out)
        for threads in (1, 2):
            set_threads(threads)
            fast = computed(cpu, x.to(dtype), regions, *sums, out)
            assert torch.equal(fast, slow), (dtype, out, threads)


@pytest.mark.parametrize("dtype, out", [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_scratch_blocks_do_not_change_the_result(dtype, out, monkeypatch):
    regions = [Region(7, 37, 91, 1003), Region.contiguous(2**40, 555)]
    x = torch.linspace(-1, 1, 37 * 91 + 555 + 3).to(dtype)
    slow = computed(reference, x, regions, [5, 6], [0.3, -0.2], out)
    monkeypatch.setattr(cpu, "SCRATCH", 100)
    assert torch.equal(computed(cpu, x, regions, [5, 6], [0.3, -0.2], out), slow)


def member_like_seeds(count: int) -> list[int]:
    return np.random.SeedSequence([1]).generate_state(count, np.uint64).tolist()


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(0, 2**45),
    rows=st.integers(1, 40),
    cols=st.integers(1, 60),
    gap=st.integers(0, 50),
    seed=st.integers(0, 2**64 - 1),
    coefficient=st.floats(-10, 10, width=32),
)
def test_kernel_equals_reference_anywhere(start, rows, cols, gap, seed, coefficient):
    call = (
        torch.linspace(-1, 1, rows * cols),
        [Region(start, rows, cols, cols + gap)],
        [seed],
        [coefficient],
    )
    assert torch.equal(computed(cpu, *call), computed(reference, *call))


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 4999), max_size=6))
def test_any_cut_of_a_tensor_gets_the_noise_of_the_whole(cuts):
    whole = gaussian(4, "w", 0, 5000)
    edges = [0, *sorted(set(cuts)), 5000]
    parts = []
    for first, last in pairwise(edges):
        part = torch.zeros(last - first)
        add_noise(part, "w", [Region.contiguous(first, last - first)], [4], [1.0])
        parts.append(part)
    assert torch.equal(torch.cat(parts), whole)


def test_columns_get_the_noise_of_the_whole():
    whole = gaussian(4, "w", 0, 60 * 50).view(60, 50)
    part = torch.zeros(60 * 17)
    add_noise(part, "w", [Region(13, 60, 17, 50)], [4], [1.0])
    assert torch.equal(part.view(60, 17), whole[:, 13:30])


def test_terms_are_added_in_member_order_without_fusing():
    n, seeds, coefficients = 4096, [3, 1, 2], [0.7, -1.3, 1e-4]
    total = torch.zeros(n)
    for seed, c in zip(seeds, coefficients, strict=True):
        total = total + gaussian(seed, "w", 0, n) * torch.tensor(c, dtype=torch.float32)
    x = torch.linspace(-3, 3, n)
    for dtype in DTYPES:
        original = x.to(dtype)
        result = original.clone()
        add_noise(result, "w", [Region.contiguous(0, n)], seeds, coefficients)
        assert torch.equal(result, (original.float() + total).to(dtype))


def test_padding_does_not_change_and_restoring_is_accurate():
    x = torch.ones(100)
    add_noise(x, "w", [Region.contiguous(0, 90)], [1], [0.01])
    assert torch.all(x[90:] == 1) and torch.all(x[:90] != 1)
    add_noise(x, "w", [Region.contiguous(0, 90)], [1], [-0.01])
    assert torch.allclose(x, torch.ones(100), atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: add_noise(torch.zeros(4), "w", [Region.contiguous(0, 5)], [1], [1.0]),
        lambda: add_noise(torch.zeros(4), "w", [Region.contiguous(0, 4)], [1, 2], [1.0]),
        lambda: add_noise(torch.zeros(4), "w", [Region.contiguous(0, 4)], [-1], [1.0]),
        lambda: add_noise(torch.zeros(4), "w", [Region.contiguous(0, 4)], [2**64], [1.0]),
        lambda: add_noise(
            torch.zeros(4), "w", [Region.contiguous(0, 4)], [1], [1.0], out=torch.zeros(5)
        ),
        lambda: add_noise(torch.zeros(2, 2), "w", [Region.contiguous(0, 4)], [1], [1.0]),
        lambda: gaussian(1, "w", -1, 4),
    ],
)
def test_invalid_arguments(call):
    with pytest.raises(ValueError):
        call()


def test_moments_and_distribution_of_ten_million():
    n = 10_000_000
    values = gaussian(12345, "model.embed_tokens.weight", 0, n).double().numpy()
    assert abs(values.mean()) < 5 / np.sqrt(n)
    assert abs(values.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((values**3).mean()) < 5 * np.sqrt(15 / n)
    # The table's kurtosis is slightly below 3, because its tails end at 4.3.
    assert abs((values**4).mean() - (table().astype(np.float64) ** 4).mean()) < 5 * np.sqrt(96 / n)
    distance = stats.kstest(values, "norm").statistic
    # 1.95 is the 0.1 % point of Kolmogorov's distribution; the table's steps of 2**-16 add half
    # a step.
    assert distance < 1.95 / np.sqrt(n) + 2**-17


@pytest.mark.parametrize(
    "a, b",
    [
        (("w", 7, 0), ("w", 8, 0)),
        (("w", 7, 0), ("w", 7 + 2**32, 0)),
        (("layers.0.weight", 7, 0), ("layers.1.weight", 7, 0)),
        (("w", 7, 0), ("w", 7, 1)),
        (("w", 7, 0), ("w", 7, 8)),
    ],
    ids=[
        "seed and next",
        "seed and high bits",
        "two parameters",
        "neighbours",
        "neighbouring counters",
    ],
)
def test_no_correlation(a, b):
    n = 2_000_000
    x, y = (gaussian(seed, name, start, n).double() for name, seed, start in (a, b))
    assert abs(torch.mean(x * y).item()) < 5 / np.sqrt(n)
