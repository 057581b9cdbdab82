"""The four sizes of Gemma 3, recognised by the shapes of their tensors, and the configs that Hugging Face's have.

Checkpoints for Flax come without a config. Everything that shapes do not say (windows, rope, which token is an image's)
is a fact about a size, and stands in :data:`SIZES`. Sources: the Gemma 3 technical report (arXiv 2503.19786, sections 2
and appendix), ``convert_gemma3_weights_orbax_to_hf.py`` in transformers, and the published ``config.json`` files, which
differ from that script in two places: 1B has no rope scaling, and ``query_pre_attn_scalar`` is the number itself rather
than its inverse root.

Keys are written as Google's own checkpoints have them (``rope_theta`` and so on): transformers 4 and 5, vLLM and
llama.cpp all read these, while transformers 5 alone reads what it would write itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

PADDING_ROWS = 64  # what multimodal checkpoints for Hugging Face have behind the vocabulary; image tokens are the first
END_OF_TURN = 106


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the tensors of a checkpoint say of its model."""

    layers: int
    hidden: int
    ffw: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def words(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    """What the tensors of the vision tower say of it."""

    layers: int
    hidden: int
    ffw: int
    heads: int
    patch: int
    positions: int

    def words(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One size: its shape and what shapes do not say.

    Attributes:
        name: as in the names of checkpoints.
        shape: of its tensors.
        window: tokens that sliding layers attend to.
        context: longest input in tokens.
        query_scalar: queries are divided by the root of this.
        rope_factor: by which positions are divided in full layers; ``None`` where they are not.
    """

    name: str
    shape: Shape
    window: int
    context: int
    query_scalar: int
    rope_factor: float | None


def _size(name: str, layers: int, hidden: int, ffw: int, heads: int, kv: int, dim: int, **facts: Any) -> Size:
    shape = Shape(layers=layers, hidden=hidden, ffw=ffw, heads=heads, kv_heads=kv, head_dim=dim, vocab=262_144)
    return Size(name=name, shape=shape, **facts)


SIZES = (
    _size("1b", 26, 1152, 6912, 4, 1, 256, window=512, context=32_768, query_scalar=256, rope_factor=None),
    _size("4b", 34, 2560, 10_240, 8, 4, 256, window=1024, context=131_072, query_scalar=256, rope_factor=8.0),
    _size("12b", 48, 3840, 15_360, 16, 8, 256, window=1024, context=131_072, query_scalar=256, rope_factor=8.0),
    _size("27b", 62, 5376, 21_504, 32, 16, 128, window=1024, context=131_072, query_scalar=168, rope_factor=8.0),
)
TOWER = TowerShape(layers=27, hidden=1152, ffw=4304, heads=16, patch=14, positions=4096)  # SigLIP-400M at 896 x 896


def size_of(shape: Shape, tower: TowerShape | None) -> Size | None:
    """The size that a checkpoint is of, ``None`` for any other shape."""
    if tower is not None and tower != TOWER:
        return None
    return next((s for s in SIZES if s.shape == shape), None)


def config_of(size: Size, *, tower: bool, chat: bool, dtype: str) -> dict[str, Any]:
    """``config.json`` of a size.

    Args:
        size: one of :data:`SIZES`.
        tower: whether the checkpoint has a vision tower.
        chat: whether it was tuned to chat: then the end of a turn ends the text as well.
        dtype: ``bfloat16`` or ``float32``.
    """
    eos: Any = [1, END_OF_TURN] if chat else 1
    text: dict[str, Any] = {
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "eos_token_id": eos,
        "final_logit_softcapping": None,
        "head_dim": size.shape.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": size.shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": size.shape.ffw,
        "max_position_embeddings": size.context,
        "num_attention_heads": size.shape.heads,
        "num_hidden_layers": size.shape.layers,
        "num_key_value_heads": size.shape.kv_heads,
        "pad_token_id": 0,
        "query_pre_attn_scalar": size.query_scalar,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": None if size.rope_factor is None else {"factor": size.rope_factor, "rope_type": "linear"},
        "rope_theta": 1_000_000.0,
        "sliding_window": size.window,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": size.shape.vocab + (PADDING_ROWS if tower else 0),
    }
    if not tower:
        return {"architectures": ["Gemma3ForCausalLM"], **text, "torch_dtype": dtype}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 255_999,
        "eoi_token_index": 256_000,
        "eos_token_id": eos,
        "image_token_index": 262_144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "text_config": {**text, "torch_dtype": dtype},
        "torch_dtype": dtype,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": TOWER.hidden,
            "image_size": 896,
            "intermediate_size": TOWER.ffw,
            "layer_norm_eps": 1e-6,
            "num_attention_heads": TOWER.heads,
            "num_channels": 3,
            "num_hidden_layers": TOWER.layers,
            "patch_size": TOWER.patch,
            "torch_dtype": dtype,
            "vision_use_head": False,
        },
    }


def shapes_in(config: Mapping[str, Any]) -> dict[str, int | None]:
    """The parts of :class:`Shape` and, with ``tower_`` before them, of :class:`TowerShape` that a config states."""
    text = config.get("text_config") or config
    keys = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "ffw": "intermediate_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
    }
    found = {ours: text.get(theirs) for ours, theirs in keys.items()}
    vision = config.get("vision_config")
    if vision:
        names = {"layers": "num_hidden_layers", "hidden": "hidden_size", "ffw": "intermediate_size"}
        names |= {"heads": "num_attention_heads", "patch": "patch_size"}
        found |= {f"tower_{ours}": vision.get(theirs) for ours, theirs in names.items()}
    return found


def generation_config(*, chat: bool) -> bytes:
    """``generation_config.json``: sampling as the technical report's authors recommend it."""
    settings = {
        "bos_token_id": 2,
        "do_sample": True,
        "eos_token_id": [1, END_OF_TURN] if chat else 1,
        "pad_token_id": 0,
        "top_k": 64,
        "top_p": 0.95,
    }
    return _json(settings)


def processor_files() -> dict[str, bytes]:
    """What prepares pictures: 896 x 896, each channel from -1 to 1, 256 tokens a picture."""
    pictures = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": 256,
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Gemma3Processor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 896, "width": 896},
    }
    return {
        "preprocessor_config.json": _json(pictures),
        "processor_config.json": _json({"image_seq_length": 256, "processor_class": "Gemma3Processor"}),
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
