"""Second moments of Linears that not enough calibration tokens reach.

From n tokens of ``width`` numbers each comes a Hessian ``H_n`` whose weak directions are chance, and GPTQ trusts them
most where n is near half of ``width``: errors on unseen text are then twice those with thousands of tokens, and larger
than with a few tokens (docs/log.md). In a mixture most experts are near: 32,768 tokens, of which each goes to 8 of 128
experts, are 2,048 for one, as many as Qwen3-30B-A3B is wide. Two remedies, both weighed by numbers of tokens:

- **shrinkage**, for all Linears, an expert's or not: ``H + sqrt(width / tokens) diag(H)`` draws correlations towards 0
  the more, the fewer tokens vouch for them. The root is the size of what chance puts there: the correlations of n
  independent tokens are off by about ``2 sqrt(width / n)`` in operator norm (Vershynin 2018, High-Dimensional
  Probability, theorem 4.6.1). Estimators of covariances shrink likewise (Ledoit and Wolf 2004, Journal of Multivariate
  Analysis 88); their target is a multiple of the identity, and their weight is estimated, where ours is fixed.
- **the layer's tokens**, for rare experts: ``H_n + width C``, with C the mean moment of all tokens that enter the
  layer, so that they count as many as ``width`` of its own. For gate and up, C is the same for all experts. For down it
  is the mean moment of what *this* expert's units make of the layer's tokens, many more of them than ``width``. Other
  experts' inputs of down are of no use: their units have nothing to do with this one's.

An own Hessian, a layer's alone, and more damping of the usual kind are worse (benchmarks/rare_experts.py).
"""

from __future__ import annotations

import math

import torch

# With fewer tokens than an input is wide the own Hessian has not even full rank; with more, own tokens and shrinkage do
# as well as with the layer's beside them (docs/log.md, 2026-11-21). Counted in widths.
RARE_WIDTHS = 1.0
# What the layer's tokens count for beside a rare expert's own, in widths.
LAYER_WIDTHS = 1.0


def is_rare(tokens: int, width: int) -> bool:
    """Whether an expert's Linears with inputs of ``width`` need the layer's tokens beside so many of their own."""
    return tokens < RARE_WIDTHS * width


def add_layer(hessian: torch.Tensor, layer: torch.Tensor, layer_tokens: int) -> None:
    """``H_n + width C``, in place; with fewer tokens of the layer than that, ``H_n`` plus their moment.

    Args:
        hessian: ``H_n [in, in]`` float32, or only strips of it, as in :class:`halfbyte.statistics.SecondMoment`.
        layer: ``[in, in]`` float32 of the same kind, the moment of ``layer_tokens`` tokens.
        layer_tokens: how many; with none, nothing is added.
    """
    if layer_tokens:
        hessian.add_(layer, alpha=layer_worth(hessian.shape[0], layer_tokens) / layer_tokens)


def shrinkage(width: int, tokens: int) -> float:
    """What share of its own diagonal a Hessian gets: ``sqrt(width / tokens)``.

    Args:
        width: inputs.
        tokens: that it was gathered from, those of the layer included where :func:`add_layer` has added them.

    Returns:
        the share, for :func:`halfbyte.methods.gptq.factor_hessians`; 0 without any token, where there is no diagonal.
    """
    return math.sqrt(width / tokens) if tokens else 0.0


def layer_worth(width: int, layer_tokens: int) -> int:
    """How many tokens the layer's moment counts for beside an expert's own."""
    return round(min(LAYER_WIDTHS * width, layer_tokens))
