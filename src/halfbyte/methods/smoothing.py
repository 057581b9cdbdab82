"""SmoothQuant (Xiao et al., arXiv 2211.10438): outliers of an input are moved into the weights before rounding both.

A norm's gain and the Linears behind it can trade a factor for each channel without changing the model:

    (x / s) (W diag(s))^T = x W^T,    s_j = |x_j|^a / |W_j|^(1-a)

Rounding x (one scale a token) and W (one a row) both profit where s evens them out. An earlier Linear, quantised
already, can take the norm's place where x is linear in its output, channel by channel (up and v, see ``pairs``): its
scales are divided by s and its codes stay. Where we differ from the paper:

- it smooths behind norms only;
- it takes maxima for |x_j| and |W_j|. A token's scale follows the largest ``|x_j / s_j|``, but the error of rounding x
  goes through every row, as ``s_j^2 sum_i W_ij^2``; that of rounding W likewise, the other way round. Were maxima
  proportional to root mean squares, the output's error would be ``c (sum_j E x_j^2 / s_j^2)(sum_j s_j^2 |W_j|^2)``,
  which is least for ``s_j^2 = rms x_j / |W_j|``: root mean squares and a = 0.5. So |W_j| is the norm of a column, and
  |x_j| the fourth root of the mean fourth power, which hears of rare outliers (docs/log.md has the numbers);
- the strength a is not given but tried, for each norm or Linear: the one whose rounded product is nearest to the exact
  one on a sample of calibration tokens, with 0 (no smoothing at all) among the candidates;
- s is what the stored dtype can express: the new gain (or scale) is rounded first, and the Linears get the exact
  quotient of the old one and the new one. Only their rounding is left as an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from halfbyte.activations import fake_quantize_activations
from halfbyte.methods.rtn import quantize_rtn
from halfbyte.schemes import ActivationFormat, WeightFormat

STRENGTHS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7)
SMALLEST = 1e-5


def gain_offset(norm: nn.Module, width: int) -> float | None:
    """Which gain a norm applies: 0 for ``weight``, 1 for ``1 + weight`` (Gemma); ``None`` for any other, or a bias.

    Found by trying it on a row of numbers with weights of zero, of one, and its own.
    """
    weight = norm._parameters["weight"]
    if weight is None or norm._parameters.get("bias") is not None:
        return None
    x = torch.linspace(-1.0, 2.0, width, device=weight.device).to(weight.dtype)[None]
    own = weight.data
    outputs = []
    try:
        for tried in (torch.zeros_like(own), torch.ones_like(own), own):
            weight.data = tried
            with torch.no_grad():
                outputs.append(norm(x).float())
    finally:
        weight.data = own
    at_zero, at_one, at_own = outputs
    unit = at_one - at_zero
    for offset in (0.0, 1.0):
        expected = (at_zero, offset * unit), (at_own, (offset + own.float()) * unit)
        if all(torch.allclose(a, b, rtol=1e-2, atol=1e-5) for a, b in expected):
            return offset
    return None


def column_energies(weights: Sequence[torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
    """``|W_j|^2 [in]`` float32, summed over Linears, each relative to its output's energy on the sample.

    Args:
        weights: ``[out, in]`` float32 each, all with the same input.
        sample: inputs ``[tokens, in]`` float32.
    """
    return torch.stack([w.square().sum(0) / _energy(sample @ w.T) for w in weights]).sum(0)


def _energy(output: torch.Tensor) -> float:
    return float(output.square().sum(dtype=torch.float64)) or 1.0


def factors_of(inputs: torch.Tensor, weights: torch.Tensor, strength: float) -> torch.Tensor:
    """``s [in]`` for one strength, with geometric mean 1; 1 where a channel or its weights are always zero.

    Args:
        inputs: how large ``x_j`` is ``[in]``.
        weights: how large column j is in all Linears together ``[in]``.
        strength: 0 to 1; 0 means no smoothing.
    """
    if strength == 0:
        return torch.ones_like(inputs, dtype=torch.float32)
    alive = (inputs > 0) & (weights > 0)
    x, w = inputs.double(), weights.double()
    x, w = x / x.max().clamp(min=1e-300), w / w.max().clamp(min=1e-300)
    x, w = x.clamp(min=SMALLEST), w.clamp(min=SMALLEST)
    logarithm = torch.where(alive, strength * x.log() - (1 - strength) * w.log(), 0.0)
    if bool(alive.any()):
        logarithm[alive] -= logarithm[alive].mean()
    return logarithm.exp().float()


def expressible(
    gain: torch.Tensor, factors: torch.Tensor, offset: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest factors that a norm stored in ``dtype`` can express.

    Args:
        gain: ``g = offset + weight [in]`` float32.
        factors: what is wished for.
        offset: 1 where the norm multiplies by ``1 + weight`` (Gemma), else 0.

    Returns:
        the new stored weight, in float32, and the factors ``g / g'``; where g' would vanish or change its sign, the
        weight stays and the factor is 1.
    """
    weight = (gain / factors - offset).to(dtype).float()
    new = weight + offset
    sound = torch.isfinite(new) & (new * gain > 0)
    weight = torch.where(sound, weight, (gain - offset).to(dtype).float())
    return weight, torch.where(sound, gain / torch.where(sound, new, 1.0), 1.0)


