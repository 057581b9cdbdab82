"""``convert`` between compressed-tensors, AutoAWQ, AutoGPTQ and dense: what is carried over, to the last bit.

Sources are packed by compressed-tensors itself or bit by bit (:mod:`coded`), and what is written is read by the same
means: no side of a comparison comes from the code that is tested.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import pack_to_int32
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoTokenizer

import coded
import halfbyte
import tiny
from coded import LAYER, Coded, random_coded
from halfbyte.conversion.awq import pack_columns, unpack_columns
from halfbyte.conversion.bits import pack_rows, unpack_rows
from halfbyte.conversion.gguf_file import open_gguf
from halfbyte.errors import CheckpointError, NumericsError, OutputError, ResumeError, UsageError

UP = f"{LAYER}.mlp.up_proj"
DOWN = f"{LAYER}.mlp.down_proj"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _without_waiting_for_the_disk() -> Iterator[None]:
    """Hundreds of small checkpoints; what is on the disk after a crash is test_convert_resume's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def weights_file(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def module_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return {n.rpartition(".")[2]: t for n, t in tiny.stored(folder).items() if n.rpartition(".")[0] == name}


def quantization_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = tiny.config_of(folder)["quantization_config"]
    return found


# --- literals


def test_awq_words_are_those_of_its_description() -> None:
    """Outputs 0 to 7 with codes 0 to 7: nibbles hold outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    codes = torch.arange(8, dtype=torch.uint8).repeat_interleave(8).reshape(8, 8)
    assert pack_columns(pack_rows(codes, 4), 8)[:, 0].tolist() == [0x75316420] * 8


def test_gptq_words_are_those_of_its_description(tmp_path: Path) -> None:
    """Inputs 0 to 7 with codes 0 to 7 are 0x76543210; a symmetric zero point is 7 in version 1, 8 in version 2."""
    codes = np.tile(np.arange(8), (8, 4))
    weight = Coded(bits=4, codes=codes, scales=torch.ones(8, 1), zeros=None, group_size=32)
    source = coded.publish(tmp_path / "a", {UP: coded.packed(weight)}, coded.ct_config(weight))
    halfbyte.convert(source, tmp_path / "v1", to="gptq")
    halfbyte.convert(source, tmp_path / "v2", to="gptq-v2")
    one, two = module_of(tmp_path / "v1", UP), module_of(tmp_path / "v2", UP)
    assert one["qweight"].tolist() == [[0x76543210] * 8] * 4
    assert one["qzeros"].tolist() == [[0x77777777]]
    assert two["qzeros"].tolist() == [[-0x77777778]]
    assert one["g_idx"].tolist() == [0] * 32
    assert quantization_of(tmp_path / "v1")["checkpoint_format"] == "gptq"
    assert quantization_of(tmp_path / "v2")["checkpoint_format"] == "gptq_v2"


# --- packing: fast and slow, and the library's


@settings(deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    rows=st.integers(1, 9),
    count=st.integers(1, 75),
    seed=st.integers(0, 99),
)
def test_rows_are_packed_as_written_down(bits: int, rows: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count))
    words = pack_rows(torch.from_numpy(values).to(torch.uint8), bits)
    assert torch.equal(words, coded.bits_along_rows(values, bits))
    assert np.array_equal(unpack_rows(words, bits, count).numpy(), values)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [32, 33, 40, 64, 7])
def test_rows_are_packed_as_the_library_does(bits: int, columns: int) -> None:
    codes = np.random.default_rng(columns).integers(0, 1 << bits, (5, columns))
    signed = torch.from_numpy(codes - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack_rows(torch.from_numpy(codes).to(torch.uint8), bits), pack_to_int32(signed, bits))


@settings(deadline=None, max_examples=40)
@given(eights=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_turning_nibbles_is_taking_them_apart(eights: int, columns: int, seed: int) -> None:
    """The kernel for widths that 8 divides, the slow way for others: both as the format is described."""
    out = 8 * eights
    assume(out * columns < 20_000)
    codes = np.random.default_rng(seed).integers(0, 16, (out, columns))
    words = pack_rows(torch.from_numpy(codes).to(torch.uint8), 4)
    turned = pack_columns(words, columns)
    weight = Coded(bits=4, codes=codes, scales=torch.ones(out, 1), zeros=None, group_size=None)
    assert torch.equal(turned, coded.awq(weight)["qweight"])
    assert torch.equal(unpack_columns(turned), words)


# --- pairs

LOSSLESS = ("awq", "gptq", "gptq-v2")


def build(kind: str, weights: dict[str, Coded], folder: Path, **config: Any) -> Path:
    first = next(iter(weights.values()))
    if kind == "compressed-tensors":
        modules = {n: coded.packed(w) for n, w in weights.items()}
        return coded.publish(folder, modules, coded.ct_config(first, **config))
    if kind == "awq":
        return coded.publish(folder, {n: coded.awq(w) for n, w in weights.items()}, coded.awq_config(first, **config))
    version = 1 if kind == "gptq" else 2
    modules = {n: coded.gptq(w, version) for n, w in weights.items()}
    return coded.publish(folder, modules, coded.gptq_config(first, version, **config))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("to", ["compressed-tensors", "awq", "gptq", "gptq-v2"])
@pytest.mark.parametrize("source", ["compressed-tensors", "awq", "gptq", "gptq-v2"])
def test_every_pair_is_written_as_if_from_scratch(source: str, to: str, symmetric: bool, tmp_path: Path) -> None:
    """The tensors of a converted checkpoint are those of one made directly in that format."""
    weights = {
        UP: random_coded(1, symmetric=symmetric, dtype=torch.float16, least_zero=1),
        DOWN: random_coded(2, out=24, columns=96, symmetric=symmetric, dtype=torch.float16, least_zero=1),
    }
    given_as = build(source, weights, tmp_path / "source")
    record = halfbyte.convert(given_as, tmp_path / "out", to=to)
    assert (record.exact, record.quantized, record.requantized) == (2, 2, [])
    expected = build(to, weights, tmp_path / "expected")
    found, direct = tiny.stored(tmp_path / "out"), tiny.stored(expected)
    if to == "compressed-tensors":  # scales in the model's dtype, where it holds them
        direct = {n: t.to(torch.bfloat16) if n.endswith("weight_scale") else t for n, t in direct.items()}
    assert same(found, direct)


@settings(deadline=None, max_examples=60)
@given(
    to=st.sampled_from(LOSSLESS),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    out=st.integers(1, 48),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([32, 64, 128, None]),
    exponent=st.sampled_from([-24, -14, -6, 0, 9]),
    seed=st.integers(0, 2**16),
)
def test_round_trips_end_in_the_same_bytes(
    to: str, bits: int, symmetric: bool, out: int, groups: int, group_size: int | None, exponent: int, seed: int
) -> None:
    """compressed-tensors -> B -> compressed-tensors, over shapes, group sizes, and scales to float16's last bit."""
    assume(bits == 4 or to != "awq")
    out *= 32 // math.gcd(32, bits)  # whole words of zero points
    columns = 32 * groups if group_size is None else group_size * groups
    weight = random_coded(
        seed, bits=bits, out=out, columns=columns, group_size=group_size, symmetric=symmetric, least_zero=to == "gptq"
    )
    # bfloat16 numbers that float16 holds: subnormal ones, the largest, and what lies between
    steps = np.random.default_rng(seed).integers(1, 128, weight.scales.shape).astype(np.float64)
    steps = np.exp2(np.random.default_rng(seed).integers(0, 7, steps.shape)) if exponent == -24 else steps
    scales = torch.from_numpy(steps * 2.0**exponent).to(torch.bfloat16)
    assert torch.equal(scales.to(torch.float16).to(torch.bfloat16), scales)
    weight = Coded(bits=bits, codes=weight.codes, scales=scales, zeros=weight.zeros, group_size=group_size)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = coded.publish(root / "source", {UP: coded.packed(weight)}, coded.ct_config(weight))
        halfbyte.convert(source, root / "a", to="compressed-tensors")
        record = halfbyte.convert(root / "a", root / "b", to=to)
        halfbyte.convert(root / "b", root / "again", to="compressed-tensors")
        assert record.exact == 1
        assert same(tiny.stored(root / "a"), tiny.stored(source))
        assert weights_file(root / "again") == weights_file(root / "a")
        halfbyte.convert(root / "again", root / "b2", to=to)
        assert weights_file(root / "b2") == weights_file(root / "b")


