"""Mixed precision before anything is measured: units, budgets, the choice against trying every set, and patterns
against the rules by which vLLM and compressed-tensors read them."""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.utils.match import match_targets

import halfbyte
from conftest import Models
from halfbyte import mixing
from halfbyte.architectures import BlockMap, map_blocks
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.errors import UsageError
from halfbyte.mixing import budget_of, choose, groups_of, measured_sequences, unit_key
from halfbyte.recipe import Recipe, SchemeGroup, mixing_problem, wider
from halfbyte.records import Manifest, read_record
from halfbyte.schemes import Scheme, preset

W4, W8 = preset("W4A16"), preset("W8A16")
# What vLLM calls the layer that several Linears become.
FUSED_IN_VLLM = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
DENSE = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
EXPERTS = [f"mlp.experts.{e}.{p}_proj" for e in range(12) for p in ("gate", "up", "down")]


# Units


@pytest.mark.parametrize(
    ("names", "units"),
    [
        (DENSE, [{0, 1, 2}, {3}, {4, 5}, {6}]),
        (["mlp.experts.0.up_proj", "mlp.experts.11.down_proj", "mlp.shared_expert.up_proj"], [{0, 1}, {2}]),
        (["block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.3.w2"], [{0, 1}]),
        (["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.q_b_proj"], [{0, 1}, {2}]),
        (["linear_attn.in_proj_z", "linear_attn.in_proj_b", "linear_attn.in_proj_qkv"], [{0, 2}, {1}]),
        (["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"], [{0, 2}, {1}]),
        (["self_attn.qkv_proj", "mlp.gate_up_proj"], [{0}, {1}]),
        (["self_attn.q_proj", "cross_attn.k_proj"], [{0}, {1}]),
    ],
)
def test_units_are_what_vllm_needs_alike(names: list[str], units: list[set[int]]) -> None:
    together: dict[str, set[int]] = {}
    for i, name in enumerate(names):
        together.setdefault(unit_key(f"model.layers.3.{name}"), set()).add(i)
    assert sorted(together.values(), key=min) == units


def test_the_more_units_the_fewer_sequences() -> None:
    assert [measured_sequences(n) for n in (0, 1, 72, 128, 129, 171, 320, 5000)] == [4, 4, 4, 4, 3, 2, 2, 2]


# Budgets


def budget(source: Path, target: float, size: int | str = 32) -> mixing.Budget:
    checkpoint = open_checkpoint(source)
    blocks = map_blocks(checkpoint)
    scheme = W4.with_group_size(size)  # type: ignore[arg-type]
    return budget_of(blocks, {n: scheme for b in blocks.linears for n in b}, checkpoint.tensors, target)


@pytest.mark.parametrize("size", [32, "channel"])
def test_bits_are_those_of_the_files(size: int | str, tiny_model: Models, tmp_path: Path) -> None:
    source = tiny_model("qwen3", num_hidden_layers=3)
    found = budget(source, 5.5, size)
    assert len(found.units) == 12
    for scheme, bits in (("W4A16", found.lowest_bits), ("W8A16", found.highest_bits)):
        made = halfbyte.plan(source, scheme=scheme, group_size=size, method="rtn")  # type: ignore[arg-type]
        assert made.bits_per_weight == pytest.approx(bits, rel=1e-12)
    assert found.reached_bits(set()) == found.lowest_bits
    assert found.reached_bits(set(range(12))) == found.highest_bits
    whole = found.size_bytes + found.extra_bytes
    assert 8 * whole / found.weights <= 5.5 < 8 * (whole + 1) / found.weights


def test_the_ends_of_the_range(tiny_model: Models) -> None:
    source = tiny_model("llama")
    low, high = budget(source, 5).lowest_bits, budget(source, 5).highest_bits
    assert budget(source, low).problem() is None
    assert budget(source, low).extra_bytes == 0
    assert budget(source, high).problem() is None
    assert budget(source, high).extra_bytes == sum(u.extra_bytes for u in budget(source, high).units)
    for target in (math.nextafter(low, 0), math.nextafter(high, 9), 0.0, -1.0, math.nan, math.inf, -math.inf):
        problem = budget(source, target).problem()
        assert isinstance(problem, UsageError)
        assert budget(source, target).extra_bytes == 0
    assert str(budget(source, 4).problem()) == (
        "--target-bits 4: 4 bits a weight, scales included, cannot be reached (the recipe's schemes take 4.525, and 8 "
        "bits everywhere 8.524). Choose between 4.525 and 8.524."
    )


