"""``inspect`` on what is no folder of safetensors files: GGUF, whoever wrote it (Flax: test_flax.py)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import halfbyte
import tiny
from conftest import Models
from halfbyte.conversion.gguf_file import GgufFiles, GgufSpec, Planned
from halfbyte.errors import CheckpointError
from halfbyte.inspection import Inspection


def parts(found: Inspection) -> dict[str, int]:
    return {p.name: p.parameters for p in found.parts}


def parameters(folder: Path) -> int:
    return sum(t.numel() for t in tiny.stored(folder).values())


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gemma3-vision"])
def test_a_gguf_has_the_parameters_of_its_source(family: str, tiny_model: Models, tmp_path: Path) -> None:
    source = tiny_model(family)
    halfbyte.quantize(source, tmp_path / "q", method="rtn", group_size=32)
    halfbyte.convert(tmp_path / "q", tmp_path / "gguf", to="gguf")
    found, before = halfbyte.inspect(tmp_path / "gguf"), halfbyte.inspect(source)
    assert found.blocks == before.blocks
    text = {"gemma3-vision": "Gemma3ForCausalLM"}
    assert found.architecture == text.get(family, before.architecture)
    assert parts(found) == parts(before)
    assert found.quantization == "gguf"
    assert found.bits_per_weight == 4.5
    up = next(g for g in found.groups if g.scheme == "Q4_0")
    assert up.quantized
    assert found.size_bytes == pytest.approx(sum(p.stat().st_size for p in (tmp_path / "gguf").glob("*.gguf")), rel=0.5)
    assert halfbyte.inspect(tmp_path / "gguf/model.gguf").blocks == before.blocks


def test_k_quants_and_unknown_architectures(tmp_path: Path) -> None:
    specs = [
        GgufSpec(name="token_embd.weight", kind="Q6_K", shape=(8, 256)),
        GgufSpec(name="blk.0.attn_norm.weight", kind="F32", shape=(256,)),
        GgufSpec(name="blk.0.ffn_up.weight", kind="Q4_K", shape=(16, 256)),
        GgufSpec(name="blk.1.ffn_up.weight", kind="Q2_K", shape=(16, 256)),
    ]
    plan = Planned(file="m.gguf", architecture="llama", metadata={}, tensors=specs, constants={})
    GgufFiles([plan]).create(tmp_path)
    found = halfbyte.inspect(tmp_path / "m.gguf")
    assert [(g.modules, g.scheme) for g in found.groups] == [
        ("model.embed_tokens", "Q6_K"),
        ("model.layers.*.mlp.up_proj", "Q4_K"),
        ("model.layers.*.mlp.up_proj", "Q2_K"),
    ]
    sizes = {"Q6_K": 210, "Q4_K": 144, "Q2_K": 84}
    assert found.bits_per_weight == pytest.approx(
        8 * (8 * sizes["Q6_K"] + 16 * sizes["Q4_K"] + 16 * sizes["Q2_K"]) / (256 * 40)
    )
    assert found.format == "Q4_K"
    assert found.parameters == sum(math.prod(s.shape) for s in specs)
    GgufFiles([Planned(file="m.gguf", architecture="rwkv7", metadata={}, tensors=specs, constants={})]).create(tmp_path)
    found = halfbyte.inspect(tmp_path / "m.gguf")
    assert found.architecture == "rwkv7"
    assert found.blocks == 2
    assert "convert does not read this architecture" in found.notes[0]


def test_a_broken_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03" + bytes(11))
    with pytest.raises(CheckpointError, match=r"x\.gguf: "):
        halfbyte.inspect(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"none\.gguf"):
        halfbyte.inspect(tmp_path / "none.gguf")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.ckpt", "pytorch_model.bin", "model.pkl"])
@pytest.mark.parametrize("to", ["dense", "gguf", "awq"])
def test_pickles_are_never_opened(name: str, to: str, tiny_model: Models, tmp_path: Path) -> None:
    """A pickle that would run code when it is loaded: refused, and nothing was run."""
    folder = tmp_path / "source"
    folder.mkdir()
    for file in tiny_model("llama").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())

    class Bomb:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"model.norm.weight": Bomb()}, folder / name)
    with pytest.raises(CheckpointError, match="safetensors"):
        halfbyte.convert(folder, tmp_path / "out", to=to)
    assert not (tmp_path / "exploded").exists()
    assert not list(tmp_path.glob("out*"))
