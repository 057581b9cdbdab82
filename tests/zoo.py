"""Every family of language models that halfbyte quantises, as configurations small enough for a second's work.

A family is data: the classes of transformers that make it, the options that make it small and odd (see :mod:`tiny`,
which turns a family into a checkpoint folder), and, where checkpoints on the hub spell their tensors unlike what
transformers 5 writes, how. ``save_pretrained`` itself writes the names of published checkpoints: per-expert matrices
for mixtures that were published so, fused three-dimensional ones for those that were not.

Vision towers have more layers than the language model, so that a rule which counts layers alone picks the wrong ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

VOCAB = 320
WINDOW = 16  # sliding window of the families that have one
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Heads of 32 and rows of 128: what vLLM's attention and its int8 products take.
ROOMY: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

# Token ids of vision-language models, behind those of tiny.save_tokenizer.
IMAGE, IMAGE_START, IMAGE_END, VIDEO, IMAGE_BREAK = range(VOCAB, VOCAB + 5)
VISION_VOCAB = VOCAB + 32


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model class and what makes it small.

    Attributes:
        config, model: names of transformers' classes.
        kind: "text", "experts" (a mixture of experts) or "vision" (images too; it may hold experts all the same).
        tied: whether its head is the embedding table, usually.
        text: options of the language model besides :data:`COMMON`.
        vision: options of the vision tower; ``None`` for language models.
        published: what the hub's config.json calls the model class, where that is not transformers' name for it.
        pictures: the family in :mod:`pictures` whose processor it has; "" for none.
        top: options of the outer config of a vision-language model.
        renamed: pairs of pattern and replacement that turn the names which transformers writes into those of a
            published checkpoint.
        transposed: pattern of three-dimensional tensors whose last two dimensions are the other way round there.
        doubled: further names of tensors, by their first one: tied heads that are stored all the same.
        predictors: layers behind the last one that predict further tokens, which transformers does not write.
    """

    config: str
    model: str
    kind: str = "text"
    tied: bool = False
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] | None = None
    published: str = ""
    pictures: str = ""
    top: Mapping[str, Any] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    transposed: str = ""
    doubled: Mapping[str, str] = field(default_factory=dict)
    predictors: int = 0

    def made(self, **extra: Any) -> Any:
        """A model with weights as transformers draws them; ``extra`` are options of the language model."""
        text = COMMON | dict(self.text) | {"tie_word_embeddings": self.tied} | extra
        if "layer_types" in text:
            kinds = text["layer_types"]
            text["layer_types"] = [kinds[i % len(kinds)] for i in range(text["num_hidden_layers"])]
        config = getattr(transformers, self.config)
        if self.vision is None:
            return getattr(transformers, self.model)(config(**text))
        tied = text.pop("tie_word_embeddings")
        text["vocab_size"] = VISION_VOCAB
        options = {"text_config": text, "vision_config": dict(self.vision), "tie_word_embeddings": tied, **self.top}
        return getattr(transformers, self.model)(config(**options))


def publish(folder: Path, family: Family) -> None:
    """Rewrite what ``save_pretrained`` wrote as the family's published checkpoints have it."""
    if family.published:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [family.published]}))
    if not (family.renamed or family.transposed or family.doubled or family.predictors):
        return
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(file).items():
            if family.transposed and re.search(family.transposed, name):
                tensor = tensor.mT.contiguous()
            for pattern, replacement in family.renamed:
                name = re.sub(pattern, replacement, name)
            tensors[name] = tensor
            if name in family.doubled:
                tensors[family.doubled[name]] = tensor.clone()
        if family.predictors:
            tensors |= _predictors(tensors, family.predictors)
        save_file(tensors, file, metadata={"format": "pt"})


