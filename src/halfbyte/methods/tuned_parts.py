"""What block tuning moves: scales and codes of Linears, and norm weights, each as it will be stored.

A Linear's weight is ``w = (q - z) s`` with, for each group, ``s = stored(s_0 (1 + a))`` in the dtype of the file, and,
where codes are tuned, for each weight ``q = clip(rint(u), q_min, q_max)`` of a latent u. Gradients go straight through
the roundings (arXiv 1308.3432), so that of ``G = dL/dw``::

    dL/da = s_0 sum_group (q - z) G = (s_0 / s) sum_group w G        dL/du = s G

As s > 0, the sign of ``dL/du`` is the sign of G. Latents start inside the cell of the codes they were given, as near to
the original weight as that allows, so the first forward pass has exactly those codes, and codes whose weight lies next
to a cell's border are the first to flip.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.methods.result import STRIP_ELEMENTS, QuantizedWeight
from halfbyte.methods.scales import LEAST_SCALE
from halfbyte.packing import dequantize
from halfbyte.ranks import Ranks
from halfbyte.schemes import WeightFormat

BORDER = 0.49


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedLinear:
    """One quantised Linear of a block.

    Attributes:
        module: whose ``weight [out, in]`` is tuned in place.
        quantized: where tuning starts.
        fmt: an integer format.
        scale_dtype: what scales are stored in.
        quantize_input: where the engine quantises activations, what it makes of this Linear's input (same shape and
            dtype); its gradient is taken for 1.
        weight: what was rounded to the codes, ``[out, in]`` in float32 or the dtype of blocks; needed where codes are
            tuned.
    """

    module: nn.Linear
    quantized: QuantizedWeight
    fmt: WeightFormat
    scale_dtype: torch.dtype
    quantize_input: Callable[[torch.Tensor], torch.Tensor] | None = None
    weight: torch.Tensor | None = None


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
    """A Linear on its way.

    Attributes:
        start, ratio: ``s_0`` and a, ``[out, groups]`` float32; the gradient of L is summed up in ``ratio.grad``.
        latent: u ``[out, in]`` float32; ``None`` where codes stay as they are.
        gradient: G ``[out, in]``, summed up where codes are tuned.
    """

    spec: TunedLinear
    start: torch.Tensor
    ratio: torch.Tensor
    latent: torch.Tensor | None
    gradient: torch.Tensor | None = None

    @staticmethod
    def of(spec: TunedLinear, *, tune_codes: bool) -> LinearState:
        start = spec.quantized.scales.to(spec.module.weight.device, torch.float32)
        return LinearState(spec, start, torch.zeros_like(start), _latent(spec, start) if tune_codes else None)

    def codes(self) -> torch.Tensor:
        """``q [out, in]`` int8, where they were given."""
        given, fmt = self.spec.quantized.codes, self.spec.fmt
        if self.latent is None:
            return given
        strips = torch.split(self.latent, _rows(given))
        return torch.cat([torch.round(u).clamp_(fmt.q_min, fmt.q_max).to(given) for u in strips])

    def scales(self) -> torch.Tensor:
        """``s [out, groups]`` float32, representable in the stored dtype."""
        dtype = self.spec.scale_dtype
        return (self.start * (1.0 + self.ratio)).to(dtype).to(torch.float32).clamp_(min=LEAST_SCALE[dtype])

    def parameter(self) -> nn.Parameter:
        return self.spec.module.get_parameter("weight")

    @torch.no_grad()
    def place(self) -> None:
        """Give the module the weight that codes and scales stand for, a few rows at a time."""
        codes, zeros, scales, weight = self.codes(), self.spec.quantized.zero_points, self.scales(), self.parameter()
        for first in range(0, codes.shape[0], _rows(codes)):
            rows = slice(first, first + _rows(codes))
            z = None if zeros is None else zeros[rows].to(weight.device)
            weight.data[rows] = dequantize(codes[rows].to(weight.device), scales[rows], z).to(weight.dtype)

    @torch.no_grad()
    def absorb(self) -> None:
        """Take the gradient out of the module's weight and add it to what has been summed up."""
        weight = self.parameter()
        assert weight.grad is not None
        products = (weight.detach().float() * weight.grad.float()).view(*self.start.shape, -1)
        _add_gradient(self.ratio, products.sum(dim=-1) * self.start / self.scales())
        if self.latent is not None:
            self.gradient = weight.grad if self.gradient is None else self.gradient.add_(weight.grad)
        weight.grad = None

    def descend(self, rate: float) -> None:
        """Move every latent by ``rate`` against the sign of the gradient summed up, which is thereby used up."""
        if self.latent is not None and self.gradient is not None:
            fmt = self.spec.fmt
            self.latent.sub_(self.gradient.sign_(), alpha=rate).clamp_(fmt.q_min - 0.5, fmt.q_max + 0.5)
            self.gradient = None

    def result(self) -> QuantizedWeight:
        """As it will be stored; the relative error is that of the start, which tuning does not reckon anew."""
        return QuantizedWeight(
            codes=self.codes(),
            scales=self.scales().to(self.spec.quantized.scales),
            zero_points=self.spec.quantized.zero_points,
            relative_error=self.spec.quantized.relative_error,
        )


