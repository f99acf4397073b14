"""The digest of a model does not depend on its sharding or on the device."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.noise.definition import name_key
from shardes.sharding import digest as digest_module
from shardes.sharding.digest import digest
from shardes.sharding.regions import Region


def reference_digest(name: str, index: int, bits: int) -> int:
    """One element's hash, in Python integers."""
    x = (
        name_key(name) + index * digest_module.INDEX_FACTOR + bits * digest_module.BITS_FACTOR
    ) % 2**64
    for factor in (digest_module.MIX_1, digest_module.MIX_2):
        x = (x ^ (x >> 33)) * factor % 2**64
    return x ^ (x >> 33)


def test_the_digest_is_its_definition_on_every_device():
    regions = (Region.contiguous(5, 70), Region(200, 9, 11, 40), Region.contiguous(2**41, 3))
    values = torch.randn(172)
    bits = values.view(torch.int32).tolist()
    expected = sum(
        reference_digest("w", index, b % 2**32)
        for index, b in zip(
            [region.index(j) for region in regions for j in range(region.numel)], bits, strict=True
        )
    )
    assert digest("w", regions, values) == expected % 2**64
    total, offset = 0, 0
    for region in regions:
        region_bits = values[offset : offset + region.numel].view(torch.int32)
        total += int(digest_module._hash(region_bits, region, name_key("w")))
        offset += region.numel
    assert total % 2**64 == expected % 2**64


@settings(max_examples=50, deadline=None)
@given(edges=st.sets(st.integers(1, 19_999), max_size=5))
def test_the_digest_does_not_depend_on_the_sharding(edges):
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    edges = [0, *sorted(edges), 20_000]
    parts = [digest("w", [Region.contiguous(a, b - a)], values[a:b]) for a, b in pairwise(edges)]
    assert sum(parts) % 2**64 == digest("w", [Region.contiguous(0, 20_000)], values)


def test_a_flipped_bit_a_swap_and_a_name_change_the_digest():
    values = torch.randn(1000)
    digests = {
        digest("w", [Region.contiguous(0, 1000)], values),
        digest("v", [Region.contiguous(0, 1000)], values),
    }
    flipped, swapped = values.clone(), values.clone()
    flipped.view(torch.int32)[500] ^= 1
    swapped[[3, 4]] = swapped[[4, 3]]
    digests |= {
        digest("w", [Region.contiguous(0, 1000)], flipped),
        digest("w", [Region.contiguous(0, 1000)], swapped),
    }
    assert len(digests) == 4


def test_low_precision_has_the_digest_of_its_float32_values():
    values = torch.randn(1000).bfloat16()
    assert digest("w", [Region.contiguous(0, 1000)], values) == digest(
        "w", [Region.contiguous(0, 1000)], values.float()
    )
