"""What config.json a GGUF's metadata stand for: the reverse of :func:`gguf_families.model_metadata`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from halfbyte.conversion.gguf_families import FAMILIES, Family, rope_factors
from halfbyte.errors import CheckpointError

# Llama 3.1 and later: what its published configs say beside the factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def known_family(metadata: Mapping[str, Any]) -> Family | None:
    """The family of a file, ``None`` where halfbyte does not know its architecture."""
    architecture = metadata.get("general.architecture")
    mixture = bool(metadata.get(f"{architecture}.expert_count"))
    return next((f for f in FAMILIES if f.architecture == architecture and f.experts == mixture), None)


def family_in(metadata: Mapping[str, Any], where: str) -> Family:
    """The family of a file.

    Raises:
        CheckpointError: halfbyte does not know the architecture.
    """
    family = known_family(metadata)
    if family is not None:
        return family
    architecture = metadata.get("general.architecture")
    mixture = bool(metadata.get(f"{architecture}.expert_count"))
    known = ", ".join(dict.fromkeys(f.architecture for f in FAMILIES))
    raise CheckpointError(
        f"has architecture {architecture}{' with experts' if mixture else ''}, which halfbyte cannot read",
        where=where,
        remedy=f"Architectures that it can: {known}.",
    )


class _Values:
    """Metadata of one architecture; a missing one that has no default is an error."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: str) -> None:
        self.metadata, self.prefix, self.where = metadata, architecture + ".", where

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(self.prefix + key, default)

    def need(self, key: str) -> Any:
        if self.prefix + key not in self.metadata:
            raise CheckpointError(f"metadata {self.prefix}{key} are missing", where=self.where)
        return self.metadata[self.prefix + key]


def head_counts(metadata: Mapping[str, Any], family: Family, where: str) -> tuple[int, int]:
    """Heads of queries, and of keys and values.

    Raises:
        CheckpointError: they are not there, or differ between layers.
    """
    v = _Values(metadata, family.architecture, where)
    heads = v.need("attention.head_count")
    kv_heads = v.get("attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise CheckpointError("has layers with different numbers of heads, which halfbyte cannot read", where=where)
    return int(heads), int(kv_heads)


def config_of(
    metadata: Mapping[str, Any], family: Family, tensors: Mapping[str, tuple[int, ...]], dtype: str, where: str
) -> dict[str, Any]:
    """``config.json`` of the dense checkpoint.

    Args:
        metadata: of the file.
        family: its family.
        tensors: shapes by GGUF name.
        dtype: ``bfloat16`` and so on.
        where: for messages.

    Raises:
        CheckpointError: metadata are missing, or per-layer where transformers has one value.
    """
    v = _Values(metadata, family.architecture, where)
    if "token_embd.weight" not in tensors:
        raise CheckpointError("tensor token_embd.weight is missing", where=where)
    heads, kv_heads = head_counts(metadata, family, where)
    vocab_size, hidden = tensors["token_embd.weight"]
    width = v.get("attention.key_length") or v.get("rope.dimension_count") or hidden // heads
    layers = v.need("block_count")
    config: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": family.model_types[0],
        "dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": v.need("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "max_position_embeddings": v.need("context_length"),
        "rms_norm_eps": _decimal(v.need("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    config["hidden_activation" if family.norm_offset else "hidden_act"] = family.activation
    if family.architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if family.architecture in ("llama", "granite") and not family.experts:
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _decimal(v.get("rope.freq_base", 10000.0))}
    kind = v.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": _decimal(v.need("rope.scaling.factor"))}
    if kind == "yarn":
        rope |= {
            "original_max_position_embeddings": v.need("rope.scaling.original_context_length"),
            "beta_fast": v.get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": v.get("rope.scaling.yarn_beta_slow", 1.0),
        }
    if family.architecture == "mistral3":
        scale = v.get("rope.scaling.yarn_log_multiplier", 0.0)
        rope |= {"mscale": scale, "mscale_all_dim": scale}
        rope["llama_4_scaling_beta"] = v.get("attention.temperature_scale", 0.0)
    if family.swa_period:
        period = v.get("attention.sliding_window_pattern", family.swa_period)
        if isinstance(period, list):
            sliding = [bool(p) for p in period]
        else:
            sliding = [i % period < period - 1 for i in range(layers)]
        config["sliding_window"] = v.get("attention.sliding_window", 4096)
        config["layer_types"] = ["sliding_attention" if s else "full_attention" for s in sliding]
        is_27b = layers == family.layers_27b
        config["query_pre_attn_scalar"] = hidden // heads if is_27b else width
    if family.architecture == "gemma2":
        config["attn_logit_softcapping"] = v.get("attn_logit_softcapping", 50.0)
        config["final_logit_softcapping"] = v.get("final_logit_softcapping", 30.0)
    if family.architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": _decimal(v.get("rope.freq_base_swa", 10000.0))}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    else:
        config["rope_parameters"] = rope
    if family.architecture == "granite":
        config["attention_multiplier"] = _decimal(v.need("attention.scale"))
        config["embedding_multiplier"] = _decimal(v.get("embedding_scale", 1.0))
        config["residual_multiplier"] = _decimal(v.get("residual_scale", 1.0))
        config["logits_scaling"] = _decimal(v.get("logit_scale", 1.0))
    if family.experts:
        count = v.need("expert_count")
        config["num_experts_per_tok"] = v.need("expert_used_count")
        config["num_experts" if family.architecture == "qwen3moe" else "num_local_experts"] = count
    if family.architecture == "qwen3moe":
        config["moe_intermediate_size"] = v.need("expert_feed_forward_length")
        config["norm_topk_prob"] = True
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        if (i := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = i
    return config


def llama3_rope(
    config: Mapping[str, Any], factors: torch.Tensor, where: str, noted: Mapping[str, Any]
) -> dict[str, Any]:
    """``rope_parameters`` of which a file's ``rope_freqs.weight`` are the factors: those ``noted``, or Llama 3's.

    Raises:
        CheckpointError: they are not those of any Llama 3 that was published.
    """
    from transformers import CONFIG_MAPPING

    rope = dict(config["rope_parameters"]) | {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3, **noted}
    made = CONFIG_MAPPING[config["model_type"]].from_dict({**config, "rope_parameters": rope})
    expected = rope_factors(made)
    if expected is None or not torch.allclose(expected, factors.float().flatten(), rtol=1e-4):
        raise CheckpointError(
            "rope_freqs.weight holds factors that no Llama 3 has, and config.json can only name those",
            where=where,
            remedy="Put the model's config.json into the same folder and give the folder.",
        )
    return rope


def _decimal(value: float) -> float:
    """A float32 as the short decimal number that it was: 1e-06 and not 9.999999974752427e-07."""
    return float(f"{value:.7g}")
