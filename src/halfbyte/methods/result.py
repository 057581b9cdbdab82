"""What every method returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from halfbyte.packing import dequantize

STRIP_ELEMENTS = 1 << 20


def squared_norm(weight: torch.Tensor) -> float:
    """``|weight|^2`` in float64, a few rows at a time: nothing of the weight's size is made for it."""
    rows = max(1, STRIP_ELEMENTS // weight.shape[1])
    return sum(float(strip.square().sum(dtype=torch.float64)) for strip in torch.split(weight, rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """Codes and scales of one Linear, and how well they stand for the weight.

    Attributes:
        codes: ``[out, in]`` int8, or float8_e4m3fn for float formats.
        scales: ``[out, groups]`` in the dtype that is stored.
        zero_points: ``[out, groups]`` int8 for asymmetric formats, else ``None``.
        relative_error: ``tr(E H E^T) / tr(W H W^T)``, see :class:`halfbyte.records.LinearRecord`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    relative_error: float

    def map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedWeight:
        """The same, with every tensor moved elsewhere."""
        zeros = None if self.zero_points is None else move(self.zero_points)
        return replace(self, codes=move(self.codes), scales=move(self.scales), zero_points=zeros)

    def dense(self) -> torch.Tensor:
        """The weight that the codes stand for, float32 ``[out, in]``."""
        return dequantize(self.codes, self.scales, self.zero_points)

    def squared_error(self, weight: torch.Tensor) -> float:
        """``|dense - weight|^2``, a few rows at a time: nothing of the weight's size is made for it."""
        rows = max(1, STRIP_ELEMENTS // weight.shape[1])
        total = 0.0
        for first in range(0, weight.shape[0], rows):
            strip = slice(first, first + rows)
            zeros = None if self.zero_points is None else self.zero_points[strip]
            error = dequantize(self.codes[strip], self.scales[strip], zeros).sub_(weight[strip])
            total += float(error.square_().sum(dtype=torch.float64))
        return total
