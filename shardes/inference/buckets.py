"""Sizes that fixed shapes have: few, so that few graphs are captured, and close to what is needed.

Sizes are 1, 2, 3, 4, 6, 8, 12, 16, ...: powers of two, and what lies halfway.
"""

LENGTH_UNIT = 256  # tokens; lengths of rows are multiples of it


def bucket(count: int) -> int:
    """The smallest size that holds `count`, at least 1: less than half of it is empty."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


def largest_bucket(count: int) -> int:
    """The largest size that is at most `count`; 0 if there is none."""
    if not count:
        return 0
    power = 1 << (count.bit_length() - 1)
    return power * 3 // 2 if count >= power * 3 // 2 else power


def padded_length(tokens: int) -> int:
    """The length of the memory of rows that grow to `tokens`."""
    return -(-tokens // LENGTH_UNIT) * LENGTH_UNIT


def attended_length(tokens: int, longest: int) -> int:
    """The length that a decode step attends to, of rows with `tokens` tokens and memory for
    `longest`.
    """
    return min(bucket(-(-tokens // LENGTH_UNIT)) * LENGTH_UNIT, longest)
