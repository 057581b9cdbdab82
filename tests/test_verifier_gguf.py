"""``verify`` on GGUF files that were converted, sound and spoilt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte
from conftest import Models
from halfbyte.conversion.gguf_file import GgufFiles, GgufSpec, GgufTensor, Planned, open_gguf
from halfbyte.errors import CheckpointError
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
    assert record.tensors >= 20
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
    source = shutil.copytree(sound[0], tmp_path / "q")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(tensors.pop("model.norm.weight").numel())
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    problems = next(c.problems for c in halfbyte.verify(sound[1], source=source).checks if c.name == "copies")
    assert "model.layers.0.self_attn.q_proj.bias should be blk.0.attn_q.bias, which is missing" in problems
    assert "output_norm.weight stands for no tensor of the source" in problems


# ---- made from a GGUF


@pytest.mark.parametrize("family", ["llama", "gemma3", "granite", "mixtral", "gemma3-vision", "mistral3"])
@pytest.mark.parametrize("to", ["compressed-tensors", "dense"])
def test_what_was_made_from_a_gguf_passes(family: str, to: str, tiny_model: Models, tmp_path: Path) -> None:
    halfbyte.quantize(tiny_model(family), tmp_path / "q", method="rtn", group_size=32)
    halfbyte.convert(tmp_path / "q", tmp_path / "gguf", to="gguf")
    halfbyte.convert(tmp_path / "gguf", tmp_path / "out", to=to)
    record = halfbyte.verify(tmp_path / "out", source=tmp_path / "gguf", reload=False)
    assert record.passed, [c for c in record.checks if c.status == "failed"]
    assert outcomes(record)["copies"] == outcomes(record)["error"] == "passed"


def test_k_quants_made_dense_pass_and_one_changed_number_does_not(tiny_model: Models, tmp_path: Path) -> None:
    """A file as llama-quantize leaves it: Q4_K and Q6_K of random bytes in the place of Linears."""
    import gguf

    source = tiny_model("llama", hidden_size=256, intermediate_size=256, head_dim=64)
    halfbyte.convert(source, tmp_path / "f16", to="gguf", dtype="float16")
    plain = open_gguf(tmp_path / "f16/model.gguf")
    specs, constants = [], {}
    draw = np.random.default_rng(1)
    for i, (name, tensor) in enumerate(plain.tensors.items()):
        coded = len(tensor.shape) == 2
        kind = ("Q4_K", "Q6_K")[i % 2] if coded else tensor.kind
        specs.append(GgufSpec(name=name, kind=kind, shape=tensor.shape))
        constants[name] = plain.raw(name)
        if coded:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            data = draw.integers(0, 256, (tensor.shape[0], tensor.shape[1] // block, size), dtype=np.uint8)
            for at in {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
                data[..., at : at + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
            constants[name] = torch.from_numpy(data.reshape(tensor.shape[0], -1))
    kinds = {str: "STRING", bool: "BOOL", float: "FLOAT32", list: "ARRAY", int: "UINT32"}
    own = {k: v for k, v in plain.metadata.items() if not k.startswith(("halfbyte.", "general.arch"))}
    metadata = {k: (v, kinds[type(v)]) for k, v in own.items()}
    plan = Planned(file="k.gguf", architecture="llama", metadata=metadata, tensors=specs, constants=constants)
    GgufFiles([plan]).create(tmp_path)
    halfbyte.convert(tmp_path / "k.gguf", tmp_path / "out", to="dense")
    record = halfbyte.verify(tmp_path / "out", source=tmp_path / "k.gguf")
    assert record.passed, [c for c in record.checks if c.status == "failed"]
    tensors = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name][5, 7] *= 1.01
    tensors["extra.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out/model.safetensors").chmod(0o644)
    (tmp_path / "out/convert.json").unlink()
    problems = next(
        c.problems for c in halfbyte.verify(tmp_path / "out", source=tmp_path / "k.gguf").checks if c.name == "copies"
    )
    assert any(p.startswith(f"{name} differs from the source's blk.1.attn_k.weight (relative error ") for p in problems)
    assert "extra.weight stands for no tensor of the source" in problems
    assert "output_norm.weight of the source is lost" in problems


# ---- single files, other tools' folders, and a GGUF beside a GGUF


def test_a_single_file_and_another_tools_folder(sound: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = sound
    (tmp_path / "theirs").mkdir()
    file = shutil.copy(out / "model.gguf", tmp_path / "theirs/model-Q4_0.gguf")
    for checkpoint in (Path(file), tmp_path / "theirs"):
        record = halfbyte.verify(checkpoint, source=source)
        assert record.passed, [c for c in record.checks if c.status == "failed"]
        assert outcomes(record)["copies"] == outcomes(record)["error"] == "passed"
        assert outcomes(record)["config"] == "skipped"
        assert (tmp_path / "theirs/verify.json").exists() == checkpoint.is_dir()
    spoil(shutil.copytree(out, tmp_path / "spoilt"), "blk.1.attn_q.weight", 2, b"\x2b")
    assert not halfbyte.verify(tmp_path / "spoilt/model.gguf", source=source).passed
    shutil.copy(file, tmp_path / "theirs/model-Q8_0.gguf")
    with pytest.raises(CheckpointError, match=r"holds several models: model-Q4_0\.gguf, model-Q8_0\.gguf"):
        halfbyte.verify(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="there is no such file"):
        halfbyte.verify(tmp_path / "none.gguf")


def test_a_gguf_beside_the_gguf_that_it_was_made_from(sound: tuple[Path, Path], tmp_path: Path) -> None:
    _, source = sound
    halfbyte.convert(source, tmp_path / "out", to="gguf")
    for beside in (source, source / "model.gguf"):
        assert halfbyte.verify(tmp_path / "out", source=beside).passed
    spoil(tmp_path / "out", "blk.1.attn_q.weight", 2, b"\x2b")
    spoil(tmp_path / "out", "blk.1.ffn_norm.weight", 2, b"\x2b")
    record = halfbyte.verify(tmp_path / "out", source=source)
    for name, tensor in (("error", "blk.1.attn_q.weight"), ("copies", "blk.1.ffn_norm.weight")):
        (problem,) = next(c.problems for c in record.checks if c.name == name)
        assert problem.startswith(f"{tensor} differs from the source's (relative error ")


def test_a_broken_checkpoint_does_not_say_that_no_source_was_given(sound: tuple[Path, Path], tmp_path: Path) -> None:
    halfbyte.convert(sound[1], tmp_path / "out", to="compressed-tensors")
    config = json.loads((tmp_path / "out/config.json").read_text())
    del config["quantization_config"]["config_groups"]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    record = halfbyte.verify(tmp_path / "out", source=sound[1])
    for check in record.checks:
        if check.name in ("copies", "error"):
            assert (check.status, check.detail) == ("skipped", "the structure of the checkpoint has to be right first")
