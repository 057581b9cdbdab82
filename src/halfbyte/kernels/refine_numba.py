"""The CPU kernel of coordinate descent: one panel of columns, threads over chunks of rows, as in ``gptq_numba``."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import torch

from halfbyte.kernels.gptq_numba import PANEL, ROWS, Array, torchs_threads


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
        slope = np.zeros((PANEL, ROWS), dtype=np.float32)
        step = np.zeros(ROWS, dtype=np.float32)
        for r in range(count):
            for j in range(width):
                slope[j, r] = gradient[b, first + r, j]
        for j in range(width):
            if not hessian[b, j, j] > 0:
                continue
            reciprocal = np.float32(1.0) / hessian[b, j, j]
            moved = False
            for r in range(count):
                s = scales[b, first + r]
                z = zeros[b, first + r]
                q = np.float32(codes[b, first + r, j])
                nearest = min(max(np.rint((q - z) + slope[j, r] * reciprocal / s) + z, q_min), q_max)
                codes[b, first + r, j] = np.int8(nearest)
                step[r] = (nearest - q) * s
                steps[b, first + r, j] += step[r]
                moved = moved or nearest != q
            if moved:
                for k in range(j + 1, width):
                    h = hessian[b, j, k]
                    for r in range(ROWS):
                        slope[k, r] -= step[r] * h


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
