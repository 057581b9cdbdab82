"""The CPU kernels that move columns into the order in which they are visited, and codes back: threads over rows.

torch's general indexing reads 64-bit indices for every element and takes several times as long.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy.typing as npt
import torch

from halfbyte.kernels.gptq_numba import torchs_threads

Indices = npt.NDArray[Any]


@numba.njit(parallel=True, cache=True)  # type: ignore[untyped-decorator]
def _take(x: npt.NDArray[Any], rows: Indices, columns: Indices, out: npt.NDArray[Any]) -> None:
    batch, count, n = out.shape
    for task in numba.prange(batch * count):
        b, r = task // count, task % count
        source = rows[b, r]
        for j in range(n):
            out[b, r, j] = x[b, source, columns[b, j]]


@numba.njit(parallel=True, cache=True)  # type: ignore[untyped-decorator]
def _put(x: npt.NDArray[Any], columns: Indices, out: npt.NDArray[Any]) -> None:
    batch, count, n = out.shape
    for task in numba.prange(batch * count):
        b, r = task // count, task % count
        for j in range(n):
            out[b, r, columns[b, j]] = x[b, r, j]


def take_square(x: torch.Tensor, order: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``out[b, i, j] = x[b, order[b, i], order[b, j]]``.

    Args:
        x: ``[batch, n, n]`` float32; order: ``[batch, n]`` int64; dtype: float32 or float64.
    """
    out = torch.empty(x.shape, dtype=dtype)
    with torchs_threads():
        _take(x.numpy(), order.numpy(), order.numpy(), out.numpy())
    return out


def take_columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``out[b, r, j] = x[b, r, order[b, j]]`` of ``[batch, rows, n]``."""
    out = torch.empty(x.shape, dtype=x.dtype)
    rows = torch.arange(x.shape[1]).expand(x.shape[:2])
    with torchs_threads():
        _take(x.numpy(), rows.numpy(), order.numpy(), out.numpy())
    return out


def put_columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``out[b, r, order[b, j]] = x[b, r, j]``: what :func:`take_columns` has moved, back where it was."""
    out = torch.empty(x.shape, dtype=x.dtype)
    with torchs_threads():
        _put(x.numpy(), order.numpy(), out.numpy())
    return out
