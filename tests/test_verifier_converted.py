"""``verify`` on AutoAWQ, AutoGPTQ, dense and compressed-tensors checkpoints that were converted, sound and spoilt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import coded
import halfbyte
import tiny
from coded import random_coded
from conftest import Models
from halfbyte.records import VerifyRecord
from halfbyte.reference import read_header
from halfbyte.reference_columns import ColumnLayout, ColumnWeight

UP = "model.layers.0.mlp.up_proj"
TARGETS = ("awq", "gptq", "gptq-v2", "compressed-tensors", "dense")


@pytest.fixture(scope="module")
def quantised(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantised") / "out"
    source = tiny_model("llama")
    halfbyte.quantize(
        source, out, scheme="W4A16_ASYM", group_size=32, method="rtn", device="cpu", ignore=("re:.*o_proj",)
    )
    return out


@pytest.fixture(scope="module")
def converted(quantised: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("converted")

    def get(to: str) -> Path:
        if not (root / to).exists():
            halfbyte.convert(quantised, root / to, to=to, allow_requantize=True)
        return root / to

    return get


def outcomes(record: VerifyRecord) -> dict[str, str]:
    return {c.name: c.status for c in record.checks}


def problems_of(record: VerifyRecord, name: str) -> list[str]:
    return next(c.problems for c in record.checks if c.name == name)


@pytest.mark.parametrize("to", TARGETS)
def test_sound_ones_pass_beside_what_they_were_made_from(to: str, converted: Any, quantised: Path) -> None:
    record = halfbyte.verify(converted(to), source=quantised)
    assert record.passed, record
    done = outcomes(record)
    assert done["copies"] == done["error"] == done["files"] == "passed"
    detail = next(c.detail for c in record.checks if c.name == "error")
    requantised = json.loads((converted(to) / "convert.json").read_text())["requantized"]
    assert detail.startswith(f"{12 - len(requantised)} of 12 weights equal the source's bit for bit")
    if to in ("awq", "gptq", "gptq-v2"):
        assert done["reload"] == "passed"
        assert "gptqmodel" in next(c.detail for c in record.checks if c.name == "reload")


@pytest.mark.parametrize("to", TARGETS[:4])
def test_and_beside_the_dense_original(to: str, converted: Any, tiny_model: Models) -> None:
    record = halfbyte.verify(converted(to), source=tiny_model("llama"), reload=False)
    assert outcomes(record)["error"] == "passed", record
    assert outcomes(record)["copies"] == "passed"


@pytest.mark.parametrize("via", ["awq", "gptq-v2"])
def test_back_in_compressed_tensors_transformers_loads_it(via: str, converted: Any, tmp_path: Path) -> None:
    """Linears that are dense in every block are ignored by name, though AWQ and GPTQ say so in other words."""
    halfbyte.convert(converted(via), tmp_path / "back", to="compressed-tensors")
    record = halfbyte.verify(tmp_path / "back", source=converted(via))
    assert record.passed, record
    assert outcomes(record)["weights"] == outcomes(record)["logits"] == "passed"


def restyled(folder: Path, out: Path, style: str) -> Path:
    """A GPTQ checkpoint of version 2 whose config says so as other tools' do."""
    shutil.copytree(folder, out)
    (out / "convert.json").unlink()
    config = tiny.config_of(out)
    said = config.pop("quantization_config")
    version = said.pop("checkpoint_format")
    if style == "format":
        config["quantization_config"] = said | {"format": version}
    elif style == "loose":
        del said["quant_method"]
        (out / "quantize_config.json").write_text(json.dumps(said | {"checkpoint_format": version}))
    else:
        plain = {f"model.layers.{i}.self_attn.o_proj": {"bits": 16} for i in range(2)}
        packing = {"quant_method": "auto-round", "packing_format": "auto_round", "extra_config": plain}
        config["quantization_config"] = {k: v for k, v in said.items() if k != "dynamic"} | packing
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("style", ["format", "loose", "auto-round"])
def test_other_tools_ways_to_say_what_is_quantised(style: str, converted: Any, tmp_path: Path) -> None:
    source = restyled(converted("gptq-v2"), tmp_path / "source", style)
    halfbyte.convert(source, tmp_path / "out", to="compressed-tensors")
    for checkpoint, beside in ((tmp_path / "out", source), (source, converted("gptq-v2"))):
        record = halfbyte.verify(checkpoint, source=beside, reload=False)
        assert record.passed, [c for c in record.checks if c.status == "failed"]
        assert "12 of 12 weights equal the source's bit for bit" in next(
            c.detail for c in record.checks if c.name == "error"
        )
    spoilt(tmp_path / "out", tmp_path, flip, recorded=False)
    record = halfbyte.verify(tmp_path / "spoilt", source=source, reload=False)
    assert any(p.startswith(f"{UP}.weight differs from the source") for p in problems_of(record, "error"))


