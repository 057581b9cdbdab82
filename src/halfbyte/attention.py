"""Attention in bfloat16 on a CPU, by matrix products instead of torch's own kernel.

    softmax(scale q k^T + mask) v,    mask(i, j) = 0 where j <= i, else -inf

torch's CPU kernel for attention multiplies bfloat16 no faster than float32. Here scores are float32 (the products of
two bfloat16 numbers are exact, see ``arithmetic.bfloat16_products``), the softmax is float32, and its probabilities are
rounded to bfloat16 before they weigh the values, as that kernel does too. Queries go in strips, and a strip looks only
at the keys that it may see: half of the work where all is causal.

What is not plain attention (dropout, position biases, sinks, caches, masks that broadcast) is left to transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halfbyte.arithmetic import bfloat16_products

NAME = "halfbyte"
STRIP = 128
# Arguments of transformers' attention functions that change what is computed.
UNUSUAL = ("position_bias", "cache", "s_aux", "softcap", "sinks")


def use_products(model: nn.Module) -> None:
    """Have a transformers model attend this way wherever it would call torch's kernel."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    configs = [m.config for m in model.modules() if hasattr(m, "config") and hasattr(m.config, "_attn_implementation")]
    if any(config._attn_implementation != "sdpa" for config in configs):
        return
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: ``query [batch, heads, tokens, d]``, keys and values with as many heads or fewer.

    Returns:
        ``[batch, tokens, heads, d_v]``, and no probabilities.
    """
    shape = (query.shape[2], key.shape[2])
    unusual = attention_mask is not None and (attention_mask.dim() != 4 or attention_mask.shape[2:] != shape)
    if dropout or unusual or any(others.get(name) is not None for name in UNUSUAL):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    return attend(query, key, value, attention_mask, scaling, causal=causal).transpose(1, 2).contiguous(), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scaling: float | None = None,
    *,
    causal: bool,
) -> torch.Tensor:
    """Attention of each query to the keys that it may see.

    Args:
        query: ``[batch, heads, tokens, d]``.
        key, value: ``[batch, key heads, keys, d]`` and ``[.., d_v]``; each serves ``heads / key heads`` heads in a row.
        mask: ``[batch or 1, heads or 1, tokens, keys]``: bool, true where a key is seen, or what is added to scores.
        scaling: of scores; ``None`` is ``d ** -0.5``.
        causal: query i sees keys up to i only.

    Returns:
        ``[batch, heads, tokens, d_v]`` in the queries' dtype. A query that may see no key gets the mean of all values.
    """
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    turned = key.transpose(2, 3).float()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    least = torch.finfo(torch.float32).min
    outputs = []
    with bfloat16_products():
        for first in range(0, query.shape[2], STRIP):
            rows = slice(first, min(first + STRIP, query.shape[2]))
            seen = slice(0, rows.stop if causal else key.shape[2])
            scores = torch.matmul(query[:, :, rows].float(), turned[..., seen]) * scale
            if causal:
                width = rows.stop - rows.start
                above = torch.ones(width, width, dtype=torch.bool, device=scores.device).triu(1)
                scores[..., rows].masked_fill_(above, least)
            elif mask is not None and mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask[:, :, rows], least)
            elif mask is not None:
                scores = scores + mask[:, :, rows].float()
            outputs.append(torch.matmul(torch.softmax(scores, -1).to(value.dtype), value[:, :, seen]))
    return torch.cat(outputs, dim=2)