@pytest.mark.parametrize("kind", ["compressed-tensors", "awq", "gptq", "gptq-v2"])
@pytest.mark.parametrize(
    ("dtype", "exact"), [("float32", True), ("bfloat16", False), ("float16", False), (None, False)]
)
def test_dense_is_the_product_rounded_once(kind: str, dtype: str | None, exact: bool, tmp_path: Path) -> None:
    weight = random_coded(5, symmetric=False, dtype=torch.float16, least_zero=1)
    source = build(kind, {UP: weight}, tmp_path / "source")
    record = halfbyte.convert(source, tmp_path / "out", to="dense", dtype=dtype)
    found = tiny.stored(tmp_path / "out")
    wanted = torch.bfloat16 if dtype is None else getattr(torch, dtype)
    assert found[f"{UP}.weight"].dtype == wanted
    assert torch.equal(found[f"{UP}.weight"], torch.from_numpy(weight.dense()).to(wanted))
    if exact:
        assert np.array_equal(found[f"{UP}.weight"].double().numpy(), weight.dense())
    assert found["model.norm.weight"].dtype == (torch.bfloat16 if dtype is None else wanted)
    config = tiny.config_of(tmp_path / "out")
    assert "quantization_config" not in config
    assert config["dtype"] == (dtype or "bfloat16")
    assert record.target == "dense"


