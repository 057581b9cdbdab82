"""How far apart two next-token distributions are."""

from __future__ import annotations

import torch

CACHE_BYTES = 1 << 20
# Beyond such differences of logits exp could overflow, and rounding drowns nothing any more.
LARGE = 50.0


def kl_rows(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(P || Q) of every row, in nats, float64 ``[n]`` on the CPU.

    With ``d = q - p`` and its mean under P taken off, ``KL = log(1 + sum_v P(v) (exp(d_v) - 1 - d_v))``: all terms are
    positive, so that a small divergence does not drown in the rounding of large logits. A few rows at a time, so that
    the passes over them stay in the cache.

    Args:
        p, q: logits ``[n, vocabulary]`` float32.
    """
    rows = max(1, CACHE_BYTES // (4 * p.shape[1]))
    parts = []
    for a, b in zip(torch.split(p, rows), torch.split(q, rows), strict=True):
        probability = torch.softmax(a, dim=-1)
        d = b - a
        d -= torch.einsum("nv,nv->n", probability, d)[:, None]
        if bool((d > LARGE).any()):
            kl = torch.logsumexp(torch.log_softmax(a, dim=-1) + d, dim=-1).double()
        else:
            kl = torch.einsum("nv,nv->n", probability, torch.expm1(d) - d).double().log1p()
        parts.append(kl.cpu())
    return torch.cat(parts)
