"""Attention in bfloat16 on a CPU, by matrix products instead of torch's own kernel.

    softmax(scale q k^T + mask) v,    mask(i, j) = 0 where j <= i, else -inf

torch's CPU kernel for attention multiplies bfloat16 no faster than float32. Here scores are float32 (the products of
two bfloat16 numbers are exact, see ``arithmetic.bfloat16_products``), the softmax is float32, and its probabilities are
rounded to bfloat16 before they weigh the values, as that kernel does too. Queries go in strips, and a strip looks only
at the keys that it may see: half of the work where all is causal. Heads that share keys are one product.

What is not plain attention in bfloat16 (dropout, position biases, sinks, caches, masks that broadcast, other dtypes) is
left to transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    rounded = any(x.dtype != torch.bfloat16 for x in (query, key, value))  # would be, by products of bfloat16
    if dropout or unusual or rounded or any(others.get(name) is not None for name in UNUSUAL):
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
    batch, heads, tokens, width = query.shape
    key_heads, keys = key.shape[1:3]
    share = heads // key_heads
    grouped = query.reshape(batch * key_heads, share, tokens, width)
    turned = key.reshape(batch * key_heads, keys, width).float().transpose(1, 2)
    value = value.reshape(batch * key_heads, keys, -1)
    scale = width**-0.5 if scaling is None else scaling
    above = torch.ones(STRIP, STRIP, dtype=torch.bool, device=query.device).triu(1)
    learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, mask))
    rooms = None if learning else _Rooms.of(batch * heads * min(STRIP, tokens) * keys, value)
    outputs = []
    with bfloat16_products():
        for first in range(0, tokens, STRIP):
            rows = slice(first, min(first + STRIP, tokens))
            count, seen = rows.stop - rows.start, rows.stop if causal else keys
            asked = grouped[:, :, rows].float().reshape(-1, share * count, width)
            scores = _scores(asked, turned[..., :seen], scale, rooms)
            by_head = scores.view(batch, key_heads, share, count, seen)
            if causal:
                by_head[..., rows].masked_fill_(above[:count, :count], torch.finfo(torch.float32).min)
            elif mask is not None:
                shared = share if mask.shape[1] > 1 else 1
                by_group = mask[:, :, rows].reshape(mask.shape[0], -1, shared, count, keys)
                if mask.dtype == torch.bool:
                    by_head.masked_fill_(~by_group, torch.finfo(torch.float32).min)
                else:
                    by_head.add_(by_group.float())
            answers = torch.bmm(_probabilities(scores, value.dtype, rooms), value[:, :seen])
            outputs.append(answers.view(batch, heads, count, -1))
    return torch.cat(outputs, dim=2)


@dataclass(frozen=True, slots=True)
class _Rooms:
    """What a strip's scores and probabilities are written to where nothing is kept for the way back: the same memory
    for all strips. Fresh memory is cleared page by page, which takes as long as the arithmetic."""

    scores: torch.Tensor
    probabilities: torch.Tensor
    rounded: torch.Tensor

    @staticmethod
    def of(size: int, value: torch.Tensor) -> _Rooms:
        scores = value.new_empty(size, dtype=torch.float32)
        return _Rooms(scores, torch.empty_like(scores), value.new_empty(size))


def _scores(query: torch.Tensor, turned: torch.Tensor, scale: float, rooms: _Rooms | None) -> torch.Tensor:
    """``scale query turned``, ``[batch, queries, keys]`` float32."""
    nothing, shape = query.new_empty(()), (query.shape[0], query.shape[1], turned.shape[2])
    out = None if rooms is None else rooms.scores[: math.prod(shape)].view(shape)
    scores: torch.Tensor = torch.baddbmm(nothing, query, turned, beta=0, alpha=scale, out=out)
    return scores


def _probabilities(scores: torch.Tensor, dtype: torch.dtype, rooms: _Rooms | None) -> torch.Tensor:
    if rooms is None:
        return torch.softmax(scores, -1).to(dtype)
    torch.softmax(scores, -1, out=rooms.probabilities[: scores.numel()].view_as(scores))
    return rooms.rounded[: scores.numel()].copy_(rooms.probabilities[: scores.numel()]).view_as(scores)
