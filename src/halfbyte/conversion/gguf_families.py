"""What llama.cpp calls the model families that it shares with transformers, their tensors and their options.

A family is data: the architecture in ``general.architecture``, names of tensors on either side, what llama.cpp does to
some of them, and how the options of ``config.json`` become metadata. The reverse is in ``gguf_configs``.

llama.cpp differs from transformers in three places, all of them exact rearrangements or one addition:

- Rotary embedding of the Llama family turns neighbouring rows of q and k, transformers' turns rows half a head apart:
  rows are reordered (:func:`permute`), codes and scales alike.
- Gemma's norms multiply by ``1 + w`` in transformers and by ``w`` in llama.cpp: 1 is added.
- Llama 3's stretched rotary frequencies are a tensor of factors, ``rope_freqs.weight``.

Whatever a config asks for that llama.cpp cannot do, or does otherwise without saying so, is listed by
:func:`family_problems`. Sources: llama.cpp's ``src/llama-model.cpp`` and ``src/models``, transformers' modeling files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Metadata = dict[str, tuple[Any, str]]  # key -> value, gguf's name of its type

ROPE_KEY = "halfbyte.rope"  # metadata that halfbyte adds for the way back: what Llama 3's factors were made from

_LAYER = "model.layers.{}."
_SHARED = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": _LAYER + "input_layernorm",
    "blk.{}.attn_q": _LAYER + "self_attn.q_proj",
    "blk.{}.attn_k": _LAYER + "self_attn.k_proj",
    "blk.{}.attn_v": _LAYER + "self_attn.v_proj",
    "blk.{}.attn_output": _LAYER + "self_attn.o_proj",
}
_MLP = {
    "blk.{}.ffn_gate": _LAYER + "mlp.gate_proj",
    "blk.{}.ffn_up": _LAYER + "mlp.up_proj",
    "blk.{}.ffn_down": _LAYER + "mlp.down_proj",
}
_PRE_NORM = {"blk.{}.ffn_norm": _LAYER + "post_attention_layernorm"}
_LLAMA = {**_SHARED, **_MLP, **_PRE_NORM}
_QK_NORMS = {
    "blk.{}.attn_q_norm": _LAYER + "self_attn.q_norm",
    "blk.{}.attn_k_norm": _LAYER + "self_attn.k_norm",
}
_GEMMA2 = {
    **_SHARED,
    **_MLP,
    "blk.{}.post_attention_norm": _LAYER + "post_attention_layernorm",
    "blk.{}.ffn_norm": _LAYER + "pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": _LAYER + "post_feedforward_layernorm",
}


def _experts(module: str, gate: str, up: str, down: str, router: str = "gate") -> dict[str, str]:
    """Names of a mixture's tensors; experts lie in stacks in GGUF, expert e's part is ``{e}``."""
    return {
        "blk.{}.ffn_gate_inp": f"{_LAYER}{module}.{router}",
        "blk.{}.ffn_gate_exps": f"{_LAYER}{module}.experts.{{e}}.{gate}",
        "blk.{}.ffn_up_exps": f"{_LAYER}{module}.experts.{{e}}.{up}",
        "blk.{}.ffn_down_exps": f"{_LAYER}{module}.experts.{{e}}.{down}",
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of llama.cpp and the model types of transformers that are it.

    Attributes:
        architecture: llama.cpp's name.
        model_types: ``model_type`` of the (text) config; the first is what a GGUF becomes.
        model_class: of the checkpoint that a GGUF becomes.
        names: GGUF name -> dense name, without ``.weight`` and ``.bias``; ``{}`` is the layer, ``{e}`` the expert.
        permuted: whether rows of q and k are reordered.
        norm_offset: what is added to norm weights.
        activation: ``hidden_act`` that llama.cpp computes.
        experts: whether it is a mixture of experts.
        layers_27b: by its number of layers llama.cpp knows the size that divides attention by the square root of
            hidden size / heads and not of the head's width (Gemma).
        swa_period: every how many layers one with full attention comes where no metadata say; 0: no windows.
    """

    architecture: str
    model_types: tuple[str, ...]
    model_class: str
    names: Mapping[str, str] = field(default_factory=lambda: dict(_LLAMA))
    permuted: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    experts: bool = False
    layers_27b: int | None = None
    swa_period: int = 0


