"""What rare experts are solved with: against the formula, and against unseen tokens."""

from __future__ import annotations

import pytest
import torch

from halfbyte.methods.gptq import factor_hessians, quantize_gptq_batch
from halfbyte.methods.pooled import add_layer, is_rare, layer_worth, shrinkage
from halfbyte.schemes import WeightFormat

WIDTH = 64


@pytest.mark.parametrize(("layer_tokens", "worth"), [(0, 0), (10, 10), (64, 64), (1000, 64)])
def test_the_layers_tokens_count_as_many_as_the_input_is_wide(layer_tokens: int, worth: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, WIDTH, generator=generator), torch.randn(layer_tokens, WIDTH, generator=generator)
    hessian = x.T @ x
    add_layer(hessian, y.T @ y, layer_tokens)
    mean = y.T @ y / max(1, layer_tokens)
    torch.testing.assert_close(hessian, x.T @ x + worth * mean, rtol=1e-5, atol=1e-5)
    assert shrinkage(WIDTH, 20 + layer_worth(WIDTH, layer_tokens)) == pytest.approx((WIDTH / (20 + worth)) ** 0.5)


def test_who_is_rare() -> None:
    assert is_rare(0, WIDTH)
    assert is_rare(63, WIDTH)
    assert not is_rare(64, WIDTH)
    assert shrinkage(WIDTH, 0) == 0.0


def test_unseen_tokens_gain_where_own_ones_are_few() -> None:
    """Experts that see the layer's inputs, some stronger and some weaker: none of the errors is put in by hand."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / 4 + torch.eye(WIDTH)
    biases = torch.rand(6, 1, WIDTH, generator=generator).add(0.5)
    x = torch.randn(6, 4096, WIDTH, generator=generator) @ mixing * biases
    weights = torch.randn(6, 48, WIDTH, generator=generator)
    layer = x[:, :1024].reshape(-1, WIDTH)
    unseen = x[:, 2048:]
    judges = unseen.mT @ unseen

    def error(hessians: torch.Tensor, shares: list[float]) -> float:
        factors = factor_hessians(hessians, 0.01, where=["w"] * 6, shrinkage=shares)
        found = quantize_gptq_batch(weights, hessians, factors, WeightFormat(num_bits=4), torch.bfloat16)
        errors = torch.stack([linear.dense() for (linear,) in found]) - weights
        return float(((errors @ judges) * errors).sum() / ((weights @ judges) * weights).sum())

    few = WIDTH // 2
    own = x[:, :few].mT @ x[:, :few]
    plain = error(own, [0.0] * 6)
    shrunk = error(own, [shrinkage(WIDTH, few)] * 6)
    for hessian in own:
        add_layer(hessian, layer.T @ layer, len(layer))
    helped = error(own, [shrinkage(WIDTH, few + layer_worth(WIDTH, len(layer)))] * 6)
    assert helped < shrunk < 0.8 * plain
