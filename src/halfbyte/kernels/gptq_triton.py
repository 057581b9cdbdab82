"""The GPU kernels: the GPTQ column loop inside a panel of columns, and the scale search.

Column loop: one launch a panel of 128 columns of all Linears of a batch, one program a chunk of 16 rows. A program
holds its chunk's panel in registers, walks the columns from left to right and spreads each column's error over those
still open; nothing is exchanged between programs. Between panels one batched matrix product updates everything to the
right.

Same mathematics as ``gptq_reference`` and the same order of operations as ``gptq_numba``, in float32: quotients are
rounded as IEEE asks (``div_rn``; a GPU's plain division is not), so that codes differ at ties only.

Triton comes with torch's CUDA builds. This module is imported where the first tensor on a GPU arrives, see
``dispatch``; with ``TRITON_INTERPRET=1`` in the environment it runs on CPU tensors, slowly, which is how it is tested.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PANEL = 128
ROWS = 16
# For the compiler: a product and the sum that it goes into may be rounded once, as numba does it too.
OPTIONS = {"enable_fp_fusion": True}
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to the nearest integer, half to even.
LARGEST = tl.constexpr(4194304.0)
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def rint(x):  # type: ignore[no-untyped-def]
    """Nearest integer, half to even; beyond ``2^22``, where no code is, the bound itself."""
    return (tl.minimum(tl.maximum(x, -LARGEST), LARGEST) + MAGIC) - MAGIC


@triton.jit  # type: ignore[untyped-decorator]
def _panel(  # type: ignore[no-untyped-def]
    weight,
    weight_batch_stride,
    weight_stride,
    rows,
    start,
    width,
    factor,
    factor_batch_stride,
    factor_stride,
    scales,
    zeros,
    groups,
    group_of,
    columns,
    q_min,
    q_max,
    codes,
    errors,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantise columns ``start .. start + width`` of a chunk of rows; fills ``codes`` and ``errors``."""
    b = tl.program_id(1).to(tl.int64)
    weight += b * weight_batch_stride
    factor += b * factor_batch_stride
    scales += b * rows * groups
    zeros += b * rows * groups
    group_of += b * columns
    codes += b * rows * columns
    errors += b * rows * COLUMNS
    row = (tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    real = row < rows
    inside = real[:, None] & (column < width)[None, :]
    open_columns = tl.load(weight + row[:, None] * weight_stride + (start + column)[None, :], mask=inside, other=0.0)
    chosen = tl.zeros((CHUNK, COLUMNS), tl.float32)
    for j in range(width):
        diagonal = factor + (start + j).to(tl.int64) * factor_stride + start
        this = (column == j)[None, :]
        w = tl.sum(tl.where(this, open_columns, 0.0), axis=1)
        group = tl.load(group_of + start + j)
        s = tl.load(scales + row * groups + group, mask=real, other=1.0)
        z = tl.load(zeros + row * groups + group, mask=real, other=0.0)
        q = tl.minimum(tl.maximum(rint(tl.div_rn(w, s)) + z, q_min), q_max)
        error = (w - (q - z) * s) * tl.div_rn(1.0, tl.load(diagonal + j))
        f = tl.load(diagonal + column, mask=column < width, other=0.0)
        # Columns behind are done with: theirs is the place where errors are kept.
        later = (column > j)[None, :]
        moved = tl.where(later, open_columns - error[:, None] * f[None, :], open_columns)
        open_columns = tl.where(this, error[:, None], moved)
        chosen = tl.where(this, q[:, None], chosen)
    tl.store(codes + row[:, None] * columns + (start + column)[None, :], chosen.to(tl.int8), mask=inside)
    tl.store(errors + row[:, None] * COLUMNS + column[None, :], open_columns, mask=inside)


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
        weight: ``[batch, rows, n]`` float32, columns in the order of processing, rows contiguous; overwritten.
        factor: ``R [batch, n, n]`` float32 upper triangular, ``H^-1 = R^T R``, rows contiguous.
        scales, zeros: ``[batch, rows, groups]`` float32.
        group_of: ``[batch, n]`` int64.
        q_min, q_max: code range.

    Returns:
        codes ``[batch, rows, n]`` int8 and the loss ``[batch, rows]`` float32, on the weight's device.
    """
    batch, rows, n = weight.shape
    scales, zeros, group_of = scales.contiguous(), zeros.contiguous(), group_of.contiguous()
    codes = torch.empty((batch, rows, n), dtype=torch.int8, device=weight.device)
    loss = torch.zeros((batch, rows), device=weight.device)
    errors = torch.empty((batch, rows, PANEL), device=weight.device)
    for start in range(0, n, PANEL):
        width = min(PANEL, n - start)
        _panel[(triton.cdiv(rows, ROWS), batch)](
            weight,
            weight.stride(0),
            weight.stride(1),
            rows,
            start,
            width,
            factor,
            factor.stride(0),
            factor.stride(1),
            scales,
            zeros,
            scales.shape[2],
            group_of,
            n,
            float(q_min),
            float(q_max),
            codes,
            errors,
            CHUNK=ROWS,
            COLUMNS=PANEL,
            **OPTIONS,
        )
        e = errors[:, :, :width]
        loss += e.square().sum(dim=2)
        if start + width < n:
            later = factor[:, start : start + width, start + width :]
            weight[:, :, start + width :].baddbmm_(e, later, alpha=-1.0)
    return codes, loss


@triton.jit  # type: ignore[untyped-decorator]
def _search(  # type: ignore[no-untyped-def]
    weight,
    weight_stride,
    rows,
    width,
    importance,
    candidates,
    zeros,
    groups,
    count,
    q_min,
    q_max,
    best,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The best of ``count`` candidates for one group of a chunk of rows."""
    row = (tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
    group = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    real = row < rows
    least = tl.full((CHUNK,), float("inf"), tl.float32)
    choice = tl.zeros((CHUNK,), tl.int64)
    for c in range(count):
        place = (row * groups + group) * count + c
        s = tl.load(candidates + place, mask=real, other=1.0)
        z = tl.load(zeros + place, mask=real, other=0.0)
        reciprocal = tl.div_rn(1.0, s)
        total = tl.zeros((CHUNK,), tl.float32)
        for first in range(0, width, COLUMNS):
            member = first + column
            inside = member < width
            h = tl.load(importance + group * width + member, mask=inside, other=0.0)
            place_of = weight + row[:, None] * weight_stride + (group * width + member)[None, :]
            w = tl.load(place_of, mask=real[:, None] & inside[None, :], other=0.0)
            q = tl.minimum(tl.maximum(rint(w * reciprocal[:, None]) + z[:, None], q_min), q_max)
            d = w - (q - z[:, None]) * s[:, None]
            total += tl.sum(h[None, :] * d * d, axis=1)
        better = total < least
        least = tl.where(better, total, least)
        choice = tl.where(better, c, choice)
    tl.store(best + row * groups + group, choice, mask=real)


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
        weight: ``[rows, groups * width]`` float32, rows contiguous; importance ``[groups * width]`` float32.
        candidates, zeros: ``[rows, groups, count]`` float32, scales positive.

    Returns:
        indices ``[rows, groups]`` int64 on the weight's device; the first of equals wins.
    """
    rows, groups, count = candidates.shape
    width = weight.shape[1] // groups
    best = torch.empty((rows, groups), dtype=torch.int64, device=weight.device)
    _search[(triton.cdiv(rows, ROWS), groups)](
        weight,
        weight.stride(0),
        rows,
        width,
        importance.contiguous(),
        candidates.contiguous(),
        zeros.contiguous(),
        groups,
        count,
        float(q_min),
        float(q_max),
        best,
        CHUNK=ROWS,
        COLUMNS=min(PANEL, triton.next_power_of_2(width)),
        **OPTIONS,
    )
    return best
