"""How many warps a block of products has, on one GPU and another."""

import pytest

from raygraft.kernels.cuda.formats import FORMATS, TILE
from raygraft.kernels.cuda.sources import (
    SHAPES,
    STATIC_BYTES,
    SharedMemory,
    product_shared_bytes,
    product_warps,
    shape_for,
)

HOPPER = SharedMemory(232448, 233472)
GPUS = {"8.0": SharedMemory(166912, 167936), "8.9": SharedMemory(101376, 102400), "9.0": HOPPER}
PAIRS = [(kind, kind) for kind in FORMATS] + [("Q4_K", "Q6_K"), ("F16", "Q8_0")]


def squares(rows, width):
    return 4 * rows * (-(-width // (TILE * shape_for(rows).row_tiles)) + 1)


@pytest.mark.parametrize(
    ("rows", "blocks", "warps"),
    [(1, 256, 12), (1, 384, 8), (4, 896, 4), (1, 8016, 8), (8, 256, 12),
     (16, 128, 16), (16, 192, 8), (16, 448, 4), (16, 4008, 4)],
)  # fmt: skip
def test_all_blocks_of_a_launch_run_at_once_where_they_can(rows, blocks, warps):
    """Launches of an 8B model on 132 multiprocessors; more than seven blocks each take turns."""
    for kinds in (("Q8_0", "Q8_0"), ("Q4_K", "Q4_K"), ("F16", "F16")):
        own = product_warps(kinds, shape_for(rows), -(-blocks // 132), squares(rows, 4096), HOPPER)
        assert own == warps, kinds


def test_shared_memory_counts():
    """Two blocks of 8 warps would need 256 bytes more than a multiprocessor has."""
    assert product_warps(("Q4_K", "Q6_K"), shape_for(16), 2, squares(16, 4096), HOPPER) == 4
    assert product_warps(("Q4_K", "Q6_K"), shape_for(16), 2, 64, HOPPER) == 8


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_block_has_the_room_it_asks_for(gpu, shape):
    room = GPUS[gpu]
    for kinds in PAIRS:
        for width in (64, 4096, 8192, 16384):
            more = squares(shape.rows, width)
            for share in range(1, 40):
                warps = product_warps(kinds, shape, share, more, room)
                needed = product_shared_bytes(kinds, shape, warps) + more + STATIC_BYTES
                assert needed <= room.block, (kinds, width, share)
                assert warps in shape.blocks
