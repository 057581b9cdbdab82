"""Which tiny models vLLM runs, and what each needs besides what :mod:`zoo` makes.

The reasons are vLLM's: it goes by names in config.json that published checkpoints have and ``save_pretrained`` does not
write, and its CPU kernels take only some sizes. To add a family of the zoo, add a row to :data:`CASES`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

import tiny
import zoo

# vLLM's CPU attention takes heads of 32 and wider ones, its experts take widths that divide by 32.
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
NEWLINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family of the zoo.

    Attributes:
        options: further ones of the (language) model.
        published: entries of config.json that the hub's checkpoints have and transformers does not write.
        tokens: special tokens that vLLM looks up.
        picture: sides of a picture that the processor takes as it is, without resizing; resizing differs between
            the libraries that do it.
    """

    options: dict[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    picture: tuple[int, int] | None = None

    def build(self, family: str, folder: Path) -> Path:
        tiny.build(folder, family, **self.options)
        if self.published:
            file = folder / "config.json"
            config = json.loads(file.read_text())
            for path, value in self.published.items():
                *parents, leaf = path.split("/")
                inner = config
                for parent in parents:
                    inner = inner[parent]
                inner[leaf] = value
            file.write_text(json.dumps(config))
        if self.tokens:
            file = folder / "tokenizer.json"
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.add_special_tokens([AddedToken(t, special=True) for t in self.tokens])
            assert tokenizer.get_vocab_size() <= zoo.VISION_VOCAB
            tokenizer.save(str(file))
        return folder


# Published DeepSeeks have it; with plain rotary embeddings vLLM's CPU kernel turns the wrong dimensions.
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

PLAIN = Case()
DEEPSEEK = Case(options={"rope_parameters": YARN})
SMALL = Case(options=SIZES)

CASES: dict[str, Case] = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": Case(options={"hidden_size": 128, "intermediate_size": 192}),
    "qwen3": SMALL,
    "gemma3": SMALL,
    "llama3": PLAIN,
    "ministral": PLAIN,
    "ministral3": PLAIN,
    "gemma2": PLAIN,
    "phi3": PLAIN,
    "phi4-mini": PLAIN,
    "granite": PLAIN,
    "olmo2": PLAIN,
    "olmo3": PLAIN,
    "falcon": PLAIN,
    "falcon-7b": PLAIN,
    "falcon-rw": PLAIN,
    "stablelm": PLAIN,
    "glm": PLAIN,
    "glm4": PLAIN,
    "cohere2": PLAIN,
    "mixtral": PLAIN,
    "qwen2-moe": PLAIN,
    "qwen3-moe": PLAIN,
    "deepseek-v2": DEEPSEEK,
    "deepseek-v2-lite": Case(options=DEEPSEEK.options | {"n_group": 1, "topk_group": 1}),
    "deepseek-v3": Case(options=DEEPSEEK.options, published={"topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    "olmoe": PLAIN,
    "gpt-oss": PLAIN,
    # vLLM cuts chunks into blocks of 128 tokens.
    "llama4-text": Case(options={"attention_chunk_size": 128}),
    "granite-moe": PLAIN,
    "granite-moe-shared": PLAIN,
    # vLLM 0.32 does not add the bias of its head.
    "phimoe": Case(options={"lm_head_bias": False}, published={"architectures": ["PhiMoEForCausalLM"]}),
    "gemma3-vision": Case(tokens=NEWLINES, picture=(28, 28)),
    "mistral3": Case(picture=(56, 84)),
    "qwen2-vl": Case(picture=(56, 84)),
    "qwen2.5-vl": Case(picture=(56, 84)),
    "qwen3-vl": Case(picture=(64, 96)),
    "qwen3-vl-moe": Case(published={"text_config/norm_topk_prob": True}, picture=(64, 96)),
    "llama4": Case(options={"attention_chunk_size": 128}),
    "llava": Case(picture=(28, 28)),
    "llava-next": PLAIN,
    "internvl": Case(picture=(28, 28)),
    "smolvlm": PLAIN,
    "idefics3": PLAIN,
    "ministral3-vision": Case(picture=(56, 84)),
    "gemma3-vision-nested": Case(tokens=NEWLINES),
    "mistral3-nested": PLAIN,
    "qwen2-vl-nested": PLAIN,
    "qwen2.5-vl-nested": PLAIN,
    "llava-nested": PLAIN,
    "internvl-nested": PLAIN,
}
NOT_IN_VLLM = {"stablelm-2-12b": "vLLM 0.32 has no norms on StableLM's queries and keys"}
