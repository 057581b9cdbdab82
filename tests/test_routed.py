"""Layers of experts: what is observed is what a plain run shows, and memory limits change no byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte
import tiny
from conftest import Models
from halfbyte import blocks, estimates, planner, routed, solver
from halfbyte.blocks import Interner, StreamedModel, run_block
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.errors import NumericsError
from halfbyte.ranks import Ranks
from halfbyte.routed import RoutedWalk
from halfbyte.statistics import SecondMoment
from halfbyte.weights import Weights

CPU = torch.device("cpu")
FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v3", "llama4-text", "granite-moe"]


def text_ids(rows: int = 4) -> torch.Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, 24), generator=torch.Generator().manual_seed(3))


class Layer:
    """A layer of experts in its block, and what entered it in two batches."""

    def __init__(self, folder: Path, rare: int) -> None:
        self.model = StreamedModel.of(Weights.of(open_checkpoint(folder)), CPU)
        self.index = self.model.num_blocks - 1
        ids = [text_ids(), text_ids(2).flip(1)]
        self.real = [None, torch.ones(48, dtype=torch.bool)]
        self.real[1][20:30] = False  # type: ignore[index]
        with self.model.embeddings(torch.unique(torch.cat([i.flatten() for i in ids]))):
            embedded = [self.model.embed(i, Interner()) for i in ids]
        self.hidden = [h for h, _ in embedded]
        for i in range(self.index):
            with self.model.block(i) as block:
                self.hidden = [run_block(block, h, e[1][i]) for h, e in zip(self.hidden, embedded, strict=True)]
        self.arguments = [e[1][self.index] for e in embedded]
        self.given: list[tuple[torch.Tensor, ...]] = []
        self.added: dict[int, torch.Tensor] = {}
        self.rare = rare

    def enter(self, block: torch.nn.Module) -> None:
        linears = self.model.linears(self.index)
        (self.layer,) = self.model.expert_layers(self.index, linears).values()
        self.linears = {n: m for number in range(len(self.layer.names)) for n, m in self.layer.linears(number).items()}
        handle = self.layer.module.register_forward_pre_hook(lambda _, given: self.given.append(given))
        for i in range(2):
            self.run(block, i)
        handle.remove()

    def run(self, block: torch.nn.Module, batch: int) -> torch.Tensor:
        return run_block(block, self.hidden[batch], self.arguments[batch])

    def walk(self) -> RoutedWalk:
        def add(batch: int, part: torch.Tensor) -> None:
            self.added[batch] = part + self.added.get(batch, torch.zeros_like(part))

        return RoutedWalk(
            self.layer,
            lambda i: self.given[i],  # type: ignore[arg-type, return-value]
            self.real,
            add,
            CPU,
            {},
            Ranks(),
            self.rare,
        )

    def plain(self, block: torch.nn.Module) -> dict[str, SecondMoment]:
        """What hooks on the experts' Linears see, each with a moment of its own, padding left out."""
        sums: dict[str, list[torch.Tensor]] = {n: [] for n in self.linears}
        tokens: list[torch.Tensor] = []

        def look(name: str) -> Any:
            return lambda _, given: sums[name].append(given[0])

        handles = [m.register_forward_pre_hook(look(n)) for n, m in self.linears.items()]
        for i, given in enumerate(self.given):
            real = self.real[i]
            x, index, weights = given
            if real is not None:
                x, index, weights = x[real], index[real], weights[real]
            tokens.append(x)
            self.layer.module(x, index, weights)
        for handle in handles:
            handle.remove()
        found = {}
        for name, seen in sums.items():
            moment = SecondMoment.empty(self.linears[name].in_features, CPU)
            for x in seen:
                moment.add(x)
            found[name] = moment
        return found


