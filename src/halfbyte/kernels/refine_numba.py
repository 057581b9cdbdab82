"""The CPU kernel of coordinate descent: one panel of columns, threads over chunks of rows, as in ``gptq_numba``."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import torch

from halfbyte.kernels.gptq_numba import BLOCK, PANEL, ROWS, Array, torchs_threads, update_later


@numba.njit(parallel=True, cache=True, fastmath={"contract"})  # type: ignore[untyped-decorator]
def _descend(
    gradient: Array,
    hessian: Array,
    scales: Array,
    zeros: Array,
    q_min: float,
    q_max: float,
    codes: npt.NDArray[np.int8],
    steps: Array,
) -> None:
    batch, rows, width = gradient.shape
    chunks = (rows + ROWS - 1) // ROWS
    for task in numba.prange(batch * chunks):
        b = task // chunks
        first = task % chunks * ROWS
        count = min(ROWS, rows - first)
        slope = np.zeros((PANEL, ROWS), dtype=np.float32)  # a finished column holds how far it moved
        code = np.zeros((PANEL, ROWS), dtype=np.int8)
        scale = np.ones(ROWS, dtype=np.float32)
        zero = np.zeros(ROWS, dtype=np.float32)
        for r in range(count):
            scale[r] = scales[b, first + r]
            zero[r] = zeros[b, first + r]
            for j in range(width):
                slope[j, r] = gradient[b, first + r, j]
                code[j, r] = codes[b, first + r, j]
        for block in range(0, width, BLOCK):
            end = min(block + BLOCK, width)
            for j in range(block, end):
                if not hessian[b, j, j] > 0:
                    slope[j] = 0.0
                    continue
                reciprocal = np.float32(1.0) / hessian[b, j, j]
                for r in range(ROWS):
                    s = scale[r]
                    z = zero[r]
                    q = np.float32(code[j, r])
                    nearest = min(max(np.rint((q - z) + slope[j, r] * reciprocal / s) + z, q_min), q_max)
                    code[j, r] = np.int8(nearest)
                    slope[j, r] = (nearest - q) * s
                for k in range(j + 1, end):
                    h = hessian[b, j, k]
                    for r in range(ROWS):
                        slope[k, r] -= slope[j, r] * h
            update_later(slope, hessian[b], 0, block, width)
        for r in range(count):
            for j in range(width):
                codes[b, first + r, j] = code[j, r]
                steps[b, first + r, j] += slope[j, r]


@numba.njit(parallel=True, cache=True)  # type: ignore[untyped-decorator]
def _rounding_error(
    weight: Array, codes: npt.NDArray[np.int8], scales: Array, zeros: Array, error: Array, most: Array
) -> None:
    batch, rows, n = weight.shape
    groups = scales.shape[2]
    width = n // groups
    for task in numba.prange(batch * rows):
        b, r = task // rows, task % rows
        largest = np.float32(0.0)
        known = np.float32(0.0)  # NaN once an error is
        for g in range(groups):
            s, z = scales[b, r, g], zeros[b, r, g]
            for j in range(g * width, (g + 1) * width):
                e = weight[b, r, j] - (np.float32(codes[b, r, j]) - z) * s
                error[b, r, j] = e
                largest = max(largest, abs(e))
                known += e - e
        most[b, r] = largest + known


def rounding_error(
    weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``W - (q - z) s``, each operation rounded by itself, and the largest absolute value of each in the batch.

    Args:
        weights: ``[batch, rows, n]`` float32; codes: the same, int8.
        scales, zeros: ``[batch, rows, groups]`` float32, contiguous.

    Returns:
        the error ``[batch, rows, n]``, and ``[batch]``, NaN where an error is NaN or infinite; float32 both.
    """
    error = torch.empty(weights.shape, dtype=torch.float32)
    most = torch.empty(weights.shape[:2], dtype=torch.float32)
    with torchs_threads():
        _rounding_error(weights.numpy(), codes.numpy(), scales.numpy(), zeros.numpy(), error.numpy(), most.numpy())
    return error, most.amax(dim=1)


def descend(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    q_min: int,
    q_max: int,
    steps: torch.Tensor,
) -> None:
    """One sweep over the columns of one panel of a batch, see :func:`halfbyte.kernels.refine_reference.descend`.

    Args:
        gradient: ``(W - W_q) H [batch, rows, width]`` float32, width at most :data:`PANEL`; not changed.
        hessian: the panel's own block of H ``[batch, width, width]`` float32; columns without a positive diagonal stay.
        codes: ``[batch, rows, width]`` int8, may be a view; changed.
        scales, zeros: ``[batch, rows]`` float32.
        steps: ``[batch, rows, width]`` float32; what each weight ``(q - z) s`` moved by is added.
    """
    with torchs_threads():
        _descend(
            gradient.numpy(),
            hessian.numpy(),
            scales.numpy(),
            zeros.numpy(),
            np.float32(q_min),
            np.float32(q_max),
            codes.numpy(),
            steps.numpy(),
        )