def test_halfbytes_own_checkpoints_come_back_to_the_byte(tiny_model: Any, tmp_path: Path) -> None:
    """quantize -> AWQ -> compressed-tensors, in shards: file names, order and bytes."""
    source = tiny_model("qwen2")
    first = tmp_path / "first"
    halfbyte.quantize(source, first, scheme="W4A16_ASYM", group_size=32, method="rtn", device="cpu")
    for to in LOSSLESS[::2]:
        halfbyte.convert(first, tmp_path / to, to=to)
        halfbyte.convert(tmp_path / to, tmp_path / f"{to}-back", to="compressed-tensors")
        assert weights_file(tmp_path / f"{to}-back") == weights_file(first)
    small = {"max_shard_bytes": 40_000}
    halfbyte.convert(first, tmp_path / "shards", to="compressed-tensors", **small)
    halfbyte.convert(tmp_path / "shards", tmp_path / "awq-shards", to="awq", **small)
    halfbyte.convert(tmp_path / "awq-shards", tmp_path / "shards-back", to="compressed-tensors", **small)
    files = sorted(p.name for p in (tmp_path / "shards").glob("model*"))
    assert len(files) > 3
    assert files == sorted(p.name for p in (tmp_path / "shards-back").glob("model*"))
    for file in files:
        assert (tmp_path / "shards-back" / file).read_bytes() == (tmp_path / "shards" / file).read_bytes()


def test_companions_arrive_and_stale_configs_do_not(tiny_model: Any, tmp_path: Path) -> None:
    source = tiny_model("llama")
    first = tmp_path / "first"
    halfbyte.quantize(source, first, scheme="W4A16", group_size=32, method="rtn", device="cpu")
    for name in ("LICENSE", "NOTICE", "preprocessor_config.json", "quantize_config.json"):
        (first / name).write_text("{}")
    out = tmp_path / "out"
    halfbyte.convert(first, out, to="gptq")
    travelled = {"LICENSE", "NOTICE", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    travelled |= {"generation_config.json", "chat_template.jinja"}
    for name in travelled:
        assert (out / name).read_bytes() == (first / name).read_bytes()
    assert {p.name for p in out.iterdir()} == travelled | {"config.json", "model.safetensors", "convert.json"}
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in out.iterdir())


def test_further_chat_templates_travel_all_the_way(tiny_model: Any, tmp_path: Path) -> None:
    source, name = tmp_path / "source", "additional_chat_templates/tool_use.jinja"
    shutil.copytree(tiny_model("llama"), source)
    (source / name).parent.mkdir()
    (source / name).write_text("{{ messages[0].content }} with tools")
    halfbyte.quantize(source, tmp_path / "small", scheme="W4A16", group_size=32, method="rtn", device="cpu")
    halfbyte.convert(tmp_path / "small", tmp_path / "awq", to="awq")
    halfbyte.convert(tmp_path / "awq", tmp_path / "gguf", to="gguf")
    for folder in ("small", "awq", "gguf"):
        assert (tmp_path / folder / name).read_bytes() == (source / name).read_bytes()
        assert (tmp_path / folder / name).stat().st_mode & 0o777 == 0o644
    told = open_gguf(tmp_path / "gguf/model.gguf").metadata
    assert told["tokenizer.chat_template.tool_use"] == (source / name).read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "awq")
    asked = [{"role": "user", "content": "How deep?"}]
    said = tokenizer.apply_chat_template(asked, tokenize=False, chat_template="tool_use")
    assert said == "How deep? with tools"