def test_which_schemes_can_be_mixed() -> None:
    assert wider(W4) == W8
    assert wider(W4.with_group_size("channel")) == W8.with_group_size("channel")
    assert wider(W8) is None
    assert mixing_problem([W4]) is None
    assert mixing_problem([preset("W3A16"), preset("W2A16")]) is None
    assert mixing_problem([W4, W8]) is None
    assert "W8A16 has them everywhere" in str(mixing_problem([W8]))
    for name in ("W4A16_ASYM", "W8A8", "FP8_DYNAMIC"):
        assert f"{name} is not of that kind" in str(mixing_problem([W4, preset(name)]))


# The choice


def best_of_all_sets(gains: list[float], costs: list[int], room: int) -> float:
    sets = itertools.product((0, 1), repeat=len(gains))
    fitting = (s for s in sets if sum(c for c, taken in zip(costs, s, strict=True) if taken) <= room)
    return max(sum(g for g, taken in zip(gains, s, strict=True) if taken) for s in fitting)


@pytest.mark.parametrize("seed", range(40))
def test_no_set_is_better(seed: int) -> None:
    chance = random.Random(seed)
    count = chance.randint(1, 11)
    sizes = [chance.randint(1, 400) * chance.choice([1, 7, 64]) for _ in range(chance.randint(1, 5))]
    costs = [chance.choice(sizes) for _ in range(count)]
    gains = [chance.choice([0.0, chance.random(), 10 ** -chance.uniform(1, 6)]) for _ in range(count)]
    room = chance.randint(0, sum(costs) + 10)
    chosen = choose(gains, costs, room)
    assert sum(costs[i] for i in chosen) <= room
    assert sum(gains[i] for i in chosen) == pytest.approx(best_of_all_sets(gains, costs, room), rel=1e-12, abs=1e-15)
    assert all(gains[i] > 0 for i in chosen)
    assert chosen == choose(list(gains), list(costs), room)