FAMILIES: tuple[Family, ...] = (
    Family(architecture="llama", model_types=("llama", "mistral"), model_class="LlamaForCausalLM", permuted=True),
    Family(
        architecture="llama",
        model_types=("mixtral",),
        model_class="MixtralForCausalLM",
        names={**_SHARED, **_PRE_NORM, **_experts("block_sparse_moe", "w1", "w3", "w2")},
        permuted=True,
        experts=True,
    ),
    Family(architecture="mistral3", model_types=("ministral3",), model_class="Ministral3ForCausalLM", permuted=True),
    Family(architecture="qwen2", model_types=("qwen2",), model_class="Qwen2ForCausalLM"),
    Family(
        architecture="qwen3",
        model_types=("qwen3",),
        model_class="Qwen3ForCausalLM",
        names={**_LLAMA, **_QK_NORMS},
    ),
    Family(
        architecture="qwen3moe",
        model_types=("qwen3_moe",),
        model_class="Qwen3MoeForCausalLM",
        names={**_SHARED, **_PRE_NORM, **_QK_NORMS, **_experts("mlp", "gate_proj", "up_proj", "down_proj")},
        experts=True,
    ),
    Family(
        architecture="gemma2",
        model_types=("gemma2",),
        model_class="Gemma2ForCausalLM",
        names={k: v for k, v in _GEMMA2.items() if k != "output"},  # its head is always the embedding table
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        layers_27b=46,
        swa_period=2,
    ),
    Family(
        architecture="gemma3",
        model_types=("gemma3_text",),
        model_class="Gemma3ForCausalLM",
        names={**_GEMMA2, **_QK_NORMS},
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        layers_27b=62,
        swa_period=6,
    ),
    Family(architecture="granite", model_types=("granite",), model_class="GraniteForCausalLM", permuted=True),
)


def family_of(model_type: str) -> Family | None:
    """The family of a (text) config's ``model_type``."""
    return next((f for f in FAMILIES if model_type in f.model_types), None)


def supported() -> str:
    """For messages: all model types."""
    return ", ".join(t for f in FAMILIES for t in f.model_types)


def text_name(name: str) -> str:
    """A language model's tensor name without the prefix that multimodal checkpoints give it.

    ``language_model.model.layers...`` and ``model.language_model.layers...`` are both ``model.layers...``.
    """
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's row order of q and k: row ``h * width / 2 + i`` of a head becomes row ``2 i + h``, h = 0, 1.

    Works on anything whose first dimension are rows: codes, scales, biases.
    """
    rows = weight.shape[0]
    parts = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return parts.transpose(1, 2).reshape(weight.shape)


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Inverse of :func:`permute`."""
    rows = weight.shape[0]
    parts = weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:])
    return parts.transpose(1, 2).reshape(weight.shape)


def turned_heads(family: Family, name: str, heads: int, kv_heads: int) -> int:
    """Heads in which the rows of a tensor (by its GGUF name) are reordered, 0 where they are not."""
    if not family.permuted:
        return 0
    part = name.split(".")[2] if name.startswith("blk.") else ""
    return {"attn_q": heads, "attn_k": kv_heads}.get(part, 0)


def is_norm(name: str) -> bool:
    """Whether a tensor (by its GGUF name) is a norm's weight."""
    return name.endswith("norm.weight")


