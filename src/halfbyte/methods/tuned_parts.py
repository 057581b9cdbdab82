"""What block tuning moves: codes and scales of Linears, and norm weights, each as it will be stored.

A Linear's weight is ``w = (q - z) s`` with, for each weight, ``q = clip(rint(u), q_min, q_max)`` of a latent u, and for
each group ``s = stored(s_0 (1 + a))`` in the dtype of the file. Gradients go straight through the roundings
(arXiv 1308.3432), so that of ``G = dL/dw``::

    dL/du = s G        dL/da = s_0 sum_group (q - z) G = (s_0 / s) sum_group w G

As s > 0, the sign of ``dL/du`` is the sign of G. Latents start inside the cell of the codes they were given, as near to
the original weight as that allows, so the first forward pass has exactly those codes, and codes whose weight lies next
to a cell's border are the first to flip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.methods.result import STRIP_ELEMENTS, QuantizedWeight
from halfbyte.methods.scales import LEAST_SCALE
from halfbyte.packing import dequantize
from halfbyte.schemes import WeightFormat

BORDER = 0.49


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedLinear:
    """One quantised Linear of a block.

    Attributes:
        module: whose ``weight [out, in]`` is tuned in place.
        weight: the original weight ``[out, in]`` float32.
        quantized: where tuning starts.
        fmt: an integer format.
        scale_dtype: what scales are stored in.
        quantize_input: where the engine quantises activations, what it makes of this Linear's input (same shape and
            dtype); its gradient is taken for 1.
    """

    module: nn.Linear
    weight: torch.Tensor
    quantized: QuantizedWeight
    fmt: WeightFormat
    scale_dtype: torch.dtype
    quantize_input: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedVector:
    """One small parameter of a block that stays dense, such as a norm's weight.

    Attributes:
        module: whose parameter ``leaf`` it is, tuned in place.
        dtype: what it is stored in.
    """

    module: nn.Module
    leaf: str
    dtype: torch.dtype


@dataclass(slots=True)
class LinearState:
    """A Linear on its way: ``latent [out, in]``, ``start`` and ``ratio`` (``s_0`` and a) ``[out, groups]``, float32."""

    spec: TunedLinear
    latent: torch.Tensor
    start: torch.Tensor
    ratio: torch.Tensor
    zeros: torch.Tensor | None

    @staticmethod
    def of(spec: TunedLinear) -> LinearState:
        device = spec.module.weight.device
        given = spec.quantized
        codes = given.codes.to(device, torch.float32)
        start = given.scales.to(device, torch.float32)
        zeros = None if given.zero_points is None else given.zero_points.to(device, torch.float32)
        latent = spec.weight.to(device, torch.float32, copy=True)
        grouped = latent.view(*start.shape, -1).div_(start.unsqueeze(-1))
        if zeros is not None:
            grouped.add_(zeros.unsqueeze(-1))
        latent.sub_(codes).clamp_(-BORDER, BORDER).add_(codes)
        return LinearState(spec, latent, start, torch.zeros_like(start), zeros)

    def codes(self) -> torch.Tensor:
        """``q [out, in]`` int8."""
        fmt = self.spec.fmt
        strips = torch.split(self.latent, self._rows())
        return torch.cat([torch.round(u).clamp_(fmt.q_min, fmt.q_max).to(torch.int8) for u in strips])

    def scales(self) -> torch.Tensor:
        """``s [out, groups]`` float32, representable in the stored dtype."""
        dtype = self.spec.scale_dtype
        return (self.start * (1.0 + self.ratio)).to(dtype).to(torch.float32).clamp_(min=LEAST_SCALE[dtype])

    def parameter(self) -> nn.Parameter:
        return self.spec.module.get_parameter("weight")

    @torch.no_grad()
    def place(self) -> None:
        """Give the module the weight that codes and scales stand for, a few rows at a time."""
        fmt, scales, weight = self.spec.fmt, self.scales(), self.parameter()
        for first in range(0, self.latent.shape[0], self._rows()):
            rows = slice(first, first + self._rows())
            codes = torch.round(self.latent[rows]).clamp_(fmt.q_min, fmt.q_max)
            zeros = None if self.zeros is None else self.zeros[rows]
            weight.data[rows] = dequantize(codes, scales[rows], zeros).to(weight.dtype)

    @torch.no_grad()
    def slope(self) -> torch.Tensor:
        """``dL/da [out, groups]`` from the gradient in the module's weight."""
        weight = self.parameter()
        assert weight.grad is not None
        sums = (weight.detach().float() * weight.grad.float()).view(*self.start.shape, -1).sum(dim=-1)
        return sums * self.start / self.scales()

    @torch.no_grad()
    def descend(self, rate: float) -> None:
        """Move every latent by ``rate`` against the sign of its gradient, which is used up."""
        weight, fmt = self.parameter(), self.spec.fmt
        assert weight.grad is not None
        self.latent.sub_(weight.grad.sign_(), alpha=rate).clamp_(fmt.q_min - 0.5, fmt.q_max + 0.5)

    def result(self) -> QuantizedWeight:
        """As it will be stored; the relative error is that of the start, which tuning does not reckon anew."""
        return QuantizedWeight(
            codes=self.codes().cpu(),
            scales=self.scales().to(self.spec.scale_dtype).cpu(),
            zero_points=self.spec.quantized.zero_points,
            relative_error=self.spec.quantized.relative_error,
        )

    def _rows(self) -> int:
        return max(1, STRIP_ELEMENTS // self.latent.shape[1])


@dataclass(slots=True)
class VectorState:
    """A vector on its way: ``stored(start + unit a)``, the unit being its own size but no less than the mean size."""

    spec: TunedVector
    start: torch.Tensor
    unit: torch.Tensor
    ratio: torch.Tensor

    @staticmethod
    def of(spec: TunedVector) -> VectorState:
        start = spec.module.get_parameter(spec.leaf).detach().to(torch.float32, copy=True)
        size = start.abs()
        return VectorState(spec, start, size.clamp(min=float(size.mean())), torch.zeros_like(start))

    def value(self) -> torch.Tensor:
        return (self.start + self.unit * self.ratio).to(self.spec.dtype)

    def parameter(self) -> nn.Parameter:
        return self.spec.module.get_parameter(self.spec.leaf)

    @torch.no_grad()
    def place(self) -> None:
        self.parameter().data.copy_(self.value())

    @torch.no_grad()
    def slope(self) -> torch.Tensor:
        gradient = self.parameter().grad
        assert gradient is not None
        return gradient.float() * self.unit