# --- what cannot be carried over


def refused(source: Path, out: Path, to: str, **options: Any) -> str:
    with pytest.raises(UsageError) as e:
        halfbyte.convert(source, out, to=to, **options)
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()
    return str(e.value)


def test_scales_that_float16_does_not_hold(tmp_path: Path) -> None:
    weight = random_coded(7)
    scales = weight.scales.clone()
    scales[3, 1] = 2.0**-24 * 1.5
    weight = Coded(bits=4, codes=weight.codes, scales=scales, zeros=None, group_size=32)
    source = build("compressed-tensors", {UP: weight, DOWN: random_coded(8)}, tmp_path / "source")
    for to in LOSSLESS:
        said = refused(source, tmp_path / "out", to)
        assert f"{UP}: its BF16 scales are not all float16 numbers" in said
        assert DOWN not in said
        assert "--allow-requantize" in said
    record = halfbyte.convert(source, tmp_path / "out", to="awq", allow_requantize=True)
    assert record.exact == 1
    (off,) = record.requantized
    assert off.name == UP
    before, after = (
        weight.dense(),
        Coded(bits=4, codes=weight.codes, scales=scales.to(torch.float16), zeros=None, group_size=32).dense(),
    )
    assert off.relative_error == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-3)
    assert same(module_of(tmp_path / "out", UP), coded.awq(weight))


def test_scales_that_the_models_dtype_does_not_hold(tmp_path: Path) -> None:
    """transformers and vLLM load compressed-tensors' scales in the model's dtype, whatever the file has."""
    plain = random_coded(7, dtype=torch.float16)
    weight = Coded(bits=4, codes=plain.codes, scales=plain.scales * 1.137, zeros=None, group_size=32)
    assert weight.scales.dtype == torch.float16
    source = build("awq", {UP: weight, DOWN: random_coded(8)}, tmp_path / "source")
    said = refused(source, tmp_path / "out", "compressed-tensors")
    assert f"{UP}: engines load scales in the model's dtype, BF16 by its config" in said
    assert DOWN not in said
    record = halfbyte.convert(source, tmp_path / "out", to="compressed-tensors", allow_requantize=True)
    assert [r.name for r in record.requantized] == [UP]
    found = module_of(tmp_path / "out", UP)
    assert torch.equal(found["weight_scale"], weight.scales.to(torch.bfloat16))
    assert torch.equal(found["weight_packed"], coded.packed(weight)["weight_packed"])
    half = coded.publish(tmp_path / "half", {UP: coded.awq(weight)}, coded.awq_config(weight), dtype=torch.float16)
    assert halfbyte.convert(half, tmp_path / "exact", to="compressed-tensors").exact == 1
    assert same(module_of(tmp_path / "exact", UP), coded.packed(weight))
    kept = build("compressed-tensors", {UP: weight}, tmp_path / "kept")  # is as it was
    halfbyte.convert(kept, tmp_path / "again", to="compressed-tensors")
    assert same(module_of(tmp_path / "again", UP), coded.packed(weight))


@pytest.mark.parametrize("scale", [2.0**-30, 1e6])
def test_scales_beyond_float16_are_never_rounded_away(scale: float, tmp_path: Path) -> None:
    weight = random_coded(7)
    scales = weight.scales.clone()
    scales[0, 0] = scale
    weight = Coded(bits=4, codes=weight.codes, scales=scales, zeros=None, group_size=32)
    source = build("compressed-tensors", {UP: weight}, tmp_path / "source")
    said = refused(source, tmp_path / "out", "awq", allow_requantize=True)
    assert "overflow or vanish" in said
    assert UP in said


def test_zero_point_0_has_no_place_in_gptq_v1(tmp_path: Path) -> None:
    weight = random_coded(9, symmetric=False)
    weight.zeros[2, 1] = 0
    source = build("awq", {UP: weight}, tmp_path / "source")
    said = refused(source, tmp_path / "out", "gptq")
    assert "zero points 0" in said
    assert "--to gptq-v2" in said
    halfbyte.convert(source, tmp_path / "v2", to="gptq-v2")
    assert same(module_of(tmp_path / "v2", UP), coded.gptq(weight, 2))
    weight.scales[3, 1] = 2.0**-24 * 1.5  # and of its scales one that float16 does not hold
    both = build("compressed-tensors", {UP: weight}, tmp_path / "both")
    assert "zero points 0" in refused(both, tmp_path / "out", "gptq")
    halfbyte.convert(both, tmp_path / "rounded", to="gptq", allow_requantize=True)
    assert module_of(tmp_path / "rounded", UP)["qzeros"].unique().tolist() == [0x77777777]


