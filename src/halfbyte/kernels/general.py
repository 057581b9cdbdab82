"""What ``order_numba`` and ``refine_numba.rounding_error`` do, in torch: for devices that have no kernel of ours."""

from __future__ import annotations

import torch

from halfbyte.packing import dequantize

STRIP = 1024


def take_square(x: torch.Tensor, order: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See :func:`halfbyte.kernels.order_numba.take_square`."""
    return x[torch.arange(len(x), device=x.device)[:, None, None], order[:, :, None], order[:, None, :]].to(dtype)


def take_columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """See :func:`halfbyte.kernels.order_numba.take_columns`."""
    return x.gather(2, order.unsqueeze(1).expand_as(x))


def put_columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """See :func:`halfbyte.kernels.order_numba.put_columns`."""
    return torch.empty_like(x).scatter_(2, order.unsqueeze(1).expand_as(x), x)


def rounding_error(
    weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`halfbyte.kernels.refine_numba.rounding_error`."""
    error = torch.empty_like(weights)
    for w, c, s, z, e in zip(weights, codes, scales, zeros, error, strict=True):
        for start in range(0, weights.shape[1], STRIP):
            rows = slice(start, start + STRIP)
            torch.sub(w[rows], dequantize(c[rows], s[rows], z[rows]), out=e[rows])
    lowest, highest = error.flatten(1).aminmax(dim=1)
    return error, torch.maximum(-lowest, highest)
