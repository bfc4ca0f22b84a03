"""What an array is padded to so that TPUs add it up without every chip making all of the sum.

A TPU keeps an array in tiles of 4 KiB. XLA makes a reduce-scatter only where each chip's share can
be divided into 2, 4, 8… pieces of whole tiles that are not too large; otherwise every chip gets the
sum of all shares. Measured with libtpu 0.0.42.1 for v5e, v5p and v6e (tests/devices/test_tpu.py).
"""

import math
from collections.abc import Sequence

TILE = 4096  # bytes: 8 rows of 128 float32; up to 4 rows lie in smaller ones
LANES = 128
LARGEST_PIECE = 200  # tiles
WORTH = 2
"""A sum of everything on every chip sends twice as much as one that is scattered."""
_SEARCHED = 16


def padded_share(
    share: tuple[int, int], sizes: Sequence[int], itemsize: int = 4
) -> tuple[int, int]:
    """The rows and columns that a chip's share of a matrix is padded to.

    Args:
        share: Rows and columns of the share.
        sizes: Of the mesh's axes, in the order in which sums are scattered over them.
        itemsize: Bytes of an element.

    Returns:
        Rows and columns that can be divided at every axis, the fewest elements; the share as it is
        where that would be too many.
    """
    height = TILE // LANES // itemsize
    tiles, columns = -(-share[0] // height), -(-share[1] // LANES)
    rows = [height * (tiles + more) for more in range(_SEARCHED)]
    shares = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    candidates = [
        (r * c, r, c)
        for r in rows
        for c in range(columns, columns + _SEARCHED)
        if all(_divides(n * r * c * LANES * itemsize) for n in shares)
    ]
    total, r, c = min(candidates, default=(math.inf, 0, 0))
    if total * LANES > WORTH * math.prod(share):
        return share
    # What XLA fills up to whole tiles anyway is left alone.
    lies_in_tiles = share[0] > height // 2
    return (
        share[0] if r == rows[0] and lies_in_tiles else r,
        share[1] if c == columns else c * LANES,
    )


def _divides(count: int) -> bool:
    """Whether so many bytes are whole tiles that can be divided into small pieces."""
    tiles, rest = divmod(count, TILE)
    pieces = max(2, 2 ** math.ceil(math.log2(max(1, tiles) / LARGEST_PIECE)))
    return rest == 0 and tiles % pieces == 0 and tiles > 0