def test_a_zero_point_that_kernels_read_differently_is_not_read(tmp_path: Path) -> None:
    weight = random_coded(9, symmetric=False, least_zero=1)
    source = build("gptq", {UP: weight}, tmp_path / "source")
    tensors = tiny.stored(source)
    tensors[f"{UP}.qzeros"][0, 0] |= 0xF
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"stored zero point is 15, which stands for 16 in some kernels and for 0"
    ):
        halfbyte.convert(source, tmp_path / "out", to="awq")


def test_act_order_goes_to_gptq_alone(tmp_path: Path) -> None:
    draw = np.random.default_rng(4)
    plain = random_coded(3, out=32, dtype=torch.float16)
    weight = Coded(
        bits=4, codes=plain.codes, scales=plain.scales, zeros=None, group_size=32,
        g_idx=draw.permutation(np.arange(64) // 32),
    )  # fmt: skip
    source = build("gptq", {UP: weight}, tmp_path / "source", desc_act=True)
    for to in ("compressed-tensors", "awq"):
        assert "act-order" in refused(source, tmp_path / "out", to)
    halfbyte.convert(source, tmp_path / "v2", to="gptq-v2")
    assert same(module_of(tmp_path / "v2", UP), coded.gptq(weight, 2))
    assert quantization_of(tmp_path / "v2")["desc_act"] is True
    halfbyte.convert(tmp_path / "v2", tmp_path / "v1", to="gptq")
    assert same(tiny.stored(tmp_path / "v1"), tiny.stored(source))
    halfbyte.convert(source, tmp_path / "dense", to="dense", dtype="float32")
    assert np.array_equal(tiny.stored(tmp_path / "dense")[f"{UP}.weight"].double().numpy(), weight.dense())
    record = halfbyte.convert(source, tmp_path / "again", to="awq", allow_requantize=True)
    assert 0.01 < record.requantized[0].relative_error < 0.3


def test_widths_and_outputs_that_a_format_has_no_place_for(tmp_path: Path) -> None:
    eight = build("compressed-tensors", {UP: random_coded(1, bits=8)}, tmp_path / "eight")
    assert "int8" in refused(eight, tmp_path / "out", "awq")
    odd = build("compressed-tensors", {UP: random_coded(1, out=12)}, tmp_path / "odd")
    assert "12 outputs do not fill words" in refused(odd, tmp_path / "out", "awq", allow_requantize=True)
    assert "do not fill whole words" in refused(odd, tmp_path / "out", "gptq")
    record = halfbyte.convert(eight, tmp_path / "out", to="awq", allow_requantize=True)
    assert record.exact == 0
    assert 0.02 < record.requantized[0].relative_error < 0.2


def test_group_sizes_that_differ(tmp_path: Path) -> None:
    """AutoAWQ has one group size for all; GPTQ names the others under ``dynamic``, and is read by it."""
    a, b, c = random_coded(1, out=32), random_coded(2, out=32), random_coded(3, bits=8, out=32, group_size=64)
    names = {UP: a, DOWN: b, f"{LAYER}.self_attn.o_proj": c}
    config = coded.ct_config(a)
    group = json.loads(json.dumps(config["config_groups"]["group_0"]))
    group["weights"] |= {"num_bits": 8, "group_size": 64}
    group["targets"] = ["re:.*o_proj$"]
    config["config_groups"]["group_1"] = group
    source = coded.publish(tmp_path / "source", {n: coded.packed(w) for n, w in names.items()}, config)
    said = refused(source, tmp_path / "out", "awq")
    assert "o_proj" in said
    assert "groups of 64" in said
    halfbyte.convert(source, tmp_path / "gptq", to="gptq")
    dynamic = quantization_of(tmp_path / "gptq")["dynamic"]
    assert list(dynamic.values()) == [{"bits": 8, "group_size": 64, "sym": True}]
    halfbyte.convert(source, tmp_path / "a", to="compressed-tensors")
    halfbyte.convert(tmp_path / "gptq", tmp_path / "back", to="compressed-tensors")
    assert weights_file(tmp_path / "back") == weights_file(tmp_path / "a")
    assert quantization_of(tmp_path / "back") == quantization_of(tmp_path / "a") | {
        "ignore": quantization_of(tmp_path / "back")["ignore"]
    }


def test_dense_sources_are_for_quantize(tmp_path: Path) -> None:
    source = coded.publish(tmp_path / "source", {UP: {"weight": torch.zeros(8, 32)}}, None)
    assert "halfbyte quantize" in refused(source, tmp_path / "out", "awq")
    halfbyte.convert(source, tmp_path / "out", to="dense", dtype="float16")
    assert tiny.stored(tmp_path / "out")["model.norm.weight"].dtype == torch.float16


def test_numbers_that_a_dtype_does_not_hold_stop_the_conversion(tmp_path: Path) -> None:
    source = coded.publish(tmp_path / "source", {UP: {"weight": torch.full((8, 32), 1e6)}}, None)
    weight = random_coded(1)
    weight = Coded(bits=4, codes=weight.codes, scales=weight.scales * 0 + 6e4, zeros=None, group_size=32)
    quantised = build("compressed-tensors", {UP: weight}, tmp_path / "quantised")
    for folder in (source, quantised):
        with pytest.raises(NumericsError, match=rf"{UP}\.weight: \d+ of its numbers become infinite in F16"):
            halfbyte.convert(folder, tmp_path / "out", to="dense", dtype="float16")
        assert not list(tmp_path.glob("out*"))
    halfbyte.convert(source, tmp_path / "out", to="dense", dtype="bfloat16")


# --- hostile and broken


def test_an_output_that_is_in_the_way_is_said_before_the_source_is_read(tmp_path: Path) -> None:
    missing, out = tmp_path / "missing", tmp_path / "out"
    with pytest.raises(ResumeError, match="there is no unfinished run"):
        halfbyte.convert(missing, out, to="awq", resume=True)
    out.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        halfbyte.convert(missing, out, to="awq")
    with pytest.raises(UsageError, match=r"OUT is a folder, in which the GGUF is called model\.gguf"):
        halfbyte.convert(missing, tmp_path / "small.gguf", to="gguf")


def test_an_older_layout_of_the_same_name_is_not_taken_for_dense(tmp_path: Path) -> None:
    """AutoGPTQ's marlin: tensors B and s."""
    tensors = {"B": torch.zeros(4, 64, dtype=torch.int32), "s": torch.ones(2, 32, dtype=torch.float16)}
    config = coded.gptq_config(random_coded(1), is_marlin_format=True)
    source = coded.publish(tmp_path / "source", {UP: tensors}, config)
    with pytest.raises(CheckpointError, match="its config says gptq, but no tensor is a qweight"):
        halfbyte.convert(source, tmp_path / "out", to="dense")


def test_a_single_weight_file_may_have_any_name(tmp_path: Path) -> None:
    """AutoGPTQ's own, but for one that says that there are more."""
    weight = random_coded(6, out=32)
    source = build("gptq", {UP: weight}, tmp_path / "source")
    file = (source / "model.safetensors").rename(source / "gptq_model-4bit-32g.safetensors")
    halfbyte.convert(source, tmp_path / "out", to="compressed-tensors")
    assert same(module_of(tmp_path / "out", UP), coded.packed(weight))
    file.rename(source / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="Restore the index"):
        halfbyte.convert(source, tmp_path / "again", to="compressed-tensors")


def spoil(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = tiny.stored(folder)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["compressed-tensors", "awq", "gptq"])
def test_scales_that_are_no_numbers(kind: str, value: float, tmp_path: Path) -> None:
    source = build(kind, {UP: random_coded(1), DOWN: random_coded(2)}, tmp_path / "source")
    leaf = "weight_scale" if kind == "compressed-tensors" else "scales"
    scales = tiny.stored(source)[f"{DOWN}.{leaf}"]
    scales[0, 0] = value
    spoil(source, f"{DOWN}.{leaf}", scales)
    with pytest.raises(NumericsError, match=rf"scales of 1 weights are NaN or infinite: {DOWN}"):
        halfbyte.convert(source, tmp_path / "out", to="dense")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "leaf", "value", "said"),
    [
        ("gptq", "g_idx", torch.full((64,), 2, dtype=torch.int32), "g_idx names groups 2 to 2, and there are 2"),
        ("gptq", "g_idx", torch.full((64,), -1, dtype=torch.int32), "g_idx names groups -1 to -1, and there are 2"),
        ("gptq", "g_idx", torch.zeros(63, dtype=torch.int32), r"g_idx has shape \[63\], not \[64\]"),
        ("gptq", "qzeros", torch.zeros(2, 4, dtype=torch.int32), r"qzeros has shape \[2, 4\], not \[2, 2\]"),
        ("gptq", "qzeros", None, "tensor qzeros is missing"),
        ("gptq", "scales", None, "tensor scales is missing"),
        ("gptq", "qweight", torch.zeros(8, 16), "qweight is F32"),
        ("awq", "qzeros", torch.zeros(1, 2, dtype=torch.int32), r"qzeros has shape \[1, 2\], not \[2, 2\]"),
        ("awq", "scales", torch.zeros(2, 16, dtype=torch.int32), "scales has dtype I32"),
        ("awq", "qweight", torch.zeros(60, 2, dtype=torch.int32), "60 input features do not divide"),
        ("compressed-tensors", "weight_shape", torch.tensor([16, 999]), "weight_packed has shape"),
        ("compressed-tensors", "weight_packed", torch.zeros(16, 9, dtype=torch.int32), "weight_packed has shape"),
        ("compressed-tensors", "weight_scale", torch.zeros(16, 3), "weight_scale has shape"),
    ],
)
def test_tensors_that_contradict_each_other(
    kind: str, leaf: str, value: torch.Tensor | None, said: str, tmp_path: Path
) -> None:
    source = build(kind, {UP: random_coded(1)}, tmp_path / "source")
    spoil(source, f"{UP}.{leaf}", value)
    with pytest.raises(CheckpointError, match=said) as e:
        halfbyte.convert(source, tmp_path / "out", to="dense")
    assert UP in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("awq", {"version": "gemv"}, "layout gemv is not read"),
        ("awq", {"bits": 3}, "3 bits, and AutoAWQ has 4"),
        ("awq", {"group_size": 0}, "group_size 0"),
        ("awq", {"group_size": "x"}, "group_size 'x', which is no whole number"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format marlin is not read"),
        ("gptq", {"bits": 5}, "5 bits, and GPTQ has 2, 3, 4, 8"),
        ("gptq", {"bits": None}, "has no bits"),
        ("gptq", {"quant_method": "aqlm"}, "aqlm format, which cannot be read"),
        ("compressed-tensors", {"config_groups": {}}, "no entry of config_groups targets it"),
        ("compressed-tensors", {"format": "marlin-24"}, None),
    ],
)
def test_configs_that_cannot_be_followed(kind: str, change: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    source = build(kind, {UP: random_coded(1)}, tmp_path / "source", **change)
    if said is None:  # the group's own format counts
        halfbyte.convert(source, tmp_path / "out", to="dense")
        return
    with pytest.raises(CheckpointError, match=said):
        halfbyte.convert(source, tmp_path / "out", to="dense")


def test_older_spellings_of_configs(tmp_path: Path) -> None:
    """AutoGPTQ's quantize_config.json beside a config.json without a word, AutoAWQ's w_bit and q_group_size."""
    weight = random_coded(6, out=32)
    for kind, file, loose in (
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}),
    ):
        source = build(kind, {UP: weight}, tmp_path / kind)
        config = tiny.config_of(source)
        del config["quantization_config"]
        (source / "config.json").write_text(json.dumps(config))
        (source / file).write_text(json.dumps(loose))
        halfbyte.convert(source, tmp_path / f"{kind}-out", to="compressed-tensors")
        assert same(module_of(tmp_path / f"{kind}-out", UP), coded.packed(weight))
        shutil.rmtree(tmp_path / f"{kind}-out")


