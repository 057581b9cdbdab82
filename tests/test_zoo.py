"""The tiny checkpoints are what they stand for: names as published, nothing constant, towers that outnumber the blocks.

Names are held against the tables of the ``gguf`` package, from which llama.cpp converts published checkpoints:
transformers, which writes ours, may spell them otherwise in its next version.
"""

from __future__ import annotations

import re

import gguf
import pytest
import transformers

import model_records
import tiny
import zoo
from conftest import Models

ARCH = gguf.MODEL_ARCH
# llama.cpp's architecture of each family that it has one for.
ARCHITECTURES = {
    "llama": ARCH.LLAMA,
    "llama3": ARCH.LLAMA,
    "mistral": ARCH.LLAMA,
    "ministral": ARCH.LLAMA,
    "ministral3": ARCH.LLAMA,
    "qwen2": ARCH.QWEN2,
    "qwen3": ARCH.QWEN3,
    "gemma2": ARCH.GEMMA2,
    "gemma3": ARCH.GEMMA3,
    "phi3": ARCH.PHI3,
    "phi4-mini": ARCH.PHI3,
    "granite": ARCH.GRANITE,
    "olmo2": ARCH.OLMO2,
    "olmo3": ARCH.OLMO2,
    "falcon": ARCH.FALCON,
    "falcon-7b": ARCH.FALCON,
    "stablelm": ARCH.STABLELM,
    "stablelm-2-12b": ARCH.STABLELM,
    "glm": ARCH.CHATGLM,
    "glm4": ARCH.GLM4,
    "cohere2": ARCH.COHERE2,
    "mixtral": ARCH.LLAMA,
    "qwen2-moe": ARCH.QWEN2MOE,
    "qwen3-moe": ARCH.QWEN3MOE,
    "deepseek-v2": ARCH.DEEPSEEK2,
    "deepseek-v2-lite": ARCH.DEEPSEEK2,
    "deepseek-v3": ARCH.DEEPSEEK2,
    "olmoe": ARCH.OLMOE,
    "gpt-oss": ARCH.GPT_OSS,
    "llama4-text": ARCH.LLAMA4,
    "granite-moe": ARCH.GRANITE_MOE,
    "granite-moe-shared": ARCH.GRANITE_MOE,
    "phimoe": ARCH.PHIMOE,
    "gemma3-vision": ARCH.GEMMA3,
    "mistral3": ARCH.LLAMA,
    "ministral3-vision": ARCH.LLAMA,
    "qwen2-vl": ARCH.QWEN2VL,
    "qwen2.5-vl": ARCH.QWEN2VL,
    "qwen3-vl": ARCH.QWEN3VL,
    "qwen3-vl-moe": ARCH.QWEN3VLMOE,
    "llama4": ARCH.LLAMA4,
    "llava": ARCH.LLAMA,
    "llava-next": ARCH.LLAMA,
    "internvl": ARCH.QWEN2,
    "smolvlm": ARCH.LLAMA,
    "idefics3": ARCH.LLAMA,
}
# What llama.cpp's converter treats in code, not by the table: it splits what is stacked, and leaves some out.
IN_CODE = re.compile(
    r"experts\.(gate_up_proj|down_proj)|(block_sparse_moe|shared_mlp)\.input_linear"
    r"|\.(k|q)_layernorm\.norms|mm_input_projection_weight|visual\.merger\.|image_newline|e_score_correction_bias"
    r"|\.(eh_proj|enorm|hnorm)\.|layers\.\d+\.(embed_tokens|shared_head)"
)
# Prefixes that the converter takes off or puts on.
PREFIXES = (
    (r"^", ""),
    (r"^model\.(language_model|text_model)\.", "model."),
    (r"^language_model\.", ""),
    (r"^model\.", ""),
    (r"^", "model."),
)


def known(name: str, table: gguf.TensorNameMap, tower: gguf.TensorNameMap) -> bool:
    one = re.sub(r"\.experts\.\d+\.", ".experts.", name)
    spelled = {re.sub(*p, one) for p in PREFIXES}
    return any(t.get_name(s, try_suffixes=(".weight", ".bias")) for t in (table, tower) for s in spelled)


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f in ARCHITECTURES])
def test_names_are_those_that_converters_know(family: str, tiny_model: Models) -> None:
    table = gguf.get_tensor_name_map(ARCHITECTURES[family], 4)
    tower = gguf.get_tensor_name_map(ARCH.MMPROJ, 4)
    names = tiny.stored(tiny_model(family)).keys()
    assert [n for n in names if not IN_CODE.search(n) and not known(n, table, tower)] == []


def test_every_published_family_is_held_against_a_converter() -> None:
    published = {f for f in zoo.FAMILIES if not f.endswith("-nested")}
    assert published - ARCHITECTURES.keys() == {"falcon-rw"}  # llama.cpp knows no Falcon with two norms in turn


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_no_tensor_is_constant(family: str, tiny_model: Models) -> None:
    tensors = tiny.stored(tiny_model(family))
    assert [n for n, t in tensors.items() if t.numel() > 1 and float(t.float().std()) == 0] == []


@pytest.mark.parametrize("family", [f for f, made in zoo.FAMILIES.items() if made.vision is not None])
def test_towers_have_more_layers_than_the_language_model(family: str, tiny_model: Models) -> None:
    numbered = [re.match(r"(.*?)\.(\d+)\.", n) for n in tiny.stored(tiny_model(family))]
    seeing = {int(m[2]) for m in numbered if m and re.search("vision|visual", m[1])}
    speaking = {int(m[2]) for m in numbered if m and not re.search("vision|visual", m[1])}
    assert len(seeing) > len(speaking)


def test_stacks_of_qwen3_vl_lie_as_published(tiny_model: Models) -> None:
    """``[experts, in, out]``, and neither side is the other's."""
    config = tiny.config_of(tiny_model("qwen3-vl-moe"))["text_config"]
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    tensors = tiny.stored(tiny_model("qwen3-vl-moe"))
    layer = "model.language_model.layers.0.mlp.experts"
    assert tensors[f"{layer}.gate_up_proj"].shape == (4, hidden, 2 * inner)
    assert tensors[f"{layer}.down_proj"].shape == (4, inner, hidden)
    assert hidden not in (inner, 2 * inner)


def test_deepseek_v3_has_a_layer_that_predicts(tiny_model: Models) -> None:
    folder = tiny_model("deepseek-v3")
    layers = tiny.config_of(folder)["num_hidden_layers"]
    names = {n.removeprefix(f"model.layers.{layers}.") for n in tiny.stored(folder) if f".layers.{layers}." in n}
    assert {"eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight"} <= names
    assert {"self_attn.o_proj.weight", "mlp.experts.7.down_proj.weight"} <= names


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_transformers_loads_it_whole(family: str, tiny_model: Models) -> None:
    folder = tiny_model(family)
    kind = getattr(transformers, zoo.FAMILIES[family].model)
    with model_records.quiet():
        _, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(".layers.3." in name for name in info["unexpected_keys"])
    assert bool(info["unexpected_keys"]) == (family == "deepseek-v3")
