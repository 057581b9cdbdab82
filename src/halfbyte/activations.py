"""Inputs of Linears as an engine sees them that quantises activations."""

from __future__ import annotations

from dataclasses import replace

import torch

from halfbyte.schemes import ActivationFormat


def fake_quantize_activations(x: torch.Tensor, fmt: ActivationFormat) -> torch.Tensor:
    """What a Linear sees when an engine quantises its input dynamically, one scale a token or a group of its features.

    ``s = max|x| / q_max`` over the last dimension (or each group in it),
    ``x' = clip(rint(x / s), -q_max - 1, q_max) * s`` for int8 and the float8_e4m3fn rounding of ``x / s`` with
    ``s = max|x| / 448`` for float8. Same shape and dtype as ``x``.
    """
    if fmt.group_size is not None:
        grouped = x.reshape(*x.shape[:-1], -1, fmt.group_size)
        return fake_quantize_activations(grouped, replace(fmt, group_size=None)).reshape(x.shape)
    extreme = x.abs().amax(dim=-1, keepdim=True).to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    if fmt.kind == "float":
        limit = torch.finfo(torch.float8_e4m3fn).max
        scale = extreme / limit
        return (
            (x.to(torch.float32) / scale).clamp(-limit, limit).to(torch.float8_e4m3fn).to(torch.float32) * scale
        ).to(x.dtype)
    q_max = (1 << (fmt.num_bits - 1)) - 1
    scale = extreme / q_max
    return (torch.round(x.to(torch.float32) / scale).clamp(-q_max - 1, q_max) * scale).to(x.dtype)