def _predictors(tensors: Mapping[str, torch.Tensor], further: int) -> dict[str, torch.Tensor]:
    """DeepSeek's multi-token prediction: layers behind the last one, each with parts of its own."""
    blocks = [re.match(r"(.*\.layers)\.(\d+)\.(.*)", name) for name in tensors]
    count = 1 + max(int(m[2]) for m in blocks if m)
    made = {}
    for i in range(count, count + further):
        for match in blocks:
            if match and int(match[2]) == count - 1:
                made[f"{match[1]}.{i}.{match[3]}"] = tensors[match[0]].flip(0).contiguous()
        prefix = next(m for m in blocks if m)[1]
        table, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
        made |= {f"{prefix}.{i}.{n}.weight": table.clone() for n in ("embed_tokens", "shared_head.head")}
        made |= {f"{prefix}.{i}.{n}.weight": norm.clone() for n in ("enorm", "hnorm", "shared_head.norm")}
        made[f"{prefix}.{i}.eh_proj.weight"] = table[: norm.numel()].repeat(1, 2)
    return made


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DEEPSEEK: dict[str, Any] = {
    **ROOMY,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
EXPERTS: dict[str, Any] = {**ROOMY, "intermediate_size": 64, "num_experts_per_tok": 2}
# Fused weights none of whose dimensions are equal, so that a wrong transposition cannot hide.
FUSED: dict[str, Any] = {**EXPERTS, "intermediate_size": 192}

TEXT: dict[str, Family] = {
    "llama": Family(config="LlamaConfig", model="LlamaForCausalLM"),
    "mistral": Family(config="MistralConfig", model="MistralForCausalLM", text={"sliding_window": WINDOW}),
    "qwen2": Family(config="Qwen2Config", model="Qwen2ForCausalLM", tied=True),
    "qwen3": Family(config="Qwen3Config", model="Qwen3ForCausalLM", text={"head_dim": 32}),
    "gemma3": Family(
        config="Gemma3TextConfig",
        model="Gemma3ForCausalLM",
        tied=True,
        text={"head_dim": 32, "query_pre_attn_scalar": 32, **SLIDING},
    ),
    "llama3": Family(
        config="LlamaConfig", model="LlamaForCausalLM", tied=True, text={**ROOMY, "rope_parameters": LLAMA3_ROPE}
    ),
    "ministral": Family(
        config="MinistralConfig", model="MinistralForCausalLM", text={**ROOMY, "head_dim": 32, **SLIDING}
    ),
    "ministral3": Family(
        config="Ministral3Config",
        model="Ministral3ForCausalLM",
        text={
            **ROOMY,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 64,
                "max_position_embeddings": 256,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "gemma2": Family(
        config="Gemma2Config",
        model="Gemma2ForCausalLM",
        tied=True,
        text={**ROOMY, "head_dim": 32, "query_pre_attn_scalar": 32, **SLIDING},
    ),
    "phi3": Family(config="Phi3Config", model="Phi3ForCausalLM", text={**ROOMY, "sliding_window": WINDOW}),
    "phi4-mini": Family(
        config="Phi3Config",
        model="Phi3ForCausalLM",
        tied=True,
        text={
            **ROOMY,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        },
    ),
    "granite": Family(
        config="GraniteConfig",
        model="GraniteForCausalLM",
        tied=True,
        text={
            **ROOMY,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.03,
        },
    ),
    "olmo2": Family(config="Olmo2Config", model="Olmo2ForCausalLM", text=ROOMY),
    "olmo3": Family(config="Olmo3Config", model="Olmo3ForCausalLM", text={**ROOMY, **SLIDING}),
    "falcon": Family(
        config="FalconConfig",
        model="FalconForCausalLM",
        tied=True,
        doubled={"transformer.word_embeddings.weight": "lm_head.weight"},
        text={**ROOMY, "new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False, "bias": False},
    ),
    "falcon-7b": Family(
        config="FalconConfig",
        model="FalconForCausalLM",
        tied=True,
        text={**ROOMY, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False},
    ),
    "falcon-rw": Family(
        config="FalconConfig",
        model="FalconForCausalLM",
        tied=True,
        text={
            **ROOMY,
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
    ),
    "stablelm": Family(config="StableLmConfig", model="StableLmForCausalLM", text={**ROOMY, "use_qkv_bias": True}),
    "stablelm-2-12b": Family(
        config="StableLmConfig",
        model="StableLmForCausalLM",
        text={**ROOMY, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "glm": Family(config="GlmConfig", model="GlmForCausalLM", text={**ROOMY, "head_dim": 32}),
    "glm4": Family(config="Glm4Config", model="Glm4ForCausalLM", text={**ROOMY, "head_dim": 32}),
    "cohere2": Family(config="Cohere2Config", model="Cohere2ForCausalLM", tied=True, text={**ROOMY, **SLIDING}),
}

MIXTURES: dict[str, Family] = {
    "mixtral": Family(config="MixtralConfig", model="MixtralForCausalLM", text={**EXPERTS, "num_local_experts": 4}),
    "qwen2-moe": Family(
        config="Qwen2MoeConfig",
        model="Qwen2MoeForCausalLM",
        text={
            **EXPERTS,
            "intermediate_size": 192,
            "num_experts": 6,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
        },
    ),
    "qwen3-moe": Family(
        config="Qwen3MoeConfig",
        model="Qwen3MoeForCausalLM",
        text={**EXPERTS, "num_experts": 8, "moe_intermediate_size": 64, "head_dim": 32, "norm_topk_prob": True},
    ),
    "deepseek-v2": Family(
        config="DeepseekV2Config",
        model="DeepseekV2ForCausalLM",
        text={**DEEPSEEK, "topk_method": "group_limited_greedy"},
    ),
    "deepseek-v2-lite": Family(
        config="DeepseekV2Config",
        model="DeepseekV2ForCausalLM",
        text={**DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy"},
    ),
    "deepseek-v3": Family(
        config="DeepseekV3Config",
        model="DeepseekV3ForCausalLM",
        text={**DEEPSEEK, "num_nextn_predict_layers": 1},
        predictors=1,
    ),
    "olmoe": Family(config="OlmoeConfig", model="OlmoeForCausalLM", text={**EXPERTS, "num_experts": 4}),
    "gpt-oss": Family(
        config="GptOssConfig",
        model="GptOssForCausalLM",
        text={**FUSED, "num_local_experts": 4, "head_dim": 32, **SLIDING},
    ),
    "llama4-text": Family(
        config="Llama4TextConfig",
        model="Llama4ForCausalLM",
        text={
            **FUSED,
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
            "intermediate_size_mlp": 192,
            "interleave_moe_layer_step": 2,
            "head_dim": 32,
            "attention_chunk_size": WINDOW,
            "no_rope_layer_interval": 2,
        },
    ),
    "granite-moe": Family(
        config="GraniteMoeConfig",
        model="GraniteMoeForCausalLM",
        tied=True,
        text={**FUSED, "num_local_experts": 4, "residual_multiplier": 0.22, "attention_multiplier": 0.03},
    ),
    "granite-moe-shared": Family(
        config="GraniteMoeSharedConfig",
        model="GraniteMoeSharedForCausalLM",
        tied=True,
        text={**FUSED, "num_local_experts": 4, "shared_intermediate_size": 128},
    ),
    "phimoe": Family(
        config="PhimoeConfig",
        model="PhimoeForCausalLM",
        published="PhiMoEForCausalLM",
        text={**EXPERTS, "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
    ),
}

SIGLIP = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
}
CLIP = {**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 64, "vocab_size": VOCAB}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
QWEN_TOP = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}
QWEN3_VISION = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "patch_size": 16,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}

VISION: dict[str, Family] = {
    "gemma3-vision": Family(
        config="Gemma3Config",
        model="Gemma3ForConditionalGeneration",
        kind="vision",
        pictures="gemma3",
        tied=True,
        text={**ROOMY, "head_dim": 32, "query_pre_attn_scalar": 32, **SLIDING},
        vision={**SIGLIP, "vision_use_head": False},
        top={
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": IMAGE_START,
            "eoi_token_index": IMAGE_END,
        },
    ),
    "mistral3": Family(
        config="Mistral3Config",
        model="Mistral3ForConditionalGeneration",
        kind="vision",
        pictures="mistral3",
        text={**ROOMY, "model_type": "mistral", "head_dim": 32, "sliding_window": None},
        vision=PIXTRAL,
        top={"image_token_index": IMAGE},
    ),
    "qwen2-vl": Family(
        config="Qwen2VLConfig",
        model="Qwen2VLForConditionalGeneration",
        kind="vision",
        pictures="qwen2_vl",
        text={**ROOMY, "rope_parameters": MROPE},
        vision={"depth": 3, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
        top=QWEN_TOP,
    ),
    "qwen2.5-vl": Family(
        config="Qwen2_5_VLConfig",
        model="Qwen2_5_VLForConditionalGeneration",
        kind="vision",
        pictures="qwen2_5_vl",
        tied=True,
        text={**ROOMY, "rope_parameters": MROPE},
        vision={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": 128,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        top=QWEN_TOP,
    ),
    "qwen3-vl": Family(
        config="Qwen3VLConfig",
        model="Qwen3VLForConditionalGeneration",
        kind="vision",
        pictures="qwen3_vl",
        text={**ROOMY, "head_dim": 32, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision=QWEN3_VISION,
        top=QWEN_TOP,
    ),
    "qwen3-vl-moe": Family(
        config="Qwen3VLMoeConfig",
        model="Qwen3VLMoeForConditionalGeneration",
        kind="vision",
        pictures="qwen3_vl",
        text={
            **EXPERTS,
            "head_dim": 32,
            "num_experts": 4,
            "moe_intermediate_size": 192,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        vision=QWEN3_VISION,
        transposed=r"mlp\.experts\.",
        top=QWEN_TOP,
    ),
    "llama4": Family(
        config="Llama4Config",
        model="Llama4ForConditionalGeneration",
        kind="vision",
        pictures="llama4",
        text=MIXTURES["llama4-text"].text,
        vision={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 96,
            "projector_input_dim": 96,
            "projector_output_dim": 96,
        },
        top={"image_token_index": IMAGE, "boi_token_index": IMAGE_START, "eoi_token_index": IMAGE_END},
    ),
    "llava": Family(
        config="LlavaConfig",
        model="LlavaForConditionalGeneration",
        kind="vision",
        pictures="llava",
        text={**ROOMY, "model_type": "llama"},
        vision=CLIP,
        top={"image_token_index": IMAGE, "image_seq_length": 4},
    ),
    "llava-next": Family(
        config="LlavaNextConfig",
        model="LlavaNextForConditionalGeneration",
        kind="vision",
        pictures="llava_next",
        text={**ROOMY, "model_type": "mistral", "sliding_window": None},
        vision=CLIP,
        top={
            "image_token_index": IMAGE,
            "image_seq_length": 4,
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        },
    ),
    "internvl": Family(
        config="InternVLConfig",
        model="InternVLForConditionalGeneration",
        kind="vision",
        pictures="internvl",
        text={**ROOMY, "model_type": "qwen2"},
        vision={**SIGLIP, "image_size": [28, 28], "patch_size": [14, 14], "attention_bias": True},
        top={"image_token_id": IMAGE, "image_seq_length": 1},
    ),
    "smolvlm": Family(
        config="SmolVLMConfig",
        model="SmolVLMForConditionalGeneration",
        kind="vision",
        pictures="smolvlm",
        text={**ROOMY, "model_type": "llama"},
        vision=SIGLIP,
        top={"image_token_id": IMAGE, "scale_factor": 2},
    ),
    "ministral3-vision": Family(
        config="Mistral3Config",
        model="Mistral3ForConditionalGeneration",
        kind="vision",
        pictures="mistral3",
        tied=True,
        text={"model_type": "ministral3", **TEXT["ministral3"].text},
        vision=PIXTRAL,
        top={"image_token_index": IMAGE},
    ),
    "idefics3": Family(
        config="Idefics3Config",
        model="Idefics3ForConditionalGeneration",
        kind="vision",
        pictures="idefics3",
        text={**ROOMY, "model_type": "llama"},
        vision=SIGLIP,
        top={"image_token_id": IMAGE, "scale_factor": 2},
    ),
}

# transformers 4.52 to 4.57 wrote these, and fine-tuned checkpoints have them.
NESTED = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^(vision_tower|multi_modal_projector|image_newline|visual)\b", r"model.\1"),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
)
# Towers that transformers 5 flattened.
INNER = (r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.")

PUBLISHED = {name: replace(VISION[name], renamed=(INNER,)) for name in ("gemma3-vision", "llava", "llava-next")}
OLDER = {
    f"{name}-nested": replace(family, renamed=family.renamed + NESTED)
    for name, family in (VISION | PUBLISHED).items()
    if name in ("gemma3-vision", "mistral3", "qwen2-vl", "qwen2.5-vl", "llava", "internvl")
}

FAMILIES: dict[str, Family] = {
    **TEXT,
    **{name: replace(f, kind="experts") for name, f in MIXTURES.items()},
    **VISION,
    **PUBLISHED,
    **OLDER,
}