def weighed(moment: SecondMoment, own: SecondMoment, layer: torch.Tensor | None, tokens: int) -> None:
    """A moment is its own tokens' plus, for as many tokens as it is wide, the layer's mean; and says so."""
    expected, width = own.finish().clone(), moment.hessian.shape[0]
    if layer is not None:
        expected += layer * (min(width, tokens) / tokens)
    assert moment.pooled == (0 if layer is None else min(width, tokens))
    standing = moment.tokens + moment.pooled
    assert moment.shrinkage == pytest.approx(width / standing if standing else 0.0)
    torch.testing.assert_close(moment.finish(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rare", [0, 10, 10**9])
@pytest.mark.parametrize("at_once", [1, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_a_plain_run(
    family: str, at_once: int, rare: int, tiny_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the expert's own tokens, what is solved already in place; of the layer's besides: for gate and up all that
    enters, for a rare expert's down its own hidden units for that."""
    monkeypatch.setattr(estimates, "MOST_IN_GROUP", at_once)
    case = Layer(tiny_model(family), rare)
    with case.model.block(case.index) as block:
        case.enter(block)
        pairs = list(zip(case.given, case.real, strict=True))
        x, index, weights = (torch.cat([g[i] if r is None else g[i][r] for g, r in pairs]) for i in range(3))
        weighs = case.layer.module.weighs_inputs
        entering = torch.cat([x * weights[:, [k]] if weighs else x for k in range(index.shape[1])])
        mean = torch.cat([w.mean().expand(len(w)) for w in weights.split([96, len(weights) - 96])])[:, None]
        seen = set()
        for moments in case.walk().moments():
            assert len(moments) <= at_once
            expected = case.plain(block)
            for moment in moments:
                name = moment.names[0]
                seen.update(moment.names)
                assert moment.tokens == expected[name].tokens
                assert moment.rare == (moment.tokens < rare)
                if len(moment.names) == 2 and moment.rare:
                    weighed(moment, expected[name], entering.T @ entering, len(entering))
                elif moment.rare:
                    expert = next(e for e in case.layer.module if e.down_proj is case.linears[name])
                    given = x * mean if weighs else x
                    hidden = expert.act(expert.gate_proj(given), expert.up_proj(given))
                    weighed(moment, expected[name], hidden.T @ hidden, len(hidden))
                else:
                    weighed(moment, expected[name], None, 0)
                for solved in moment.names:
                    case.linears[solved].weight.data.mul_(0.9).round_(decimals=2)  # what comes later must see this
        assert seen == set(case.linears)
        for batch, given in enumerate(case.given):
            torch.testing.assert_close(case.added[batch], case.layer.module(*given), rtol=1e-4, atol=1e-5)


def quantized(source: Path, out: Path, text: Path, **options: Any) -> dict[str, Any]:
    """Hashes of the files, and what the manifest says of Linears."""
    usual = {"scheme": "W4A16", "group_size": 32, "samples": 10, "seq_len": 40, "effort": "low"}
    halfbyte.quantize(source, out, calibration=f"text:{text}", **(usual | options))
    manifest = json.loads((out / "halfbyte.json").read_text())
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("*.safetensors"))}
    return {"files": files, "linears": manifest["linears"]}


@pytest.fixture(params=["deepseek-v3", "llama4-text"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", ["groups", "fetched", "files", "batches"])
def test_limits_of_memory_change_no_byte(
    family: str, limit: str, tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model(family)
    expected = quantized(source, tmp_path / "plain", text_file)
    options: dict[str, Any] = {}
    if limit == "groups":
        monkeypatch.setattr(estimates, "MOST_IN_GROUP", 3)
    elif limit == "fetched":
        for module in (blocks, planner):
            monkeypatch.setattr(module, "RESIDENT_EXPERTS", 0)
        monkeypatch.setattr(estimates, "MOST_IN_GROUP", 3)
    elif limit == "files":
        options["offload"] = True
    else:  # on a CPU with few threads each would be solved alone
        monkeypatch.setattr(solver, "worthwhile", lambda *_: 64)
    assert quantized(source, tmp_path / "limited", text_file, **options) == expected


@pytest.mark.filterwarnings("ignore")
def test_experts_too_many_for_memory_turn_tuning_off(
    tiny_model: Models, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"group_size": 32, "calibration": f"text:{text_file}"}
    assert not [n for n in halfbyte.plan(tiny_model("mixtral"), **options).notes if "tuned" in n]
    monkeypatch.setattr(planner, "RESIDENT_EXPERTS", 0)
    assert [n for n in halfbyte.plan(tiny_model("mixtral"), **options).notes if "not tuned" in n]


@pytest.mark.filterwarnings("ignore")
def test_rare_experts_are_named_in_the_manifest(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    source, recipe = tiny_model("qwen3-moe"), tmp_path / "recipe.toml"
    recipe.write_text("scheme = 'W4A16'\ngroup_size = 32\n[experts]\nrare_tokens = 100\n")
    halfbyte.quantize(source, tmp_path / "out", recipe=recipe, calibration=f"text:{text_file}", samples=10, seq_len=40)
    manifest = json.loads((tmp_path / "out" / "halfbyte.json").read_text())
    records = manifest["linears"]
    experts = [r for r in records if ".experts." in r["name"]]
    assert [r["name"] for r in experts if r["rare"]] == [r["name"] for r in experts if r["tokens"] < 100]
    rare = manifest["rare_experts"]
    assert rare == list(dict.fromkeys(r["name"].rpartition(".")[0] for r in experts if r["rare"]))
    assert 0 < 3 * len(rare) < len(experts)
    assert not [r for r in records if ".experts." not in r["name"] and (r["rare"] or r["pooled"])]


@pytest.mark.filterwarnings("ignore")
def test_all_tokens_through_all_experts(tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    source = tiny_model("qwen3-moe")
    found = quantized(source, tmp_path / "all", text_file, all_experts=True)
    tokens = {r["tokens"] for r in found["linears"]}
    assert len(tokens) == 1
    assert not [r for r in found["linears"] if r["pooled"]]
    routed_ones = quantized(source, tmp_path / "routed", text_file)
    assert len({r["tokens"] for r in routed_ones["linears"]}) > 1
    assert routed_ones["files"] != found["files"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("resident", [True, False])
def test_an_expert_that_is_not_finite_is_named(
    resident: bool, tiny_model: Models, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, bad = tmp_path / "bad", "model.layers.1.mlp.experts.2.up_proj.weight"
    shutil.copytree(tiny_model("qwen3-moe"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[bad][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    if not resident:
        for module in (blocks, planner):
            monkeypatch.setattr(module, "RESIDENT_EXPERTS", 0)
    with pytest.raises(NumericsError, match="NaN or infinity") as caught:
        quantized(source, tmp_path / "out", text_file)
    assert caught.value.where == bad


def test_a_group_fits_its_bytes() -> None:
    assert routed.group_size(2048) == 32
    assert routed.group_size(14336) == 1
    assert routed.group_size(64) == estimates.MOST_IN_GROUP
