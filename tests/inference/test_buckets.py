"""Fixed shapes are few, and close to what is needed."""

import pytest

from shardes.config.schema import Decode
from shardes.inference.buckets import attended_length, bucket, largest_bucket, padded_length
from shardes.inference.generation import batches, rows_of_batch


def test_a_bucket_holds_the_count_and_is_less_than_half_empty():
    sizes = sorted({bucket(count) for count in range(1, 1025)})
    assert sizes[:8] == [1, 2, 3, 4, 6, 8, 12, 16] and len(sizes) == 20
    for count in range(1, 1025):
        assert count <= bucket(count) < 1.5 * count
        assert bucket(count) == min(size for size in sizes if size >= count)
        assert largest_bucket(count) == max(size for size in sizes if size <= count)
    assert largest_bucket(0) == 0
    assert largest_bucket(10**9) == 1 << 29 | 1 << 28


@pytest.mark.parametrize(
    "tokens, longest, attended",
    [(1, 1280, 256), (256, 1280, 256), (257, 1280, 512), (1025, 1280, 1280), (1200, 4096, 1536)],
)
def test_a_step_attends_to_no_more_than_the_memory(tokens, longest, attended):
    assert attended_length(tokens, longest) == attended
    assert padded_length(longest - 3) == longest


def test_batches_of_fixed_shape_keep_to_the_token_budget():
    lengths, new, budget = [3, 20, 9, 5, 300, 8] * 9, 200, 5000
    for rows in batches(lengths, new, budget, decode=Decode.graph):
        longest = max(lengths[row] for row in rows)
        assert bucket(len(rows)) * padded_length(longest + new) <= budget
    assert rows_of_batch(220, budget, Decode.eager) == 22
    assert rows_of_batch(220, budget, Decode.graph) == 16
    assert list(map(len, batches([9, 9], 10, 5, decode=Decode.graph))) == [1, 1]
