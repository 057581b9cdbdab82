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
KINDS = ["causal", "none", "bool", "bool of each head", "added", "added of each head"]


def tensors(tokens: int, heads: int, kv: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, tokens, 32, generator=g).bfloat16() for h in (heads, kv, kv))
    return q, k, v


def mask_of(kind: str, batch: int, heads: int, tokens: int, keys: int) -> torch.Tensor | None:
    """Of a kind in :data:`KINDS`; every query sees a key."""
    if kind in ("causal", "none"):
        return None
    shape = (1 if kind == "added" else batch, heads if kind.endswith("head") else 1, tokens, keys)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return (values > 0) | torch.eye(tokens, keys, dtype=torch.bool) if kind.startswith("bool") else values.bfloat16()


def exactly(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None = None,
    *,
    causal: bool,
) -> torch.Tensor:
    """torch's own, in float64."""
    share = q.shape[1] // k.shape[1]
    return scaled_dot_product_attention(
        q.double(),
        k.double().repeat_interleave(share, 1),
        v.double().repeat_interleave(share, 1),
        attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.double(),
        is_causal=causal,
        scale=scale,
    )


@pytest.mark.parametrize("tokens", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_attention(kind: str, tokens: int) -> None:
    q, k, v = tensors(tokens, 4, 2)
    mask = mask_of(kind, 2, 4, tokens, tokens)
    found = attend(q, k, v, mask, 0.3, causal=kind == "causal")
    learnt = attend(q.clone().requires_grad_(True), k, v, mask, 0.3, causal=kind == "causal")
    assert torch.equal(found, learnt.detach()), "the same whether or not there is a way back"
    exact = exactly(q, k, v, mask, 0.3, causal=kind == "causal")
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    assert float((found - exact).abs().max()) < 0.02
    assert float((found - exact).abs().mean()) < 0.002


LEARNERS = [(kind, who) for kind in KINDS for who in ("query", "key", "value", "query, key, value")]
LEARNERS += [(kind, "mask") for kind in KINDS if kind.startswith("added")]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize(("kind", "who"), LEARNERS)
def test_its_gradient_is_that_of_attention(kind: str, share: int, batch: int, who: str) -> None:
    """Whoever learns alone, values of another width than keys, and more keys than queries (in two strips)."""
    heads, tokens, keys, width, value_width = 4, 150, 170, 32, 24
    g = torch.Generator().manual_seed(5)
    shapes = {"query": (heads, tokens, width), "key": (heads // share, keys, width)}
    shapes |= {"value": (heads // share, keys, value_width)}
    given = {name: torch.randn(batch, *shape, generator=g).bfloat16() for name, shape in shapes.items()}
    mask = mask_of(kind, batch, heads, tokens, keys)
    if mask is not None:
        given["mask"] = mask
    weights = torch.randn(tokens, value_width, generator=g, dtype=torch.float64)
    learners = who.split(", ")
    found = []
    for attention in (attend, exactly):
        own = {name: t.clone().requires_grad_(name in learners) for name, t in given.items()}
        out = attention(own["query"], own["key"], own["value"], own.get("mask"), causal=kind == "causal")
        (out.double() * weights).sum().backward()
        assert all(t.grad is None for name, t in own.items() if name not in learners)
        found.append([own[name].grad.double() for name in learners])  # type: ignore[union-attr]
    for grad, exact in zip(*found, strict=True):
        assert float((grad - exact).norm() / exact.norm()) < 0.01


def test_a_query_that_sees_nothing_stays_finite() -> None:
    q, k, v = tensors(5, 2, 2)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 2, :] = False
    assert bool(torch.isfinite(attend(q, k, v, mask, causal=False)).all())


@pytest.mark.parametrize(
    ("unusual", "dtype"),
    [
        ({"dropout": 0.5}, torch.bfloat16),
        ({"position_bias": torch.ones(1, 4, 6, 6).bfloat16()}, torch.bfloat16),
        ({"attention_mask": torch.ones(1, 1, 1, 6)}, torch.bfloat16),
        ({}, torch.float32),
        ({}, torch.float16),
    ],
)
def test_what_is_unusual_is_left_to_transformers(
    unusual: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.integrations.sdpa_attention as theirs

    called = []
    monkeypatch.setattr(theirs, "sdpa_attention_forward", lambda *a, **k: called.append(1) or (a[1], None))
    given = [t.to(dtype) for t in tensors(6, 4, 4)]
    attention_forward(torch.nn.Module(), *given, **({"attention_mask": None} | unusual))
    assert called == [1]


def test_nothing_usual_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.sdpa_attention as theirs

    monkeypatch.setattr(theirs, "sdpa_attention_forward", None)
    q, k, v = tensors(6, 4, 2)
    found, _ = attention_forward(torch.nn.Module(), q, k, v, None)
    assert torch.equal(found, attend(q, k, v, causal=True).transpose(1, 2))


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
