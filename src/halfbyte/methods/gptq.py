"""GPTQ (Frantar et al., arXiv 2210.17323) with static activation order, a reversed Cholesky factor and searched scales.

For one Linear with inputs X (``[tokens, in]``) and weight W (``[out, in]``) GPTQ looks for codes that make

    tr((W_q - W) H (W_q - W)^T),    H = X^T X

small, column by column. Where we differ from the paper:

- Columns are visited by descending ``diag(H)``, but scales belong to the original groups and are fixed beforehand, so
  the file needs no ``g_idx`` (llm-compressor calls this *static* activation order).
- The factor ``R`` with ``H^-1 = R^T R`` comes without inverting H: with J the reversal, ``J H J = L L^T``; then
  ``U = J L J`` is upper triangular, ``H = U U^T`` and ``R = U^-1 = J L^-1 J``. One factorisation and one triangular
  inverse, in place and by halves.
- Scales minimise the rounding error weighted by ``1 / R_jj^2``. That is the weight an error in column j has in GPTQ's
  own objective, ``sum_j (w_j - w_q,j)^2 / R_jj^2``, once the open columns have absorbed what they can; ``diag(H)``
  ignores that they do. (Ablation: docs/log.md.)
- If H cannot be factored, damping rises tenfold, at most :data:`MAX_RAISES` times, and the record says so. Where none
  was asked for, the first raise goes to ten times :data:`LEAST_RAISED`.
- An input that was always zero gets the mean diagonal for its own: its weights are 0 whatever its pivot is, and it
  forces no damping on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.errors import NumericsError
from halfbyte.kernels.gptq_numba import solve_columns
from halfbyte.methods.result import QuantizedWeight
from halfbyte.methods.scales import searched
from halfbyte.schemes import WeightFormat

MAX_RAISES = 4
LEAST_RAISED = 1e-3
DOUBLE_LIMIT = 4096
INVERT_DIRECTLY = 256
STRIP = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """What the solver needs of a Hessian, once for all Linears that share it.

    Attributes:
        order: ``[in]`` int64, columns by descending ``diag(H)``.
        upper: ``R [in, in]`` float32 upper triangular in that order, of the damped H.
        importance: ``1 / R_jj^2 [in]`` float32 in the original order.
        damping: what was added to the diagonal (of inputs that are not dead).
        damp_fraction: the same as a share of the mean diagonal.
        raises: how often it had to be raised.
        dead: ``[in]`` bool, inputs that were always zero.
    """

    order: torch.Tensor
    upper: torch.Tensor
    importance: torch.Tensor
    damping: float
    damp_fraction: float
    raises: int
    dead: torch.Tensor


def factor_hessian(hessian: torch.Tensor, damp_fraction: float, *, where: str) -> Factor:
    """Order, damp and factor a Hessian.

    Args:
        hessian: ``H = sum x x^T [in, in]`` float32, symmetric; not changed, and not kept: a caller that hands over its
            only reference has the memory back as soon as H has been permuted.
        damp_fraction: share of the mean diagonal to add.
        where: whose Hessian it is, for messages.

    Raises:
        NumericsError: not finite, or not positive definite even at the highest damping.
    """
    n = hessian.shape[0]
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.mean(dtype=torch.float64))
    if not all(bool(torch.isfinite(rows).all()) for rows in torch.split(hessian, STRIP)):
        raise NumericsError(
            "the Hessian holds NaN or infinity",
            where=where,
            why="the calibration activations overflow float32 when squared",
            remedy="Check the model's activations on this text, or skip the Linear with --ignore.",
        )
    if mean == 0:
        mean = 1.0
    order = torch.argsort(diagonal, descending=True, stable=True)
    # reversed once for L: the factorisation runs over J H J
    backwards = order.flip(0)
    dtype = torch.float64 if n <= DOUBLE_LIMIT else torch.float32
    reversed_h = hessian[backwards.unsqueeze(1), backwards.unsqueeze(0)].to(dtype)
    del hessian, diagonal
    undamped = reversed_h.diagonal().clone()
    for raises in range(MAX_RAISES + 1):
        fraction = max(damp_fraction, LEAST_RAISED) * 10**raises if raises else damp_fraction
        reversed_h.diagonal().copy_(undamped + torch.where(dead, mean, fraction * mean)[backwards])
        lower, info = torch.linalg.cholesky_ex(reversed_h)
        if int(info) == 0:
            break
    else:
        raise NumericsError(
            f"the Hessian cannot be factored even with {fraction:g} of its mean diagonal added",
            where=where,
            why="the calibration activations are degenerate",
            remedy="Use more or other calibration text, or a higher damping (damp_fraction in a recipe).",
        )
    del reversed_h
    invert_lower(lower)
    # R = U^-1 = (J L J)^-1 = J L^-1 J
    r = lower.to(torch.float32).flip(0, 1)
    del lower
    importance = torch.empty(n)
    importance[order] = 1.0 / r.diagonal().square()
    return Factor(
        order=order,
        upper=r,
        importance=importance,
        damping=fraction * mean,
        damp_fraction=fraction,
        raises=raises,
        dead=dead,
    )


def invert_lower(matrix: torch.Tensor) -> None:
    """Invert a lower triangular matrix ``[n, n]`` in place, by halves.

    ``[[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]``: two matrix products of half size and two inverses of
    half size, so nearly all of it runs at the rate of matrix products, and beside the matrix only a quarter of its size
    is needed.
    """
    n = matrix.shape[0]
    if n <= INVERT_DIRECTLY:
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
        return
    half = n // 2
    a, b, c = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    invert_lower(a)
    invert_lower(c)
    torch.mm(c, b @ a, out=b)
    b.neg_()


def output_energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(W H W^T)``: the squared outputs of a Linear, summed over tokens; what relative errors are relative to."""
    return sum(float(torch.mm(w, hessian).mul_(w).sum(dtype=torch.float64)) for w in torch.split(weight, STRIP))


def quantize_gptq(
    weight: torch.Tensor, energy: float, factor: Factor, fmt: WeightFormat, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Quantise one weight against its inputs' Hessian.

    Args:
        weight: ``[out, in]`` float32; not changed.
        energy: ``tr(W H W^T)`` with the undamped H (:func:`output_energy`), which the error is relative to.
        factor: of the same H.
        fmt: an integer format.
        scale_dtype: what scales are stored in.
    """
    alive = weight.masked_fill(factor.dead, 0.0)
    scales, zeros = searched(alive, factor.importance, fmt, scale_dtype)
    group_of = (torch.arange(weight.shape[1]) // (weight.shape[1] // scales.shape[1]))[factor.order]
    permuted = alive[:, factor.order].contiguous()
    permuted_codes, loss = solve_columns(permuted, factor.upper, scales, zeros, group_of, fmt.q_min, fmt.q_max)
    del permuted
    codes = torch.empty_like(permuted_codes)
    codes[:, factor.order] = permuted_codes
    del permuted_codes
    result = QuantizedWeight(
        codes=codes,
        scales=scales.to(scale_dtype),
        zero_points=None if fmt.symmetric else zeros.to(torch.int8),
        relative_error=0.0,
    )
    # The loop's loss is tr(E (H + damping I) E^T); take the damping's part off again.
    error = max(float(loss.sum(dtype=torch.float64)) - factor.damping * result.squared_error(alive), 0.0)
    return QuantizedWeight(
        codes=result.codes,
        scales=result.scales,
        zero_points=result.zero_points,
        relative_error=error / energy if energy > 0 else 0.0,
    )
