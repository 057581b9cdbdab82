"""SmoothQuant: the model stays the same but for rounding, and rounding does less harm."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import halfbyte
import tiny
from conftest import Models
from halfbyte.methods.smoothing import STRENGTHS, choose_strength, column_energies, expressible, factors_of, gain_offset
from halfbyte.records import Manifest, PairRecord
from halfbyte.schemes import ActivationFormat, WeightFormat

INT8 = ActivationFormat(num_bits=8, kind="int")
ROWS = WeightFormat(num_bits=8, kind="int", symmetric=True, group_size=None)


class Rms(nn.Module):
    def __init__(self, width: int, offset: float, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight, self.offset = nn.Parameter(torch.randn(width)), offset
        self.bias = nn.Parameter(torch.randn(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.offset + self.weight)
        return y if self.bias is None else y + self.bias


def factors_in(pair: PairRecord) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(pair.factors)), dtype=torch.float32)


def test_factors_are_the_papers() -> None:
    x, w = torch.tensor([4.0, 1.0, 16.0]), torch.tensor([1.0, 4.0, 1.0])
    s = factors_of(x, w, 0.5)
    wished = (x / w).sqrt()
    assert torch.allclose(s, wished / wished.log().mean().exp())
    assert torch.equal(factors_of(x, w, 0.0), torch.ones(3))
    all_of_it = factors_of(x, w, 1.0)
    assert torch.allclose((x / all_of_it) / (x / all_of_it)[0], torch.ones(3))


def test_columns_count_by_what_their_error_does_to_the_output() -> None:
    """White noise on channel j of the input comes out, relative to each Linear's output, with column j's energy."""
    torch.manual_seed(0)
    weights, x = [torch.randn(9, 5), 100 * torch.randn(3, 5)], torch.randn(40, 5)
    energies = column_energies(weights, x)
    for j in range(5):
        noise = torch.zeros_like(x)
        noise[:, j] = 1.0
        share = sum(float((noise @ w.T).double().square().sum() / (x @ w.T).double().square().sum()) for w in weights)
        assert float(energies[j]) * len(x) == pytest.approx(share, rel=1e-5)


def test_half_strength_is_the_least_product_of_energies() -> None:
    """What the docstring says of root mean squares: (sum x^2 / s^2)(sum s^2 w^2) is least for s^2 = x / w."""
    torch.manual_seed(0)
    x, w = torch.rand(30) + 0.01, torch.rand(30) + 0.01

    def product(s: torch.Tensor) -> float:
        return float((x / s).square().sum() * (s * w).square().sum())

    best = factors_of(x, w, 0.5)
    assert product(best) == pytest.approx(float((x * w).sum()) ** 2, rel=1e-5)
    assert all(product(best) < product(factors_of(x, w, a)) for a in STRENGTHS if a != 0.5)
    assert product(best) < product(best * (1 + 0.1 * torch.randn(30)))


def test_channels_that_are_always_zero_stay() -> None:
    s = factors_of(torch.tensor([0.0, 9.0, 1.0, 4.0]), torch.tensor([1.0, 1.0, 0.0, 1.0]), 0.5)
    assert s[0] == s[2] == 1
    assert s[1] * s[3] == pytest.approx(1)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gains_are_told_apart(offset: float) -> None:
    norm = Rms(32, offset)
    before = norm.weight.detach().clone()
    assert gain_offset(norm, 32) == offset
    assert torch.equal(norm.weight, before)


def test_other_norms_are_left_alone() -> None:
    assert gain_offset(Rms(32, 0.5), 32) is None
    assert gain_offset(Rms(32, 0.0, bias=True), 32) is None


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_what_a_norm_gives_up_its_linears_take_over_exactly(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gain = torch.randn(64, generator=generator) * 3
    weight, s = expressible(gain, torch.rand(64, generator=generator) * 4 + 0.1, offset, torch.bfloat16)
    assert torch.equal(weight, weight.bfloat16().float())
    assert (s > 0).all()
    assert torch.allclose((offset + weight) * s, gain, rtol=1e-6)


def test_a_gain_that_would_vanish_stays() -> None:
    gain = torch.tensor([1e-3, 0.0, 2.0])  # with offset 1, 1e-3 / 100 - 1 is -1 in bfloat16
    weight, s = expressible(gain, torch.tensor([100.0, 2.0, 2.0]), 1.0, torch.bfloat16)
    assert s[:2].tolist() == [1, 1]
    assert weight[2] == 0
    assert s[2] == 2


def test_the_best_strength_is_the_least_error() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(64, 32), torch.randn(16, 32)
    x[:, 5] *= 60
    candidates = [factors_of(x.abs().amax(0), w.abs().amax(0), a) for a in STRENGTHS]
    best = choose_strength([w], [ROWS], INT8, torch.float32, x, candidates)

    def error(s: torch.Tensor) -> float:
        xs, ws = x.double() / s, w.double() * s
        tx, tw = xs.abs().amax(1, keepdim=True) / 127, ws.abs().amax(1, keepdim=True) / 127.5
        rounded = (torch.round(xs / tx) * tx) @ (torch.round(ws / tw).clamp(-128, 127) * tw).T
        return float((rounded - x.double() @ w.double().T).square().sum())

    errors = [error(s) for s in candidates]
    assert errors[best] <= min(errors) * 1.03  # the largest weight of a row is a tie, which goes either way
    assert errors[best] < errors[0] / 2
    plain = torch.randn(64, 32)
    assert choose_strength([w], [ROWS], INT8, torch.float32, plain, [torch.ones(32), torch.linspace(0.01, 9, 32)]) == 0


def with_outliers(folder: Path, family: str) -> Path:
    """A model whose norms let two channels through far louder than the rest."""
    source = tiny.build(folder, family)
    tensors = tiny.stored(source)
    for name in tensors:
        if name.endswith(
            ("input_layernorm.weight", "post_attention_layernorm.weight", "pre_feedforward_layernorm.weight")
        ):
            tensors[name][7], tensors[name][40] = 25, -40
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def quantize(source: Path, out: Path, text: Path, **steps: Any) -> Manifest:
    recipe = out.with_name(f"{out.name}.json")
    recipe.write_text(json.dumps({"scheme": "W8A8", "gptq": steps}))
    return halfbyte.quantize(
        source, out, recipe=recipe, calibration=f"text:{text}", samples=6, seq_len=40, device="cpu"
    )


@pytest.mark.parametrize(("family", "offset"), [("llama", 0.0), ("qwen3", 0.0), ("gemma3", 1.0)])
def test_outliers_move_into_the_weights(family: str, offset: float, text_file: Path, tmp_path: Path) -> None:
    source = with_outliers(tmp_path / "source", family)
    manifest = quantize(source, tmp_path / "smooth", text_file)
    plain = quantize(source, tmp_path / "plain", text_file, smoothing=False)
    assert plain.smoothing == []
    assert {r.offset for r in manifest.smoothing} == {offset}
    assert len(manifest.smoothing) == 4  # two norms in each of two blocks
    before, after, dense = tiny.stored(source), tiny.stored(tmp_path / "smooth"), tiny.decoded(tmp_path / "smooth")
    for pair in manifest.pairs:  # v and up have norms before them and may have given factors to o and down
        dense[f"{pair.source}.weight"] *= factors_in(pair)[:, None]
    for record in manifest.smoothing:
        s = (offset + before[record.norm].float()) / (offset + after[record.norm].float())
        assert s.max() / s.min() > 2
        for name in record.linears:
            wanted = before[f"{name}.weight"].float() * s
            assert (dense[f"{name}.weight"] - wanted).norm() / wanted.norm() < 0.05
    checked = halfbyte.verify(tmp_path / "smooth", source=source)
    assert checked.passed, [c for c in checked.checks if c.status == "failed"]
    (copies,) = [c for c in checked.checks if c.name == "copies"]
    assert copies.detail.endswith("4 smoothed norms are not")
    kl = [
        halfbyte.compare(source, tmp_path / name, text=text_file, tokens=200, window=40).metrics["kl_mean"]
        for name in ("smooth", "plain")
    ]
    assert kl[0] < kl[1]


def test_w4a8_is_smoothed_where_rounding_in_groups_gains_by_it(text_file: Path, tmp_path: Path) -> None:
    source = with_outliers(tmp_path / "source", "llama")
    runs = {}
    for name, smoothing in (("smooth", True), ("plain", False)):
        recipe = tmp_path / f"{name}.json"
        recipe.write_text(json.dumps({"scheme": "W4A8", "group_size": 32, "gptq": {"smoothing": smoothing}}))
        settings: dict[str, Any] = {"calibration": f"text:{text_file}", "samples": 6, "seq_len": 40, "device": "cpu"}
        manifest = halfbyte.quantize(source, tmp_path / name, recipe=recipe, **settings)
        assert bool(manifest.smoothing) is smoothing
        assert halfbyte.verify(tmp_path / name, source=source).passed
        runs[name] = halfbyte.compare(source, tmp_path / name, text=text_file, tokens=200, window=40).metrics["kl_mean"]
    assert runs["smooth"] < runs["plain"]


def test_a_norm_changed_behind_the_manifests_back_is_found(text_file: Path, tmp_path: Path) -> None:
    source = with_outliers(tmp_path / "source", "llama")
    manifest = quantize(source, tmp_path / "out", text_file)
    file = tmp_path / "out" / "model.safetensors"
    tensors = tiny.stored(tmp_path / "out")
    tensors[manifest.smoothing[0].norm][0] *= -1
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    checked = halfbyte.verify(tmp_path / "out", source=source, reload=False)
    (copies,) = [c for c in checked.checks if c.name == "copies"]
    assert sorted(p.split(" ")[0] for p in copies.problems) == sorted([manifest.smoothing[0].norm, "model.norm.weight"])


def test_only_what_is_rounded_is_smoothed(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    source = with_outliers(tmp_path / "source", "llama")
    manifest = halfbyte.quantize(
        source, tmp_path / "out", scheme="W8A16", group_size=64, calibration=f"text:{text_file}", samples=4, seq_len=40
    )
    assert manifest.smoothing == []
