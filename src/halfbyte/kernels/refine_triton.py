"""The GPU kernel of coordinate descent: one panel of columns, one program a chunk of rows, as in ``gptq_triton``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from halfbyte.kernels.gptq_triton import OPTIONS, PANEL, ROWS, rint


@triton.jit  # type: ignore[untyped-decorator]
def _descend(  # type: ignore[no-untyped-def]
    gradient,
    gradient_batch_stride,
    gradient_stride,
    rows,
    width,
    hessian,
    hessian_batch_stride,
    hessian_stride,
    scales,
    zeros,
    q_min,
    q_max,
    codes,
    codes_batch_stride,
    codes_stride,
    steps,
    steps_batch_stride,
    steps_stride,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    gradient += b * gradient_batch_stride
    hessian += b * hessian_batch_stride
    scales += b * rows
    zeros += b * rows
    codes += b * codes_batch_stride
    steps += b * steps_batch_stride
    row = (tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    real = row < rows
    inside = real[:, None] & (column < width)[None, :]
    slope = tl.load(gradient + row[:, None] * gradient_stride + column[None, :], mask=inside, other=0.0)
    before = tl.load(codes + row[:, None] * codes_stride + column[None, :], mask=inside, other=0).to(tl.float32)
    after = before
    s = tl.load(scales + row, mask=real, other=1.0)
    z = tl.load(zeros + row, mask=real, other=0.0)
    for j in range(width):
        line = hessian + j * hessian_stride
        this = (column == j)[None, :]
        curve = tl.load(line + j)
        alive = curve > 0
        reciprocal = tl.div_rn(1.0, tl.where(alive, curve, 1.0))
        q = tl.sum(tl.where(this, before, 0.0), axis=1)
        towards = tl.sum(tl.where(this, slope, 0.0), axis=1)
        nearest = rint((q - z) + tl.div_rn(towards * reciprocal, s)) + z
        nearest = tl.where(alive, tl.minimum(tl.maximum(nearest, q_min), q_max), q)
        h = tl.load(line + column, mask=column < width, other=0.0)
        step = (nearest - q) * s
        slope = tl.where((column > j)[None, :], slope - step[:, None] * h[None, :], slope)
        after = tl.where(this, nearest[:, None], after)
    tl.store(codes + row[:, None] * codes_stride + column[None, :], after.to(tl.int8), mask=inside)
    place = steps + row[:, None] * steps_stride + column[None, :]
    moved = tl.load(place, mask=inside, other=0.0) + (after - before) * s[:, None]
    tl.store(place, moved, mask=inside)


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

    Rows of all of them are contiguous.
    """
    batch, rows, width = gradient.shape
    _descend[(triton.cdiv(rows, ROWS), batch)](
        gradient,
        gradient.stride(0),
        gradient.stride(1),
        rows,
        width,
        hessian,
        hessian.stride(0),
        hessian.stride(1),
        scales.contiguous(),
        zeros.contiguous(),
        float(q_min),
        float(q_max),
        codes,
        codes.stride(0),
        codes.stride(1),
        steps,
        steps.stride(0),
        steps.stride(1),
        CHUNK=ROWS,
        COLUMNS=PANEL,
        **OPTIONS,
    )
