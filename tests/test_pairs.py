"""Linears that trade factors: which ones is found right, the model stays the same, and rounding does less harm."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import halfbyte
import halfbyte.pipeline
import tiny
from conftest import Models
from halfbyte.blocks import Interner, StreamedModel, run_block
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.methods.rtn import quantize_rtn
from halfbyte.methods.smoothing import divided_scales, nearest_powers
from halfbyte.pairs import Pair, find_pairs
from halfbyte.ranks import Ranks
from halfbyte.records import LinearRecord, Manifest, numbers_of, ranges_of, read_record, write_json
from halfbyte.schemes import PRESETS, WeightFormat
from halfbyte.sequential import Outliers, Sequential, Shelf, learn_route
from halfbyte.smoother import Smoother, Solved
from halfbyte.statistics import SecondMoment
from halfbyte.weights import Weights
from interrupted import finish, finish_ranks, start, start_ranks
from test_resume import KILLED, contents, stage_of
from test_sequential import CPU, Gated, Parallel, Plain, linears_of, looks
from test_smoothing import factors_in

GROUPS_OF_8 = WeightFormat(num_bits=4, group_size=8)
Activation = Callable[[torch.Tensor], torch.Tensor]


# Who trades with whom


def found_in(block: nn.Module, x: torch.Tensor) -> dict[int, Pair]:
    linears = linears_of(block)
    with torch.no_grad():
        route = learn_route(block, linears, lambda: block(x))
        assert route is not None
        return find_pairs(linears, route.stages, lambda: block(x))


class Attention(nn.Module):
    """Four query heads of 6 channels on two of keys and values, then a gated MLP of 37 channels; fused where asked."""

    HEADS, KV, DIM, WIDTH, INNER = 4, 2, 6, 16, 37

    def __init__(
        self, *, fused: bool = False, act: Callable[[torch.Tensor], torch.Tensor] = nn.functional.silu
    ) -> None:
        super().__init__()
        q, kv, self.fused, self.act = self.HEADS * self.DIM, self.KV * self.DIM, fused, act
        self.norm, self.norm2 = nn.RMSNorm(self.WIDTH), nn.RMSNorm(self.WIDTH)
        if fused:
            self.qkv, self.gate_up = nn.Linear(self.WIDTH, q + 2 * kv), nn.Linear(self.WIDTH, 2 * self.INNER)
        else:
            self.q, self.k, self.v = nn.Linear(self.WIDTH, q), nn.Linear(self.WIDTH, kv), nn.Linear(self.WIDTH, kv)
            self.gate, self.up = nn.Linear(self.WIDTH, self.INNER), nn.Linear(self.WIDTH, self.INNER)
        self.o, self.down = nn.Linear(q, self.WIDTH), nn.Linear(self.INNER, self.WIDTH)

    def values(self, v: torch.Tensor) -> torch.Tensor:
        return v

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return nn.functional.silu(gate) * up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        y, kv = self.norm(x), self.KV * self.DIM
        q, k, v = (
            self.qkv(y).split([x.shape[-1] * 3 // 2, kv, kv], -1) if self.fused else (self.q(y), self.k(y), self.v(y))
        )
        heads = [z.view(batch, tokens, -1, self.DIM).transpose(1, 2) for z in (q, k, self.values(v))]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        y = self.down(self.inner(self.norm2(x)))
        return x + y


VALUES = (*range(6), *range(6), *range(6, 12), *range(6, 12))  # two heads of queries to one of values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_up_and_v_are_found_for_down_and_o(fused: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pairs = found_in(Attention(fused=fused).to(dtype), 3 * torch.randn(2, 20, 16).to(dtype))
    assert pairs == {
        1: Pair("qkv" if fused else "v", tuple(c + 36 * fused for c in VALUES)),
        3: Pair("gate_up" if fused else "up", tuple(c + 37 * fused for c in range(37))),
    }


class NormedValues(Attention):
    def values(self, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(v, (v.shape[-1],))


class ClippedValues(Attention):
    """As OLMo and DBRX have it: linear, but only where nothing is large."""

    def values(self, v: torch.Tensor) -> torch.Tensor:
        return v.clamp(-300, 300)


class ReadTwice(Attention):
    def inner(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        return torch.sigmoid(self.gate(x)) * up + 1e-3 * up.mean(-1, keepdim=True)


class Shifted(Attention):
    """Llama 4's experts and gpt-oss: ``(up + 1) glu``."""

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.gate(x)) * (self.up(x) + 1)