def nearest_powers(values: torch.Tensor) -> torch.Tensor:
    """The nearest power of two by ratio, exactly; for positive float32 values in the normal range."""
    mantissa, _ = torch.frexp(values)  # 0.5 to 1
    above = values / mantissa
    return torch.where(mantissa < 0.5**0.5, above / 2, above)


def divided_scales(
    scales: torch.Tensor, factors: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest factors by which a quantised Linear's output channels can be divided, codes staying as they are.

    Args:
        scales: ``[out, groups]``, in the dtype that is stored.
        factors: what is wished for ``[out]`` float32, positive.
        bias: the Linear's ``[out]``, in the dtype that is stored, where it has one.

    Returns:
        the new scales, in the same dtype, and the factors ``s / s'`` float32. Rows with several scales, and Linears
        with a bias, are divided by powers of two, of which all quotients are exact. Where a scale would leave the
        dtype's normal range, or a bias could not be divided exactly, the row stays and the factor is 1.
    """
    old = scales.float()
    powers = scales.shape[1] > 1 or bias is not None
    wished = nearest_powers(factors) if powers else factors
    new = (old / wished[:, None]).to(scales.dtype).float()
    limits = torch.finfo(scales.dtype)
    sound = ((new >= limits.tiny) & (new <= limits.max)).all(dim=1)
    if powers:
        sound &= (new * wished[:, None] == old).all(dim=1)
    if bias is not None:
        sound &= (bias.float() / wished).to(bias.dtype).float() * wished == bias.float()
    quotients = wished if powers else old[:, 0] / new[:, 0]
    return torch.where(sound[:, None], new, old).to(scales.dtype), torch.where(sound, quotients, 1.0)


def choose_strength(
    weights: Sequence[torch.Tensor],
    formats: Sequence[WeightFormat],
    activations: ActivationFormat,
    scale_dtype: torch.dtype,
    sample: torch.Tensor,
    candidates: Sequence[torch.Tensor],
) -> int:
    """Which of several factor vectors gives the least output error of rounded inputs and weights.

    The error is ``sum_W |Q(x/s) Q(W s)^T - x W^T|^2 / |x W^T|^2`` with weights rounded to nearest.

    Args:
        weights: ``[out, in]`` float32 each, all with the same input; formats: theirs.
        activations: how an engine rounds the input.
        scale_dtype: of weight scales.
        sample: inputs ``[tokens, in]`` float32.
        candidates: factors ``[in]`` each.

    Returns:
        the index of the best candidate; the first where none is better than it.
    """
    targets = [sample @ w.T for w in weights]
    energies = [_energy(t) for t in targets]
    errors = []
    for s in candidates:
        x = fake_quantize_activations(sample / s, activations)
        error = 0.0
        for w, fmt, target, energy in zip(weights, formats, targets, energies, strict=True):
            rounded = quantize_rtn(w * s, fmt, scale_dtype).dense()
            error += float((x @ rounded.T - target).square().sum(dtype=torch.float64)) / energy
        errors.append(error)
    return min(range(len(errors)), key=errors.__getitem__)
