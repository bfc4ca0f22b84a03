"""To what a chip's share of a sum is padded: pieces of whole tiles at every axis, little more."""

import math

import pytest

from jhessians.devices.tiles import LANES, LARGEST_PIECE, padded_share

# Rows and columns of a chip's share, and the mesh: of 8B and 70B models on 16 to 256 chips.
SHARES = [
    ((86, 4096), (4, 4)), ((86, 1366), (4, 4)), ((299, 9558), (4, 4)), ((22, 342), (4, 4)),
    ((150, 28672), (4, 4, 4)), ((43, 8192), (4, 4, 4)), ((38, 19115), (4, 4, 4, 4)),
    ((6, 1365), (4, 4, 4, 4)), ((1195, 28672), (2, 2, 2)), ((100, 900), (3, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("share", "sizes"), SHARES)
def test_shares_divide_into_pieces_of_whole_tiles(share, sizes):
    rows, columns = padded_share(share, sizes)
    assert rows >= share[0] and columns >= share[1]
    assert rows * columns < 1.6 * math.prod(share)
    tiles = -(-rows // 8) * -(-columns // LANES)  # of float32
    for i in range(len(sizes)):
        together = tiles * math.prod(sizes[i + 1 :])
        powers = [2**k for k in range(1, 30) if together % 2**k == 0]
        assert any(together // power <= LARGEST_PIECE for power in powers)


def test_small_ones_and_those_that_fit_are_left_alone():
    assert padded_share((86, 4096), (4, 4)) == (86, 4096)
    assert padded_share((2, 233), (4, 4, 4, 4)) == (2, 233)
