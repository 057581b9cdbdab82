"""The benchmark against other quantisers: who takes part, pairing, tables, and the yardsticks that share no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness
import layer_errors
import peers
import pytest
import report
import score_transformers
import torch

from halfbyte.activations import fake_quantize_activations
from halfbyte.schemes import ActivationFormat

RUNS = {"llmcompressor": 3, "autoround": 1, "halfbyte": 3}
EVERYONE = list(RUNS)


def measurement(run: int, tool: str, wall: float, **changes: Any) -> dict[str, Any]:
    figures = {"wall_s": wall, "cpu_s": 2 * wall, "peak_rss_bytes": 2**30, "peak_anonymous_bytes": 2**29}
    return {"run": run, "tool": tool, **figures, "other_cpu_share": 0.01, **changes}


def metrics(kl: float) -> dict[str, float]:
    return {
        "kl_mean": kl,
        "kl_se": 0.01,
        "perplexity_ratio": 1 + kl,
        "perplexity_ratio_se": 0.02,
        "top1_agreement": 0.75,
        "top1_agreement_se": 0.005,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    """A result with two rounds, of which AutoRound was in the first only."""
    runs = [
        measurement(0, "llmcompressor", 100.0),
        measurement(0, "autoround", 1000.0),
        measurement(0, "halfbyte", 80.0),
        measurement(1, "llmcompressor", 200.0),
        measurement(1, "halfbyte", 120.0),
    ]
    tools = {t: t for t in EVERYONE}
    kls = {"llmcompressor": 0.2, "autoround": 0.1, "halfbyte": 0.15}
    return {
        "benchmark": "peers",
        "date": "2026-01-02",
        "work": {"model": "m", "scheme": "W4A16", "group_size": 64, "samples": 4, "seq_len": 8},
        "machine": {"cpu": "a CPU", "cores": 2, "memory_bytes": 2**33},
        "commit": {"commit": "0123456789abcdef", "modified": []},
        "versions": {
            "llmcompressor": {"llmcompressor": "1"},
            "autoround": {"auto-round": "2"},
            "halfbyte": {"halfbyte": "3"},
        },
        "competitors": {t: {"tool": t, "how": "so", "words": []} for t in tools},
        "runs": runs,
        "summary": peers.summary(runs, tools),
        "scores": {
            t: {"halfbyte_compare": {"tokens": 64, "metrics": metrics(kl)}, "layer_errors": {"layers": [kl, 3 * kl]}}
            for t, kl in kls.items()
        },
    }


def test_a_round_has_the_peers_that_know_the_scheme_then_halfbyte_and_its_variants() -> None:
    def names(*arguments: Any) -> list[str]:
        return [c.name for c in peers.competitors(*arguments, 200, RUNS)]

    variants = ["--method rtn"]
    assert names(EVERYONE, variants, "W4A16") == ["llmcompressor", "autoround", "halfbyte", "halfbyte --method rtn"]
    assert names(EVERYONE, variants, "W8A8") == ["llmcompressor", "halfbyte", "halfbyte --method rtn"]
    assert names(["autoround"], variants, "W4A16") == ["autoround"]
    assert names(["autoround"], variants, "W8A8") == []


def test_a_variant_is_halfbyte_with_more_words_in_a_folder_of_its_own() -> None:
    *_, plain, variant = peers.competitors(EVERYONE, ["--method rtn"], "W4A16", 200, RUNS)
    assert (plain.words, plain.folder) == ((), "halfbyte")
    assert (variant.words, variant.folder) == (("--method", "rtn"), "halfbyte-method-rtn")
    assert (variant.tool, variant.how, variant.runs) == ("halfbyte", "--method rtn", 3)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "head_dim": 256}, 128),
        ({"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}, 64),
        ({"text_config": {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 2}}, 32),
    ],
)
def test_the_group_size_divides_every_width(config: dict[str, Any], size: int) -> None:
    assert peers.default_group_size(config) == size


def test_no_group_size_is_an_error() -> None:
    with pytest.raises(SystemExit, match=r"no group size of 128, 64 and 32 divides all of \(100, 256, 100\)"):
        peers.default_group_size({"hidden_size": 100, "intermediate_size": 256, "num_attention_heads": 4})


def test_ratios_are_taken_within_rounds() -> None:
    """The ratio of medians would be 110 / 150; within rounds it is 0.8 and 0.7."""
    peer = {0: measurement(0, "p", 100.0), 1: measurement(1, "p", 200.0), 2: measurement(2, "p", 1.0)}
    ours = {0: measurement(0, "o", 80.0), 1: measurement(1, "o", 140.0)}
    wall = peers.paired(peer, ours)["wall_s"]
    assert (wall["min"], wall["max"]) == (0.7, 0.8)
    assert wall["median"] == pytest.approx(0.75)


def test_a_figure_that_could_not_be_read_has_no_ratio() -> None:
    peer = {0: measurement(0, "p", 1.0, peak_anonymous_bytes=0)}
    assert set(peers.paired(peer, peer)) == {"wall_s", "cpu_s", "peak_rss_bytes"}
    assert peers.paired(peer, {}) == {}


def test_every_peer_is_paired_with_halfbyte_and_each_variant() -> None:
    tools = {"llmcompressor": "llmcompressor", "halfbyte": "halfbyte", "halfbyte --x": "halfbyte"}
    runs = [measurement(0, name, 10.0 * (i + 1)) for i, name in enumerate(tools)]
    ratios = peers.summary(runs, tools)["paired_ratios"]
    assert {p: {o: r["wall_s"]["median"] for o, r in by_ours.items()} for p, by_ours in ratios.items()} == {
        "llmcompressor": {"halfbyte": 2.0, "halfbyte --x": 3.0}
    }


def test_the_tables(result: dict[str, Any]) -> None:
    tools, ratios, where = peers.render(result).split("\n\n")
    rows = [" | ".join(cell.strip() for cell in line.split("|")[1:-1]) for line in tools.splitlines()]
    memory, accuracy = "1.00 | 0.50", "± 0.0200 | 0.7500 ± 0.0050"
    assert rows[2:] == [
        f"llmcompressor 1, so | 2 | 150 | 300 | {memory} | 0.2000 ± 0.0100 | 1.2000 {accuracy} | 0.4",
        f"autoround 2, so | 1 | 1000 | 2000 | {memory} | 0.1000 ± 0.0100 | 1.1000 {accuracy} | 0.2",
        f"halfbyte 3, so | 2 | 100 | 200 | {memory} | 0.1500 ± 0.0100 | 1.1500 {accuracy} | 0.3",
    ]
    assert [[cell.strip() for cell in line.split("|")[1:3]] for line in ratios.splitlines()[2:]] == [
        ["halfbyte / llmcompressor", "0.70 (0.60 to 0.80)"],
        ["halfbyte / autoround", "0.08 (0.08 to 0.08)"],
    ]
    assert where == (
        "m, W4A16 g64, 4 x 8 tokens, scored on 64; a CPU, 2 cores, 8.00 GiB; 2026-01-02, commit 0123456789ab; "
        "other work used 1% to 1% of the processors meanwhile"
    )


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.17828, 0.00634, "0.1783 ± 0.0063"),
        (0.000213, 0.0000118, "0.000213 ± 0.000012"),
        (1.5, 0.25, "1.5000 ± 0.2500"),
        (0.97, 0.0, "0.9700 ± 0.0000"),
    ],
)
def test_a_standard_error_keeps_two_digits(value: float, error: float, shown: str) -> None:
    assert peers.plus_minus({"x": value, "se": error}, "x", "se") == shown


def test_columns_without_scores_are_left_out(result: dict[str, Any]) -> None:
    tools = peers.render({**result, "scores": {}}).split("\n\n")[0]
    assert "KL" not in tools
    assert "of it anonymous" in tools


def test_the_picture_needs_scores(result: dict[str, Any], tmp_path: Path) -> None:
    peers.draw({**result, "scores": {}}, tmp_path / "none.png")
    peers.draw(result, tmp_path / "both.png")
    assert [p.name for p in tmp_path.iterdir()] == ["both.png"]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", harness.kept("*peers*.json"), ids=lambda p: p.name)
def test_results_that_are_kept_can_be_rendered(path: Path) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))
    shown = peers.render(stored)
    for name in stored["competitors"]:
        assert f"{stored['summary'][name]['wall_s']['median']:.0f} |" in shown


def test_the_page_shows_the_results_that_are_kept() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.page(), "run benchmarks/report.py"


def test_rounded_inputs_are_those_of_halfbyte() -> None:
    """The cross-check's eight-bit inputs, which it computes by itself; a row of zeros stays what it is."""
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0
    (rounded,) = score_transformers.round_inputs(None, (x,))
    torch.testing.assert_close(
        rounded, fake_quantize_activations(x, ActivationFormat(num_bits=8)), rtol=1e-6, atol=1e-6
    )
    assert not rounded[0, 0].any()


