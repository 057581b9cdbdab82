"""After GPTQ: each scale and each code is looked at again with all others in place, and moved where that helps.

GPTQ goes through the columns once and never looks back. The objective stays its own,
``tr(E H E^T)`` with ``E = W - W_q`` and the damped H:

- **refit** (closed form): along the integers ``v = q - z`` of one row's group the error is a parabola in the scale, and
  least at ``s + (E H)_g v / (v H_gg v)``; taken as it is rounded to the stored dtype, where that still gains;
- **descent** (coordinate descent on codes; QuantEase, arXiv 2309.01885): each code goes to the grid point nearest to
  where its own parabola is least.

Neither can raise the error. ``E H`` is kept up to date, so a sweep costs one matrix product of the weight with H.
"""

from __future__ import annotations

import torch

from halfbyte.kernels.dispatch import PANEL, descend
from halfbyte.methods.scales import LEAST_SCALE
from halfbyte.packing import dequantize
from halfbyte.schemes import WeightFormat

STRIP = 1024


def refine(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    damping: float,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    fmt: WeightFormat,
    scale_dtype: torch.dtype,
    *,
    refit: bool,
    descent: bool,
    sweeps: int,
) -> float:
    """Refine codes and scales in place, ``sweeps`` times.

    Args:
        weight: ``[out, in]`` float32.
        hessian: ``[in, in]`` float32, symmetric, undamped; not changed.
        damping: what stands for added on its diagonal.
        codes: ``[out, in]`` int8; scales, zeros: ``[out, groups]`` float32. Codes and scales are changed.
        fmt: an integer format.
        scale_dtype: what scales are stored in.
        refit, descent: which of the two to do.

    Returns:
        the error left, ``tr(E H E^T)`` without damping; infinite, and nothing changed, where it overflows float32.
    """
    columns, groups = weight.shape[1], scales.shape[1]
    width = columns // groups
    step = min(width, PANEL)
    error = dequantize(codes, scales, None if fmt.symmetric else zeros).neg_().add_(weight)
    gradient = torch.addmm(error, error, hessian, beta=damping)
    if not bool(torch.isfinite(gradient.sum())):  # nothing to go by; what made it so is found in the activations
        return float("inf")
    for _ in range(sweeps):
        for g in range(groups):
            whole = slice(g * width, (g + 1) * width)
            moved = _refit(gradient, hessian, damping, codes, scales, zeros, g, scale_dtype) if refit else None
            if moved is not None and (width > PANEL or not descent):
                _move(gradient, error, hessian, damping, moved, whole)
                moved = None
            for start in range(whole.start, whole.stop, step) if descent else ():
                panel = slice(start, min(start + step, whole.stop))
                square = _damped(hessian, damping, panel)
                slope = gradient[:, panel].clone()
                if moved is not None:
                    slope.addmm_(moved, square, alpha=-1.0)
                steps = torch.zeros_like(slope) if moved is None else moved
                scale, zero = scales[:, g].contiguous(), zeros[:, g].contiguous()
                descend(slope, square, codes[:, panel], scale, zero, fmt.q_min, fmt.q_max, steps)
                _move(gradient, error, hessian, damping, steps, panel)
    # gradient = E (H + damping I)
    gradient.sub_(error, alpha=damping)
    strips = zip(torch.split(gradient, STRIP), torch.split(error, STRIP), strict=True)
    return max(0.0, sum(float(g.mul(e).sum(dtype=torch.float64)) for g, e in strips))


def _refit(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    damping: float,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group: int,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """Move one group's scales, all rows at once; returns what its weights moved by, ``[rows, width]``."""
    width = codes.shape[1] // scales.shape[1]
    columns = slice(group * width, (group + 1) * width)
    v = codes[:, columns].to(torch.float32) - zeros[:, group, None]
    slope = (v * gradient[:, columns]).sum(dim=1)
    curve = (torch.addmm(v, v, hessian[columns, columns], beta=damping) * v).sum(dim=1)
    old = scales[:, group]
    wanted = old + torch.where(curve > 0, slope / curve, 0.0)
    new = wanted.to(scale_dtype).to(torch.float32).clamp(min=LEAST_SCALE[scale_dtype])
    change = new - old
    gains = (2 * change * slope > change.square() * curve) & torch.isfinite(new)
    change = torch.where(gains, change, 0.0)
    scales[:, group] += change
    return v.mul_(change[:, None])


def _move(
    gradient: torch.Tensor,
    error: torch.Tensor,
    hessian: torch.Tensor,
    damping: float,
    steps: torch.Tensor,
    columns: slice,
) -> None:
    """Bring ``E`` and ``E (H + damping I)`` up to date after quantised weights moved by ``steps [rows, width]``."""
    error[:, columns].sub_(steps)
    gradient.addmm_(steps, hessian[columns], alpha=-1.0)
    gradient[:, columns].sub_(steps, alpha=damping)


def _damped(hessian: torch.Tensor, damping: float, columns: slice) -> torch.Tensor:
    square = hessian[columns, columns].clone()
    square.diagonal().add_(damping)
    return square
