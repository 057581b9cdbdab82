"""``verify`` on GGUF files that were converted, sound and spoilt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import halfbyte
from conftest import Models
from halfbyte.conversion.gguf_file import GgufTensor, open_gguf
from halfbyte.records import VerifyRecord

SOUND = [
    ("llama", {"scheme": "W4A16", "group_size": 64}),
    ("qwen2", {"scheme": "W4A16_ASYM", "group_size": 32}),
    ("gemma3", {"scheme": "W8A16", "group_size": 32}),
    ("granite", {"scheme": "W8A8"}),
    ("mixtral", {"scheme": "W4A16", "group_size": 32}),
    ("gemma3-vision", {"scheme": "W4A16", "group_size": 32}),
    ("mistral3", {"scheme": "W4A16", "group_size": 32}),
]


@pytest.mark.parametrize(("family", "options"), SOUND)
def test_sound_files_pass(family: str, options: dict[str, object], tiny_model: Models, tmp_path: Path) -> None:
    halfbyte.quantize(tiny_model(family), tmp_path / "q", method="rtn", **options)
    halfbyte.convert(tmp_path / "q", tmp_path / "out", to="gguf")
    record = halfbyte.verify(tmp_path / "out", source=tmp_path / "q")
    assert record.passed, [c for c in record.checks if c.status == "failed"]
    assert outcomes(record) == {
        "files": "passed",
        "headers": "passed",
        "config": "passed",
        "copies": "passed",
        "error": "passed",
        "reload": "skipped",
    }


def test_dense_and_rounded_files_pass(tiny_model: Models, tmp_path: Path) -> None:
    for dtype in ("float16", "float32", None):
        out = tmp_path / str(dtype)
        halfbyte.convert(tiny_model("llama3"), out, to="gguf", dtype=dtype)
        assert halfbyte.verify(out, source=tiny_model("llama3")).passed


@pytest.fixture(scope="module")
def sound(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sound")
    halfbyte.quantize(tiny_model("gemma3"), folder / "q", method="rtn", group_size=32)
    halfbyte.convert(folder / "q", folder / "out", to="gguf")
    return folder / "q", folder / "out"


def outcomes(record: VerifyRecord) -> dict[str, str]:
    return {c.name: c.status for c in record.checks}


def spoil(folder: Path, name: str, at: int, value: bytes) -> None:
    tensor: GgufTensor = open_gguf(folder / "model.gguf").tensors[name]
    with open(tensor.path, "r+b") as f:
        f.seek(tensor.offset + at)
        f.write(value)


@pytest.mark.parametrize(
    ("tensor", "at", "check"),
    [
        ("blk.1.attn_q.weight", 2, "error"),  # a code
        ("blk.0.ffn_up.weight", 1, "error"),  # a scale
        ("blk.1.ffn_norm.weight", 2, "copies"),
        ("token_embd.weight", 4000, "copies"),
    ],
)
def test_a_changed_byte_is_found_and_named(
    tensor: str, at: int, check: str, sound: tuple[Path, Path], tmp_path: Path
) -> None:
    source, out = sound
    copy = shutil.copytree(out, tmp_path / "out")
    spoil(copy, tensor, at, b"\x2b")
    record = halfbyte.verify(copy, source=source)
    assert {n for n, s in outcomes(record).items() if s == "failed"} == {"files", check}
    problems = next(c.problems for c in record.checks if c.name == check)
    assert problems
    assert problems[0].startswith(f"{tensor} differs from the source's model.")
    assert not halfbyte.verify(copy).passed  # by its hash, without a source


def test_another_source_is_not_its_source(sound: tuple[Path, Path], tiny_model: Models, tmp_path: Path) -> None:
    halfbyte.quantize(tiny_model("gemma3", seed=5), tmp_path / "other", method="rtn", group_size=32)
    record = halfbyte.verify(sound[1], source=tmp_path / "other")
    assert outcomes(record)["copies"] == outcomes(record)["error"] == "failed"


def test_a_tokenizer_that_is_not_the_files_is_found(sound: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(sound[1], tmp_path / "out")
    whole = json.loads((copy / "tokenizer.json").read_text())
    whole["model"]["merges"].reverse()
    token = next(t for t, i in whole["model"]["vocab"].items() if i == 300)
    whole["model"]["vocab"][token + "x"] = whole["model"]["vocab"].pop(token)
    (copy / "tokenizer.json").write_text(json.dumps(whole))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    problems = next(c.problems for c in halfbyte.verify(copy).checks if c.name == "config")
    assert [p.split(" ")[0] for p in problems] == ["1", "merges", "the"]


def test_a_missing_and_a_surplus_tensor_are_found(sound: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(sound[0], tmp_path / "q")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(tensors.pop("model.norm.weight").numel())
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    problems = next(c.problems for c in halfbyte.verify(sound[1], source=source).checks if c.name == "copies")
    assert "model.layers.0.self_attn.q_proj.bias should be blk.0.attn_q.bias, which is missing" in problems
    assert "output_norm.weight stands for no tensor of the source" in problems
