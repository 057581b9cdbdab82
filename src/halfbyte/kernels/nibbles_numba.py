"""Turning a matrix of 4-bit codes, eight to a word, without taking words apart.

Codes ``[out, in]`` packed along rows, ``words[o, r]`` holding inputs ``8r .. 8r + 7`` of output ``o``, become codes
packed along columns, ``turned[i, c]`` holding outputs ``8c + order[0], 8c + order[1], ...`` of input ``i``, and back.
Eight by eight codes are eight words on either side, and turning them takes three rounds of exchanging halves.

The slow twin is :mod:`halfbyte.conversion.bits`, which takes words apart. Does not cover widths that 8 does not divide.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

Words = npt.NDArray[np.uint32]
# Words of a tile's side: 16 of them are a cache line.
TILE = 16


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _turn(w: Words) -> None:
    """Transpose eight words of eight nibbles in place: nibble ``j`` of word ``k`` changes with ``k`` of ``j``."""
    for k in range(4):
        t = ((w[k] >> np.uint32(16)) ^ w[k + 4]) & np.uint32(0x0000FFFF)
        w[k + 4] ^= t
        w[k] ^= t << np.uint32(16)
    for k in (0, 1, 4, 5):
        t = ((w[k] >> np.uint32(8)) ^ w[k + 2]) & np.uint32(0x00FF00FF)
        w[k + 2] ^= t
        w[k] ^= t << np.uint32(8)
    for k in (0, 2, 4, 6):
        t = ((w[k] >> np.uint32(4)) ^ w[k + 1]) & np.uint32(0x0F0F0F0F)
        w[k + 1] ^= t
        w[k] ^= t << np.uint32(4)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def turn_rows(words: Words, order: npt.NDArray[np.int64], turned: Words) -> None:
    """``words [out, in / 8]`` to ``turned [in, out / 8]``."""
    columns, eights = words.shape[1], words.shape[0] // 8
    for strip in range((eights + TILE - 1) // TILE):
        w = np.empty(8, dtype=np.uint32)
        stop = min(eights, (strip + 1) * TILE)
        for first in range(0, columns, TILE):
            for c in range(strip * TILE, stop):
                for r in range(first, min(columns, first + TILE)):
                    for k in range(8):
                        w[k] = words[8 * c + order[k], r]
                    _turn(w)
                    for k in range(8):
                        turned[8 * r + k, c] = w[k]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def turn_back(turned: Words, order: npt.NDArray[np.int64], words: Words) -> None:
    """``turned [in, out / 8]`` to ``words [out, in / 8]``."""
    columns, eights = words.shape[1], words.shape[0] // 8
    for strip in range((eights + TILE - 1) // TILE):
        w = np.empty(8, dtype=np.uint32)
        stop = min(eights, (strip + 1) * TILE)
        for first in range(0, columns, TILE):
            for c in range(strip * TILE, stop):
                for r in range(first, min(columns, first + TILE)):
                    for k in range(8):
                        w[k] = turned[8 * r + k, c]
                    _turn(w)
                    for k in range(8):
                        words[8 * c + order[k], r] = w[k]
