"""After GPTQ: each scale and each code is looked at again with all others in place, and moved where that helps.

GPTQ goes through the columns once and never looks back. The objective stays its own,
``tr(E H E^T)`` with ``E = W - W_q`` and the damped H:

- **refit** (closed form; scales and codes as coordinates of one least-squares problem: COMQ, arXiv 2403.07134): along
  the integers ``v = q - z`` of one row's group the error is a parabola in the scale, and least at
  ``s + (E H)_g v / (v H_gg v)``; taken as it is rounded to the stored dtype, where that still gains, and never below a
  sixteenth of s;
- **descent** (coordinate descent on codes; QuantEase, arXiv 2309.01885): each code goes to the grid point nearest to
  where its own parabola is least.

Neither can raise the error. Columns are taken in panels from the left, and a panel's part of ``E H`` is computed when
its turn comes, from what E is then. So a sweep costs one matrix product of the weight with H, and nothing of the
weight's size is held besides E. In the last sweep, all that is left of a panel is final, and the error that remains
comes without another product::

    tr(E H E^T) = sum_p E_p (2 sum_{l left of p} E_l H_lp + E_p H_pp)^T
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from halfbyte.kernels.dispatch import PANEL, descend, rounding_error
from halfbyte.kernels.general import STRIP
from halfbyte.methods.scales import LEAST_SCALE
from halfbyte.schemes import WeightFormat

SMALLEST_MOVE = 2.0**-4


def output_energy(weights: torch.Tensor, hessians: torch.Tensor) -> torch.Tensor:
    """``diag(W H W^T)``: the squared outputs of each row, summed over tokens; what relative errors are relative to.

    H is symmetric, so half of its products are enough: ``sum_p W_p (2 sum_{r right of p} W_r H_rp + W_p H_pp)^T``.

    Args:
        weights: ``[batch, out, in]`` float32.
        hessians: ``[batch, in, in]`` float32, symmetric.

    Returns:
        ``[batch, out]`` float64.
    """
    n = weights.shape[2]
    total = torch.zeros(weights.shape[:2], dtype=torch.float64, device=weights.device)
    for start in range(0, n, PANEL):
        own = slice(start, min(start + PANEL, n))
        product = torch.bmm(weights[:, :, own], hessians[:, own, own])
        if own.stop < n:
            product.baddbmm_(weights[:, :, own.stop :], hessians[:, own.stop :, own], alpha=2.0)
        total += product.mul_(weights[:, :, own]).sum(dim=2)
    return total


def refine(
    weights: torch.Tensor,
    hessians: torch.Tensor,
    damping: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    fmt: WeightFormat,
    scale_dtype: torch.dtype,
    *,
    refit: bool,
    descent: bool,
    sweeps: int,
) -> torch.Tensor:
    """Refine codes and scales in place, ``sweeps`` times.

    Args:
        weights: ``[batch, out, in]`` float32.
        hessians: ``[batch, in, in]`` float32, symmetric, undamped; not changed.
        damping: ``[batch, in]`` float32, what stands for added on their diagonals.
        codes: ``[batch, out, in]`` int8; scales, zeros: ``[batch, out, groups]`` float32. Codes and scales are changed.
        fmt: an integer format.
        scale_dtype: what scales are stored in.
        refit, descent: which of the two to do.

    Returns:
        ``[batch, out]`` float64, each row's part of the error left, ``tr(E H E^T)`` without damping; infinite, and
        nothing changed, for each of the batch where it could overflow float32.
    """
    n = weights.shape[2]
    width = n // scales.shape[2]
    error, largest = rounding_error(weights, codes, scales, zeros)
    most = largest.double() * hessians.diagonal(dim1=1, dim2=2).amax(dim=1) * n
    fits = most < torch.finfo(torch.float32).max  # what made it so is found in the activations
    if not bool(fits.all()):
        remaining = torch.full(weights.shape[:2], torch.inf, dtype=torch.float64, device=weights.device)
        if bool(fits.any()):
            w, h, d, c, s, z = (t[fits] for t in (weights, hessians, damping, codes, scales, zeros))
            remaining[fits] = refine(w, h, d, c, s, z, fmt, scale_dtype, refit=refit, descent=descent, sweeps=sweeps)
            codes[fits], scales[fits] = c, s
        return remaining
    if not (refit or descent) or sweeps < 1:
        return output_energy(error, hessians)
    remaining = torch.zeros(weights.shape[:2], dtype=torch.float64, device=weights.device)
    for sweep in range(sweeps):
        for panel in _panels(n, width):
            if refit and width > PANEL and panel.start % width == 0:
                _refit_wide(error, hessians, damping, codes, scales, zeros, panel.start // width, scale_dtype)
            left = torch.bmm(error[:, :, : panel.start], hessians[:, : panel.start, panel])
            slope = torch.baddbmm(left, error[:, :, panel.start :], hessians[:, panel.start :, panel])
            slope += error[:, :, panel] * damping[:, None, panel]
            for g in range(panel.start // width, -(-panel.stop // width)):
                part = slice(max(panel.start, g * width), min(panel.stop, (g + 1) * width))
                square = hessians[:, part, part].clone()
                square.diagonal(dim1=1, dim2=2).add_(damping[:, part])
                here = slope[:, :, part.start - panel.start : part.stop - panel.start]
                of_group = (codes[:, :, part], scales[:, :, g], zeros[:, :, g])
                steps = _steps(
                    here, square, *of_group, fmt, scale_dtype, refit=refit and width <= PANEL, descent=descent
                )
                error[:, :, part].sub_(steps)
                if part.stop < panel.stop:
                    later = slice(part.stop, panel.stop)
                    rest = slope[:, :, later.start - panel.start :]
                    rest.baddbmm_(steps, hessians[:, part, later], alpha=-1.0)
                del steps, here  # before the next are made
            if sweep == sweeps - 1:
                own = error[:, :, panel]
                left.mul_(2.0).baddbmm_(own, hessians[:, panel, panel])
                remaining += left.mul_(own).sum(dim=2)
    return remaining


def _panels(n: int, width: int) -> Iterator[slice]:
    """Columns ``0 .. n`` in panels of whole groups, or of parts of one group where groups are wider than a panel."""
    whole = width if width > PANEL else n
    step = PANEL if width > PANEL else PANEL // width * width
    for first in range(0, n, whole):
        for start in range(first, first + whole, step):
            yield slice(start, min(start + step, first + whole))


def _steps(
    slope: torch.Tensor,
    square: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    fmt: WeightFormat,
    scale_dtype: torch.dtype,
    *,
    refit: bool,
    descent: bool,
) -> torch.Tensor:
    """Refine one group's scales and codes in place; returns by how much its weights moved, ``[batch, rows, width]``.

    Args:
        slope: ``E H`` of its columns; follows the scales that move.
        square: the damped H of its columns.
    """
    if refit:
        v = codes.to(torch.float32).sub_(zeros.unsqueeze(2))
        product = torch.bmm(v, square)
        change = _refit((v * slope).sum(dim=2), (v * product).sum(dim=2), scales, scale_dtype)
        steps = v.mul_(change.unsqueeze(2))
        slope.sub_(product.mul_(change.unsqueeze(2)))
    else:
        steps = torch.zeros_like(slope, memory_format=torch.contiguous_format)
    if descent:
        descend(slope, square, codes, scales.contiguous(), zeros.contiguous(), fmt.q_min, fmt.q_max, steps)
    return steps


def _refit(slope: torch.Tensor, curve: torch.Tensor, scales: torch.Tensor, scale_dtype: torch.dtype) -> torch.Tensor:
    """Move one group's scales ``[batch, rows]``, each to the least of its parabola; returns by how much they moved.

    A parabola may be least at zero or below it, where no scale can be: such a scale moves to `SMALLEST_MOVE` of what
    it was, which AWQ's and GPTQ's float16 still holds.
    """
    wanted = torch.maximum(scales + torch.where(curve > 0, slope / curve, 0.0), scales * SMALLEST_MOVE)
    new = wanted.to(scale_dtype).to(torch.float32).clamp(min=LEAST_SCALE[scale_dtype])
    change = new - scales
    gains = (2 * change * slope > change.square() * curve) & torch.isfinite(new)
    change = torch.where(gains, change, 0.0)
    scales += change
    return change


def _refit_wide(
    error: torch.Tensor,
    hessians: torch.Tensor,
    damping: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group: int,
    scale_dtype: torch.dtype,
) -> None:
    """Refit a group of more columns than a panel has; ``v H_g`` gives slope and curve alike."""
    width = codes.shape[2] // scales.shape[2]
    columns = slice(group * width, (group + 1) * width)
    for start in range(0, codes.shape[1], STRIP):
        rows = slice(start, start + STRIP)
        v = codes[:, rows, columns].to(torch.float32) - zeros[:, rows, group, None]
        product = torch.bmm(v, hessians[:, columns])
        product[:, :, columns] += v * damping[:, None, columns]
        slope, curve = (product * error[:, rows]).sum(dim=2), (product[:, :, columns] * v).sum(dim=2)
        change = _refit(slope, curve, scales[:, rows, group], scale_dtype)
        error[:, rows, columns] -= v.mul_(change.unsqueeze(2))
