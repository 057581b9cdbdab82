"""4-bit codes packed along rows <-> the halves of GGUF's blocks, in one pass over the bytes.

Along rows, byte ``k`` of a block's sixteen holds elements ``2k`` (low half) and ``2k + 1``; in a block, byte ``i``
holds elements ``i`` (low half) and ``i + 16``, behind ``start`` bytes of scales that are not touched. The slow twins
are :func:`halfbyte.conversion.gguf_blocks.encode` and ``decode``, which take codes apart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

Bytes = npt.NDArray[np.uint8]
LOW, HIGH, HALF = np.uint8(0x0F), np.uint8(0xF0), np.uint8(4)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def rows_to_blocks(octets: Bytes, start: int, blocks: Bytes) -> None:
    """``octets [rows, n, 16]`` into ``blocks [rows, n, start + 16]``."""
    rows, count, _ = blocks.shape
    for row in range(rows):
        for n in range(count):
            for k in range(8):
                first, second = octets[row, n, k], octets[row, n, k + 8]
                blocks[row, n, start + 2 * k] = (first & LOW) | (second << HALF)
                blocks[row, n, start + 2 * k + 1] = (first >> HALF) | (second & HIGH)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def blocks_to_rows(blocks: Bytes, start: int, octets: Bytes) -> None:
    """``blocks [rows, n, start + 16]`` to ``octets [rows, n, 16]``."""
    rows, count, _ = blocks.shape
    for row in range(rows):
        for n in range(count):
            for k in range(8):
                even, odd = blocks[row, n, start + 2 * k], blocks[row, n, start + 2 * k + 1]
                octets[row, n, k] = (even & LOW) | (odd << HALF)
                octets[row, n, k + 8] = (even >> HALF) | (odd & HIGH)