@pytest.mark.parametrize("seed", range(20))
def test_coarse_places_stay_within_the_room(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where exact places would be too many, costs are rounded up: never too dear, and little is lost."""
    monkeypatch.setattr(mixing, "PLACES", 50)
    chance = random.Random(seed)
    costs = [chance.randint(10_000, 90_000) for _ in range(11)]
    gains = [chance.random() for _ in range(11)]
    room = chance.randint(100_000, 500_000)
    chosen = choose(gains, costs, room)
    spent = sum(costs[i] for i in chosen)
    assert spent <= room
    assert all(costs[i] > room - spent for i in range(11) if i not in chosen)
    assert sum(gains[i] for i in chosen) >= 0.85 * best_of_all_sets(gains, costs, room)


def test_a_large_model_is_settled_at_once() -> None:
    """80 blocks of a 70B model: 320 units of four sizes."""
    sizes = [8192 * n for n in (10240, 8192, 57344, 28672)]
    chance = random.Random(0)
    gains = [10 ** -chance.uniform(2, 6) for _ in range(320)]
    costs = [sizes[i % 4] for i in range(320)]
    room = sum(costs) // 9
    chosen = choose(gains, costs, room)
    left = room - sum(costs[i] for i in chosen)
    assert left >= 0
    # No swap of one unit for another that fits is an improvement.
    for i in chosen:
        for j in set(range(320)) - chosen:
            assert gains[j] <= gains[i] or costs[j] - costs[i] > left


# Patterns


def blocks_of(prefix: str, tails: list[str], layers: int = 12) -> BlockMap:
    return BlockMap(prefix, tuple(tuple(f"{prefix}.{i}.{t}" for t in tails) for i in range(layers)), (), (), ())


def in_vllm(name: str, groups: tuple[SchemeGroup, ...]) -> Scheme | None:
    """The scheme of an engine's layer: its name by the patterns in order, then its class, then its parts, all of which
    must match; the first part's match counts. So it is in vLLM's find_matched_target."""
    targets = {t: g.scheme for g in groups for t in g.targets}

    def first(value: str) -> str | None:
        return next((t for t in targets if re.match(t.removeprefix("re:"), value)), None)

    def by_class(cls: str) -> str | None:
        return next((t for t in targets if (t.startswith("re:") and re.match(t[3:], cls)) or t.lower() in cls), None)

    found = first(name) or by_class("qkvparallellinear")
    fused = next((f for f in FUSED_IN_VLLM if name.endswith(f)), None)
    if found is None and fused is not None:
        parts = [first(name.replace(fused, part)) for part in FUSED_IN_VLLM[fused]]
        found = parts[0] if all(parts) else None
    return None if found is None else targets[found]


@pytest.mark.parametrize(
    ("prefix", "elsewhere"),
    [
        ("model.layers", ["model.layers"]),
        ("model.language_model.layers", ["language_model.model.layers", "model.language_model.layers"]),
        ("layers", ["model.layers"]),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_patterns_mean_the_same_to_every_loader(prefix: str, elsewhere: list[str], seed: int) -> None:
    chance = random.Random(seed)
    tails = [*DENSE, *EXPERTS]
    blocks = blocks_of(prefix, tails)
    chosen = {}
    for block in blocks.linears:
        of_unit = {unit_key(n): chance.choice([W4, W8]) for n in block}
        chosen |= {n: of_unit[unit_key(n)] for n in block if seed or ".mlp." in n}
    groups = groups_of(blocks, chosen)
    assert sum(len(g.targets) for g in groups) <= 20
    assert Recipe(groups=groups).contested(chosen) == []
    targets = [t for g in groups for t in g.targets]
    scheme_of = {t: g.scheme for g in groups for t in g.targets}
    for spelt in (prefix, *elsewhere):
        for index, block in enumerate(blocks.linears):
            for name in block:
                other = name.replace(f"{prefix}.", f"{spelt}.", 1)
                hits = [t for t in targets if re.match(t.removeprefix("re:"), other)]
                assert len(hits) == (name in chosen)
                # compressed-tensors, and through it transformers
                by_library = match_targets(other, torch.nn.Linear(1, 1), targets)
                assert [scheme_of[t] for t in by_library] == [chosen[n] for n in (name,) if n in chosen]
                assert in_vllm(other, groups) == chosen.get(name)
            parents = {"qkv_proj": "self_attn", "gate_up_proj": "mlp"}
            for fused, parent in parents.items():
                first = f"{prefix}.{index}.{parent}.{FUSED_IN_VLLM[fused][0]}"
                assert in_vllm(f"{spelt}.{index}.{parent}.{fused}", groups) == chosen.get(first)
    for stranger in (f"{prefix}.0.self_attn.q_proj_extra", f"{prefix}.0.mlp", "lm_head", f"x{prefix}s.0.mlp.up_proj"):
        assert in_vllm(stranger, groups) is None


def test_patterns_are_few() -> None:
    blocks = blocks_of("model.layers", DENSE, layers=5)
    chosen = {n: W8 if "down" in n and ".3." not in n else W4 for b in blocks.linears for n in b}
    attention = r"self_attn\.k_proj|self_attn\.o_proj|self_attn\.q_proj|self_attn\.v_proj"
    low, high = groups_of(blocks, chosen)
    assert (low.scheme, high.scheme) == (W4, W8)
    assert low.targets == (
        r"re:.*\blayers\.\d+\.(?:mlp\.gate_proj|mlp\.up_proj|" + attention + ")$",
        r"re:.*\blayers\.3\.mlp\.down_proj$",
    )
    assert high.targets == (r"re:.*\blayers\.(?:0|1|2|4)\.mlp\.down_proj$",)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama4-text", "granite-moe", "qwen3-moe"])
def test_a_layer_of_experts_is_one_unit(family: str, tiny_model: Models, text_file: Path, tmp_path: Path) -> None:
    source, out = tiny_model(family), tmp_path / "out"
    halfbyte.quantize(
        source,
        out,
        scheme="W4A16",
        group_size=32,
        target_bits=6.5,
        calibration=f"text:{text_file}",
        samples=6,
        seq_len=40,
    )
    manifest = read_record(Manifest, out / "halfbyte.json")
    assert manifest.bits_per_weight <= 6.5
    schemes: dict[str, set[str]] = {}
    for linear in manifest.linears:
        if ".experts." in linear.name:
            schemes.setdefault(linear.name.partition(".experts.")[0], set()).add(linear.scheme)
    assert schemes
    assert all(len(found) == 1 for found in schemes.values())
    assert halfbyte.verify(out, source=source).passed
