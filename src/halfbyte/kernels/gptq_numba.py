"""The CPU kernels: the GPTQ column loop inside a panel of columns, and the scale search.

Column loop: threads over chunks of rows, of all Linears of a batch. A chunk's panel is held transposed (``[columns,
rows]``, 16 KiB), so that both the rounding and the update of the columns still open run over contiguous rows and
vectorise. A few columns at a time are rounded before those to their right are touched, which are then read and written
once. Between panels one matrix product for each Linear updates everything to the right.

Same mathematics as ``gptq_reference``; float32 instead of float64.

Both kernels run on as many threads as torch does. numba and torch share one OpenMP runtime, whose thread count numba
sets: left alone, a first call here would change how torch splits its sums from then on, and a resumed run, whose torch
has not been through that call yet, would end in other bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numba
import numpy as np
import numpy.typing as npt
import torch

PANEL = 128
ROWS = 32
# Columns that are rounded before those behind them are touched; :func:`update_later` is written out for so many. numba
# keeps compiled kernels by file: after a change here, refine_numba's are compiled anew only when that file changes too.
BLOCK = 8

Array = npt.NDArray[np.float32]


@contextlib.contextmanager
def torchs_threads() -> Iterator[None]:
    """Run numba on torch's number of threads, and leave torch with the number it had."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@numba.njit(cache=True, fastmath={"contract"})  # type: ignore[untyped-decorator]
def update_later(columns: Array, matrix: Array, offset: int, first: int, width: int) -> None:
    """``columns[k] -= sum_j columns[j] matrix[offset + j, offset + k]``, j the block from ``first``, all k behind it.

    A column that is still open is read and written once for all of a block's, not once for each; terms are subtracted
    in the order of their columns.

    Args:
        columns: ``[PANEL, ROWS]`` float32.
        matrix: float32, of which columns and rows begin at ``offset``.
        first: of the block's :data:`BLOCK` columns. Where it has fewer, nothing is behind it.
    """
    for k in range(first + BLOCK, width):
        column = offset + k
        m0 = matrix[offset + first, column]
        m1 = matrix[offset + first + 1, column]
        m2 = matrix[offset + first + 2, column]
        m3 = matrix[offset + first + 3, column]
        m4 = matrix[offset + first + 4, column]
        m5 = matrix[offset + first + 5, column]
        m6 = matrix[offset + first + 6, column]
        m7 = matrix[offset + first + 7, column]
        for r in range(ROWS):
            x = columns[k, r]
            x -= columns[first, r] * m0
            x -= columns[first + 1, r] * m1
            x -= columns[first + 2, r] * m2
            x -= columns[first + 3, r] * m3
            x -= columns[first + 4, r] * m4
            x -= columns[first + 5, r] * m5
            x -= columns[first + 6, r] * m6
            x -= columns[first + 7, r] * m7
            columns[k, r] = x


@numba.njit(parallel=True, cache=True, fastmath={"contract"})  # type: ignore[untyped-decorator]
def _panel(
    weight: Array,
    start: int,
    width: int,
    factor: Array,
    scales: Array,
    zeros: Array,
    group_of: npt.NDArray[np.int64],
    q_min: float,
    q_max: float,
    codes: npt.NDArray[np.int8],
    errors: Array,
    loss: Array,
) -> None:
    """Quantise columns ``start .. start + width`` of all rows; fills ``codes`` and ``errors``, adds to ``loss``."""
    rows = weight.shape[1]
    groups = scales.shape[2]
    chunks = (rows + ROWS - 1) // ROWS
    for task in numba.prange(weight.shape[0] * chunks):
        b = task // chunks
        first = task % chunks * ROWS
        count = min(ROWS, rows - first)
        open_columns = np.zeros((PANEL, ROWS), dtype=np.float32)  # a column that is done holds its error
        rounded = np.empty((PANEL, ROWS), dtype=np.int8)
        scale = np.ones((groups, ROWS), dtype=np.float32)
        zero = np.zeros((groups, ROWS), dtype=np.float32)
        for r in range(count):
            for j in range(width):
                open_columns[j, r] = weight[b, first + r, start + j]
            for g in range(groups):
                scale[g, r] = scales[b, first + r, g]
                zero[g, r] = zeros[b, first + r, g]
        for block in range(0, width, BLOCK):
            end = min(block + BLOCK, width)
            for j in range(block, end):
                g = group_of[b, start + j]
                reciprocal = np.float32(1.0) / factor[b, start + j, start + j]
                for r in range(ROWS):
                    s = scale[g, r]
                    z = zero[g, r]
                    w = open_columns[j, r]
                    q = min(max(np.rint(w / s) + z, q_min), q_max)
                    rounded[j, r] = np.int8(q)
                    open_columns[j, r] = (w - (q - z) * s) * reciprocal
                for k in range(j + 1, end):
                    f = factor[b, start + j, start + k]
                    for r in range(ROWS):
                        open_columns[k, r] -= open_columns[j, r] * f
            update_later(open_columns, factor[b], start, block, width)
        for r in range(count):
            total = np.float32(0.0)
            for j in range(width):
                error = open_columns[j, r]
                codes[b, first + r, start + j] = rounded[j, r]
                errors[b, first + r, j] = error
                total += error * error
            loss[b, first + r] += total