def head_dim(config: Any) -> int:
    """Width of a head of a (text) config of transformers."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _rope(config: Any, kind: str) -> Mapping[str, Any]:
    """Rotary options, of layers of one type where they differ."""
    rope: dict[str, Any] = config.rope_parameters
    own: Mapping[str, Any] = rope.get(kind, rope)
    return own


def _windows(config: Any) -> list[bool]:
    """Which layers have a sliding window."""
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "sliding_window", None) is None:
        return [False] * config.num_hidden_layers
    if kinds is None:
        return [True] * config.num_hidden_layers
    return [k == "sliding_attention" for k in kinds]


def _period(windows: list[bool]) -> int | None:
    """n where every n-th layer, and no other, has full attention; ``None`` where there is no such n."""
    fitting = (n for n in range(1, len(windows) + 2) if windows == [i % n < n - 1 for i in range(len(windows))])
    return next(fitting, None)


def family_problems(config: Any, family: Family) -> list[str]:
    """What a (text) config of transformers asks for and llama.cpp does not do."""
    problems = []
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation not in (None, family.activation):
        problems.append(f"hidden_act {activation}: llama.cpp computes {family.activation} for this architecture")
    windows = _windows(config)
    if family.swa_period and _period(windows) is None:
        problems.append(
            "layer_types: llama.cpp has sliding windows in all layers but every n-th, counted from the last"
        )
    if not family.swa_period and any(windows) and not all(windows):
        problems.append("layer_types: llama.cpp has no sliding windows for this architecture")
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None:
        expected = head_dim(config)
        if config.num_hidden_layers == family.layers_27b:
            expected = config.hidden_size // config.num_attention_heads
        if scalar != expected:
            problems.append(f"query_pre_attn_scalar {scalar}: llama.cpp divides by the square root of {expected}")
    if family.architecture == "gemma3" and getattr(config, "attn_logit_softcapping", None):
        problems.append("attn_logit_softcapping: llama.cpp has none for this architecture")
    if family.architecture == "gemma3" and getattr(config, "final_logit_softcapping", None):
        problems.append("final_logit_softcapping: llama.cpp has none for this architecture")
    if family.architecture == "qwen3moe" and (
        getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1
    ):
        problems.append("mlp_only_layers, decoder_sparse_step: llama.cpp has experts in every layer")
    if family.architecture == "qwen3moe" and not config.norm_topk_prob:
        problems.append("norm_topk_prob false: llama.cpp always normalises the experts' shares")
    for kind in ("full_attention", "sliding_attention"):
        problems += _rope_problems(_rope(config, kind), kind, family)
    return list(dict.fromkeys(problems))


def _rope_problems(rope: Mapping[str, Any], kind: str, family: Family) -> list[str]:
    scaling = rope.get("rope_type", "default")
    if scaling not in ("default", "linear", "llama3", "yarn"):
        return [f"rope_type {scaling}: halfbyte cannot write it for llama.cpp yet"]
    if kind == "sliding_attention" and family.swa_period and scaling != "default" and "rope_theta" in rope:
        return [f"rope_type {scaling} in layers with a sliding window: llama.cpp does not stretch them"]
    if scaling == "llama3" and family.architecture not in ("llama", "granite"):
        return [f"rope_type llama3: llama.cpp reads no frequencies for {family.architecture}"]
    if scaling == "yarn" and family.architecture != "mistral3":
        factor, found = rope["factor"], rope.get("attention_factor")
        if found is not None and not math.isclose(found, 0.1 * math.log(factor) + 1, rel_tol=1e-6):
            return [f"attention_factor {found}: llama.cpp uses 0.1 ln(factor) + 1"]
        if rope.get("mscale") or rope.get("mscale_all_dim"):
            return ["mscale, mscale_all_dim: llama.cpp has neither for this architecture"]
    return []


def model_metadata(config: Any, family: Family) -> Metadata:
    """Metadata below the architecture's name, from a (text) config of transformers."""
    width = head_dim(config)
    values: dict[str, tuple[Any, str]] = {
        "context_length": (context_length(config, family), "UINT32"),
        "embedding_length": (config.hidden_size, "UINT32"),
        "block_count": (config.num_hidden_layers, "UINT32"),
        "feed_forward_length": (config.intermediate_size, "UINT32"),
        "vocab_size": (config.vocab_size, "UINT32"),
        "attention.head_count": (config.num_attention_heads, "UINT32"),
        "attention.head_count_kv": (config.num_key_value_heads, "UINT32"),
        "attention.key_length": (width, "UINT32"),
        "attention.value_length": (width, "UINT32"),
        "attention.layer_norm_rms_epsilon": (config.rms_norm_eps, "FLOAT32"),
        "rope.dimension_count": (width, "UINT32"),
    }
    rope = _rope(config, "full_attention")
    values["rope.freq_base"] = (float(rope["rope_theta"]), "FLOAT32")
    values |= _scaling(rope, family)
    if family.swa_period:
        windows = _windows(config)
        values["attention.sliding_window"] = (config.sliding_window, "UINT32")
        period = _period(windows)
        if period != _period([i % family.swa_period < family.swa_period - 1 for i in range(len(windows))]):
            values["attention.sliding_window_pattern"] = (period, "UINT32")
        local = _rope(config, "sliding_attention")
        values["rope.freq_base_swa"] = (float(local["rope_theta"]), "FLOAT32")
    if family.architecture == "gemma2":
        values["attn_logit_softcapping"] = (config.attn_logit_softcapping, "FLOAT32")
        values["final_logit_softcapping"] = (config.final_logit_softcapping, "FLOAT32")
    if family.architecture == "granite":
        values["attention.scale"] = (config.attention_multiplier, "FLOAT32")
        values["embedding_scale"] = (config.embedding_multiplier, "FLOAT32")
        values["residual_scale"] = (config.residual_multiplier, "FLOAT32")
        values["logit_scale"] = (config.logits_scaling, "FLOAT32")
    if family.experts:
        values["expert_count"] = (expert_count(config), "UINT32")
        values["expert_used_count"] = (config.num_experts_per_tok, "UINT32")
    if family.architecture == "qwen3moe":
        values["expert_feed_forward_length"] = (config.moe_intermediate_size, "UINT32")
    return {f"{family.architecture}.{key}": value for key, value in values.items() if value[0] is not None}