class IntoTheResult(Attention):
    """The result has more of up, from the first channel or from all."""

    READ = slice(None)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        self.leak = self.up(x)
        return torch.sigmoid(self.gate(x)) * self.leak

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1e-3 * self.leak[..., self.READ].mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "stages"),
    [(NormedValues, {3}), (ClippedValues, {3}), (ReadTwice, {1}), (Shifted, {1}), (IntoTheResult, {1})],
)
def test_what_is_not_linear_in_each_channel_alone_is_no_pair(kind: type[Attention], stages: set[int]) -> None:
    torch.manual_seed(0)
    block = kind()
    if kind is ClippedValues:
        block.v.weight.data *= 1000
    assert found_in(block, torch.randn(2, 20, 16)).keys() == stages


def test_channels_that_others_read_are_left_out() -> None:
    class First(IntoTheResult):
        READ = slice(0, 1)

    assert found_in(First(), torch.randn(2, 20, 16))[3] == Pair("up", (-1, *range(1, 37)))


def test_activations_that_are_homogeneous_pass_factors_on() -> None:
    """relu(2 x) is 2 relu(x); its square is not, nor is silu."""

    class Simple(nn.Module):
        def __init__(self, act: Activation) -> None:
            super().__init__()
            self.norm, self.up, self.down, self.act = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6), act

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = x + self.down(self.act(self.up(self.norm(x))))
            return y

    x = torch.randn(2, 5, 6)
    assert found_in(Simple(torch.relu), x) == {1: Pair("up", tuple(range(10)))}
    assert found_in(Simple(lambda u: torch.relu(u) ** 2), x) == {}
    assert found_in(Simple(nn.functional.silu), x) == {}


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_family_has_its_pairs(family: str, tiny_model: Models) -> None:
    folder = tiny_model(family)
    model = StreamedModel.of(Weights.of(open_checkpoint(folder)), CPU)
    ids = tiny.token_ids(folder, 40)
    with model.embeddings(torch.unique(ids)):
        hidden, calls = model.embed(torch.searchsorted(torch.unique(ids), ids), Interner())
    for index in range(2):  # Gemma 3: a sliding layer and a full one
        with model.block(index) as block:
            linears = linears_of(block)
            route = learn_route(block, linears, lambda: run_block(block, hidden, calls[index]))  # noqa: B023
            assert route is not None
            pairs = find_pairs(linears, route.stages, lambda: run_block(block, hidden, calls[index]))  # noqa: B023
            head, inner = linears["self_attn.v_proj"].out_features // 2, linears["mlp.down_proj"].in_features
        halves = [tuple(range(i * head, (i + 1) * head)) for i in (0, 1)]
        shared = linears["self_attn.o_proj"].in_features // head
        values = [c for h in range(shared) for c in halves[h * 2 // shared]]
        assert pairs == {
            1: Pair("self_attn.v_proj", tuple(values)),
            3: Pair("mlp.up_proj", tuple(range(inner))),
        }


def test_phi3_with_its_fused_linears() -> None:
    config = transformers.Phi3Config(
        vocab_size=50, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(config).eval()
    linears, ids = linears_of(model.model.layers[0]), torch.randint(1, 50, (2, 12))
    with torch.no_grad():
        run = lambda: model(ids, use_cache=False).logits  # noqa: E731
        route = learn_route(model, linears, run)
        assert route is not None
        pairs = find_pairs(linears, route.stages, run)
    values = [48 + c for h in range(4) for c in range(8 * (h // 2), 8 * (h // 2) + 8)]
    assert pairs == {
        1: Pair("self_attn.qkv_proj", tuple(values)),
        3: Pair("mlp.gate_up_proj", tuple(range(24, 48))),
    }


# Factors


def test_powers_of_two_are_the_nearest() -> None:
    values = torch.tensor([1.0, 0.9, 1.41, 1.42, 3.0, 2.0**-20, 2.0**30])
    assert nearest_powers(values).tolist() == [1.0, 1.0, 1.0, 2.0, 4.0, 2.0**-20, 2.0**30]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_with_one_scale_gives_the_exact_quotient(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    scales = (torch.rand(200, 1, generator=generator) + 0.1).to(dtype)
    wished = torch.rand(200, generator=generator) * 8 + 0.1
    new, factors = divided_scales(scales, wished)
    assert new.dtype == dtype
    assert torch.allclose(factors, wished, rtol=2.0**-7)
    assert torch.allclose(new.float()[:, 0] * factors, scales.float()[:, 0], rtol=1e-7)
    assert not torch.equal(factors, nearest_powers(factors))


def test_several_scales_or_a_bias_take_powers_of_two() -> None:
    scales = torch.tensor([[0.5, 0.25], [1.0, 3.0]]).bfloat16()
    new, factors = divided_scales(scales, torch.tensor([3.1, 0.3]))
    assert factors.tolist() == [4.0, 0.25]
    assert torch.equal(new.float() * factors[:, None], scales.float())
    bias = torch.tensor([0.7, -1e-38]).bfloat16()  # the second would not survive a division by 4
    new, factors = divided_scales(scales[:, :1], torch.tensor([3.1, 3.1]), bias)
    assert factors.tolist() == [4.0, 1.0]
    assert new.float()[:, 0].tolist() == [0.125, 1.0]


def test_scales_stay_in_the_normal_range() -> None:
    scales = torch.tensor([[2.0**-13], [2.0**-13], [60000.0]]).half()
    new, factors = divided_scales(scales, torch.tensor([2.0, 3.0, 0.5]))
    assert factors.tolist() == [2.0, 1.0, 1.0]
    assert torch.equal(new[1:], scales[1:])
    new, factors = divided_scales(torch.tensor([[2.0**-100, 2.0**100]]).bfloat16(), torch.tensor([2.0**60]))
    assert factors.tolist() == [1.0]


def test_heads_that_share_values_share_factors() -> None:
    pair = Pair("v", (0, 1, 0, 1, -1))
    assert pair.to_columns(torch.tensor([2.0, 4.0]), 1.0).tolist() == [2, 4, 2, 4, 1]
    assert pair.to_source(torch.tensor([1.0, 5.0, 3.0, 2.0, 9.0]), 3).tolist() == [4, 7, 0]


@pytest.mark.parametrize(
    ("channels", "text"),
    [
        (range(64), "0-63"),
        ([5], "5"),
        ([0, 1, 0, 1, 2, 3, 2, 3], "0-1 0-3 2-3"),
        ([-1, -1, 7, 6, -1], "none*2 7 6 none"),
    ],
)
def test_channels_are_written_as_ranges(channels: Any, text: str) -> None:
    assert ranges_of(list(channels)) == text
    assert numbers_of(text, 64) == list(channels)


@pytest.mark.parametrize("text", ["", "0-", "3-1", "a", "0-9999999999999", "none*0", "0 -1", "0-64"])
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="channels"):
        numbers_of(text, 64)


# The block stays the same


@pytest.mark.parametrize(("fmt", "exact"), [(PRESETS["W8A8"].weights, False), (GROUPS_OF_8, True)])
def test_trading_alone_changes_nothing(fmt: WeightFormat, exact: bool) -> None:
    """Before the second Linear is rounded, the block gives what it gave; to the bit, if factors are powers of two."""
    torch.manual_seed(0)
    block = Attention()
    for module in linears_of(block).values():
        module.bias = None
    with torch.no_grad():
        block.v.weight[3] *= 50
        block.up.weight[7] *= 200
    x = torch.randn(2, 20, 16)
    linears = linears_of(block)
    schemes = dict.fromkeys(linears, PRESETS["W8A8"])
    with torch.no_grad():
        route = learn_route(block, linears, lambda: block(x))
        assert route is not None
        pairs = find_pairs(linears, route.stages, lambda: block(x))
        solved = Solved({})
        for name in ("v", "up"):
            result = quantize_rtn(linears[name].weight.data, fmt, torch.bfloat16)
            linears[name].weight.data = result.dense()
            solved.linears[name] = (record_of(name), result)
        before = block(x)
        codes = {n: r.codes for n, (_, r) in solved.linears.items()}
        dtypes = {f"{n}.weight": torch.bfloat16 for n in linears}
        smoother = Smoother(block, linears, str, schemes, dtypes, Ranks())
        seen = inputs_of(block, x)
        for stage in (1, 3):
            (name,) = route.stages[stage]
            rows = seen[name].reshape(-1, seen[name].shape[-1])
            outliers = Outliers(pairs[stage], rows.double().pow(4).sum(0), [rows])
            moment = SecondMoment.empty(rows.shape[1], CPU)
            moment.names.append(name)
            moment.add(rows)
            smoother.smooth(Told(outliers), moment, solved)
            after = inputs_of(block, x)[name].reshape(rows.shape)
            assert torch.allclose(moment.finish(), after.T @ after, rtol=1e-4, atol=1e-5)
        assert [r.source for r in solved.pairs] == ["v", "up"]
        assert all(torch.equal(solved.linears[n][1].codes, codes[n]) for n in codes)
        if exact:
            assert torch.equal(block(x), before)
        assert torch.allclose(block(x), before, rtol=1e-5, atol=1e-5)
        factors = factors_in(solved.pairs[1])
        assert factors.max() / factors.min() > 4
        assert int(factors.argmax()) == 7


class Told:
    """A walk that only tells of outliers."""

    def __init__(self, outliers: Outliers) -> None:
        self.told = outliers

    def outliers(self) -> Outliers:
        return self.told

    def divided(self, pair: Pair, by: torch.Tensor) -> None:
        assert pair is self.told.origin


def record_of(name: str) -> LinearRecord:
    return LinearRecord(
        name=name, block=0, scheme="W8A8", group_size=None, method="gptq", bits_per_weight=8.0, relative_error=0.0
    )


def inputs_of(block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: seen[0] for name, seen in looks(block, lambda _: block(x), 1).items()}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("kind", "stages"), [(Attention, {1, 3}), (Plain, {1, 3}), (Parallel, {2}), (Gated, set())])
def test_a_walk_goes_on_with_what_was_divided(
    kind: type[nn.Module], stages: set[int], on_disk: bool, tmp_path: Path
) -> None:
    """Inputs and outputs put aside before the division are those after it; in ``Parallel``, up's output is."""
    torch.manual_seed(0)
    block, width = kind(), 16 if kind is Attention else 6
    batches = [torch.randn(2, 5, width) for _ in range(3)]
    linears = linears_of(block)

    def run(i: int) -> torch.Tensor:
        y: torch.Tensor = block(batches[i])
        return y

    with torch.no_grad():
        expected = [run(i).clone() for i in range(3)]
        route = learn_route(block, linears, lambda: run(0))
        assert route is not None
        pairs = find_pairs(linears, route.stages, lambda: run(0))
        assert pairs.keys() == stages
        shelf = Shelf(tmp_path if on_disk else None)
        walk = Sequential(block, linears, route, run, [None] * 3, CPU, shelf, {}, Ranks(), pairs)
        for stage, (moment,) in enumerate(walk.moments()):
            assert (walk._origin(stage) in pairs.values()) == (stage in pairs)
            if stage in pairs:
                pair = pairs[stage]
                by = 2.0 ** torch.randint(-3, 4, (linears[pair.source].out_features,))
                linears[pair.source].weight.data /= by[:, None]
                linears[pair.source].bias.data /= by
                for name in moment.names:
                    linears[name].weight.data *= pair.to_columns(by, 1.0)
                walk.divided(pair, by)
        for i, output in enumerate(walk.outputs()):
            assert torch.allclose(output, expected[i], rtol=1e-5, atol=1e-6)
    assert shelf._divisors == {}
    assert list(tmp_path.iterdir()) == []


# Whole runs


def with_inner_outliers(folder: Path, family: str, **options: Any) -> Path:
    """The same model, with a few channels of what enters o and down far larger: v and up larger, o and down smaller."""
    source = tiny.build(folder, family, **options)
    tensors, config = tiny.stored(source), tiny.config_of(source)
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    for name in tensors:
        if name.endswith("mlp.up_proj.weight"):
            down = name.replace("up_proj", "down_proj")
            for channel in (9, 77):
                tensors[name][channel] *= 32
                tensors[down][:, channel] /= 32
        if name.endswith("v_proj.weight"):
            o, head = name.replace("v_proj", "o_proj"), tensors[name].shape[0] // kv
            channel = head + 3  # of the second head of values, which the last half of the heads reads
            tensors[name][channel] *= 32
            for h in range(heads // 2, heads):
                tensors[o][:, h * head + 3] /= 32
            bias = name.replace("weight", "bias")
            if bias in tensors:
                tensors[bias][channel] *= 32
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def quantize(source: Path, out: Path, text: Path, **recipe: Any) -> Manifest:
    file = out.with_name(f"{out.name}.json")
    file.write_text(json.dumps({"scheme": "W8A8", "effort": "low"} | recipe))
    return halfbyte.quantize(source, out, recipe=file, calibration=f"text:{text}", samples=6, seq_len=40, device="cpu")


def divergence(source: Path, out: Path, text: Path) -> float:
    return halfbyte.compare(source, out, text=text, tokens=200, window=40).metrics["kl_mean"]


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama", {}), ("qwen2", {}), ("gemma3", {}), ("llama", {"scheme": "W4A8", "group_size": 32, "effort": "high"})],
)
def test_inner_outliers_move_into_the_weights(
    family: str, recipe: dict[str, Any], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_inner_outliers(tmp_path / "source", family)
    manifest = quantize(source, tmp_path / "pairs", text_file, **recipe)
    with monkeypatch.context() as patch:
        patch.setattr(halfbyte.pipeline, "find_pairs", lambda *_: {})
        plain = quantize(source, tmp_path / "plain", text_file, **recipe)
    assert plain.pairs == []
    sources = {r.source.removeprefix("model.layers.") for r in manifest.pairs}
    assert sources >= {"0.mlp.up_proj", "1.mlp.up_proj"}
    if not recipe:
        assert sources >= {"0.self_attn.v_proj", "1.self_attn.v_proj"}
    before, dense = tiny.stored(source), tiny.decoded(tmp_path / "pairs")
    weights = {n: t.float() for n, t in before.items()}
    for norm in manifest.smoothing:
        s = (norm.offset + weights[norm.norm]) / (norm.offset + dense[norm.norm])
        for name in norm.linears:
            weights[f"{name}.weight"] *= s
    for record in manifest.pairs:
        f = factors_in(record)
        columns = f[numbers_of(record.channels, before[f"{record.linears[0]}.weight"].shape[1])]
        limit = 0.03 if not recipe else 0.3
        for name, wanted in (
            (record.source, weights[f"{record.source}.weight"] / f[:, None]),
            (record.linears[0], weights[f"{record.linears[0]}.weight"] * columns),
        ):
            assert (dense[f"{name}.weight"] - wanted).norm() / wanted.norm() < limit, name
    checked = halfbyte.verify(tmp_path / "pairs", source=source)
    assert checked.passed, [c for c in checked.checks if c.status == "failed"]
    kl = [divergence(source, tmp_path / name, text_file) for name in ("pairs", "plain")]
    assert kl[0] < (0.5 if not recipe else 1.0) * kl[1], kl
    if family == "llama" and not recipe:
        # what was solved before anything was divided has the same codes, and scales that differ by the factors
        (first,) = [r for r in manifest.pairs if r.source == "model.layers.0.self_attn.v_proj"]
        a, b = tiny.stored(tmp_path / "pairs"), tiny.stored(tmp_path / "plain")
        assert torch.equal(a[f"{first.source}.weight"], b[f"{first.source}.weight"])
        scales = [t[f"{first.source}.weight_scale"][:, 0].float() for t in (b, a)]
        assert torch.equal(scales[0] / scales[1], factors_in(first))


def test_without_smoothing_nothing_is_traded(text_file: Path, tmp_path: Path) -> None:
    source = with_inner_outliers(tmp_path / "source", "llama")
    assert quantize(source, tmp_path / "out", text_file, gptq={"smoothing": False}).pairs == []
    assert quantize(source, tmp_path / "wide", text_file, scheme="W8A16", group_size=32).pairs == []
    ignoring = quantize(source, tmp_path / "less", text_file, ignore=["re:.*(gate|up)_proj"])
    assert {r.source.rpartition(".")[2] for r in ignoring.pairs} == {"v_proj"}


def test_killed_and_resumed(text_file: Path, tmp_path: Path) -> None:
    source = with_inner_outliers(tmp_path / "source", "qwen2", num_hidden_layers=4)
    options = {"scheme": "W8A8", "calibration": f"text:{text_file}", "samples": 6, "seq_len": 40, "effort": "low"}
    assert finish(start(source, tmp_path / "whole", **options)) == 0
    pairs = read_record(Manifest, tmp_path / "whole" / "halfbyte.json").pairs
    assert {r.source.split(".")[2] for r in pairs} == set("0123")
    writes = tmp_path / "writes"
    assert finish(start(source, tmp_path / "counted", trap=("count", 0, writes), **options)) == 0
    number = len(writes.read_text().splitlines()) // 2
    out = tmp_path / "out"
    assert finish(start(source, out, trap=("kill", number), **options)) == KILLED
    assert 0 < stage_of(out) < 4
    assert finish(start(source, out, resume=True, **options)) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_two_ranks_trade_as_one_does(text_file: Path, tmp_path: Path) -> None:
    source = with_inner_outliers(tmp_path / "source", "llama")
    long = tmp_path / "long.txt"
    long.write_text(4 * text_file.read_text())
    options: dict[str, Any] = {"scheme": "W8A8", "calibration": f"text:{long}", "samples": 12, "seq_len": 200}
    options |= {"effort": "low"}
    outs = [tmp_path / "one", tmp_path / "two", tmp_path / "again"]
    assert finish(start(source, outs[0], **options)) == 0
    for out in outs[1:]:
        assert finish_ranks(start_ranks(2, source, out, **options)) == [0, 0]
    assert contents(outs[1]) == contents(outs[2])
    one, two = (read_record(Manifest, o / "halfbyte.json").pairs for o in outs[:2])
    assert [(r.source, r.channels) for r in one] == [(r.source, r.channels) for r in two]
    assert len(one) == 4
    assert torch.allclose(factors_in(one[0]), factors_in(two[0]), rtol=1e-2)
    assert halfbyte.verify(outs[1], source=source).passed


# What verify makes of it


@pytest.fixture(scope="module")
def traded(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and what was made of it, with biases that were divided."""
    folder = tmp_path_factory.mktemp("traded")
    source = with_inner_outliers(folder / "source", "qwen2")
    quantize(source, folder / "out", text_file)
    return source, folder / "out"


@pytest.fixture
def spoil(traded: tuple[Path, Path], tmp_path: Path) -> Callable[..., dict[str, list[str]]]:
    """Change tensors or the manifest, make hashes fit again and verify: problems by check."""

    def change(edit: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> dict[str, list[str]]:
        source, good = traded
        out = tmp_path / "out"
        out.mkdir()
        for file in good.iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        tensors, manifest = tiny.stored(good), json.loads((good / "halfbyte.json").read_text())
        edit(tensors, manifest)
        weights = out / "model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(0o644)
        manifest["files"] = {"model.safetensors": hashlib.sha256(weights.read_bytes()).hexdigest()}
        write_json(out / "halfbyte.json", manifest)
        record = halfbyte.verify(out, source=source, reload=False)
        return {c.name: c.problems for c in record.checks if c.status == "failed"}

    return change


V, UP = "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"


def test_divided_biases_are_the_source_s_over_the_factors(
    traded: tuple[Path, Path], spoil: Callable[..., dict[str, list[str]]]
) -> None:
    source, out = traded
    (record,) = [r for r in read_record(Manifest, out / "halfbyte.json").pairs if r.source == V]
    old, new = tiny.stored(source)[f"{V}.bias"].float(), tiny.stored(out)[f"{V}.bias"].float()
    assert torch.equal(new * factors_in(record), old)
    assert not torch.equal(new, old)

    assert spoil(lambda tensors, manifest: None) == {}


def test_a_changed_bias_is_found(spoil: Callable[..., dict[str, list[str]]]) -> None:
    def edit(tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        tensors[f"{V}.bias"][5] *= 2

    assert spoil(edit) == {"copies": [f"{V}.bias is not the source's over the recorded factors"]}


def test_a_changed_scale_is_found(spoil: Callable[..., dict[str, list[str]]]) -> None:
    def edit(tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        tensors[f"{UP}.weight_scale"][11] *= 2

    assert spoil(edit) == {"error": [f"{UP}: rows are not the source's over the recorded factors: 1, such as 11"]}


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("factors", "AAAA", f"{UP} is recorded as divided by what cannot be read: "),
        ("factors", "AACAPw==", f"{UP} is recorded as divided by factors that do not fit its rows"),
        ("factors", base64.b64encode(bytes(512)).decode(), f"{UP} is recorded as divided by factors that do not fit"),
        ("factors", "?", f"{UP} is recorded as divided by what cannot be read: "),
        ("channels", "1-128", f"{UP} is recorded as divided by factors that do not fit its rows"),
        ("channels", "0-99999999999", f"{UP} is recorded as divided by what cannot be read: "),
        ("linears", ["model.layers.0.mlp.gate_proj"], f"{UP} is recorded as divided by "),
        ("linears", ["nowhere"], f"{UP} is recorded as divided, but the source has no such weights"),
        ("linears", [], f"{UP} is recorded as divided, but the source has no such weights"),
    ],
)
def test_records_that_make_no_sense_are_named(
    field: str, value: Any, problem: str, spoil: Callable[..., dict[str, list[str]]]
) -> None:
    def edit(tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        (record,) = [r for r in manifest["pairs"] if r["source"] == UP]
        record[field] = value

    found = spoil(edit)
    assert any(p.startswith(problem) for p in found["copies"]), found
