"""Plans from headers alone: totals against arithmetic by hand, and every problem at once."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import attention, estimates
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.estimates import CalibrationWork
from halfbyte.planner import WorkPlan, choose_recipe, make_plan, plan
from halfbyte.recipe import Recipe
from halfbyte.records import Plan, read_record, write_json
from halfbyte.schemes import PRESETS, preset

Shapes = dict[str, tuple[int, ...]]
BYTES = {"BF16": 2, "F32": 4, "I8": 1}


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans time a matrix product; here it is said to run at 100 GFLOP/s."""
    monkeypatch.setattr(estimates, "matmul_rate", lambda dtype: 100e9)


def numel(shape: tuple[int, ...]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


def write_shard(path: Path, shapes: Shapes, dtype: str = "BF16") -> None:
    """A safetensors header, and zeros of the right length that take no room on the disk."""
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + numel(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + start)


def write_checkpoint(
    folder: Path, shapes: Shapes, config: dict[str, Any], *, shards: int = 1, dtype: str = "BF16"
) -> Path:
    """Tensors dealt to shards in runs, as savers do."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = list(shapes)
    if shards == 1:
        write_shard(folder / "model.safetensors", shapes, dtype)
        return folder
    size = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: shapes[n] for n in names[i * size : (i + 1) * size]}
        write_shard(folder / file, part, dtype)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def llama(
    layers: int, hidden: int, intermediate: int, kv: int, vocab: int, prefix: str = "model.", head: str = "lm_head"
) -> Shapes:
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        block = f"{prefix}layers.{i}."
        shapes |= {
            f"{block}input_layernorm.weight": (hidden,),
            f"{block}self_attn.q_proj.weight": (hidden, hidden),
            f"{block}self_attn.k_proj.weight": (kv, hidden),
            f"{block}self_attn.v_proj.weight": (kv, hidden),
            f"{block}self_attn.o_proj.weight": (hidden, hidden),
            f"{block}post_attention_layernorm.weight": (hidden,),
            f"{block}mlp.gate_proj.weight": (intermediate, hidden),
            f"{block}mlp.up_proj.weight": (intermediate, hidden),
            f"{block}mlp.down_proj.weight": (hidden, intermediate),
        }
    shapes |= {f"{prefix}norm.weight": (hidden,), f"{head}.weight": (vocab, hidden)}
    return shapes


def config(layers: int, hidden: int, architecture: str = "LlamaForCausalLM") -> dict[str, Any]:
    return {"architectures": [architecture], "num_hidden_layers": layers, "hidden_size": hidden}


TINY = llama(2, 256, 512, 128, 320)
LINEARS = 7


def work(folder: Path, recipe: Recipe) -> WorkPlan:
    return make_plan(open_checkpoint(folder), recipe, CalibrationWork(spec="random-tokens", samples=4, seq_len=64))


def test_a_70b_checkpoint_is_planned_from_its_headers(tmp_path: Path) -> None:
    layers, hidden, intermediate, kv, vocab = 80, 8192, 28672, 1024, 128256
    shapes = llama(layers, hidden, intermediate, kv, vocab)
    source = write_checkpoint(tmp_path / "70b", shapes, config(layers, hidden), shards=30)
    apparent = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    real = sum(p.stat().st_blocks * 512 for p in source.glob("*.safetensors"))
    assert apparent > 141e9 > 1e8 > real

    made = plan(source, calibration="random-tokens", offload=False, dtype="float32")
    assert made.problems == []
    assert made.notes == []
    assert made.num_blocks == layers
    assert made.block_prefix == "model.layers"
    assert (made.scheme, made.method) == ("W4A16 g128", "gptq")

    a_block = 2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * intermediate
    quantized = layers * a_block
    copied = 2 * vocab * hidden + layers * 2 * hidden + hidden
    assert a_block == 855_638_016
    assert made.quantized_parameters == quantized == 68_451_041_280
    assert made.copied_parameters == copied == 2_102_665_216
    assert made.bytes_before == 2 * (quantized + copied)
    # Codes 4 bits, a bfloat16 scale for 128 weights, and two int64 for each Linear's shape.
    linears = LINEARS * layers
    after = quantized // 2 + quantized // 128 * 2 + 16 * linears + 2 * copied
    assert made.bytes_after == after
    assert made.bits_per_weight == pytest.approx(4.125, abs=1e-5)
    assert made.bits_per_weight == 8 * (quantized // 2 + quantized // 64 + 16 * linears) / quantized
    assert made.bits_per_parameter == 8 * after / (quantized + copied)

    assert [t.name for t in made.tensors] == list(shapes)
    by_name = {t.name: t for t in made.tensors}
    down = by_name["model.layers.79.mlp.down_proj.weight"]
    assert (down.action, down.block, down.scheme, down.group_size) == ("quantize", 79, "W4A16", 128)
    assert down.bytes_before == 2 * hidden * intermediate
    assert down.bytes_after == hidden * intermediate // 2 + hidden * intermediate // 64 + 16
    assert by_name["lm_head.weight"].reason == "outside the decoder blocks"
    assert by_name["model.layers.0.input_layernorm.weight"].reason == "not a Linear weight"

    memory = made.estimates["peak_memory"]
    assert memory.unit == "bytes"
    assert memory.parts["one block's weights, float32"] == 4 * a_block
    # The fullest moment: down_proj is solved, with all other codes found (one byte each).
    assert memory.parts[f"Hessian of width {intermediate} and its factor"] == 8 * intermediate**2
    assert memory.parts["solving the largest Linear"] >= 6 * hidden * intermediate
    assert memory.parts["codes found so far"] == a_block - hidden * intermediate
    assert "a Linear is solved" in memory.how
    # Of 128 batches (a sample each), 8 teach and two in 10 are held out: their original hidden states are kept too.
    assert memory.parts["hidden states of both models"] == 4 * (128 + 10) * 512 * hidden
    untuned = plan(source, calibration="random-tokens", offload=False, dtype="float32", effort="low")
    assert untuned.estimates["peak_memory"].parts["hidden states"] == 4 * 128 * 512 * hidden
    assert memory.value < made.bytes_before / 5  # one block in memory, not the model
    for estimate in made.estimates.values():
        assert estimate.value == pytest.approx(sum(estimate.parts.values()))
        assert estimate.how
    assert made.estimates["disk"].parts["quantised checkpoint"] == after
    # One pass of two operations a weight and token.
    expected = 2 * 128 * 512 * quantized / 100e9
    assert made.estimates["time"].parts["a pass through the blocks"] == pytest.approx(expected)

    write_json(tmp_path / "plan.json", made)
    assert read_record(Plan, tmp_path / "plan.json") == made


def test_codes_that_are_tuned_take_memory(tmp_path: Path) -> None:
    layers, hidden, intermediate, kv = 2, 8192, 28672, 1024
    source = write_checkpoint(tmp_path / "big", llama(layers, hidden, intermediate, kv, 32000), config(layers, hidden))
    a_block = 2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * intermediate
    recipe, found = tmp_path / "r.toml", []
    for wanted in ("true", "false"):
        recipe.write_text(f'scheme = "W4A16"\n[gptq]\ntune_codes = {wanted}\n')
        made = plan(source, recipe=recipe, calibration="random-tokens", offload=False, dtype="float32")
        found.append(made.estimates["peak_memory"])
    assert "a block is tuned" in found[0].how
    assert found[0].parts["latents of all codes, float32, and gradients"] == 8 * a_block
    assert found[0].parts["the weights before rounding, float32, to tune codes by"] == 4 * a_block
    assert found[0].parts.keys() - found[1].parts.keys() >= {
        "latents of all codes, float32, and gradients",
        "the weights before rounding, float32, to tune codes by",
    }


@pytest.mark.parametrize(
    ("scheme", "group_size", "bits"),
    [
        ("W4A16", 64, 4.25),
        ("W4A16", "channel", None),
        ("W4A16_ASYM", None, 4.15625),
        ("W8A16", None, 8.125),
        ("W8A8", None, None),
        ("FP8_DYNAMIC", None, None),
        ("W4A8", 64, 4.25),
        ("W3A16", None, 3.125),
        ("W2A16", 64, 2.25),
        ("W2A16", "channel", None),
        ("FP8_BLOCK", None, 8 + 16 / 128**2),
    ],
)
def test_bytes_of_every_scheme(scheme: str, group_size: Any, bits: float | None, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", TINY, config(2, 256))
    made = plan(source, scheme=scheme, group_size=group_size)
    assert made.problems == []
    total = 0
    for t in made.tensors:
        if t.action == "copy":
            assert t.bytes_after == t.bytes_before
            continue
        rows, columns = t.shape
        weight_bits = int(scheme[1]) if scheme.startswith("W") else 8
        widths = {4.25: 64, 4.15625: 128, 8.125: 128, 3.125: 128, 2.25: 64, 8 + 16 / 128**2: 128 * 128}
        width = columns if bits is None else widths[bits]
        expected = rows * columns * weight_bits // 8 + 2 * rows * columns // width
        expected += rows // 2 * (columns // width) if scheme == "W4A16_ASYM" else 0
        expected += 0 if scheme in ("W8A8", "FP8_DYNAMIC", "FP8_BLOCK") else 16
        assert t.bytes_after == expected, t.name
        assert t.bits_per_weight == 8 * expected / (rows * columns)
        total += expected
    assert made.bits_per_weight == 8 * total / made.quantized_parameters
    if bits is not None:
        shapes = 0 if scheme == "FP8_BLOCK" else 16
        assert made.bits_per_weight - 8 * shapes * 2 * LINEARS / made.quantized_parameters == pytest.approx(bits)


def test_schemes_that_not_every_engine_loads_say_so(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", TINY, config(2, 256))
    for scheme in PRESETS.values():
        notes = plan(source, scheme=scheme.name).notes
        assert ([n for n in notes if "vLLM" in n] == [scheme.note]) is (
            scheme.name in ("W3A16", "W2A16", "W8A16", "W4A8")
        )
        assert any(scheme.name in n for n in notes) is bool(scheme.note)


def test_blocks_that_engines_cannot_cut_are_refused_at_once(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", llama(2, 192, 512, 128, 320), config(2, 192))
    made = plan(source, scheme="FP8_BLOCK")
    assert len(made.problems) == 2 * 6  # down_proj alone fits: 512 columns
    assert made.problems[0] == (
        "model.layers.0.self_attn.q_proj: in_features 192 is not divisible by 128, the width of a block and of a group "
        "of inputs. Use FP8_DYNAMIC, or skip it with --ignore."
    )
    narrow = write_checkpoint(tmp_path / "narrow", llama(2, 256, 512, 64, 320), config(2, 256))
    made = plan(narrow, scheme="FP8_BLOCK")
    assert [p.split(":")[0].rpartition(".")[2] for p in made.problems] == ["k_proj", "v_proj"] * 2
    assert "out_features 64 is not divisible by 128" in made.problems[0]
    kept = plan(narrow, scheme="FP8_BLOCK", ignore=["re:.*self_attn.[qkv]_proj"])
    assert (kept.problems, kept.scheme) == ([], "FP8_BLOCK")


def test_announced_outputs_add_up_to_the_plan(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", TINY, config(2, 256))
    made = work(source, Recipe.of_options(preset("W4A16_ASYM")))
    assert sum(s.size_bytes for s in made.outputs) == made.plan.bytes_after
    assert len({s.name for s in made.outputs}) == len(made.outputs)
    assert len(made.schemes) == 2 * LINEARS


def test_no_calibration_costs_none(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", TINY, config(2, 256))
    made = plan(source, method="rtn")
    assert made.method == "rtn"
    assert "hidden states" not in made.estimates["peak_memory"].parts
    assert made.estimates["time"].parts["a pass through the blocks"] == 0
    assert plan(source, scheme="FP8_DYNAMIC").method == "rtn"


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_offloaded_hidden_states_take_no_memory(dtype: str, item: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", TINY, config(2, 256))
    options: dict[str, Any] = {"calibration": "random-tokens", "samples": 100, "seq_len": 1000}
    options |= {"dtype": dtype, "effort": "low"}
    held = plan(source, **options, offload=False).estimates["peak_memory"]
    spilt = plan(source, **options, offload=True).estimates["peak_memory"]
    kept = held.parts["inputs and outputs kept between stages"]
    assert kept == item * 100 * 1000 * (256 + 512)  # the attention's output, and what down_proj sees
    # But for a few small things: the fullest moment is another one then.
    assert held.value - spilt.value == pytest.approx(item * 100 * 1000 * 256 + kept, rel=0.01)


def test_what_waits_between_stages_goes_to_disk_past_a_gibibyte(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", TINY, config(2, 256))
    for samples, on_disk in ((340, False), (360, True)):  # 1000 tokens each, 3072 bytes for one
        options: dict[str, Any] = {"samples": samples, "seq_len": 1000, "offload": False, "dtype": "float32"}
        options["effort"] = "low"
        found = plan(source, calibration="random-tokens", **options).estimates
        kept = 4.0 * samples * 1000 * (256 + 512)
        assert found["peak_memory"].parts["inputs and outputs kept between stages"] == (0 if on_disk else kept)
        assert found["disk"].parts.get("inputs and outputs kept between stages", 0) == (kept if on_disk else 0)


def test_hidden_states_go_to_disk_where_they_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "tiny", TINY, config(2, 256))
    options: dict[str, Any] = {"calibration": "random-tokens", "samples": 100, "seq_len": 1000}
    held = plan(source, **options, offload=False).estimates["peak_memory"]
    for free, stays in ((held.value / 0.79, True), (held.value / 0.81, False)):
        monkeypatch.setattr(estimates, "available_memory_bytes", lambda free=free, **_: free)
        chosen = plan(source, **options).estimates["peak_memory"]
        assert (chosen == held) == stays
        assert any("(on disk: --offload)" in part for part in chosen.parts) != stays
        assert plan(source, **options, offload=False).estimates["peak_memory"] == held


def test_processes_on_one_machine_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "tiny", TINY, config(2, 256))
    size = CalibrationWork(spec="random-tokens", samples=100, seq_len=1000)
    recipe = Recipe.of_options(preset("W4A16"))
    peak = make_plan(open_checkpoint(source), recipe, replace(size, offload=False)).plan.estimates["peak_memory"].value
    monkeypatch.setattr(estimates, "available_memory_bytes", lambda processes: 3 * peak / 0.79 / processes)
    for said, on_disk in ((None, False), ("", False), ("3", False), ("4", True)):
        if said is None:
            monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        else:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
        assert make_plan(open_checkpoint(source), recipe, size).calibration.offload is on_disk


def test_what_writing_the_text_took_is_free_again_when_there_are_hidden_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "tiny", llama(2, 256, 512, 128, 160_000), config(2, 256))
    size = CalibrationWork(spec="self", samples=1, seq_len=16)
    written = make_plan(open_checkpoint(source), Recipe.of_options(preset("W4A16")), replace(size, offload=False))
    peak = written.plan.estimates["peak_memory"]
    assert peak.how == f"what is held while {estimates.WRITING}"
    assert peak.value > 1.4 * estimates.RUNTIME_BYTES
    for free, on_disk in ((peak.value, False), (estimates.RUNTIME_BYTES, True)):
        monkeypatch.setattr(estimates, "available_memory_bytes", lambda free=free, **_: free)
        made = make_plan(open_checkpoint(source), Recipe.of_options(preset("W4A16")), size)
        assert made.calibration.offload is on_disk


def test_attention_in_bfloat16_has_a_strip_of_scores(tmp_path: Path) -> None:
    """While inputs are observed: 10 bytes for each of a strip's queries, key and head of a batch."""
    rooms = attention._Rooms.of(1000, torch.empty(0, dtype=torch.bfloat16))
    assert sum(t.nbytes for t in (rooms.scores, rooms.probabilities, rooms.rounded)) == 10 * 1000
    peaks: dict[tuple[str, int, int], float] = {}
    for heads in (128, 256):
        settings = config(2, 256) | {"num_attention_heads": heads}
        source = write_checkpoint(tmp_path / f"heads-{heads}", TINY, settings)
        for dtype in ("float32", "bfloat16"):
            for seq_len in (64, 512):
                options: dict[str, Any] = {"samples": 1024 // seq_len, "seq_len": seq_len, "effort": "low"}
                made = plan(source, calibration="random-tokens", offload=False, dtype=dtype, **options)
                peak = made.estimates["peak_memory"]
                assert ("activations of one batch" in peak.parts) or dtype == "float32"
                peaks[dtype, seq_len, heads] = peak.value
    for seq_len, queries in ((64, 64), (512, attention.STRIP)):
        assert peaks["float32", seq_len, 256] == peaks["float32", seq_len, 128]
        # A batch has 1024 tokens: so many keys for each query of a strip of every sequence.
        assert peaks["bfloat16", seq_len, 256] - peaks["bfloat16", seq_len, 128] == 10 * 128 * queries * 1024


def test_a_model_that_writes_its_own_text_is_in_memory_whole(tmp_path: Path) -> None:
    shapes = llama(30, 256, 512, 128, 320)  # so many that all blocks outweigh one with its statistics
    source = write_checkpoint(tmp_path / "tiny", shapes, config(30, 256))
    written = plan(source, calibration="self", samples=1, seq_len=16).estimates
    given = plan(source, calibration="random-tokens", samples=1, seq_len=16).estimates
    assert "writes its calibration text" in written["peak_memory"].how
    assert written["peak_memory"].value > given["peak_memory"].value
    parameters = written["time"].value - given["time"].value
    assert parameters == pytest.approx(2 * 16 * sum(map(numel, shapes.values())) / (0.3 * 100e9))
    with pytest.raises(UsageError, match="unknown calibration source"):
        plan(source, calibration="wikitext")


def test_every_problem_at_once(tmp_path: Path) -> None:
    """A shard is missing, one is cut short, group sizes do not divide, a weight has an odd dtype, and it is unknown."""
    shapes = llama(6, 288, 480, 96, 320)
    source = write_checkpoint(tmp_path / "odd", shapes, config(6, 288, "NovelForCausalLM"), shards=6)
    (source / "model-00006-of-00006.safetensors").unlink()
    short = source / "model-00005-of-00006.safetensors"
    os.truncate(short, short.stat().st_size - 1)
    odd = {"model.layers.5.self_attn.q_proj.weight": (288, 288)}
    write_shard(source / "model-00004-of-00006.safetensors", odd, "I8")

    made = plan(source, group_size=64)
    found = "\n".join(made.problems)
    assert "1 of 6 shards are missing: model-00006-of-00006.safetensors" in found
    assert f"{short}: is not a whole safetensors file" in found
    assert "of 6 are absent from the weights" in found
    assert (
        "model.layers.0.self_attn.q_proj: in_features 288 is not divisible by group_size 64 (remainder 32). "
        "Use group_size 32, or skip it with --ignore."
    ) in made.problems
    assert "model.layers.0.mlp.down_proj: in_features 480 is not divisible by group_size 64 (remainder 32)" in found
    assert "model.layers.5.self_attn.q_proj.weight: is stored as I8, not as one of BF16, F16, F32" in found
    assert made.notes == [
        "architecture NovelForCausalLM is not among those tested; its 6 blocks were found by the general rule"
    ]
    assert not any("vLLM fuses" in p for p in made.problems)


def test_an_architecture_without_blocks_is_one_problem_of_several(tmp_path: Path) -> None:
    shapes: Shapes = {"stem.weight": (64, 64), "tail.weight": (64, 64), "vision_tower.layers.0.fc.weight": (64, 64)}
    options = config(2, 64, "NovelModel") | {"quantization_config": {"quant_method": "awq"}}
    source = write_checkpoint(tmp_path / "odd", shapes, options, shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    made = plan(source)
    assert [p.split(": ", 1)[1] for p in made.problems] == [
        "1 of 3 shards are missing: model-00002-of-00003.safetensors. Download them again.",
        "is quantised already (awq). Start from the original checkpoint.",
        "no decoder blocks were found for architecture NovelModel (no numbered module list among the tensors). "
        "halfbyte quantises decoder-only language models; `halfbyte inspect` shows what this is.",
    ]
    assert made.num_blocks == 0
    assert made.estimates == {}
    assert {t.action for t in made.tensors} == {"copy"}


def test_no_folder_and_no_config_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        plan(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        plan(tmp_path)


def test_zero_points_need_eights(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "odd", llama(1, 256, 512, 132, 320), config(1, 256))
    assert plan(source, scheme="W4A16_ASYM").problems == [
        f"model.layers.0.self_attn.{name}: out_features 132 is not divisible by 8, which packed zero points need. "
        "Use the symmetric W4A16, or skip it with --ignore."
        for name in ("k_proj", "v_proj")
    ]
    assert plan(source, scheme="W4A16").problems == []


STACKED = {
    **TINY,
    "model.layers.0.mlp.experts.gate_up_proj": (8, 768, 256),
    "model.layers.0.mlp.experts.down_proj": (8, 256, 384),
    "model.layers.0.mlp.gate.weight": (8, 256),
}


def test_stacked_experts_are_planned_one_by_one(tmp_path: Path) -> None:
    made = plan(write_checkpoint(tmp_path / "moe", STACKED, config(2, 256)))
    assert made.problems == []
    experts = {t.name: (t.action, t.shape) for t in made.tensors if ".experts." in t.name}
    assert len(experts) == 24
    assert experts["model.layers.0.mlp.experts.7.up_proj.weight"] == ("quantize", [384, 256])
    assert not [t for t in made.tensors if t.name == "model.layers.0.mlp.experts.gate_up_proj"]
    assert made.bytes_before == sum(2 * math.prod(shape) for shape in STACKED.values())


@pytest.mark.parametrize(("threads", "at_once"), [(2, 1), (8, 2), (64, 8)])
def test_experts_are_reckoned_in_the_batches_that_threads_are_worth(
    threads: int, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    source = open_checkpoint(write_checkpoint(tmp_path / "moe", STACKED, config(2, 256)))
    linears = [t for t in plan(source.path).tensors if t.action == "quantize" and t.block == 0]
    size = CalibrationWork(spec="random-tokens", samples=4, seq_len=64)
    moments = dict(estimates._block_moments(source, estimates.shared_inputs(linears, 2), size))
    parts = moments["experts are solved"]
    assert parts[f"solving {at_once} experts"] == at_once * (8.0 * 384**2 + 14.0 * 2 * 384 * 256)


def test_stacked_experts_that_are_ignored_stay_stacked(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "moe", STACKED, config(2, 256))
    made = plan(source, ignore=["re:.*experts.*"])
    assert made.problems == []
    kept = {t.name: t.action for t in made.tensors if "experts" in t.name}
    assert kept == dict.fromkeys((n for n in STACKED if "experts" in n), "copy")


@pytest.mark.parametrize("pattern", ["re:.*experts\\.3\\..*", "re:.*experts.*down_proj"])
def test_experts_of_a_layer_are_treated_alike(pattern: str, tmp_path: Path) -> None:
    made = plan(write_checkpoint(tmp_path / "moe", STACKED, config(2, 256)), ignore=[pattern])
    assert [p for p in made.problems if "experts in one tensor" in p and p.startswith("model.layers.0.mlp.experts: ")]


def test_gpt_oss_keeps_its_experts(tmp_path: Path) -> None:
    made = plan(write_checkpoint(tmp_path / "moe", STACKED, config(2, 256) | {"model_type": "gpt_oss"}))
    assert made.problems == []
    assert {t.action for t in made.tensors if "experts" in t.name} == {"copy"}
    assert [n for n in made.notes if n.startswith("this family's experts stay as they are")]


def test_ignored_linears_are_copied(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", TINY, config(2, 256))
    made = plan(source, ignore=["re:.*down_proj", "model.layers.0.self_attn.o_proj", "re:.*absent.*"])
    assert made.problems == []
    copied = {t.name: t.reason for t in made.tensors if t.action == "copy" and len(t.shape) == 2}
    assert copied == {
        "model.embed_tokens.weight": "outside the decoder blocks",
        "model.layers.0.self_attn.o_proj.weight": "ignored by the recipe",
        "model.layers.0.mlp.down_proj.weight": "ignored by the recipe",
        "model.layers.1.mlp.down_proj.weight": "ignored by the recipe",
        "lm_head.weight": "outside the decoder blocks",
    }
    assert made.notes == ["pattern 're:.*absent.*' matches no Linear of the decoder blocks"]


def test_ignoring_everything_is_a_problem(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", TINY, config(2, 256))
    assert plan(source, ignore=["re:.*"]).problems == [
        "--ignore: nothing is left to quantise: every Linear is ignored or untargeted. Narrow it."
    ]


def test_half_a_fused_layer_is_a_problem(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", TINY, config(2, 256))
    assert plan(source, ignore=["re:.*v_proj"]).problems == [
        "model.layers.0.self_attn and 1 more: vLLM fuses these into one layer, so they must share one scheme: "
        "q_proj W4A16 g128, k_proj W4A16 g128, v_proj unquantised. "
        "Treat them alike in --ignore and in the recipe's targets."
    ]


def test_a_recipe_and_options_contradict(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a recipe already says scheme, group size, method and what to ignore"):
        choose_recipe(scheme="W4A16", group_size=64, method=None, ignore=[], recipe=tmp_path / "r.toml", effort=None)


def patterns(folder: Path, ignore: list[str] | None = None) -> list[str]:
    made = work(folder, Recipe.of_options(preset("W4A16"), ignore=ignore or []))
    assert made.plan.problems == []
    return made.ignore_patterns


def test_ignore_list_of_a_text_model(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "text", TINY, config(2, 256))
    assert patterns(source) == ["lm_head"]
    assert patterns(source, ["re:.*down_proj", "model.layers.0.self_attn.o_proj"]) == [
        "lm_head",
        "re:.*down_proj",
        "model.layers.0.self_attn.o_proj",
    ]


@pytest.mark.parametrize("new", [False, True])
def test_ignore_list_of_a_multimodal_model(new: bool, tmp_path: Path) -> None:
    language, other = ("model.language_model.", "model.") if new else ("language_model.model.", "")
    shapes = llama(2, 256, 512, 128, 320, language, "lm_head" if new else "language_model.lm_head")
    shapes |= {
        f"{other}multi_modal_projector.mm_input_projection_weight": (256, 64),
        f"{other}vision_tower.vision_model.embeddings.patch_embedding.weight": (64, 3, 14, 14),
        f"{other}vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (64, 64),
        f"{other}vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight": (64, 64),
        f"{other}vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight": (64, 64),
    }
    options = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config(2, 256)}
    source = write_checkpoint(tmp_path / "vlm", shapes, options)
    assert patterns(source) == [
        "lm_head",
        "re:.*lm_head.*",
        "re:.*multi_modal_projector.*",
        "re:.*vision_tower.*",
    ]
    made = plan(source)
    assert made.quantized_parameters == 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512)
    reasons = {t.name.removeprefix(other).split(".")[0]: t.reason for t in made.tensors if "fc1" in t.name}
    assert reasons == {"vision_tower": "vision, audio or projector"}


def test_ignore_list_names_routers(tmp_path: Path) -> None:
    shapes = {n: s for n, s in TINY.items() if ".mlp." not in n}
    for i in range(2):
        shapes[f"model.layers.{i}.block_sparse_moe.gate.weight"] = (4, 256)
        for e in range(4):
            shapes[f"model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight"] = (512, 256)
    source = write_checkpoint(tmp_path / "moe", shapes, config(2, 256, "MixtralForCausalLM"))
    assert patterns(source) == ["lm_head", r"re:.*block_sparse_moe\.gate$", r"re:.*mlp\.router$"]


def test_ignore_list_names_layers_after_the_last(tmp_path: Path) -> None:
    """Layers that predict further tokens (as in DeepSeek-V3) are copied, so loaders must not expect codes there."""
    source = write_checkpoint(tmp_path / "mtp", llama(14, 256, 512, 128, 320), config(13, 256))
    found = patterns(source)
    assert found == ["lm_head", r"re:.*layers\.13\..*"]
    reader = Recipe.of_options(preset("W4A16"), ignore=found)
    quantised = [i for i in range(14) if reader.scheme_for(f"model.layers.{i}.mlp.up_proj") is not None]
    assert quantised == list(range(13))


def test_ignore_list_keeps_every_quantised_linear(tmp_path: Path) -> None:
    """Whatever is ignored, a loader that reads the list must still quantise what was quantised."""
    shapes = llama(2, 256, 512, 128, 320) | {"visual.blocks.0.attn.qkv.weight": (64, 64)}
    source = write_checkpoint(tmp_path / "vl", shapes, config(2, 256, "Qwen2VLForConditionalGeneration"))
    for ignore in ([], ["re:.*o_proj$"], ["re:.*layers\\.1\\..*"]):
        made = work(source, Recipe.of_options(preset("W4A16"), ignore=ignore))
        reader = Recipe.of_options(preset("W4A16"), ignore=made.ignore_patterns)
        matrices = [t.name for t in made.plan.tensors if len(t.shape) == 2 and "embed" not in t.name]
        modules = [n.removesuffix(".weight") for n in matrices]
        assert {m for m in modules if reader.scheme_for(m) is not None} == set(made.schemes)