def expert_count(config: Any) -> int:
    """Experts of a layer."""
    return int(getattr(config, "num_local_experts", None) or config.num_experts)


def context_length(config: Any, family: Family) -> int:
    """How many tokens llama.cpp computes as the model would.

    It has no sliding windows for the Llama family (Mistral 7B v0.1): up to the window's length there is no difference.
    """
    if not family.swa_period and any(_windows(config)):
        return int(min(config.sliding_window, config.max_position_embeddings))
    return int(config.max_position_embeddings)


def _scaling(rope: Mapping[str, Any], family: Family) -> Metadata:
    kind = rope.get("rope_type", "default")
    if kind not in ("linear", "yarn"):
        return {}
    values: Metadata = {
        "rope.scaling.type": (kind, "STRING"),
        "rope.scaling.factor": (float(rope["factor"]), "FLOAT32"),
    }
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = (rope["original_max_position_embeddings"], "UINT32")
        values["rope.scaling.yarn_beta_fast"] = (float(rope.get("beta_fast") or 32), "FLOAT32")
        values["rope.scaling.yarn_beta_slow"] = (float(rope.get("beta_slow") or 1), "FLOAT32")
        if family.architecture == "mistral3":
            values["rope.scaling.yarn_log_multiplier"] = (float(rope.get("mscale_all_dim") or 0), "FLOAT32")
            if rope.get("llama_4_scaling_beta"):
                values["attention.temperature_scale"] = (float(rope["llama_4_scaling_beta"]), "FLOAT32")
    return values


def rope_factors(config: Any) -> torch.Tensor | None:
    """``rope_freqs.weight``: by what Llama 3 divides each rotary frequency, ``[head_dim / 2]`` float32.

    Frequencies ``f = theta**(-2 i / d)`` of wavelengths ``2 pi / f`` under ``L / high`` stay, those over ``L / low``
    are divided by the factor, and between them ``f`` becomes ``(1 - t) f / factor + t f`` with
    ``t = (L / wavelength - low) / (high - low)``; L is the original context length (Llama 3.1's reference code).
    """
    rope = _rope(config, "full_attention")
    if rope.get("rope_type") != "llama3":
        return None
    width = head_dim(config)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / width)
        share = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        factors.append(1.0 / ((1 - share) / factor + share))
    return torch.tensor(factors, dtype=torch.float32)