def _latent(spec: TunedLinear, scales: torch.Tensor) -> torch.Tensor:
    """``u = q + clip(w / s + z - q, -BORDER, BORDER)``."""
    if spec.weight is None:
        raise ValueError("codes are tuned from the original weight; give TunedLinear.weight")
    codes = spec.quantized.codes.to(scales)
    latent = spec.weight.to(scales.device, torch.float32, copy=True)
    grouped = latent.view(*scales.shape, -1).div_(scales.unsqueeze(-1))
    if spec.quantized.zero_points is not None:
        grouped.add_(spec.quantized.zero_points.to(scales).unsqueeze(-1))
    return latent.sub_(codes).clamp_(-BORDER, BORDER).add_(codes)


def _rows(matrix: torch.Tensor) -> int:
    return max(1, STRIP_ELEMENTS // matrix.shape[1])


def _add_gradient(to: torch.Tensor, gradient: torch.Tensor) -> None:
    to.grad = gradient if to.grad is None else to.grad.add_(gradient)


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
    def absorb(self) -> None:
        """As :meth:`LinearState.absorb`: ``dL/da = unit dL/dvalue``."""
        parameter = self.parameter()
        assert parameter.grad is not None
        _add_gradient(self.ratio, parameter.grad.float() * self.unit)
        parameter.grad = None


@contextlib.contextmanager
def differentiated(parts: Sequence[LinearState | VectorState]) -> Iterator[None]:
    """Gradients for these parameters and no others; each is taken as soon as it is made, and its memory freed."""
    parameters = [part.parameter() for part in parts]
    before = [p.requires_grad for p in parameters]
    handles = []
    try:
        for part, p in zip(parts, parameters, strict=True):
            p.requires_grad_(True)
            handles.append(p.register_post_accumulate_grad_hook(lambda _, part=part: part.absorb()))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, old in zip(parameters, before, strict=True):
            p.requires_grad_(old)


@contextlib.contextmanager
def told_by(ranks: Ranks, owner: int, parts: Sequence[LinearState | VectorState]) -> Iterator[None]:
    """What one rank adds to the gradients inside, all add."""
    if ranks.world == 1:
        yield
        return
    before = [part.ratio.grad for part in parts]
    for part in parts:
        part.ratio.grad = None
        if isinstance(part, LinearState) and part.latent is not None:
            raise ValueError("codes are tuned in one process only")
    yield
    for part, sum_before in zip(parts, before, strict=True):
        own = part.ratio.grad
        told = ranks.spread(None if own is None else own.cpu(), owner)
        part.ratio.grad = sum_before
        if told is not None:
            _add_gradient(part.ratio, told.to(part.ratio.device))


@contextlib.contextmanager
def input_quantization(linears: Iterable[TunedLinear]) -> Iterator[None]:
    """Linears see their inputs as an engine would quantise them; gradients go straight through."""
    handles = []
    for linear in linears:
        if linear.quantize_input is not None:

            def hook(
                _: nn.Module,
                inputs: tuple[torch.Tensor, ...],
                quantize: Callable[[torch.Tensor], torch.Tensor] = linear.quantize_input,
            ) -> tuple[torch.Tensor, ...]:
                x = inputs[0]
                return (x + (quantize(x.detach()) - x.detach()), *inputs[1:])

            handles.append(linear.module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
