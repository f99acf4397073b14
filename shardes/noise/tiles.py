"""Cuts regions into tiles of one matrix, whose elements share the factors of low-rank noise."""

import numba
import numpy as np


@numba.njit(cache=True, error_model="numpy")
def rectangles(place, count, m, n):
    """The parts of matrices that `count` elements of a region are.

    Args:
        place: int64, (5,): start, rows, cols and stride of the region, and how many of its elements
            come before those.
        m, n: the shape of one matrix.

    Returns:
        int64, (parts, 5): the first element's place among the `count`; its row, over all matrices,
        and its column; the height and the width. The elements of a part are consecutive.
    """
    start, rows, cols, stride, skip = place
    made = np.empty((16, 5), np.int64)
    parts, at = 0, 0
    while at < count:
        line, offset = (skip + at) // cols, (skip + at) % cols
        index = start + line * stride + offset
        row, col = index // n, index % n
        width = min(n - col, cols - offset, count - at)
        if width == n:  # whole rows
            height = (cols - offset) // n
            if stride == cols:  # across lines, which are consecutive
                height = (rows * cols - skip - at) // n
        elif width == cols and stride == n:  # a block of columns
            height = rows - line
        else:
            height = 1
        height = max(min(height, (count - at) // width, m - row % m), 1)
        if parts == len(made):
            grown = np.empty((2 * parts, 5), np.int64)
            grown[:parts] = made
            made = grown
        made[parts] = at, row, col, height, width
        parts += 1
        at += height * width
    return made[:parts]


@numba.njit(cache=True, error_model="numpy")
def tiles(parts, tile_rows, tile_cols):
    """The parts of `rectangles`, cut into tiles: int64, (tiles, 6).

    A tile is its first element's place, row and column, its height and width, and the distance of
    its rows in memory.
    """
    total = 0
    for i in range(len(parts)):
        down, across = -(-parts[i, 3] // tile_rows), -(-parts[i, 4] // tile_cols)
        total += down * across
    made = np.empty((total, 6), np.int64)
    done = 0
    for i in range(len(parts)):
        place, row, col, height, width = parts[i]
        for y in range(0, height, tile_rows):
            for x in range(0, width, tile_cols):
                made[done] = (
                    place + y * width + x,
                    row + y,
                    col + x,
                    min(tile_rows, height - y),
                    min(tile_cols, width - x),
                    width,
                )
                done += 1
    return made
