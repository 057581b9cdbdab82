"""GPTQ (Frantar et al., arXiv 2210.17323) with static activation order, searched scales and refinement.

For one Linear with inputs X (``[tokens, in]``) and weight W (``[out, in]``) GPTQ looks for codes that make

    tr((W_q - W) H (W_q - W)^T),    H = X^T X

small, column by column. Where we differ from the paper:

- Columns are visited by descending ``diag(H)``, but scales belong to the original groups and are fixed beforehand, so
  the file needs no ``g_idx`` (llm-compressor calls this *static* activation order).
- The factor ``R`` with ``H^-1 = R^T R`` comes without inverting H: ``H = U U^T`` with U upper triangular (a Cholesky
  factorisation that runs from the last column to the first), and ``R = U^-1``. One factorisation and one triangular
  inverse, both by halves and in one matrix's memory.
- Scales minimise the rounding error weighted by ``1 / R_jj^2``. That is the weight an error in column j has in GPTQ's
  own objective, ``sum_j (w_j - w_q,j)^2 / R_jj^2``, once the open columns have absorbed what they can; ``diag(H)``
  ignores that they do. (Ablation: docs/benchmarks.md.)
- After the columns, scales and codes are refined against the whole Hessian, see ``refine``.
- If H cannot be factored, damping rises tenfold, at most :data:`MAX_RAISES` times, and the record says so. Where none
  was asked for, the first raise goes to ten times :data:`LEAST_RAISED`.
- An input that was always zero gets the mean diagonal for its own: its weights are 0 whatever its pivot is, and it
  forces no damping on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.errors import NumericsError
from halfbyte.kernels.dispatch import solve_columns
from halfbyte.methods.refine import output_energy, refine
from halfbyte.methods.result import QuantizedWeight
from halfbyte.methods.scales import minmax, searched
from halfbyte.recipe import GptqSteps
from halfbyte.schemes import WeightFormat

MAX_RAISES = 4
LEAST_RAISED = 1e-3
# With so much damping a float32 factor gives the same errors as a float64 one to four digits (docs/log.md), in half the
# time. With less, float64 is used up to a width where its memory still does no harm.
ENOUGH_FOR_SINGLE = 1e-3
DOUBLE_LIMIT = 4096
DIRECTLY = 256
DIRECTLY_ON_GPU = 1024  # there a small factorisation takes as long as a larger one
DEFAULT_STEPS = GptqSteps()
STRIP = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """What the solver needs of a Hessian, once for all Linears that share it.

    Attributes:
        order: ``[in]`` int64, columns in the order in which they are visited.
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