def solve_columns(
    weight: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group_of: torch.Tensor,
    q_min: int,
    q_max: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ over all columns of a batch, see :func:`halfbyte.kernels.gptq_reference.solve_columns` for one of it.

    Args:
        weight: ``[batch, rows, n]`` float32, columns in the order of processing; overwritten.
        factor: ``R [batch, n, n]`` float32 upper triangular, ``H^-1 = R^T R``.
        scales, zeros: ``[batch, rows, groups]`` float32.
        group_of: ``[batch, n]`` int64.
        q_min, q_max: code range.

    Returns:
        codes ``[batch, rows, n]`` int8 and the loss ``[batch, rows]`` float32.
    """
    batch, rows, n = weight.shape
    codes = torch.empty((batch, rows, n), dtype=torch.int8)
    loss = torch.zeros((batch, rows), dtype=torch.float32)
    errors = torch.empty((batch, rows, PANEL), dtype=torch.float32)
    for start in range(0, n, PANEL):
        width = min(PANEL, n - start)
        with torchs_threads():
            _panel(
                weight.numpy(),
                start,
                width,
                factor.numpy(),
                scales.numpy(),
                zeros.numpy(),
                group_of.numpy(),
                np.float32(q_min),
                np.float32(q_max),
                codes.numpy(),
                errors.numpy(),
                loss.numpy(),
            )
        e = errors[:, :, :width]
        if start + width < n:
            later = factor[:, start : start + width, start + width :]
            weight[:, :, start + width :].baddbmm_(e, later, alpha=-1.0)
    return codes, loss


@numba.njit(parallel=True, cache=True, fastmath={"contract", "reassoc", "nsz"})  # type: ignore[untyped-decorator]
def _search(
    weight: Array,
    importance: Array,
    candidates: Array,
    zeros: Array,
    q_min: float,
    q_max: float,
    best: npt.NDArray[np.int64],
) -> None:
    rows, groups, count = candidates.shape
    width = weight.shape[1] // groups
    for row in numba.prange(rows):
        for g in range(groups):
            base = g * width
            least = np.float32(np.inf)
            for c in range(count):
                s = candidates[row, g, c]
                z = zeros[row, g, c]
                reciprocal = np.float32(1.0) / s
                total = np.float32(0.0)
                for k in range(width):
                    w = weight[row, base + k]
                    q = min(max(np.rint(w * reciprocal) + z, q_min), q_max)
                    d = w - (q - z) * s
                    total += importance[base + k] * d * d
                if total < least:
                    least = total
                    best[row, g] = c


def search_scales(
    weight: torch.Tensor,
    importance: torch.Tensor,
    candidates: torch.Tensor,
    zeros: torch.Tensor,
    q_min: int,
    q_max: int,
) -> torch.Tensor:
    """Best candidate for each row and group, see :func:`halfbyte.kernels.gptq_reference.search_scales`.

    Args:
        weight: ``[rows, groups * width]`` float32; importance ``[groups * width]`` float32, not negative.
        candidates, zeros: ``[rows, groups, count]`` float32, scales positive.

    Returns:
        indices ``[rows, groups]`` int64; the first of equals wins.
    """
    best = torch.zeros(candidates.shape[:2], dtype=torch.int64)
    with torchs_threads():
        _search(
            weight.numpy(),
            importance.numpy(),
            candidates.numpy(),
            zeros.numpy(),
            np.float32(q_min),
            np.float32(q_max),
            best.numpy(),
        )
    return best
