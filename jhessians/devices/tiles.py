"""What an array is padded to so that TPUs add it up without every chip making all of the sum.

A TPU keeps an array in tiles of 4 KiB. XLA makes a reduce-scatter only where each chip's share can
be divided into 2, 4, 8… pieces of whole tiles that are not too large; otherwise every chip gets the
sum of all shares. Measured with libtpu 0.0.42.1 for v5e, v5p and v6e.
"""

import math
from collections.abc import Sequence

TILE = (32, 128)  # bytes high, elements wide
LARGEST_PIECE = 200  # tiles
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
        Rows and columns whose tiles can be divided at every axis; the fewest tiles.
    """
    height, width = TILE[0] // itemsize, TILE[1]
    rows, columns = -(-share[0] // height), -(-share[1] // width)
    shares = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    candidates = [
        (r * c, r, c)
        for r in range(rows, rows + _SEARCHED)
        for c in range(columns, columns + _SEARCHED)
        if all(n * r * c % _pieces(n * r * c) == 0 for n in shares)
    ]
    _, r, c = min(candidates, default=(0, rows, columns))
    return (
        share[0] if r == rows else r * height,
        share[1] if c == columns else c * width,
    )


def _pieces(tiles: int) -> int:
    """Into how many pieces a share must be divided."""
    return max(2, 2 ** math.ceil(math.log2(tiles / LARGEST_PIECE)))