def test_groups_that_an_index_deals(tmp_path: Path) -> None:
    weight = random_coded(5, columns=128)
    index = np.random.default_rng(5).permutation(np.arange(128) // 32)
    weight = replace(weight, g_idx=index)
    source = coded.publish(tmp_path / "source", {UP: coded.packed(weight)}, coded.ct_config(weight))
    halfbyte.convert(source, tmp_path / "out", to="gptq-v2")
    record = halfbyte.verify(tmp_path / "out", source=source, reload=False)
    assert outcomes(record)["error"] == "passed", record
    assert "1 of 1 weights equal" in next(c.detail for c in record.checks if c.name == "error")


def test_a_dense_copy_is_held_against_its_hash(converted: Any, tmp_path: Path) -> None:
    assert halfbyte.verify(converted("dense")).passed
    record = halfbyte.verify(spoilt(converted("dense"), tmp_path, flip, recorded=True))
    assert outcomes(record)["files"] == "failed"
    assert any("changed since they were written" in p for p in problems_of(record, "files"))


@pytest.mark.parametrize(("family", "kept"), [("llama", 0), ("qwen2", 6)])
def test_zeros_that_autogptq_added_as_biases_are_left_behind(
    family: str, kept: int, tiny_model: Models, tmp_path: Path
) -> None:
    """A Llama has no biases; a Qwen2's q, k and v do, and keep theirs, zeros or not."""
    halfbyte.quantize(tiny_model(family), tmp_path / "q", method="rtn", group_size=32, device="cpu")
    halfbyte.convert(tmp_path / "q", tmp_path / "gptq", to="gptq")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for module in [n.removesuffix("qweight") for n in tensors if n.endswith("qweight")]:
            tensors[f"{module}bias"] = torch.zeros(tensors[f"{module}qweight"].shape[1], dtype=torch.bfloat16)

    source = spoilt(tmp_path / "gptq", tmp_path, add, recorded=False)
    record = halfbyte.convert(source, tmp_path / "out", to="compressed-tensors")
    assert any(f"{14 - kept} biases of zeros that the architecture does not have" in n for n in record.notes)
    assert sum(n.endswith(".bias") for n in tiny.stored(tmp_path / "out")) == kept
    found = halfbyte.verify(tmp_path / "out", source=source)
    assert found.passed, [c for c in found.checks if c.status == "failed"]


def spoilt(folder: Path, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], None], *, recorded: bool) -> Path:
    out = tmp_path / "spoilt"
    shutil.copytree(folder, out)
    tensors = tiny.stored(out)
    edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    if not recorded:
        (out / "convert.json").unlink()
    return out


def flip(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith((f"{UP}.qweight", f"{UP}.weight_packed", f"{UP}.weight")))
    if tensors[name].dtype == torch.int32:
        tensors[name][0, 0] ^= 1
    else:
        tensors[name][0, 0] += 1


@pytest.mark.parametrize("to", TARGETS)
def test_one_code_that_is_not_the_sources(to: str, converted: Any, quantised: Path, tmp_path: Path) -> None:
    record = halfbyte.verify(spoilt(converted(to), tmp_path, flip, recorded=True), source=quantised, reload=False)
    assert not record.passed
    assert any("changed since they were written" in p for p in problems_of(record, "files"))
    if to in ("awq", "gptq-v2", "compressed-tensors"):
        assert any(p.startswith(f"{UP}.weight differs from the source") for p in problems_of(record, "error"))


@pytest.mark.parametrize(
    ("to", "edit", "check", "said"),
    [
        ("awq", lambda t: t.pop(f"{UP}.qzeros"), "config", "qzeros is missing"),
        ("gptq-v2", lambda t: t[f"{UP}.g_idx"].fill_(9), "config", "names groups 9 to 9"),
        ("gptq-v2", lambda t: t[f"{UP}.scales"].fill_(float("nan")), "scales", "scales are not finite"),
        ("gptq", lambda t: t[f"{UP}.qzeros"].fill_(-1), "codes", "stored zero points are 15, read as 16 or as 0"),
        ("awq", lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:32].clone()}), "linears", "scales has shape"),
        ("awq", lambda t: t.pop("model.norm.weight"), "copies", "model.norm.weight of the source is lost"),
        ("awq", lambda t: t["model.norm.weight"].add_(1), "copies", "model.norm.weight differs from the source"),
        ("dense", lambda t: t.pop("model.norm.weight"), "copies", "model.norm.weight of the source is lost"),
        ("awq", lambda t: t.update({"x.weight": torch.zeros(2)}), "reload", "unexpected key x.weight"),
    ],
)
def test_spoilt_tensors(
    to: str, edit: Any, check: str, said: str, converted: Any, quantised: Path, tmp_path: Path
) -> None:
    folder = spoilt(converted(to), tmp_path, edit, recorded=False)
    record = halfbyte.verify(folder, source=quantised)
    assert not record.passed
    found = [p for c in record.checks for p in c.problems]
    assert any(said in p for p in found), found


