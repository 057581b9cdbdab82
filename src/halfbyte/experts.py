"""Experts as Linears of their own, where transformers fuses them into three-dimensional parameters.

A mixture's layer computes, for a token x that its router sends to the experts of a set S with weights p_e,

    y = sum_{e in S} p_e down_e(act(gate_e(x)) * up_e(x))

(Llama 4 weighs x instead). transformers holds all gates and ups in one parameter. To observe, round and write each
expert's Linears, :func:`unfuse` puts an :class:`Experts` in the place of each such module: a list of experts with plain
``nn.Linear`` parts, on the meta device like the rest. The gate's activation is the original module's own.

Weights may be left on meta: ``fetch`` then brings one expert's in for as long as it is needed, so that a layer may be
larger than memory.

Does not cover: experts whose forward takes anything but tokens, indices and weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

LEAVES = ("gate_proj", "up_proj", "down_proj")
Fetch = Callable[["Expert"], contextlib.AbstractContextManager[None]]


class Expert(nn.Module):
    """One expert: ``down(act(gate(x), up(x)))``.

    Attributes:
        gate_proj, up_proj ``[intermediate, hidden]``; down_proj ``[hidden, intermediate]``.
        number: which one of its layer.
    """

    def __init__(self, owner: Experts, number: int, hidden: int, intermediate: int, *, bias: bool, dtype: Any) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": bias, "dtype": dtype, "device": "meta"}
        self.gate_proj = nn.Linear(hidden, intermediate, **options)
        self.up_proj = nn.Linear(hidden, intermediate, **options)
        self.down_proj = nn.Linear(intermediate, hidden, **options)
        self.number = number
        self.__dict__["owner"] = owner  # not a child

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(self.act(self.gate_proj(x), self.up_proj(x)))
        return y

    def act(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What stands between the Linears: ``[tokens, intermediate]`` of both."""
        return self.__dict__["owner"].combine(gate, up)  # type: ignore[no-any-return]


class Experts(nn.ModuleList):
    """A layer's experts.

    Attributes:
        fused: the module in whose place this stands; it has no parameters any more.
        in_features, out_features: the model's width.
        weighs_inputs: whether the router's weights multiply what enters an expert, not what leaves it.
        concatenated, transposed: how the original module holds gate and up (one behind the other, or row by row in
            turns) and matrices (``[out, in]``, or transposed).
        fetch: brings in the weights of an expert that is not in memory.
    """

    def __init__(self, fused: nn.Module, count: int, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.__dict__["fused"] = fused
        self.in_features = self.out_features = hidden
        self.weighs_inputs = not hasattr(fused, "_apply_gate")
        self.concatenated = self.weighs_inputs or bool(fused.is_concatenated)
        self.transposed = self.weighs_inputs or bool(fused.is_transposed)
        self.fetch: Fetch | None = None
        bias = bool(getattr(fused, "has_bias", False))
        for number in range(count):
            self.append(Expert(self, number, hidden, intermediate, bias=bias, dtype=dtype))

    def combine(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The activation, by the original module's code."""
        fused = self.__dict__["fused"]
        if self.weighs_inputs:
            return up * fused.act_fn(gate)  # type: ignore[no-any-return]
        both = torch.cat([gate, up], dim=-1) if self.concatenated else torch.stack([gate, up], dim=-1).flatten(-2)
        return fused._apply_gate(both)  # type: ignore[no-any-return]

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Every token's weighted sum over its experts.

        Args:
            hidden: ``[tokens, hidden]``; index: ``[tokens, k]`` int64, experts; weights: ``[tokens, k]``.
        """
        result = torch.zeros_like(hidden)
        for number in torch.unique(index).tolist():
            if number < len(self):
                with self.present(number) as expert:
                    self.run(expert, expert, hidden, index, weights, result)
        return result

    def run(
        self,
        expert: Expert,
        function: Callable[[torch.Tensor], torch.Tensor],
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        result: torch.Tensor,
    ) -> None:
        """Add one expert's part, computed by ``function``, to the result ``[tokens, hidden]``."""
        rows, place = torch.where(index == expert.number)
        if not len(rows):
            return
        x = self.entering(hidden, weights, rows, place)
        y = function(x)
        if not self.weighs_inputs:
            y = y * weights[rows, place, None]
        result.index_add_(0, rows, y.to(result.dtype))

    def entering(
        self, hidden: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor, place: torch.Tensor
    ) -> torch.Tensor:
        """What an expert is given of the tokens ``rows``."""
        x = hidden[rows]
        return x * weights[rows, place, None].to(x.dtype) if self.weighs_inputs else x

    @contextlib.contextmanager
    def present(self, number: int) -> Iterator[Expert]:
        """An expert with its weights in memory."""
        expert = self[number]
        assert isinstance(expert, Expert)
        if self.fetch is None or not expert.gate_proj.weight.is_meta:
            yield expert
            return
        with self.fetch(expert):
            yield expert


def unfuse(model: nn.Module) -> dict[str, Experts]:
    """Replace every module of fused experts in a model on meta; returns what was put in, by path.

    Fused experts are what has three-dimensional parameters ``gate_up_proj`` and ``down_proj``.
    """
    replaced: dict[str, Experts] = {}
    for path, module in list(model.named_modules()):
        both, down = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
        if both is None or down is None or both.dim() != 3 or down.dim() != 3:
            continue
        llama4 = not hasattr(module, "_apply_gate")
        turned = llama4 or bool(module.is_transposed)
        count = both.shape[0]
        hidden, intermediate = (down.shape[2], down.shape[1]) if turned else (down.shape[1], down.shape[2])
        if getattr(module, "has_post_expert_norm", False):
            continue
        experts = Experts(module, count, hidden, intermediate, both.dtype)
        for name in list(module._parameters):
            del module._parameters[name]
        parent = model.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], experts)
        if llama4:
            parent.forward = _routed_by(parent, experts)
        replaced[path] = experts
    return replaced


def _routed_by(layer: Any, experts: Experts) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Llama 4's layer with each expert given its own tokens, instead of every expert all tokens times zero."""

    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = layer.router(hidden)
        index = logits.topk(layer.top_k, dim=1).indices
        out = layer.shared_expert(hidden)
        out = out + experts(hidden, index, scores.gather(1, index))
        return out, logits

    return forward
