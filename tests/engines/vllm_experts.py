"""int8 experts for vLLM on CPUs without AMX, computed by torch.

vLLM 0.32 has one kernel for W8A8 experts on x86, and it needs AMX. Everything else of a mixture of experts runs here:
config, loader, router, attention, shared experts. So that the tests can tell whether the loader found every expert's
codes and scales, :func:`install` puts plain matrix products in the place of that one kernel. With AMX it does nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear, silu
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows of ``x`` as int8 with a scale each, and back: ``s round(x / s)``, ``s = absmax / 127``."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 127
    return (x / scale).round() * scale


def apply(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *args: Any,
    apply_router_weight_on_input: bool,
    **kwargs: Any,
) -> None:
    """``sum_e p_e down_e(silu(gate_e x) up_e x)``; ``w1`` [experts, gate rows and then up rows, hidden]."""
    gates_and_ups, downs = w1.float() * self.w1_scale, w2.float() * self.w2_scale
    x = rounded(hidden_states.float())
    total = torch.zeros_like(x)
    for expert in topk_ids.unique().tolist():
        rows, slot = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = linear(x[rows], gates_and_ups[expert]).chunk(2, -1)
        made = linear(rounded(silu(gate) * up), downs[expert])
        if not apply_router_weight_on_input:  # Llama 4 has weighed the inputs already
            made = made * topk_weights[rows, slot, None].float()
        total.index_add_(0, rows, made)
    output.copy_(total)


def install() -> None:
    if torch.cpu._is_amx_tile_supported():
        return
    CPUExpertsInt8._supports_current_device = staticmethod(lambda: True)
    CPUExpertsInt8._supports_routing_method = staticmethod(lambda *args: True)
    CPUExpertsInt8.process_weights_after_loading = lambda self, layer: None
    CPUExpertsInt8.apply = apply
