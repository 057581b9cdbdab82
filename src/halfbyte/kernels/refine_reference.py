"""The slow twin of ``refine_numba``: coordinate descent on codes in float64, one weight at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int8]


def descend(
    weight: Array,
    hessian: Array,
    codes: Codes,
    scales: Array,
    zeros: Array,
    group_of: npt.NDArray[np.int64],
    q_min: int,
    q_max: int,
    forced_codes: Codes | None = None,
) -> tuple[Codes, Array]:
    """One sweep over all columns, each code put where the error is least while all others stay (arXiv 2309.01885).

    With ``E = W - W_q``, the error ``(E H E^T)_rr`` of a row is least in column j alone at::

        w_q,j + (E H)_j / H_jj,      rounded to the grid:  q_j = clip(rint(that / s) + z, q_min, q_max)

    Args:
        weight: ``[rows, n]``; hessian: ``[n, n]`` symmetric.
        codes: ``[rows, n]`` to start from; not changed.
        scales, zeros: ``[rows, groups]``; group_of: ``[n]``.
        forced_codes: when given, these are taken instead of the nearest.

    Returns:
        codes, and the values that were rounded, ``[rows, n]`` each.
    """
    codes, exact = codes.copy(), np.zeros_like(weight)
    for r in range(weight.shape[0]):
        s, z = scales[r, group_of], zeros[r, group_of]
        error = weight[r] - (codes[r] - z) * s
        for j in range(weight.shape[1]):
            quantized = (codes[r, j] - z[j]) * s[j]
            exact[r, j] = (quantized + error @ hessian[:, j] / hessian[j, j]) / s[j] + z[j]
            nearest = np.clip(np.rint(exact[r, j] - z[j]) + z[j], q_min, q_max)
            codes[r, j] = np.int8(nearest if forced_codes is None else forced_codes[r, j])
            error[j] = weight[r, j] - (codes[r, j] - z[j]) * s[j]
    return codes, exact
