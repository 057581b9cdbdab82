"""Recover the int4 grid that a fake-quantised weight lies on, exactly: zero error, or no grid.

Quantisation-aware training leaves weights in which every group of 32 inputs is ``w = round(q s)`` with ``q`` in -8..7,
one scale ``s`` for the group, and ``round`` that of the dtype they are stored in; ``s`` itself is not stored. Here
``s`` and ``q`` are found again, and what is found is checked by computing ``round(q s)`` and comparing all bits.

For one group let ``m = max|w|``. Some code ``a`` in 1..8 belongs to it. With the right ``a`` all ``a w / m`` are whole
numbers but for rounding, and two different choices of codes that both fit are multiples of each other: ratios of whole
numbers up to 8 differ by 1/64 at least, bfloat16 rounding moves them by 1/128 at most. So codes are unique up to a
common factor, and the smallest is taken whose scale is a bfloat16 number, else a float16 number, else any float32.

Given the codes, each ``w`` says between which two numbers ``s`` lies: those whose products round to ``w``. The scale is
the bfloat16 (float16, float32) number nearest to the middle of what all of them leave. Several can be left where ``w``
was rounded to bfloat16; all of them give the same weight, bit for bit.

Weights that some arithmetic has moved beside their grid, by a few last places (``w + (round(q s) - w)`` does, as
training computes it), are on none. ``slack`` allows for that: then the scale is the one nearest to the middle of what
brings every product within ``slack`` times the group's largest number.

A group of zeros has no scale to be found; it gets codes 0 and the scale 1, which is exact as well.

Method: our own. (The idea of trying ``(max - min) / n`` for n = 15..1 is that of the conversion script in
gau-nernst/gemma3-int4; it accepts errors up to 1e-6 and has no notion of rounding.) ``tests/test_lattice.py`` holds a
slow twin. Does not cover: zero points, other widths than 4 bits.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

GROUP = 32
_ROWS = 512  # upcast to float32 at a time

_OFF_GRID, _NOT_FINITE = 1, 2
BF16, F16, F32 = 0, 1, 2  # what a scale needs, from narrow to wide


@dataclass(frozen=True, slots=True, kw_only=True)
class OffGrid:
    """Where a weight leaves the grid.

    Attributes:
        row, column: of the first group concerned (its first column).
        finite: whether all of that group's numbers are.
        groups: how many are concerned, of ``of``.
        values: of the first group.
    """

    row: int
    column: int
    finite: bool
    groups: int
    of: int
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """A weight's grid.

    Attributes:
        codes: int8 ``[out, in]``, -8..7; left out (``None``) when only scales were asked for.
        scales: float32 ``[out, in / 32]``, above zero.
        scale_dtype: the narrowest of ``BF16``, ``F16`` and ``F32`` that holds all scales.
        zero_groups: groups of zeros, whose scale is 1.
    """

    codes: torch.Tensor | None
    scales: torch.Tensor
    scale_dtype: str
    zero_groups: int


def recover(weight: torch.Tensor, *, with_codes: bool = True, slack: float = 0.0) -> Lattice | OffGrid:
    """Grid of a weight ``[out, in]`` in bfloat16 or float32, ``in`` a multiple of 32.

    ``(codes * scales).to(weight.dtype)``, multiplied in float32, is ``weight``, bit for bit but for the sign of zeros.
    With ``slack`` (below 0.01) it may be off by so much of each group's largest number.
    """
    rows, columns = weight.shape
    rounded = weight.dtype == torch.bfloat16
    codes = np.empty((rows, columns) if with_codes else (0, columns), dtype=np.int8)
    scales = np.empty((rows, columns // GROUP), dtype=np.float32)
    needs = np.empty(scales.shape, dtype=np.int8)
    faults = np.zeros(scales.shape, dtype=np.int8)

    def strip(first: int) -> None:
        part = slice(first, min(first + _ROWS, rows))
        values = weight[part].to(torch.float32).contiguous().numpy()
        _recover(values, rounded, slack, codes[part], scales[part], needs[part], faults[part])

    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        for _ in pool.map(strip, range(0, rows, _ROWS)):
            pass
    if faults.any():
        row, group = (int(i) for i in np.argwhere(faults)[0])
        column = group * GROUP
        return OffGrid(
            row=row,
            column=column,
            finite=bool(faults[row, group] != _NOT_FINITE),
            groups=int(np.count_nonzero(faults)),
            of=faults.size,
            values=tuple(weight[row, column : column + GROUP].to(torch.float32).tolist()),
        )
    return Lattice(
        codes=torch.from_numpy(codes) if with_codes else None,
        scales=torch.from_numpy(scales),
        scale_dtype=_narrowest(scales),
        zero_groups=int(np.count_nonzero(needs < 0)),
    )


def _narrowest(scales: npt.NDArray[np.float32]) -> str:
    """Which dtype holds all of them exactly. Each was chosen as narrow as its group allows, but bfloat16 is no part of
    float16: where one group needs float16 and another's bfloat16 lies outside its range, float32 it is."""
    tensor = torch.from_numpy(scales)
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        if torch.equal(tensor.to(dtype).to(torch.float32), tensor):
            return name
    return "F32"


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _to_bfloat16(value: float) -> Any:
    """A float32 rounded to the nearest bfloat16, ties to even."""
    bits = np.float32(value).view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.uint32(bits).view(np.float32)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _neighbour(value: float, step: int) -> Any:
    """The number ``step`` places away from a positive float32, away from or towards zero."""
    return np.uint32(np.int64(np.float32(value).view(np.uint32)) + step).view(np.float32)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _to_float16(value: float) -> Any:
    """The nearest float16 in its normal range, as float32; 0 outside of it. (Ties do not matter here.)"""
    if not 2.0**-14 <= value < 65504.0:
        return np.float32(0)
    bits = np.float32(value).view(np.uint32)
    bits = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.uint32(bits).view(np.float32)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _reproduces(values: Any, codes: Any, scale: Any, rounded: bool, room: float) -> bool:
    for i in range(values.shape[0]):
        product = np.float32(np.float32(codes[i]) * scale)
        if rounded:
            product = _to_bfloat16(product)
        if abs(product - values[i]) > room:
            return False
    return True


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _scale(values: Any, codes: Any, rounded: bool, room: float) -> Any:
    """The narrowest scale that gives these values with these codes, and what it needs; 3 where there is none."""
    ulp = 0x10000 if rounded else 1
    low, high = 0.0, np.inf
    for i in range(values.shape[0]):
        if codes[i] != 0:
            size, code = np.float64(abs(values[i])), np.float64(abs(codes[i]))  # numba's float() of a float32 is one
            low = max(low, ((size + np.float64(_neighbour(size, -ulp))) / 2 - room) / code)
            high = min(high, ((size + np.float64(_neighbour(size, ulp))) / 2 + room) / code)
    if low > high:
        return np.float32(0), 3
    middle = np.float32((low + high) / 2)
    for need in range(3):
        candidate = middle
        if need == 0:
            candidate = _to_bfloat16(middle)
        elif need == 1:
            candidate = _to_float16(middle)
        if candidate > 0 and _reproduces(values, codes, candidate, rounded, room):
            return candidate, need
    return np.float32(0), 3


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _recover(values: Any, rounded: bool, slack: float, codes: Any, scales: Any, needs: Any, faults: Any) -> None:
    rows, columns = values.shape
    # 8 codes, twice the relative error of one rounding, and a margin
    tolerance = (0.07 if rounded else 2e-6) + 16 * slack
    tried = np.zeros(GROUP, dtype=np.int8)
    kept = np.zeros(GROUP, dtype=np.int8)
    for row in range(rows):
        for group in range(columns // GROUP):
            part = values[row, group * GROUP : (group + 1) * GROUP]
            largest = np.float32(0)
            finite = True
            for i in range(GROUP):
                finite = finite and np.isfinite(part[i])
                largest = max(largest, abs(part[i]))
            if not finite:
                faults[row, group] = _NOT_FINITE
                continue
            scale, need = np.float32(0), 3
            if largest == 0:
                scale, need = np.float32(1), -1
                kept[:] = 0
            a = 1
            while a <= 8 and need > 0:
                factor = a / np.float64(largest)
                fits = True
                for i in range(GROUP):
                    exact = np.float64(part[i]) * factor
                    whole = np.rint(exact)
                    if abs(exact - whole) > tolerance or whole > 7:
                        fits = False
                        break
                    tried[i] = np.int8(whole)
                if fits:
                    found, found_need = _scale(part, tried, rounded, slack * np.float64(largest))
                    if found_need < need:
                        scale, need = found, found_need
                        kept[:] = tried
                a += 1
            if need == 3:
                faults[row, group] = _OFF_GRID
                continue
            scales[row, group] = scale
            needs[row, group] = need
            if codes.shape[0]:
                codes[row, group * GROUP : (group + 1) * GROUP] = kept
