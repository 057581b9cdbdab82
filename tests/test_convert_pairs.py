"""Every way between two formats and back: the same bytes, whatever the shapes, groups and scales."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import coded
import halfbyte
import tiny
from coded import Coded, random_coded
from conftest import Models

FORMATS = ("compressed-tensors", "awq", "gptq", "gptq-v2", "gguf")
PAIRS = list(itertools.permutations(FORMATS, 2))


@pytest.fixture(autouse=True, scope="module")
def _without_waiting_for_the_disk() -> Iterator[None]:
    """Dozens of small checkpoints; what is on the disk after a crash is test_convert_resume's."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def weights_of(folder: Path) -> dict[str, bytes]:
    found = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf")}
    assert found
    return found


@pytest.fixture(scope="module")
def model(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """A tiny model in a format, with symmetric codes of 4 or 8 bits and scales of a dtype that all formats share."""
    root = tmp_path_factory.mktemp("models")

    def get(kind: str, bits: int) -> Path:
        first, out = root / f"q{bits}", root / f"{kind} {bits}"
        if not first.exists():
            source = tiny_model("llama", dtype=torch.float16)
            halfbyte.quantize(source, first, method="rtn", scheme=f"W{bits}A16", group_size=32, device="cpu")
        if not out.exists():
            halfbyte.convert(first, out, to=kind)
        return out

    return get


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_there_and_back(a: str, b: str, bits: int, model: Callable[[str, int], Path], tmp_path: Path) -> None:
    if "awq" in (a, b) and bits != 4:
        return
    source, there = model(a, bits), tmp_path / f"q{bits}"  # a GGUF is called what its source's folder is
    record = halfbyte.convert(source, there, to=b)
    assert record.exact == record.quantized == 14
    record = halfbyte.convert(there, tmp_path / "back", to=a)
    assert record.exact == record.quantized == 14
    assert weights_of(tmp_path / "back") == weights_of(source)
    assert tiny.config_of(tmp_path / "back") == tiny.config_of(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(("a", "b"), [p for p in PAIRS if "gguf" not in p])
def test_there_and_back_with_zero_points(a: str, b: str, tmp_path: Path) -> None:
    draw = {"symmetric": False, "dtype": torch.float16, "least_zero": 1}
    weights = {
        f"{coded.LAYER}.mlp.up_proj": random_coded(1, **draw),
        f"{coded.LAYER}.mlp.down_proj": random_coded(2, out=24, columns=96, **draw),
    }
    first = coded.publish(
        tmp_path / "first",
        {n: coded.packed(w) for n, w in weights.items()},
        coded.ct_config(next(iter(weights.values()))),
        dtype=torch.float16,
    )
    halfbyte.convert(first, tmp_path / "a", to=a)
    halfbyte.convert(tmp_path / "a", tmp_path / "b", to=b)
    halfbyte.convert(tmp_path / "b", tmp_path / "back", to=a)
    assert weights_of(tmp_path / "back") == weights_of(tmp_path / "a")


# ---- a Llama of one layer, number by number


def llama(folder: Path, base: Path, *, bits: int, group_size: int | None, width: int, kv_heads: int, seed: int) -> Path:
    """One layer of ``2 * 32`` or more features, whose scales are anything that float16 and bfloat16 both hold."""
    hidden, heads = 2 * width, 2
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (width * kv_heads, hidden),
        "self_attn.v_proj": (width * kv_heads, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (3 * width, hidden),
        "mlp.up_proj": (3 * width, hidden),
        "mlp.down_proj": (hidden, 3 * width),
    }
    draw = np.random.default_rng(seed)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, (rows, columns) in shapes.items():
        groups = columns // (group_size or columns)
        exponents = draw.integers(-24, 9, (rows, groups))
        digits = np.where(exponents < -17, 1, draw.integers(64, 128, (rows, groups)) / 64)
        weight = Coded(
            bits=bits,
            codes=draw.integers(0, 1 << bits, (rows, columns)),
            scales=torch.from_numpy(digits * np.exp2(exponents)).to(torch.bfloat16),
            zeros=None,
            group_size=group_size,
        )
        modules[f"{coded.LAYER}.{name}"] = coded.packed(weight)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config: dict[str, Any] = json.loads((base / "config.json").read_text())
    config |= {
        "hidden_size": hidden,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "tie_word_embeddings": True,
        "quantization_config": coded.ct_config(weight),
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"{m}.{leaf}": t for m, leaves in modules.items() for leaf, t in leaves.items()}
    noise = torch.Generator().manual_seed(seed)
    tensors["model.embed_tokens.weight"] = torch.randn(config["vocab_size"], hidden, generator=noise).bfloat16()
    for name in ("model.norm", f"{coded.LAYER}.input_layernorm", f"{coded.LAYER}.post_attention_layernorm"):
        tensors[f"{name}.weight"] = torch.randn(hidden, generator=noise).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def base(tiny_model: Models) -> Path:
    return tiny_model("llama")


@settings(deadline=None, max_examples=12)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([32, 64, None]),
    width=st.sampled_from([32, 64, 96, 128]),
    kv_heads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)
def test_through_gguf_over_shapes_groups_and_scales(
    base: Path, bits: int, group_size: int | None, width: int, kv_heads: int, seed: int
) -> None:
    """compressed-tensors -> GGUF -> compressed-tensors and GPTQ, beside compressed-tensors -> GPTQ."""
    if width % (group_size or 32):
        group_size = 32
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made = llama(root / "made", base, bits=bits, group_size=group_size, width=width, kv_heads=kv_heads, seed=seed)
        halfbyte.convert(made, root / "a", to="compressed-tensors")
        record = halfbyte.convert(root / "a", root / "gguf", to="gguf")
        assert record.exact == record.quantized == 7
        halfbyte.convert(root / "gguf", root / "back", to="compressed-tensors")
        assert weights_of(root / "back") == weights_of(root / "a")
        assert tiny.config_of(root / "back") == tiny.config_of(root / "a")
        if kv_heads * width % 32 == 0:
            halfbyte.convert(root / "a", root / "gptq", to="gptq")
            halfbyte.convert(root / "gguf", root / "other", to="gptq")
            assert weights_of(root / "other") == weights_of(root / "gptq")