def factor_hessian(hessian: torch.Tensor, damp_fraction: float, *, where: str, static_order: bool = True) -> Factor:
    """Order, damp and factor a Hessian.

    Args:
        hessian: ``H = sum x x^T [in, in]`` float32, symmetric; not changed.
        damp_fraction: share of the mean diagonal to add.
        where: whose Hessian it is, for messages.
        static_order: visit columns by descending ``diag(H)``; else as they stand.

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
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if static_order
        else torch.arange(n, device=hessian.device)
    )
    for raises in range(MAX_RAISES + 1):
        fraction = max(damp_fraction, LEAST_RAISED) * 10**raises if raises else damp_fraction
        dtype = torch.float64 if n <= DOUBLE_LIMIT and fraction < ENOUGH_FOR_SINGLE else torch.float32
        matrix = hessian[order.unsqueeze(1), order.unsqueeze(0)].to(dtype)
        matrix.diagonal().add_(torch.where(dead, mean, fraction * mean)[order])
        if factor_upper(matrix):
            break
    else:
        raise NumericsError(
            f"the Hessian cannot be factored even with {fraction:g} of its mean diagonal added",
            where=where,
            why="the calibration activations are degenerate",
            remedy="Use more or other calibration text, or a higher damping (damp_fraction in a recipe).",
        )
    invert_upper(matrix)
    upper = matrix.to(torch.float32)
    importance = torch.empty(n, device=hessian.device)
    importance[order] = 1.0 / upper.diagonal().square()
    return Factor(
        order=order,
        upper=upper,
        importance=importance,
        damping=fraction * mean,
        damp_fraction=fraction,
        raises=raises,
        dead=dead,
    )


def factor_upper(matrix: torch.Tensor) -> bool:
    """Replace a symmetric positive definite ``A [n, n]`` by the upper triangular U with ``A = U U^T``, by halves.

    With ``A = [[P, Q], [Q^T, S]]``: ``S = U_s U_s^T``, ``U_q = Q U_s^-T``, ``P - U_q U_q^T = U_p U_p^T``. Only the
    upper triangle is read; beside the matrix at most half of its size is needed.

    Returns:
        whether it is positive definite; where not, the matrix is left half done.
    """
    n = matrix.shape[0]
    if n <= _directly(matrix):
        mirrored = matrix.triu() + matrix.triu(1).T
        lower, info = torch.linalg.cholesky_ex(mirrored.flip(0, 1))
        matrix.copy_(lower.flip(0, 1))
        return int(info) == 0
    half = n // 2
    p, q, s = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    if not factor_upper(s):
        return False
    q.copy_(torch.linalg.solve_triangular(s.T, q, upper=False, left=False))
    for i in range(0, half, STRIP):
        p[i : i + STRIP, i:].addmm_(q[i : i + STRIP], q[i:].T, alpha=-1.0)
    matrix[half:, :half].zero_()
    return factor_upper(p)


def _directly(matrix: torch.Tensor) -> int:
    return DIRECTLY if matrix.device.type == "cpu" else DIRECTLY_ON_GPU


def invert_upper(matrix: torch.Tensor) -> None:
    """Invert an upper triangular matrix ``[n, n]`` in place, by halves.

    ``[[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]]``: two matrix products of half size and two inverses of
    half size, so nearly all of it runs at the rate of matrix products, and beside the matrix only a quarter of its size
    is needed.
    """
    n = matrix.shape[0]
    if n <= _directly(matrix):
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=True))
        return
    half = n // 2
    a, b, c = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    invert_upper(a)
    invert_upper(c)
    torch.mm(a @ b, c, out=b)
    b.neg_()


def quantize_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    factor: Factor,
    fmt: WeightFormat,
    scale_dtype: torch.dtype,
    steps: GptqSteps = DEFAULT_STEPS,
) -> QuantizedWeight:
    """Quantise one weight against its inputs' Hessian.

    Args:
        weight: ``[out, in]`` float32; not changed.
        hessian: ``H [in, in]`` float32, symmetric, undamped; not changed.
        factor: of the same H.
        fmt: an integer format.
        scale_dtype: what scales are stored in.
        steps: what is done besides the columns; ``static_order`` is the factor's matter.

    Everything is on one device, where it is worked on and where the result is.
    """
    alive = weight.masked_fill(factor.dead, 0.0) if bool(factor.dead.any()) else weight
    if steps.scale_search:
        scales, zeros = searched(alive, factor.importance, fmt, scale_dtype)
    else:
        scales, zeros = minmax(alive, fmt, scale_dtype)
    columns = torch.arange(weight.shape[1], device=weight.device)
    group_of = (columns // (weight.shape[1] // scales.shape[1]))[factor.order]
    permuted_codes, _ = solve_columns(
        alive.index_select(1, factor.order), factor.upper, scales, zeros, group_of, fmt.q_min, fmt.q_max
    )
    codes = torch.empty_like(permuted_codes)
    codes[:, factor.order] = permuted_codes
    del permuted_codes
    error = refine(
        alive,
        hessian,
        factor.damping,
        codes,
        scales,
        zeros,
        fmt,
        scale_dtype,
        refit=steps.scale_refit,
        descent=steps.code_descent,
        sweeps=steps.sweeps,
    )
    energy = output_energy(weight, hessian)
    return QuantizedWeight(
        codes=codes,
        scales=scales.to(scale_dtype),
        zero_points=None if fmt.symmetric else zeros.to(torch.int8),
        relative_error=error / energy if energy > 0 else 0.0,
    )
