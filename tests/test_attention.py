"""Attention by products against torch's own kernel, and where it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from conftest import Models
from halfbyte.attention import NAME, attend, attention_forward
from halfbyte.blocks import StreamedModel
from halfbyte.checkpoint.source import open_checkpoint
from halfbyte.weights import Weights

CPU = torch.device("cpu")


def tensors(tokens: int, heads: int, kv: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, tokens, 32, generator=g).bfloat16() for h in (heads, kv, kv))
    return q, k, v


@pytest.mark.parametrize("tokens", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("kind", ["causal", "none", "bool", "added", "of each head"])
def test_it_is_attention(kind: str, tokens: int) -> None:
    q, k, v = tensors(tokens, 4, 2)
    mask: torch.Tensor | None = None
    if kind == "bool":
        mask = torch.rand(2, 1, tokens, tokens, generator=torch.Generator().manual_seed(3)) < 0.5
        mask |= torch.eye(tokens, dtype=torch.bool)
    if kind == "added":
        mask = torch.randn(1, 1, tokens, tokens, generator=torch.Generator().manual_seed(3)).bfloat16()
    if kind == "of each head":
        mask = torch.randn(2, 4, tokens, tokens, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = attend(q, k, v, mask, 0.3, causal=kind == "causal")
    learnt = attend(q.clone().requires_grad_(True), k, v, mask, 0.3, causal=kind == "causal")
    assert torch.equal(found, learnt.detach()), "the same whether or not there is a way back"
    exact = scaled_dot_product_attention(
        q.double(),
        k.double().repeat_interleave(2, 1),
        v.double().repeat_interleave(2, 1),
        attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.double(),
        is_causal=kind == "causal",
        scale=0.3,
    )
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    assert float((found - exact).abs().max()) < 0.02
    assert float((found - exact).abs().mean()) < 0.002


def test_its_gradient_is_that_of_attention() -> None:
    grads = []
    for own in (True, False):
        q, k, v = (t.requires_grad_(True) for t in tensors(150, 4, 2))
        if own:
            out = attend(q, k, v, causal=True)
        else:
            out = scaled_dot_product_attention(
                q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1), is_causal=True
            )
        (out.double() * torch.linspace(-1, 1, 32)).sum().backward()
        grads.append([t.grad.double() for t in (q, k, v)])  # type: ignore[union-attr]
    for own_grad, exact in zip(*grads, strict=True):
        assert float((own_grad - exact).norm() / exact.norm()) < 0.01


def test_a_query_that_sees_nothing_stays_finite() -> None:
    q, k, v = tensors(5, 2, 2)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 2, :] = False
    assert bool(torch.isfinite(attend(q, k, v, mask, causal=False)).all())


@pytest.mark.parametrize(
    "unusual",
    [
        {"dropout": 0.5},
        {"position_bias": torch.ones(1, 4, 6, 6).bfloat16()},
        {"attention_mask": torch.ones(1, 1, 1, 6)},
    ],
)
def test_what_is_unusual_is_left_to_transformers(unusual: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.sdpa_attention as theirs

    called = []
    monkeypatch.setattr(theirs, "sdpa_attention_forward", lambda *a, **k: called.append(1) or (a[1], None))
    attention_forward(torch.nn.Module(), *tensors(6, 4, 4), **({"attention_mask": None} | unusual))
    assert called == [1]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral", "qwen2", "qwen3"])
def test_bfloat16_blocks_attend_so(family: str, tiny_model: Models) -> None:
    """Hidden states behind each block are near those of float32, and the module really calls it."""
    found = {}
    ids = torch.arange(3, 63).reshape(2, 30)
    for dtype in (torch.float32, torch.bfloat16):
        model = StreamedModel.of(Weights.of(open_checkpoint(tiny_model(family), family)), CPU, dtype)
        assert (model.model.config._attn_implementation == NAME) == (dtype == torch.bfloat16)  # type: ignore[union-attr]
        found[dtype] = [h.float() for h in states(model, ids)]
    for exact, own in zip(found[torch.float32], found[torch.bfloat16], strict=True):
        assert float((own - exact).norm() / exact.norm()) < 0.03


def states(model: StreamedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    from halfbyte.blocks import Interner, run_block

    with torch.no_grad(), model.embeddings(torch.unique(ids)):
        hidden, calls = model.embed(ids, Interner())
    if getattr(model.model.config, "sliding_window", None) is None:
        assert all(c.kwargs.get("attention_mask") is None for c in calls), "a mask that only says causal is left out"
    found = []
    for i in range(model.num_blocks):
        with torch.no_grad(), model.block(i) as block:
            hidden = run_block(block, hidden, calls[i])
        found.append(hidden)
    return found