@pytest.mark.parametrize(
    ("to", "change", "said"),
    [
        ("awq", {"group_size": 64}, "scales has shape"),
        ("awq", {"bits": 3}, "3 bits in groups of 32"),
        ("awq", {"version": "gemv"}, "layout 'gemv' is not decoded"),
        ("awq", {"modules_to_not_convert": []}, "is dense on disk, and config.json does not say"),
        ("awq", {"modules_to_not_convert": ["mlp", "o_proj"]}, "is quantised on disk, but config.json leaves it alone"),
        ("gptq-v2", {"bits": 5}, "5 bits in groups of 32"),
        ("gptq-v2", {"sym": True}, "has zero points, and config.json says sym"),
        ("gptq-v2", {"dynamic": {}}, "is dense on disk, and config.json does not say"),
        ("gptq-v2", {"damp_percent": 7}, "rejected by transformers"),
        ("gptq-v2", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not decoded"),
    ],
)
def test_spoilt_configs(to: str, change: dict[str, Any], said: str, converted: Any, tmp_path: Path) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(converted(to), folder)
    config = tiny.config_of(folder)
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    record = halfbyte.verify(folder)
    assert not record.passed
    assert any(said in p for c in record.checks for p in c.problems), record


@pytest.mark.parametrize(("kind", "plus"), [("awq", 0), ("gptq", 1), ("gptq", 0)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_reference_decoder_knows_what_was_packed(kind: Any, plus: int, bits: int, tmp_path: Path) -> None:
    if kind == "awq" and bits != 4:
        return
    weight = random_coded(3, bits=bits, out=32, columns=96, symmetric=False, dtype=torch.float16, least_zero=plus)
    tensors = coded.awq(weight) if kind == "awq" else coded.gptq(weight, 1 if plus else 2)
    save_file(tensors, tmp_path / "x.safetensors")
    parts = {t.name: t for t in read_header(tmp_path / "x.safetensors").tensors}
    found = ColumnWeight.of(parts, ColumnLayout(kind=kind, bits=bits, group_size=32, plus=plus))
    assert np.array_equal(found.decode(0, 32).weight.astype(np.float64), weight.dense())
    assert np.array_equal(found.decode(7, 20).weight.astype(np.float64), weight.dense()[7:20])


GPTQ_BYTES = {
    "qweight": (
        "I32",
        [4, 8],
        "10325476" * 8
        + "98badcfe" * 8
        + "00000000111111112222222233333333444444445555555566666666"
        + "77777777"
        + "ffffffff" * 8,
    ),
    "qzeros": ("I32", [2, 1], "10325476" + "77" * 4),
    "scales": ("F16", [2, 8], "0038" * 8 + "0034" * 8),  # 0.5, 0.25
    "g_idx": ("I32", [32], "00000000" * 16 + "01000000" * 16),
}


@pytest.mark.parametrize(("version", "plus"), [("gptq", 1), ("gptq_v2", 0)])
def test_bytes_of_autogptq_mean_what_its_packing_loop_says(version: str, plus: int, tmp_path: Path) -> None:
    """Inputs 0 to 15 have their numbers as codes, 16 to 23 that of the output, the others 15; zero points are stored
    as the output's number and 7."""
    header, data = {}, b""
    for leaf, (dtype, shape, digits) in GPTQ_BYTES.items():
        start, data = len(data), data + bytes.fromhex(digits)
        header[f"{UP}.{leaf}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    said = {"bits": 4, "group_size": 16, "sym": False, "desc_act": False, "quant_method": "gptq"}
    config = {"model_type": "llama", "dtype": "float16", "quantization_config": said | {"checkpoint_format": version}}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    expected = np.full((8, 32), (15 - 7 - plus) * 0.25)
    for o in range(8):
        expected[o, :16] = (np.arange(16) - o - plus) * 0.5
        expected[o, 16:24] = (o - 7 - plus) * 0.25
    halfbyte.convert(tmp_path / "in", tmp_path / "out", to="dense", dtype="float32")
    assert np.array_equal(tiny.stored(tmp_path / "out")[f"{UP}.weight"].numpy(), expected)
    parts = {t.name.rpartition(".")[2]: t for t in read_header(tmp_path / "in/model.safetensors").tensors}
    found = ColumnWeight.of(parts, ColumnLayout(kind="gptq", bits=4, group_size=16, plus=plus))
    assert np.array_equal(found.decode(0, 8).weight, expected)


def test_inspect_names_what_was_converted(converted: Any) -> None:
    for to, quantization, scheme in (
        ("awq", "awq", "W4A16 g32 asym"),
        ("gptq-v2", "gptq", "W4A16 g32 asym"),
        ("dense", "none", "BF16"),
    ):
        found = halfbyte.inspect(converted(to))
        assert found.quantization == quantization
        assert {g.scheme for g in found.groups if "up_proj" in g.modules} == {scheme}
        assert found.notes == []
