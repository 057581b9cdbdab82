"""Finding the decoder blocks among the tensor names of real families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte.architectures import KEPT_MODULES, NOT_LANGUAGE, find_block_prefix, is_linear_weight, map_blocks
from halfbyte.checkpoint.reader import Checkpoint, TensorInfo
from halfbyte.errors import ArchitectureError, HalfbyteError

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (
    *NORMS,
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
)

Shapes = dict[str, tuple[int, ...]]


def decoder(prefix: str, layers: int, linears: tuple[str, ...], norms: tuple[str, ...]) -> Shapes:
    shapes: Shapes = {}
    for i in range(layers):
        shapes |= {f"{prefix}.{i}.{m}.weight": (64, 64) for m in linears}
        shapes |= {f"{prefix}.{i}.{m}.weight": (64,) for m in norms}
    return shapes


def siglip(prefix: str, layers: int) -> Shapes:
    """A vision tower with more layers than the language model, which must not win."""
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    shapes: Shapes = {f"{prefix}.embeddings.patch_embedding.weight": (64, 3, 14, 14)}
    for i in range(layers):
        for part in parts:
            shapes |= {f"{prefix}.encoder.layers.{i}.{part}.weight": (64, 64)}
            shapes |= {f"{prefix}.encoder.layers.{i}.{part}.bias": (64,)}
    return shapes


LLAMA: Shapes = {
    "model.embed_tokens.weight": (256, 64),
    **decoder("model.layers", 3, ATTENTION + MLP, NORMS),
    "model.norm.weight": (64,),
    "lm_head.weight": (256, 64),
}
GEMMA3_OLD: Shapes = {
    "language_model.model.embed_tokens.weight": (256, 64),
    **decoder("language_model.model.layers", 3, ATTENTION + MLP, GEMMA_NORMS),
    "language_model.model.norm.weight": (64,),
    "multi_modal_projector.mm_input_projection_weight": (64, 64),
    "multi_modal_projector.mm_soft_emb_norm.weight": (64,),
    **siglip("vision_tower.vision_model", 5),
}
GEMMA3_NEW: Shapes = {
    "model.language_model.embed_tokens.weight": (256, 64),
    **decoder("model.language_model.layers", 3, ATTENTION + MLP, GEMMA_NORMS),
    "model.language_model.norm.weight": (64,),
    "model.multi_modal_projector.mm_input_projection_weight": (64, 64),
    **siglip("model.vision_tower.vision_model", 5),
}
MISTRAL3: Shapes = {
    **decoder("language_model.model.layers", 3, ATTENTION + MLP, NORMS),
    "language_model.lm_head.weight": (256, 64),
    "multi_modal_projector.linear_1.weight": (64, 64),
    "multi_modal_projector.patch_merger.merging_layer.weight": (64, 256),
    "vision_tower.patch_conv.weight": (64, 3, 14, 14),
    **decoder(
        "vision_tower.transformer.layers",
        5,
        ("attention.q_proj", "attention.k_proj", "feed_forward.gate_proj"),
        ("attention_norm",),
    ),
}
QWEN2_VL: Shapes = {
    "model.embed_tokens.weight": (256, 64),
    **decoder("model.layers", 3, ATTENTION + MLP, NORMS),
    **{f"model.layers.{i}.self_attn.{m}_proj.bias": (64,) for i in range(3) for m in "qkv"},
    "visual.patch_embed.proj.weight": (64, 3, 2, 14, 14),
    **decoder("visual.blocks", 5, ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), ("norm1", "norm2")),
    "visual.merger.mlp.0.weight": (64, 64),
    "visual.merger.mlp.2.weight": (64, 64),
}
QWEN2_VL_NEW: Shapes = {
    f"model.{n}" if n.startswith("visual.") else n.replace("model.", "model.language_model.", 1): s
    for n, s in QWEN2_VL.items()
}
MIXTRAL: Shapes = {
    "model.embed_tokens.weight": (256, 64),
    **decoder(
        "model.layers",
        3,
        (
            *ATTENTION,
            "block_sparse_moe.gate",
            # more experts than layers: their numbers must not be taken for blocks
            *(f"block_sparse_moe.experts.{e}.{w}" for e in range(8) for w in ("w1", "w2", "w3")),
        ),
        NORMS,
    ),
}
QWEN3_MOE: Shapes = decoder(
    "model.layers",
    3,
    (*ATTENTION, "mlp.gate", "mlp.shared_expert_gate", *(f"mlp.experts.{e}.gate_proj" for e in range(8))),
    NORMS,
)
QWEN2_AUDIO: Shapes = {
    **decoder("audio_tower.layers", 5, ("self_attn.q_proj", "fc1"), ("self_attn_layer_norm",)),
    **decoder("language_model.model.layers", 3, ATTENTION + MLP, NORMS),
    "multi_modal_projector.linear.weight": (64, 64),
}
GPT2: Shapes = {
    **decoder("h", 3, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), ("ln_1", "ln_2")),
    "wte.weight": (256, 64),
}
FALCON: Shapes = decoder(
    "transformer.h",
    3,
    ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ("input_layernorm",),
)
FAMILIES: dict[str, tuple[Shapes, str, str, int]] = {
    "llama": (LLAMA, "model.layers", "model.", 7),
    "gemma3-old": (GEMMA3_OLD, "language_model.model.layers", "language_model.model.", 7),
    "gemma3-new": (GEMMA3_NEW, "model.language_model.layers", "model.language_model.", 7),
    "mistral3": (MISTRAL3, "language_model.model.layers", "language_model.model.", 7),
    "qwen2-vl": (QWEN2_VL, "model.layers", "model.", 7),
    "qwen2-vl-new": (QWEN2_VL_NEW, "model.language_model.layers", "model.language_model.", 7),
    "mixtral": (MIXTRAL, "model.layers", "model.", 28),
    "qwen3-moe": (QWEN3_MOE, "model.layers", "model.", 12),
    "qwen2-audio": (QWEN2_AUDIO, "language_model.model.layers", "language_model.model.", 7),
    "gpt2": (GPT2, "h", "", 4),
    "falcon": (FALCON, "transformer.h", "transformer.", 4),
}


def info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name=name, dtype="BF16", shape=shape, file="model.safetensors", offset=0, size_bytes=0)


def checkpoint(shapes: Shapes, config: dict[str, Any]) -> Checkpoint:
    return Checkpoint(
        path=Path("nowhere"), name="a/model", config=config, tensors={n: info(n, s) for n, s in shapes.items()}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_real_families(family: str) -> None:
    shapes, prefix, decoder_prefix, linears = FAMILIES[family]
    assert find_block_prefix(shapes) == prefix
    assert find_block_prefix(reversed(shapes)) == prefix
    found = map_blocks(checkpoint(shapes, {"num_hidden_layers": 3}))
    assert found.prefix == prefix
    assert found.decoder_prefix == decoder_prefix
    assert found.num_blocks == 3
    assert [len(b) for b in found.linears] == [linears] * 3
    assert found.unsupported == ()
    # Every tensor has exactly one place.
    placed = [n for i in range(3) for n in found.block_tensors(i)] + list(found.outside)
    assert sorted(placed) == sorted(shapes)
    for i in range(3):
        assert all(n.startswith(f"{prefix}.{i}.") for n in found.block_tensors(i))
    assert not any(n.startswith(f"{prefix}.") for n in found.outside)


def test_routers_are_kept() -> None:
    for shapes, kept in (
        (MIXTRAL, {"block_sparse_moe.gate"}),
        (QWEN3_MOE, {"mlp.gate", "mlp.shared_expert_gate"}),
    ):
        found = map_blocks(checkpoint(shapes, {"num_hidden_layers": 3}))
        matrices = {n for n in found.others[1] if len(shapes[n]) == 2}
        assert matrices == {f"model.layers.1.{m}.weight" for m in kept}


def test_the_linears_of_a_llama_block() -> None:
    found = map_blocks(checkpoint(LLAMA, {"num_hidden_layers": 3}))
    assert found.linears[2] == tuple(f"model.layers.2.{m}" for m in ATTENTION + MLP)
    assert found.others[2] == tuple(f"model.layers.2.{m}.weight" for m in NORMS)
    assert found.outside == ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


@pytest.mark.parametrize("module", ["block_sparse_moe.gate", "mlp.router", "mlp.shared_expert_gate", "gate", "moe.wg"])
def test_kept_modules(module: str) -> None:
    assert KEPT_MODULES.search(module)
    assert not is_linear_weight(info(f"model.layers.0.{module}.weight", (8, 64)))


@pytest.mark.parametrize("module", ["mlp.gate_proj", "mlp.gate_up_proj", "mlp.investigate", "self_attn.gate_o"])
def test_names_that_only_resemble_routers_are_quantised(module: str) -> None:
    assert is_linear_weight(info(f"model.layers.0.{module}.weight", (64, 64)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.bias", (64,)),
        ("model.layers.0.input_layernorm.weight", (64,)),
        ("model.layers.0.conv.weight", (64, 3, 4)),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 64)),
        ("model.layers.0.mixer.A_log", (64, 64)),
    ],
)
def test_what_is_no_linear_weight(name: str, shape: tuple[int, ...]) -> None:
    assert not is_linear_weight(info(name, shape))


@pytest.mark.parametrize(
    "prefix",
    [
        "vision_tower.vision_model.encoder.layers",
        "model.vision_tower.transformer.layers",
        "model.visual.blocks",
        "visual.blocks",
        "audio_tower.layers",
        "model.multi_modal_projector.layers",
        "multi_modal_projector.layers",
        "model.connector.modality_projection",
        "model.encoder.layers",
        "mtp.layers",
    ],
)
def test_other_towers_are_no_language_model(prefix: str) -> None:
    assert NOT_LANGUAGE.search(prefix)
    assert find_block_prefix(f"{prefix}.{i}.a.weight" for i in range(9)) is None


@pytest.mark.parametrize("prefix", ["model.layers", "model.decoder.layers", "transformer.h", "gpt_neox.layers"])
def test_language_prefixes(prefix: str) -> None:
    assert find_block_prefix(f"{prefix}.{i}.a.weight" for i in range(2)) == prefix


def test_extra_layers_past_the_config_are_outside() -> None:
    """DeepSeek stores its multi-token prediction as one layer more."""
    shapes = decoder("model.layers", 4, ATTENTION + MLP, NORMS)
    found = map_blocks(checkpoint(shapes, {"num_hidden_layers": 3}))
    assert found.num_blocks == 3
    assert {n.split(".")[2] for n in found.outside} == {"3"}


def test_the_config_may_be_nested() -> None:
    assert map_blocks(checkpoint(GEMMA3_NEW, {"text_config": {"num_hidden_layers": 3}})).num_blocks == 3


def test_fused_experts_are_reported() -> None:
    shapes = {**LLAMA, "model.layers.1.mlp.experts.gate_up_proj": (8, 64, 128)}
    found = map_blocks(checkpoint(shapes, {"num_hidden_layers": 3}))
    assert found.unsupported == ("model.layers.1.mlp.experts.gate_up_proj",)


def test_no_blocks() -> None:
    with pytest.raises(ArchitectureError) as caught:
        map_blocks(checkpoint({"a.weight": (4, 4)}, {"num_hidden_layers": 3, "architectures": ["OddModel"]}))
    assert str(caught.value) == (
        "a/model: no decoder blocks were found for architecture OddModel (no numbered module list among the tensors). "
        "halfbyte quantises decoder-only language models; `halfbyte inspect` shows what this is."
    )


@pytest.mark.parametrize("value", [None, "3", 0, -1])
def test_no_number_of_layers(value: object) -> None:
    with pytest.raises(ArchitectureError, match=rf"\(num_hidden_layers in the config is {value}\)"):
        map_blocks(checkpoint(LLAMA, {"num_hidden_layers": value}))


def test_absent_layers_are_named() -> None:
    shapes = {n: s for n, s in LLAMA.items() if not n.startswith("model.layers.1.")}
    words = (
        "a/model: model.layers: layers 1, 3, 4, 5, 6, 7, 8, 9 ... of 20 are absent from the weights. "
        "The checkpoint is incomplete; download it again."
    )
    source = checkpoint(shapes, {"num_hidden_layers": 20})
    with pytest.raises(ArchitectureError) as caught:
        map_blocks(source)
    assert str(caught.value) == words
    found: list[HalfbyteError] = []
    blocks = map_blocks(source, found)
    assert [str(e) for e in found] == [words]
    assert [len(b) for b in blocks.linears] == [7, 0, 7] + [0] * 17
