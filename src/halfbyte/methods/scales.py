"""Choosing scales (and zero points): from the range of a group, or by search around it.

Min-max, as compressed-tensors reckons it, with ``lo = min(w, 0)`` and ``hi = max(w, 0)`` over a group::

    symmetric    s = max(|lo|, |hi|) / ((q_max - q_min) / 2)          z = 0
    asymmetric   s = (hi - lo) / (q_max - q_min)                      z = clip(q_min - rint(lo / s))
    float8       s = max|w| / 448

A block is a group that spans rows; its scale is repeated for each of them.

Scales are rounded to the dtype they will be stored in before any code is chosen, so that codes fit the scales on disk.
A group of zeros gets scale 1. No scale is 0: the least is the dtype's smallest normal number, and in float16, whose
normal numbers end where scales of real int8 weights begin, its smallest subnormal one.
"""

from __future__ import annotations

import torch

from halfbyte.kernels.dispatch import search_scales
from halfbyte.packing import FLOAT8_MAX
from halfbyte.schemes import WeightFormat

# Shares of the min-max range that the search tries. Shrinking clips the extremes to serve the many; the few above 1
# help where compensation pushes weights outwards.
SHRINK = torch.linspace(0.40, 1.05, 66)
# Codes of 2 and 3 bits pay for a long tail with more of the middle: their best shares go down to half of that.
SHRINK_FEW_BITS = torch.linspace(0.15, 1.05, 91)
CANDIDATES_PER_CALL = 1 << 19
LEAST_SCALE = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}


def minmax(weight: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points ``[out, groups]`` from each group's range, float32 values representable in ``dtype``."""
    lo, hi = _range(weight, fmt)
    return _from_range(lo, hi, fmt, dtype)


def searched(
    weight: torch.Tensor, importance: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points that minimise the weighted squared error of rounding, group by group.

    ``argmin_{s, z} sum_k h_k (w_k - (q_k - z) s)^2`` over :func:`shares` of the min-max range.

    Args:
        weight: ``[out, in]`` float32.
        importance: ``h [in]`` float32, not negative.
        fmt: an integer format.
        dtype: what scales are stored in.
    """
    lo, hi = _range(weight, fmt)
    rows, groups = lo.shape
    scales, zeros = torch.empty_like(lo), torch.empty_like(lo)
    tried = shares(fmt).to(weight.device)
    step = max(1, CANDIDATES_PER_CALL // (groups * len(tried)))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        s, z = _from_range(lo[part, :, None], hi[part, :, None], fmt, dtype, tried)
        best = search_scales(weight[part], importance, s, z, fmt.q_min, fmt.q_max).unsqueeze(-1)
        scales[part], zeros[part] = s.gather(2, best).squeeze(-1), z.gather(2, best).squeeze(-1)
    return scales, zeros


def shares(fmt: WeightFormat) -> torch.Tensor:
    """Shares of the min-max range that the search tries."""
    return SHRINK_FEW_BITS if fmt.num_bits < 4 else SHRINK


def _range(weight: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    grouped = weight.reshape(weight.shape[0], fmt.groups(weight.shape[1]), -1)
    lo, hi = grouped.aminmax(dim=-1)
    if fmt.block is not None:
        rows = torch.split(torch.stack((lo, hi)), fmt.block[0], dim=1)
        lo = torch.cat([r[0].amin(0).expand_as(r[0]) for r in rows])
        hi = torch.cat([r[1].amax(0).expand_as(r[1]) for r in rows])
    return lo.clamp(max=0), hi.clamp(min=0)


def _from_range(
    lo: torch.Tensor, hi: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype, tried: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """With ``tried``, for each of these shares of the range (in the last dimension)."""
    extreme = torch.maximum(-lo, hi)
    empty = extreme == 0
    if tried is not None and fmt.symmetric:
        extreme = extreme * tried
    elif tried is not None:
        lo, hi = lo * tried, hi * tried
    if fmt.kind == "float":
        scales = extreme / FLOAT8_MAX
    elif fmt.symmetric:
        scales = extreme / ((fmt.q_max - fmt.q_min) / 2)
    else:
        scales = (hi - lo) / (fmt.q_max - fmt.q_min)
    scales = scales.to(dtype).to(torch.float32)
    scales = scales.clamp_(min=LEAST_SCALE[dtype]).masked_fill_(empty, 1.0)
    if fmt.symmetric:
        return scales, torch.zeros_like(scales)
    return scales, (fmt.q_min - torch.round(lo / scales)).clamp(fmt.q_min, fmt.q_max)
