"""Second moments of experts that not enough calibration tokens reach.

From n tokens of ``width`` numbers each comes a Hessian ``H_n`` whose small directions are chance. Where n is near
``width`` GPTQ leans on them most: errors on unseen text are then up to three times those with thousands of tokens, and
larger than with a few tokens (docs/log.md). In a mixture most experts are there: 32,768 tokens, of which each goes to 8
of 128 experts, are 2,048 for one, as many as Qwen3-30B-A3B is wide. Two remedies, both weighed as so and so many tokens:

- **the layer's tokens** (:func:`add_layer`): ``H_n + width C``, with C the mean moment of all tokens that enter the
  layer. For gate and up, C is the same for all experts and costs nothing. For down it is the mean moment of what *this*
  expert's units make of (some of) the layer's tokens. Other experts' inputs of down are of no use: their units have
  nothing to do with this one's.
- **shrinkage** (:func:`shrinkage`): ``H + (width / tokens) diag(H)``, which draws correlations towards 0 the more, the
  fewer tokens vouch for them. So do estimators of covariances (Ledoit and Wolf 2004, Journal of Multivariate Analysis
  88), whose target is a multiple of the identity and whose weight is estimated; ours is fixed.

An own Hessian, a layer's in its place, and more damping of the usual kind are all worse (benchmarks/rare_experts.py).
"""

from __future__ import annotations

import torch

# Of an expert's width: with fewer tokens than that, down too is worth the layer's tokens, which it costs time to send
# through the expert. With more, its own and shrinkage do as well.
RARE_WIDTHS = 1.0


def layer_tokens_worth(width: int, layer_tokens: int) -> int:
    """How many tokens the layer's moment counts for beside an expert's own: ``width``, or as many as there are."""
    return min(width, layer_tokens)


def add_layer(hessian: torch.Tensor, layer: torch.Tensor, layer_tokens: int) -> None:
    """``H_n + width C``, in place.

    Args:
        hessian: ``H_n [in, in]`` float32, or only strips of it, as in :class:`halfbyte.statistics.SecondMoment`.
        layer: ``[in, in]`` float32 of the same kind, the moment of ``layer_tokens`` tokens.
        layer_tokens: how many; with none, nothing is added.
    """
    if layer_tokens:
        hessian.add_(layer, alpha=layer_tokens_worth(hessian.shape[0], layer_tokens) / layer_tokens)


def shrinkage(width: int, tokens: int, layer_tokens: int = 0) -> float:
    """What share of its own diagonal a Hessian gets: ``width / tokens``.

    Args:
        width: inputs.
        tokens: the expert's own.
        layer_tokens: those of the layer that were added by :func:`add_layer`.

    Returns:
        0 without any token, for there is nothing then to shrink.
    """
    standing = tokens + layer_tokens_worth(width, layer_tokens)
    return width / standing if standing else 0.0


def is_rare(tokens: int, width: int) -> bool:
    """Whether an expert with so many own tokens, and Linears whose narrowest input has ``width`` numbers, needs the
    layer's for down."""
    return tokens < RARE_WIDTHS * width
