"""Inspection of checkpoints that halfbyte and other tools write; parameters are counted against the dense model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3 import Gemma3ForCausalLM

import tiny
from halfbyte.cli.inspect import command
from halfbyte.errors import CheckpointError
from halfbyte.inspection import Inspection, ModuleGroup, block_errors, inspect
from halfbyte.records import (
    CalibrationRecord,
    Check,
    CompareRecord,
    LinearRecord,
    Manifest,
    VerifyRecord,
    from_plain,
    to_json,
    write_json,
)
from halfbyte.schemes import PRESETS, quantization_config

LEAVES = ("weight", "weight_packed", "weight_scale", "qweight", "qzeros", "scales", "g_idx")
HIDDEN, WIDE, LAYERS, VOCABULARY = 64, 128, 3, 80
LINEARS_IN_BLOCKS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * 32 * HIDDEN + 3 * HIDDEN * WIDE)


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rewritten(folder: Path, quantize: Any, quantization: dict[str, Any] | None) -> Path:
    """A tiny Llama in which ``quantize(name, [out, in])`` replaces each Linear of the blocks."""
    model = llama()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".layers." in name and tensor.ndim == 2:
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{leaf}": t for leaf, t in quantize(module, *tensor.shape).items()}
        else:
            tensors[name] = tensor
    config = model.config.to_dict()
    if quantization is not None:
        config["quantization_config"] = quantization
    return write(folder, tensors, json.loads(json.dumps(config, default=str)))


# On-disk layouts, as AutoAWQ, AutoGPTQ and compressed-tensors write them --------------------------------------------


def awq(_: str, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    return {
        "qweight": torch.full((in_features, out_features // 8), -0x77777778, dtype=torch.int32),
        "qzeros": torch.full((in_features // 32, out_features // 8), -0x77777778, dtype=torch.int32),
        "scales": torch.ones(in_features // 32, out_features, dtype=torch.float16),
    }


def gptq(_: str, out_features: int, in_features: int, bits: int = 4) -> dict[str, torch.Tensor]:
    return {
        "qweight": torch.full((in_features * bits // 32, out_features), -0x77777778, dtype=torch.int32),
        "qzeros": torch.full((in_features // 32, out_features * bits // 32), 0x77777777, dtype=torch.int32),
        "scales": torch.ones(in_features // 32, out_features, dtype=torch.float16),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // 32,
    }


def packed(
    out_features: int, in_features: int, *, bits: int = 4, group_size: int | None = 32, symmetric: bool = True
) -> dict[str, torch.Tensor]:
    groups = 1 if group_size is None else in_features // group_size
    tensors = {
        "weight_packed": torch.zeros(out_features, -(-in_features * bits // 32), dtype=torch.int32),
        "weight_scale": torch.ones(out_features, groups, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([out_features, in_features]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = torch.zeros(out_features * bits // 32, groups, dtype=torch.int32)
    return tensors


def only(result: Inspection, modules: str) -> ModuleGroup:
    (group,) = [g for g in result.groups if g.modules == modules]
    return group


def adds_up(result: Inspection) -> None:
    """What holds for every tiny Llama, however it is stored."""
    assert result.parameters == sum(p.numel() for p in llama().parameters())
    assert sum(p.parameters for p in result.parts) == result.parameters
    assert sum(p.bytes for p in result.parts) == result.size_bytes
    assert result.bits_per_parameter == 8 * result.size_bytes / result.parameters
    assert (result.blocks, result.architecture, result.model_type) == (LAYERS, "LlamaForCausalLM", "llama")
    assert from_plain(Inspection, json.loads(to_json(result))) == result


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    result = inspect(tmp_path)
    adds_up(result)
    assert (result.quantization, result.format, result.bits_per_weight) == ("none", None, None)
    assert result.quantized_parameters == 0
    query = only(result, "model.layers.*.self_attn.q_proj")
    assert (query.count, query.scheme, query.shape, query.bits_per_weight) == (LAYERS, "BF16", [HIDDEN, HIDDEN], 16.0)
    parts = {p.name: p.parameters for p in result.parts}
    assert parts == {
        "embeddings": VOCABULARY * HIDDEN,
        "decoder linears": LINEARS_IN_BLOCKS,
        "norms": (2 * LAYERS + 1) * HIDDEN,
        "lm_head": VOCABULARY * HIDDEN,
    }
    assert result.notes == []


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    config = Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=40,
        architectures=["Gemma3ForCausalLM"],
    )
    model = Gemma3ForCausalLM(config)
    model.save_pretrained(tmp_path)
    result = inspect(tmp_path)
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert {p.name for p in result.parts} == {"embeddings", "decoder linears", "norms"}


def test_awq(tmp_path: Path) -> None:
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    result = inspect(rewritten(tmp_path / "c", awq, quantization))
    adds_up(result)
    assert (result.quantization, result.format) == ("awq", "gemm")
    assert result.quantized_parameters == LINEARS_IN_BLOCKS
    assert result.bits_per_weight == 4 + (16 + 4) / 32
    group = only(result, "model.layers.*.self_attn.k_proj")
    assert (group.scheme, group.shape, group.count) == ("W4A16 g32 asym", [32, HIDDEN], LAYERS)
    assert result.notes == []


def test_gptq(tmp_path: Path) -> None:
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}
    result = inspect(rewritten(tmp_path / "c", gptq, quantization))
    adds_up(result)
    assert (result.quantization, result.format) == ("gptq", "gptq")
    group = only(result, "model.layers.*.mlp.down_proj")
    assert (group.scheme, group.shape) == ("W4A16 g32 sym", [HIDDEN, WIDE])
    assert group.bits_per_weight == 4 + (16 + 4) / 32 + 32 / HIDDEN  # g_idx: 32 bits for each input feature


def test_gptq_believes_shapes_over_the_config(tmp_path: Path) -> None:
    """One config, two widths: what per-module overrides leave on disk."""
    folder = rewritten(
        tmp_path / "c",
        lambda name, o, i: gptq(name, o, i, 8 if "down" in name else 4),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
    )
    result = inspect(folder)
    adds_up(result)
    assert only(result, "model.layers.*.mlp.down_proj").scheme == "W8A16 g32 asym"
    assert only(result, "model.layers.*.mlp.up_proj").scheme == "W4A16 g32 asym"


def test_packed_weights_believe_shapes_over_the_config(tmp_path: Path) -> None:
    config = quantization_config([(PRESETS["W4A16"], ["Linear"])], [])
    result = inspect(rewritten(tmp_path / "c", lambda _, o, i: packed(o, i, group_size=32), config))
    adds_up(result)
    assert only(result, "model.layers.*.self_attn.q_proj").scheme == "W4A16 g32 sym"


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("W4A16", 32, "W4A16 g32 sym"),
        ("W4A16", "channel", "W4A16 channel sym"),
        ("W4A16_ASYM", 64, "W4A16 g64 asym"),
        ("W8A16", 32, "W8A16 g32 sym"),
        ("W3A16", 32, "W3A16 g32 sym"),
        ("W2A16", "channel", "W2A16 channel sym"),
        ("W4A8", 32, "W4A8 g32 sym, dynamic token inputs"),
    ],
)
def test_packed_compressed_tensors(tmp_path: Path, name: str, size: Any, expected: str) -> None:
    scheme = PRESETS[name].with_group_size(size)
    w = scheme.weights
    folder = rewritten(
        tmp_path / "c",
        lambda _, o, i: packed(o, i, bits=w.num_bits, group_size=w.group_size, symmetric=w.symmetric),
        quantization_config([(scheme, ["Linear"])], ["lm_head"]),
    )
    result = inspect(folder)
    adds_up(result)
    assert (result.quantization, result.format) == ("compressed-tensors", "pack-quantized")
    group = only(result, "model.layers.*.self_attn.q_proj")
    assert (group.scheme, group.bits_per_weight) == (expected, w.bits_per_weight(HIDDEN))
    assert only(result, "lm_head").scheme == "BF16"


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("W8A8", torch.int8, "W8A8 channel sym, dynamic token inputs"),
        ("FP8_DYNAMIC", torch.float8_e4m3fn, "FP8A8 channel, dynamic token inputs"),
    ],
)
def test_unpacked_compressed_tensors(tmp_path: Path, name: str, dtype: torch.dtype, expected: str) -> None:
    folder = rewritten(
        tmp_path / "c",
        lambda _, o, i: {"weight": torch.zeros(o, i).to(dtype), "weight_scale": torch.ones(o, 1, dtype=torch.bfloat16)},
        quantization_config([(PRESETS[name], ["Linear"])], ["lm_head"]),
    )
    result = inspect(folder)
    adds_up(result)
    group = only(result, "model.layers.*.self_attn.q_proj")
    assert (group.scheme, group.bits_per_weight) == (expected, 8 + 16 / HIDDEN)


def test_mixed_groups_by_exact_name_pattern_and_class(tmp_path: Path) -> None:
    exact = "model.layers.1.mlp.down_proj"
    groups = [
        (PRESETS["W4A16"].with_group_size(64), ["Linear"]),
        (PRESETS["W8A16"].with_group_size("channel"), ["re:.*down_proj"]),
        (PRESETS["W8A16"].with_group_size(32), [exact]),
    ]

    def quantize(name: str, o: int, i: int) -> dict[str, torch.Tensor]:
        if name == exact:
            return packed(o, i, bits=8, group_size=32)
        return packed(o, i, bits=8, group_size=None) if "down" in name else packed(o, i, group_size=64)

    result = inspect(rewritten(tmp_path / "c", quantize, quantization_config(groups, ["lm_head"])))
    adds_up(result)
    found = {(g.modules, g.scheme, g.count) for g in result.groups if "mlp" in g.modules}
    assert found == {
        ("model.layers.*.mlp.gate_proj", "W4A16 g64 sym", LAYERS),
        ("model.layers.*.mlp.up_proj", "W4A16 g64 sym", LAYERS),
        ("model.layers.*.mlp.down_proj", "W8A16 channel sym", LAYERS - 1),
        ("model.layers.*.mlp.down_proj", "W8A16 g32 sym", 1),
    }


def test_padding_in_the_last_word_is_no_parameter(tmp_path: Path) -> None:
    quantization = quantization_config([(PRESETS["W4A16"].with_group_size("channel"), ["Linear"])], [])
    tensors = {f"model.layers.0.mlp.down_proj.{k}": v for k, v in packed(8, 36, group_size=None).items()}
    result = inspect(write(tmp_path / "c", tensors, {"quantization_config": quantization}))
    assert tensors["model.layers.0.mlp.down_proj.weight_packed"].shape == (8, 5)
    assert (result.parameters, result.groups[0].shape) == (8 * 36, [8, 36])


def test_block_scaled_float8_without_config_groups(tmp_path: Path) -> None:
    folder = rewritten(
        tmp_path / "c",
        lambda _, o, i: {"weight": torch.zeros(o, i).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)},
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    )
    result = inspect(folder)
    adds_up(result)
    assert (result.quantization, result.format) == ("fp8", "e4m3")
    assert only(result, "model.layers.*.self_attn.q_proj").scheme == "FP8A8 block 128x128, dynamic inputs"


def test_a_vision_tower_is_a_part_of_its_own(tmp_path: Path) -> None:
    tensors = {
        "model.language_model.embed_tokens.weight": torch.zeros(10, 4),
        "model.language_model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4),
        "model.language_model.layers.1.self_attn.q_proj.weight": torch.zeros(4, 4),
        "model.language_model.norm.weight": torch.zeros(4),
        "model.vision_tower.encoder.layers.0.norm.weight": torch.zeros(6),
        "model.vision_tower.encoder.layers.0.fc1.weight": torch.zeros(6, 6),
        "model.multi_modal_projector.mm_input_projection_weight": torch.zeros(6, 4),
        "lm_head.weight": torch.zeros(10, 4),
    }
    result = inspect(write(tmp_path / "c", tensors, {"architectures": ["X"], "model_type": "x"}))
    assert {p.name: p.parameters for p in result.parts} == {
        "embeddings": 40,
        "decoder linears": 32,
        "norms": 4,
        "lm_head": 40,
        "vision, audio and projector": 66,
    }
    assert result.blocks == 2


def test_contradictions_are_noted(tmp_path: Path) -> None:
    (without,) = inspect(rewritten(tmp_path / "a", awq, None)).notes
    assert without.startswith("quantised tensors are there, but config.json has no quantization_config")
    dense = rewritten(tmp_path / "b", lambda _, o, i: {"weight": torch.zeros(o, i)}, {"quant_method": "awq"})
    (unfounded,) = inspect(dense).notes
    assert unfounded.startswith("config.json has a quantization_config, but no tensor is stored in a quantised form")
    raw = write(tmp_path / "c", {"model.layers.0.q.weight": torch.zeros(4, 4, dtype=torch.uint8)}, {})
    (unknown,) = inspect(raw).notes
    assert unknown.startswith("1 tensors are raw bytes (U8) of a format unknown here, e.g. model.layers.0.q.weight")


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
ODD_VALUES = st.sampled_from([None, 3, -1, True, "re:(", [], ["Linear", 4, "re:("], {}, {"num_bits": 0}])
ODD_GROUPS = st.dictionaries(st.sampled_from(["weights", "targets", "input_activations"]), ODD_VALUES)
ODD_CONFIGS = st.fixed_dictionaries(
    {"quant_method": ODD_VALUES},
    optional={"bits": ODD_VALUES, "config_groups": st.one_of(ODD_VALUES, st.dictionaries(st.just("g"), ODD_GROUPS))},
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    leaves=st.dictionaries(st.sampled_from([*LEAVES, "weight_shape"]), SHAPES, min_size=1),
    dtype=st.sampled_from([torch.int32, torch.int8, torch.bfloat16, torch.float8_e4m3fn]),
    config=ODD_CONFIGS,
)
def test_nonsense_is_described_and_never_crashes(
    tmp_path: Path, leaves: dict[str, Any], dtype: torch.dtype, config: dict[str, Any]
) -> None:
    tensors = {f"model.layers.0.mlp.up_proj.{leaf}": torch.zeros(shape).to(dtype) for leaf, shape in leaves.items()}
    result = inspect(write(tmp_path / "odd", tensors, {"quantization_config": config}))
    assert sum(p.bytes for p in result.parts) == result.size_bytes
    assert from_plain(Inspection, json.loads(to_json(result))) == result


def test_a_folder_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        inspect(tmp_path)


def linear(name: str, block: int, error: float) -> LinearRecord:
    return LinearRecord(
        name=name,
        block=block,
        scheme="W4A16",
        group_size=32,
        method="gptq",
        bits_per_weight=4.5,
        relative_error=error,
    )


def test_block_errors_name_the_worst_linear() -> None:
    first, second = block_errors([linear("a", 1, 0.25), linear("b", 0, 0.1), linear("c", 1, 0.75)])
    assert (first.block, first.linears, first.worst, first.mean_relative_error) == (0, 1, "b", 0.1)
    assert (second.linears, second.worst, second.worst_relative_error, second.mean_relative_error) == (
        2,
        "c",
        0.75,
        0.5,
    )


@pytest.fixture
def with_records(tmp_path: Path) -> Path:
    folder = rewritten(
        tmp_path / "c",
        lambda _, o, i: packed(o, i),
        quantization_config([(PRESETS["W4A16"].with_group_size(32), ["Linear"])], []),
    )
    calibration = CalibrationRecord(spec="text:a.txt", samples=4, tokens=64, seq_len=16, seed=0, sha256="ab" * 32)
    manifest = Manifest(
        format_version=1,
        source={"name": "s", "architecture": "LlamaForCausalLM", "sha256": "cd" * 32},
        recipe={"scheme": "W4A16"},
        calibration=calibration,
        linears=[linear("model.layers.0.mlp.up_proj", 0, 0.0125), linear("model.layers.0.mlp.down_proj", 0, 0.5)],
        bits_per_weight=4.5,
        bytes_before=1,
        bytes_after=1,
        files={},
        versions={},
    )
    write_json(folder / "halfbyte.json", manifest)
    checks = [Check(name="codes", status="passed", detail="-"), Check(name="scales", status="failed", detail="-")]
    verify = VerifyRecord(
        checkpoint="c", source=None, passed=False, checks=checks, tensors=7, bytes_read=9, versions={}
    )
    write_json(folder / "verify.json", verify)
    compare = CompareRecord(
        base="dense",
        checkpoint="c",
        text="t",
        text_sha256="",
        tokens=512,
        window=64,
        metrics={"kl_mean": 0.25},
        versions={},
    )
    write_json(folder / "compare.json", compare)
    return folder


def test_records_beside_the_weights(with_records: Path) -> None:
    result = inspect(with_records)
    assert [e.worst for e in result.errors] == ["model.layers.0.mlp.down_proj"]
    assert result.calibration is not None
    assert result.verify is not None
    assert result.compare is not None
    assert (result.calibration.tokens, result.verify.passed, result.compare.metrics) == (64, False, {"kl_mean": 0.25})
    assert result.recipe == {"scheme": "W4A16"}


def test_a_broken_record_is_noted_and_the_rest_shown(with_records: Path) -> None:
    (with_records / "verify.json").write_text("{")
    (with_records / "halfbyte.json").write_text('{"format_version": 99, "new": 1}')
    result = inspect(with_records)
    assert (result.errors, result.verify) == ([], None)
    assert result.compare is not None
    assert any("halfbyte.json: is not a Manifest record: unknown fields new" in n for n in result.notes)
    assert any("verify.json: not valid JSON at line 1" in n for n in result.notes)


def test_the_command_prints_for_people_and_for_programs(with_records: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(command, [str(with_records)])
    assert shown.exit_code == 0
    words = " ".join(shown.stdout.split())
    assert "LlamaForCausalLM (llama), 3 blocks" in words
    assert "quantisation: compressed-tensors (pack-quantized), 0.1 M weights at 4.500 bits, scales included" in words
    assert "model.layers.*.self_attn.q_proj W4A16 g32 sym 64 x 64 x3" in words
    assert "0 model.layers.0.mlp.down_proj 0.50000 0.25625" in words
    assert "calibration: text:a.txt, 4 samples, 64 tokens, seed 0, sha256 abababababab" in words
    assert "verify: FAILED (scales), 2 checks over 7 tensors" in words
    assert "compare with dense on 512 tokens: kl_mean 0.25" in words
    machine = runner.invoke(command, [str(with_records), "--json"])
    assert from_plain(Inspection, json.loads(machine.stdout)) == inspect(str(with_records))


def test_experts_are_counted_by_kind_and_prediction_layers_apart(tmp_path: Path) -> None:
    """A dense mixture: stacks as they are, single experts in a line each, and a layer behind the last."""
    source = tiny.build(tmp_path / "stacks", "llama4-text")
    result = inspect(source)
    stacks = {g.modules: (g.shape, g.count) for g in result.groups if ".experts." in g.modules}
    prefix = "model.layers.*.feed_forward.experts"
    assert stacks == {f"{prefix}.gate_up_proj": ([4, 128, 384], 1), f"{prefix}.down_proj": ([4, 192, 128], 1)}
    assert result.parameters == sum(t.numel() for t in tiny.stored(source).values())

    source = tiny.build(tmp_path / "single", "deepseek-v3")
    tensors = tiny.stored(source)
    result = inspect(source)
    assert result.blocks == 3
    assert {g.count for g in result.groups if g.modules == "model.layers.*.mlp.experts.*.up_proj"} == {24}
    further = [t for n, t in tensors.items() if n.startswith("model.layers.3.")]
    (part,) = [p for p in result.parts if p.name == "multi-token prediction"]
    assert (part.tensors, part.parameters) == (len(further), sum(t.numel() for t in further))


def test_rare_experts_are_shown(with_records: Path) -> None:
    manifest = json.loads((with_records / "halfbyte.json").read_text())
    rare = [f"model.layers.0.mlp.experts.{i}" for i in range(7)]
    (with_records / "halfbyte.json").write_text(json.dumps(manifest | {"rare_experts": rare}))
    assert inspect(with_records).rare_experts == rare
    shown = CliRunner().invoke(command, [str(with_records)]).stdout
    assert "experts that few calibration tokens reached: 7 (model.layers.0.mlp.experts.0, " in shown