@pytest.mark.parametrize(
    ("backend", "kind"),
    [("autoround:exllamav2", "gptq-v2"), ("auto_round:gptq:exllamav2", "gptq"), ("auto_round:awq", "awq")],
)
def test_autorounds_older_configs(backend: str, kind: str, tmp_path: Path) -> None:
    weight = random_coded(6, out=32, symmetric=False, least_zero=1)
    source = build(kind, {UP: weight}, tmp_path / "source")
    config = tiny.config_of(source)
    config["quantization_config"] = {
        "quant_method": "intel/auto-round", "backend": backend, "bits": 4, "group_size": 32, "sym": False
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    halfbyte.convert(source, tmp_path / "out", to="compressed-tensors")
    assert same(module_of(tmp_path / "out", UP), coded.packed(weight))


def test_unknown_names_and_options(tmp_path: Path) -> None:
    source = build("awq", {UP: random_coded(1)}, tmp_path / "source")
    assert "unknown format 'onnx'" in refused(source, tmp_path / "out", "onnx")
    assert "unknown format 'x'" in refused(source, tmp_path / "out", "dense", source_format="x")
    assert "the checkpoint's format is awq" in refused(source, tmp_path / "out", "dense", source_format="gptq")
    assert "int8 cannot be chosen with --to dense" in refused(source, tmp_path / "out", "dense", dtype="int8")
    assert "float16 cannot be chosen with --to awq" in refused(source, tmp_path / "out", "awq", dtype="float16")


# --- eight bits and floats


def plain(folder: Path, weight: torch.Tensor, scale: torch.Tensor, **change: Any) -> Path:
    """One Linear in int-quantized or float-quantized form."""
    kind = "float" if weight.dtype == torch.float8_e4m3fn else "int"
    form = f"{kind}-quantized"
    numbers = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True} | change
    group = {"targets": ["Linear"], "weights": numbers, "input_activations": inputs, "format": form}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    leaves = {"weight": weight, "weight_scale": scale}
    if change:
        leaves["input_scale"] = torch.ones(1)
    return coded.publish(folder, {UP: leaves}, config)


