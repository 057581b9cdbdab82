"""GPTQ (Frantar et al., arXiv 2210.17323) with static activation order, searched scales and refinement.

For one Linear with inputs X (``[tokens, in]``) and weight W (``[out, in]``) GPTQ looks for codes that make

    tr((W_q - W) H (W_q - W)^T),    H = X^T X

small, column by column. Where we differ from the paper:

- Columns are visited by descending ``diag(H)``, but scales belong to the original groups and are fixed beforehand, so
  the file needs no ``g_idx`` (``--act-order`` with ``--static-groups`` in the code of GPTQ's authors, github.com/
  IST-DASLab/gptq; llm-compressor calls it *static* activation order).
- The factor ``R`` with ``H^-1 = R^T R`` comes without inverting H: ``H = U U^T`` with U upper triangular (a Cholesky
  factorisation that runs from the last column to the first), and ``R = U^-1``. One factorisation and one triangular
  inverse, both by halves and in one matrix's memory.
- Scales minimise the rounding error weighted by ``1 / R_jj^2``. That is the weight an error in column j has in GPTQ's
  own objective, ``sum_j (w_j - w_q,j)^2 / R_jj^2``, once the open columns have absorbed what they can (the cost of one
  rounded weight in Optimal Brain Compression, arXiv 2208.11580); ``diag(H)`` ignores that they do. To search scales by
  it is ours. (Ablation: docs/benchmarks.md.)
- After the columns, scales and codes are refined against the whole Hessian, see ``refine``.
- Many Linears of one shape, as a mixture of experts has them, are solved in one batch: tensors have a leading dimension
  over Hessians, and every step works on all of them at once. One Linear is a batch of one. Each Hessian has its own
  order and damping, so what a Linear becomes does not depend on what it is batched with (on a CPU to the bit).
- If H cannot be factored, damping rises tenfold, at most :data:`MAX_RAISES` times, and the record says so. Where none
  was asked for, the first raise goes to ten times :data:`LEAST_RAISED`.
- An input that was always zero gets the mean diagonal for its own: its weights are 0 whatever its pivot is, and it
  forces no damping on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from halfbyte.errors import NumericsError
from halfbyte.kernels.dispatch import put_columns, solve_columns, take_columns, take_square
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
STRIP = 256  # rows at a time; of a symmetric product, no more than a strip of each row is computed in vain


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """What the solver needs of a batch of Hessians, once for all Linears that share one of them.

    Attributes:
        order: ``[batch, in]`` int64, columns in the order in which they are visited.
        upper: ``R [batch, in, in]`` float32 upper triangular in that order, of the damped H.
        importance: ``1 / R_jj^2 [batch, in]`` float32 in the original order.
        damping: ``[batch, in]`` float32, what was added to the diagonal (of inputs that are not dead).
        damp_fractions: what of it is the same for all inputs, as a share of the mean diagonal; for each Hessian.
        raises: how often it had to be raised, for each.
        dead: ``[batch, in]`` bool, inputs that were always zero.
    """

    order: torch.Tensor
    upper: torch.Tensor
    importance: torch.Tensor
    damping: torch.Tensor
    damp_fractions: tuple[float, ...]
    raises: tuple[int, ...]
    dead: torch.Tensor


def factor_hessian(
    hessian: torch.Tensor, damp_fraction: float, *, where: str, static_order: bool = True, shrinkage: float = 0.0
) -> Factors:
    """Order, damp and factor one Hessian ``[in, in]``: a batch of one, see :func:`factor_hessians`."""
    return factor_hessians(
        hessian.unsqueeze(0), damp_fraction, where=[where], static_order=static_order, shrinkage=[shrinkage]
    )


def factor_hessians(
    hessians: torch.Tensor,
    damp_fraction: float,
    *,
    where: Sequence[str],
    static_order: bool = True,
    shrinkage: Sequence[float] | None = None,
) -> Factors:
    """Order, damp and factor Hessians of one width, each as if it were alone.

    What is factored is ``H + (damp_fraction mean(diag H)) I + shrinkage diag(H)``.

    Args:
        hessians: ``H = sum x x^T [batch, in, in]`` float32, symmetric; not changed.
        damp_fraction: share of the mean diagonal to add.
        where: whose Hessians they are, for messages.
        static_order: visit columns by descending ``diag(H)``; else as they stand.
        shrinkage: share of its own diagonal to add, for each; see :func:`halfbyte.methods.pooled.shrinkage`.

    Raises:
        NumericsError: one is not finite, or not positive definite even at the highest damping.
    """
    batch, n, device = len(hessians), hessians.shape[-1], hessians.device
    diagonals = hessians.diagonal(dim1=-2, dim2=-1)
    dead = diagonals == 0
    own = diagonals * torch.tensor(shrinkage or [0.0] * batch, device=device).unsqueeze(1)
    means = [float(d.mean(dtype=torch.float64)) or 1.0 for d in diagonals.cpu()]
    finite = torch.isfinite(hessians.sum(dim=(1, 2)))  # a sum may overflow that nothing in it does
    for i in (~finite).nonzero().flatten().tolist():
        finite[i] = all(bool(torch.isfinite(rows).all()) for rows in torch.split(hessians[i], STRIP))
    if not bool(finite.all()):
        raise NumericsError(
            "the Hessian holds NaN or infinity",
            where=_named(where, ~finite),
            why="the calibration activations overflow float32 when squared",
            remedy="Check the model's activations on this text, or skip the Linear with --ignore.",
        )
    order = (
        torch.argsort(diagonals, dim=-1, descending=True, stable=True)
        if static_order
        else torch.arange(n, device=device).repeat(batch, 1)
    )
    upper: torch.Tensor | None = None
    fractions, raises = [damp_fraction] * batch, [0] * batch
    left = torch.arange(batch, device=device)  # those that are not factored yet
    for raised in range(MAX_RAISES + 1):
        fraction = max(damp_fraction, LEAST_RAISED) * 10**raised if raised else damp_fraction
        for i in left.tolist():
            fractions[i], raises[i] = fraction, raised
        dtype = torch.float64 if n <= DOUBLE_LIMIT and fraction < ENOUGH_FOR_SINGLE else torch.float32
        matrices = take_square(hessians if len(left) == batch else hessians[left], order[left], dtype)
        for i, matrix in zip(left.tolist(), matrices, strict=True):
            matrix.diagonal().add_(torch.where(dead[i], means[i], fraction * means[i] + own[i])[order[i]])
        done = factor_upper(matrices)
        if bool(done.any()):
            invert_upper(matrices)
            if upper is None:  # then all are in ``matrices``, and those not done will be overwritten
                upper = matrices.to(torch.float32)
            else:
                upper[left[done]] = matrices[done].to(torch.float32)
        del matrices
        left = left[~done]
        if not len(left):
            break
    else:
        hopeless = torch.zeros_like(finite)
        hopeless[left] = True
        raise NumericsError(
            f"the Hessian cannot be factored even with {fraction:g} of its mean diagonal added",
            where=_named(where, hopeless),
            why="the calibration activations are degenerate",
            remedy="Use more or other calibration text, or a higher damping (damp_fraction in a recipe).",
        )
    assert upper is not None
    importance = torch.empty(batch, n, device=device)
    importance.scatter_(1, order, 1.0 / upper.diagonal(dim1=-2, dim2=-1).square())
    return Factors(
        order=order,
        upper=upper,
        importance=importance,
        damping=own + torch.tensor([[f * m] for f, m in zip(fractions, means, strict=True)], device=device),
        damp_fractions=tuple(fractions),
        raises=tuple(raises),
        dead=dead,
    )


def _named(where: Sequence[str], affected: torch.Tensor) -> str:
    """The first of those affected, and how many more."""
    names = [name for name, bad in zip(where, affected.tolist(), strict=True) if bad]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def factor_upper(matrices: torch.Tensor) -> torch.Tensor:
    """Replace symmetric positive definite ``A [batch, n, n]`` by the upper triangular U with ``A = U U^T``, by halves.

    With ``A = [[P, Q], [Q^T, S]]``: ``S = U_s U_s^T``, ``U_q = Q U_s^-T``, ``P - U_q U_q^T = U_p U_p^T``. Only the
    upper triangle is read; beside the matrices at most half of their size is needed.

    Returns:
        ``[batch]`` bool, which are positive definite; what is left of the others means nothing.
    """
    n = matrices.shape[-1]
    if n <= _directly(matrices):
        mirrored = matrices.triu() + matrices.triu(1).mT
        lower, info = torch.linalg.cholesky_ex(mirrored.flip(1, 2))
        matrices.copy_(lower.flip(1, 2))
        positive: torch.Tensor = info == 0
        return positive
    half = n // 2
    p, q, s = matrices[:, :half, :half], matrices[:, :half, half:], matrices[:, half:, half:]
    done = factor_upper(s)
    if not bool(done.any()):
        return done
    q.copy_(torch.linalg.solve_triangular(s.mT, q, upper=False, left=False))
    for i in range(0, half, STRIP):
        p[:, i : i + STRIP, i:].baddbmm_(q[:, i : i + STRIP], q[:, i:].mT, alpha=-1.0)
    matrices[:, half:, :half].zero_()
    return done & factor_upper(p)


def _directly(matrices: torch.Tensor) -> int:
    return DIRECTLY if matrices.device.type == "cpu" or len(matrices) > 1 else DIRECTLY_ON_GPU


def invert_upper(matrices: torch.Tensor) -> None:
    """Invert upper triangular matrices ``[batch, n, n]`` in place, by halves.

    ``[[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]]``: two matrix products of half size and two inverses of
    half size, so nearly all of it runs at the rate of matrix products, and beside the matrices only a quarter of their
    size is needed.
    """
    n = matrices.shape[-1]
    if n <= _directly(matrices):
        identity = torch.eye(n, dtype=matrices.dtype, device=matrices.device)
        matrices.copy_(torch.linalg.solve_triangular(matrices, identity.expand_as(matrices), upper=True))
        return
    half = n // 2
    a, b, c = matrices[:, :half, :half], matrices[:, :half, half:], matrices[:, half:, half:]
    invert_upper(a)
    invert_upper(c)
    torch.bmm(torch.bmm(a, b), c, out=b)
    b.neg_()


def quantize_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    factors: Factors,
    fmt: WeightFormat,
    scale_dtype: torch.dtype,
    steps: GptqSteps = DEFAULT_STEPS,
) -> QuantizedWeight:
    """Quantise one weight ``[out, in]`` against its inputs' Hessian ``[in, in]``: a batch of one.

    See :func:`quantize_gptq_batch`.
    """
    return quantize_gptq_batch(weight.unsqueeze(0), hessian.unsqueeze(0), factors, fmt, scale_dtype, steps)[0][0]


def quantize_gptq_batch(
    weights: torch.Tensor,
    hessians: torch.Tensor,
    factors: Factors,
    fmt: WeightFormat,
    scale_dtype: torch.dtype,
    steps: GptqSteps = DEFAULT_STEPS,
    *,
    rows: Sequence[int] | None = None,
) -> list[list[QuantizedWeight]]:
    """Quantise weights of one shape, each against its own inputs' Hessian.

    Args:
        weights: ``[batch, out, in]`` float32; not changed. Linears that share a Hessian are stacked along ``out``: gate
            and up of an expert, or all experts of a layer with a batch of one.
        hessians: ``H [batch, in, in]`` float32, symmetric, undamped; not changed.
        factors: of the same H.
        fmt: an integer format.
        scale_dtype: what scales are stored in.
        steps: what is done besides the columns; ``static_order`` is the factors' matter.
        rows: the stacked Linears' rows, ``out`` in all; ``None`` where there is one Linear for each Hessian.

    Everything is on one device, where it is worked on and where the result is.

    Returns:
        for each Hessian its Linears, in the order of their rows. They are views of the batch's tensors.
    """
    parts = list(rows or weights.shape[1:2])
    alive = weights.masked_fill(factors.dead.unsqueeze(1), 0.0) if bool(factors.dead.any()) else weights
    found = [
        searched(w, importance, fmt, scale_dtype) if steps.scale_search else minmax(w, fmt, scale_dtype)
        for w, importance in zip(alive, factors.importance, strict=True)
    ]
    scales, zeros = (torch.stack(tensors) for tensors in zip(*found, strict=True))
    columns = torch.arange(weights.shape[2], device=weights.device)
    group_of = (columns // (weights.shape[2] // scales.shape[2]))[factors.order]
    visited = take_columns(alive, factors.order)
    permuted_codes, _ = solve_columns(visited, factors.upper, scales, zeros, group_of, fmt.q_min, fmt.q_max)
    del visited
    codes = put_columns(permuted_codes, factors.order)
    del permuted_codes
    errors = refine(
        alive,
        hessians,
        factors.damping,
        codes,
        scales,
        zeros,
        fmt,
        scale_dtype,
        refit=steps.scale_refit,
        descent=steps.code_descent,
        sweeps=steps.sweeps,
    )
    shares = _shares(errors, output_energy(weights, hessians), parts)
    stored = (codes, scales.to(scale_dtype), zeros.to(torch.int8))
    return [
        [
            QuantizedWeight(codes=c, scales=s, zero_points=None if fmt.symmetric else z, relative_error=share)
            for c, s, z, share in zip(*(torch.split(t[i], parts) for t in stored), of_one, strict=True)
        ]
        for i, of_one in enumerate(shares)
    ]


def _shares(errors: torch.Tensor, energies: torch.Tensor, parts: list[int]) -> list[list[float]]:
    """Each Linear's error as a share of its energy, from those of rows ``[batch, out]``; 0 where there is none."""
    both = [torch.stack([p.sum(dim=1) for p in torch.split(t, parts, dim=1)], 1).tolist() for t in (errors, energies)]
    return [
        [max(0.0, error) / energy if energy > 0 else 0.0 for error, energy in zip(*of_one, strict=True)]
        for of_one in zip(*both, strict=True)
    ]