def test_rounding_of_inputs_is_read_from_the_config() -> None:
    def config(**changes: Any) -> dict[str, Any]:
        inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True, **changes}
        return {"quantization_config": {"config_groups": {"group_0": {"input_activations": inputs}}}}

    weight_only = {"quantization_config": {"config_groups": {"group_0": {"input_activations": None}}}}
    assert score_transformers.inputs_are_rounded(config())
    assert not score_transformers.inputs_are_rounded(weight_only)
    assert not score_transformers.inputs_are_rounded({})
    with pytest.raises(SystemExit, match="not known here"):
        score_transformers.inputs_are_rounded(config(dynamic=False))


class Residual(torch.nn.Module):
    """h + W h, with hidden states given as decoder layers are: by keyword, or first."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(*weight.shape, bias=False)
        self.proj.weight.data = weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.proj(hidden_states)


def test_the_error_of_a_layer_is_relative_to_what_it_adds() -> None:
    """A weight that is 10 % too large errs by 1 % of the energy, for the layer as for its Linear, whatever h is."""
    g = torch.Generator().manual_seed(0)
    weight, h = torch.randn(8, 8, generator=g), torch.randn(1, 6, 8, generator=g)
    h[0, 0] *= 1000
    right = Residual(weight)
    layer = layer_errors.Layer(right, Residual(1.1 * weight))
    with torch.inference_mode():
        right(h)
        right(hidden_states=h)
    assert layer.tokens == 12
    assert layer.layer_sum / layer.tokens == pytest.approx(0.01, rel=1e-3)
    assert layer.linear_sums["proj"] / layer.tokens == pytest.approx(0.01, rel=1e-3)