def test_int8_with_int8_inputs(tmp_path: Path) -> None:
    codes = torch.randint(-128, 128, (32, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    scale = torch.linspace(0.01, 0.02, 32)[:, None].to(torch.bfloat16)
    source = plain(tmp_path / "source", codes, scale)
    record = halfbyte.convert(source, tmp_path / "gptq", to="gptq")
    assert any("round activations" in n for n in record.notes)
    weight = Coded(bits=8, codes=codes.numpy().astype(np.int64) + 128, scales=scale, zeros=None, group_size=None)
    assert same(module_of(tmp_path / "gptq", UP), coded.gptq(weight))
    halfbyte.convert(source, tmp_path / "same", to="compressed-tensors")
    assert same(tiny.stored(tmp_path / "same"), tiny.stored(source))
    group = quantization_of(tmp_path / "same")["config_groups"]["group_0"]
    assert (group["format"], group["input_activations"]["dynamic"]) == ("int-quantized", True)


def test_float8_goes_to_dense_and_stays_itself(tmp_path: Path) -> None:
    weight = torch.randn((32, 64), generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scale = torch.linspace(0.01, 0.02, 32)[:, None].to(torch.bfloat16)
    source = plain(tmp_path / "source", weight, scale)
    assert "float8" in refused(source, tmp_path / "out", "gptq")
    halfbyte.convert(source, tmp_path / "dense", to="dense", dtype="float32")
    assert torch.equal(tiny.stored(tmp_path / "dense")[f"{UP}.weight"], weight.float() * scale.float())
    halfbyte.convert(source, tmp_path / "same", to="compressed-tensors")
    assert same(tiny.stored(tmp_path / "same"), tiny.stored(source))


def test_static_scales_of_activations_are_left_behind_and_said(tmp_path: Path) -> None:
    weight = torch.ones((32, 64)).to(torch.float8_e4m3fn)
    source = plain(tmp_path / "source", weight, torch.ones(32, 1), dynamic=False, strategy="tensor")
    record = halfbyte.convert(source, tmp_path / "out", to="dense")
    assert f"{UP}.input_scale" not in tiny.stored(tmp_path / "out")
    assert any("left behind" in n for n in record.notes)


def test_words_on_the_command_line(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    import sys

    from halfbyte.cli.main import entry_point

    source = build("awq", {UP: random_coded(1)}, tmp_path / "source")
    monkeypatch.setattr(
        sys, "argv", ["halfbyte", "convert", str(source), str(tmp_path / "out"), "--to", "gptq", "--json"]
    )
    entry_point()
    assert json.loads(capfd.readouterr().out)["exact"] == 1
    monkeypatch.setattr(sys, "argv", ["halfbyte", "convert", str(source), str(tmp_path / "b"), "--to", "dense"])
    entry_point()
    assert "awq -> dense" in capfd.readouterr().out
