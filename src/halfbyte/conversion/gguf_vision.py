"""Vision towers and projectors for llama.cpp: what goes into ``mmproj.gguf``.

Two kinds: SigLIP with Gemma 3's projector, and Pixtral with that of Mistral Small 3.1 and its like. They are not
quantised. As in the language model, Gemma's norm gets 1 added and Pixtral's rows of q and k are reordered; Pixtral's
file also holds the embedding of the token at the end of a row of patches. llama.cpp's GELU is the tanh approximation,
for models too whose config says otherwise. Does not cover: other towers (the language model is converted without).

Source: llama.cpp's ``tools/mtmd/clip.cpp`` and ``models/siglip.cpp``, ``models/pixtral.cpp`` beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.conversion.gguf_families import Metadata, permute
from halfbyte.records import parse_object

# What is added to the elements of a tensor, as to Gemma's other norms.
NORM_OFFSETS = {"mm.soft_emb_norm.weight": 1.0}

_SIGLIP_LAYER = "vision_tower.encoder.layers.{}."
_SIGLIP = {
    "vision_tower.embeddings.patch_embedding": "v.patch_embd",
    "vision_tower.embeddings.position_embedding": "v.position_embd",
    "vision_tower.post_layernorm": "v.post_ln",
    _SIGLIP_LAYER + "layer_norm1": "v.blk.{}.ln1",
    _SIGLIP_LAYER + "layer_norm2": "v.blk.{}.ln2",
    _SIGLIP_LAYER + "self_attn.q_proj": "v.blk.{}.attn_q",
    _SIGLIP_LAYER + "self_attn.k_proj": "v.blk.{}.attn_k",
    _SIGLIP_LAYER + "self_attn.v_proj": "v.blk.{}.attn_v",
    _SIGLIP_LAYER + "self_attn.out_proj": "v.blk.{}.attn_out",
    _SIGLIP_LAYER + "mlp.fc1": "v.blk.{}.ffn_up",
    _SIGLIP_LAYER + "mlp.fc2": "v.blk.{}.ffn_down",
    "multi_modal_projector.mm_soft_emb_norm": "mm.soft_emb_norm",
}
_PIXTRAL_LAYER = "vision_tower.transformer.layers.{}."
_PIXTRAL = {
    "vision_tower.patch_conv": "v.patch_embd",
    "vision_tower.ln_pre": "v.pre_ln",
    _PIXTRAL_LAYER + "attention_norm": "v.blk.{}.ln1",
    _PIXTRAL_LAYER + "ffn_norm": "v.blk.{}.ln2",
    _PIXTRAL_LAYER + "attention.q_proj": "v.blk.{}.attn_q",
    _PIXTRAL_LAYER + "attention.k_proj": "v.blk.{}.attn_k",
    _PIXTRAL_LAYER + "attention.v_proj": "v.blk.{}.attn_v",
    _PIXTRAL_LAYER + "attention.o_proj": "v.blk.{}.attn_out",
    _PIXTRAL_LAYER + "feed_forward.gate_proj": "v.blk.{}.ffn_gate",
    _PIXTRAL_LAYER + "feed_forward.up_proj": "v.blk.{}.ffn_up",
    _PIXTRAL_LAYER + "feed_forward.down_proj": "v.blk.{}.ffn_down",
    "multi_modal_projector.norm": "mm.input_norm",
    "multi_modal_projector.patch_merger.merging_layer": "mm.patch_merger",
    "multi_modal_projector.linear_1": "mm.1",
    "multi_modal_projector.linear_2": "mm.2",
}
# What llama.cpp computes with in float32 whatever else has.
FLOAT32 = frozenset({"v.patch_embd.weight", "v.position_embd.weight", "mm.input_projection.weight"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Vision:
    """How one checkpoint's tower and projector are written.

    Attributes:
        names: dense stem -> GGUF stem, ``{}`` the layer.
        metadata: of the file, without its name.
        heads: in which rows of q and k are reordered, 0 where they are not.
        break_token: id of the token at the end of a row of patches, ``None`` where there is none.
    """

    names: Mapping[str, str]
    metadata: Metadata
    heads: int = 0
    break_token: int | None = None

    def place(self, name: str) -> str | None:
        """GGUF name of a tensor by its dense one, ``None`` for what is not part of tower or projector."""
        plain = name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")
        if plain == "multi_modal_projector.mm_input_projection_weight":
            return "mm.input_projection.weight"
        stem, _, leaf = plain.rpartition(".")
        layer = ""
        if match := re.fullmatch(r"(.*\.layers\.)(\d+)(\..*)", stem):
            stem, layer = f"{match[1]}{{}}{match[3]}", match[2]
        if stem not in self.names or leaf not in ("weight", "bias"):
            return None
        return f"{self.names[stem].replace('{}', layer)}.{leaf}"

    def changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor (by its GGUF name) as llama.cpp wants it."""
        turned = permute(tensor, self.heads) if turned_in_tower(name, self.heads) else tensor
        return turned + NORM_OFFSETS[name] if name in NORM_OFFSETS else turned


