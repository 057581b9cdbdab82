"""Round to nearest: every weight to the closest code of its group's min-max grid. No calibration.

``q = clip(rint(w / s) + z, q_min, q_max)``, half to even, in float32 (rounding a bfloat16 weight in bfloat16 gives
other codes). For symmetric formats this is code for code what compressed-tensors computes with its ``minmax`` observer.
For asymmetric ones it differs in two ways: the zero point is reckoned from the scale as stored, and ``w / s`` is
rounded before ``z`` is added, so that a tie goes the same way whatever ``z`` is.
"""

from __future__ import annotations

import torch

from halfbyte.methods.result import QuantizedWeight, squared_norm
from halfbyte.methods.scales import minmax
from halfbyte.packing import FLOAT8_MAX
from halfbyte.schemes import WeightFormat


def quantize_rtn(weight: torch.Tensor, fmt: WeightFormat, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Quantise one weight ``[out, in]`` float32; the relative error is ``|E|^2 / |W|^2``."""
    scales, zeros = minmax(weight, fmt, scale_dtype)
    codes = nearest(weight, scales, zeros, fmt)
    zero_points = None if fmt.symmetric else zeros.to(torch.int8)
    result = QuantizedWeight(
        codes=codes, scales=scales.to(scale_dtype), zero_points=zero_points, relative_error=float("nan")
    )
    energy = squared_norm(weight)
    error = result.squared_error(weight)
    return QuantizedWeight(
        codes=codes,
        scales=result.scales,
        zero_points=zero_points,
        relative_error=error / energy if energy else 0.0,
    )


def nearest(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """The nearest code of each weight; int8, or float8_e4m3fn for float formats."""
    grouped = weight.reshape(weight.shape[0], scales.shape[1], -1) / scales.unsqueeze(-1)
    if fmt.kind == "float":
        return grouped.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).reshape(weight.shape)
    codes = (torch.round(grouped) + zeros.unsqueeze(-1)).clamp(fmt.q_min, fmt.q_max)
    return codes.to(torch.int8).reshape(weight.shape)
