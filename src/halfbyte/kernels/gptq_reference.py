"""The slow twins: column-by-column GPTQ and scale search in float64, as close to the paper as code gets.

Used only by tests (and by readers). ``gptq_numba`` must choose the same codes, ties excepted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def solve_columns(
    weight: Array,
    factor: Array,
    scales: Array,
    zeros: Array,
    group_of: npt.NDArray[np.int64],
    q_min: int,
    q_max: int,
    forced_codes: npt.NDArray[np.int8] | None = None,
) -> tuple[npt.NDArray[np.int8], Array, Array]:
    """Quantise columns left to right, spreading each column's error over those still open (arXiv 2210.17323, eq. 2, 3).

    For column j, with ``H^-1 = R^T R``::

        q_j = clip(rint(w_j / s) + z, q_min, q_max)
        e_j = (w_j - (q_j - z) s) / R_jj
        w_k <- w_k - e_j R_jk        for k > j

    Args:
        weight: ``[rows, n]``, columns in the order of processing.
        factor: ``R [n, n]``, upper triangular, same order.
        scales, zeros: ``[rows, groups]``.
        group_of: ``[n]``, the group that each column belongs to.
        q_min, q_max: code range.
        forced_codes: ``[rows, n]``; when given, these codes are taken instead of the nearest ones, which shows for
            each of them what the exact value was that it stands for.

    Returns:
        codes ``[rows, n]``; the values ``w_j / s + z`` that were rounded ``[rows, n]``; the loss
        ``sum_j e_j^2 [rows]``, which equals ``(w - w_q) H (w - w_q)^T``.
    """
    w = weight.copy()
    rows, n = w.shape
    codes = np.zeros((rows, n), dtype=np.int8)
    exact = np.zeros((rows, n))
    loss = np.zeros(rows)
    for j in range(n):
        s, z = scales[:, group_of[j]], zeros[:, group_of[j]]
        exact[:, j] = w[:, j] / s + z
        q = np.clip(np.rint(w[:, j] / s) + z, q_min, q_max)
        if forced_codes is not None:
            q = forced_codes[:, j].astype(np.float64)
        codes[:, j] = q.astype(np.int8)
        e = (w[:, j] - (q - z) * s) / factor[j, j]
        loss += e * e
        w[:, j + 1 :] -= np.outer(e, factor[j, j + 1 :])
    return codes, exact, loss


def search_scales(
    weight: Array, importance: Array, candidates: Array, zeros: Array, q_min: int, q_max: int
) -> npt.NDArray[np.int64]:
    """Index of the candidate scale with the least weighted squared error, for each row and group.

    ``argmin_c sum_k h_k (w_k - (clip(rint(w_k / s_c) + z_c) - z_c) s_c)^2``

    Args:
        weight: ``[rows, groups * width]``; importance: ``h [groups * width]``.
        candidates, zeros: ``[rows, groups, count]``.
    """
    rows, groups, _ = candidates.shape
    w = weight.reshape(rows, groups, 1, -1)
    h = importance.reshape(1, groups, 1, -1)
    s, z = candidates[..., None], zeros[..., None]
    error = w - (np.clip(np.rint(w / s) + z, q_min, q_max) - z) * s
    return np.asarray((h * error * error).sum(axis=-1).argmin(axis=-1), dtype=np.int64).reshape(rows, groups)
