"""What every method returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.packing import dequantize


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

    def dense(self) -> torch.Tensor:
        """The weight that the codes stand for, float32 ``[out, in]``."""
        return dequantize(self.codes, self.scales, self.zero_points)