def turned_in_tower(name: str, heads: int) -> int:
    """Heads in which the rows of a tensor (by its GGUF name) are reordered, 0 where they are not."""
    return heads if name.split(".")[-2] in ("attn_q", "attn_k") else 0


def tower_heads(metadata: Mapping[str, Any]) -> int:
    """``heads`` of :class:`Vision` by a file's metadata."""
    pixtral = metadata.get("clip.projector_type") == "pixtral"
    return int(metadata["clip.vision.attention.head_count"]) if pixtral else 0


def vision_of(config: Any, files: Mapping[str, bytes]) -> Vision | None:
    """What a multimodal model's tower and projector become; ``None`` for kinds that are not written.

    Args:
        config: transformers' config object of the whole model.
        files: contents of ``preprocessor_config.json``, ``processor_config.json`` and ``tokenizer.json``, if there.
    """
    tower: Any = getattr(config, "vision_config", None)
    kind = None if tower is None else (config.model_type, tower.model_type)
    if kind == ("gemma3", "siglip_vision_model"):
        side = tower.image_size // tower.patch_size
        values = _common(config, tower, files, "gemma3", tower.layer_norm_eps)
        values["clip.use_gelu"] = (True, "BOOL")
        values["clip.vision.projector.scale_factor"] = (side // int(config.mm_tokens_per_image**0.5), "UINT32")
        return Vision(names=_SIGLIP, metadata=values)
    if kind == ("mistral3", "pixtral"):
        values = _common(config, tower, files, "pixtral", 1e-5)  # the tower's norms have it built in
        values["clip.use_silu" if tower.hidden_act == "silu" else "clip.use_gelu"] = (True, "BOOL")
        values["clip.vision.spatial_merge_size"] = (config.spatial_merge_size, "UINT32")
        return Vision(names=_PIXTRAL, metadata=values, heads=tower.num_attention_heads, break_token=_break_token(files))
    return None


def _common(config: Any, tower: Any, files: Mapping[str, bytes], projector: str, epsilon: float) -> Metadata:
    pictures = parse_object(files, "preprocessor_config.json")
    nested = parse_object(files, "processor_config.json").get("image_processor", {})
    half = [0.5, 0.5, 0.5]
    mean, std = (pictures.get(k) or nested.get(k) or half for k in ("image_mean", "image_std"))
    return {
        "clip.has_vision_encoder": (True, "BOOL"),
        "clip.projector_type": (projector, "STRING"),
        "clip.vision.image_size": (tower.image_size, "UINT32"),
        "clip.vision.patch_size": (tower.patch_size, "UINT32"),
        "clip.vision.embedding_length": (tower.hidden_size, "UINT32"),
        "clip.vision.feed_forward_length": (tower.intermediate_size, "UINT32"),
        "clip.vision.projection_dim": (config.get_text_config().hidden_size, "UINT32"),
        "clip.vision.block_count": (tower.num_hidden_layers, "UINT32"),
        "clip.vision.attention.head_count": (tower.num_attention_heads, "UINT32"),
        "clip.vision.attention.layer_norm_epsilon": (epsilon, "FLOAT32"),
        "clip.vision.image_mean": ([float(v) for v in mean], "ARRAY"),
        "clip.vision.image_std": ([float(v) for v in std], "ARRAY"),
    }


def _break_token(files: Mapping[str, bytes]) -> int | None:
    token = parse_object(files, "processor_config.json").get("image_break_token", "[IMG_BREAK]")
    whole = parse_object(files, "tokenizer.json")
    found = {t["content"]: t["id"] for t in whole.get("added_tokens") or []}
    i = found.get(token)
    return i if isinstance(i, int) else None
