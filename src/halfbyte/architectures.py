"""Which tensors of a checkpoint are the Linears of its language model's decoder blocks.

The rule needs tensor names and the config, not the model's code, so it works on the headers of a 70B checkpoint:

1. the decoder blocks are the numbered module list with the most entries outside vision, audio and projector parts;
   its length must be ``num_hidden_layers``;
2. the Linears are the 2-D ``weight`` tensors in those blocks, less routers and gates (:data:`KEPT_MODULES`).

:data:`KNOWN_ARCHITECTURES` lists the model classes that tests cover; any other is tried by the rule, and the plan
says so. The loop checks against the real module tree that each planned module is an ``nn.Linear``.

Experts that a checkpoint stacks in one three-dimensional tensor are seen one by one, see ``checkpoint.stacks``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from halfbyte.checkpoint.reader import Checkpoint, TensorInfo
from halfbyte.errors import ArchitectureError, HalfbyteError

NUMBERED = re.compile(r"^(?P<prefix>.+?)\.(?P<index>\d+)\.(?P<rest>.+)$")
NOT_LANGUAGE = re.compile(r"(^|[._])(vision|visual|vit|image|audio|speech|projector|connector|resampler|encoder|mtp)")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens\w*|wte|word_embeddings|tok_embeddings|embed_in)(\.|$)")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)(\.|$)")
# Modules inside blocks that hold a 2-D weight and stay in original precision: they steer tokens to experts.
KEPT_MODULES = re.compile(r"(^|\.)(router(\.layer)?|gate|shared_expert_gate|wg)$")
# How else transformers' module tree may spell a kept module that it takes to be a Linear (PhiMoE's router).
OTHER_SPELLINGS = {"block_sparse_moe.gate": "mlp.router"}
# One Linear of one expert.
EXPERT_MODULE = re.compile(r"(?P<layer>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)$")
# model_type of text configs whose quantised experts no engine reads: vLLM's loader of gpt-oss drops unknown names.
EXPERTS_AS_THEY_ARE = frozenset({"gpt_oss"})

# Linears that engines fuse into one: all parts have the same input, and need the same scheme. After vLLM's
# packed_modules_mapping: attention and MLP of most models; InternLM 2; DeepSeek's latent attention; Qwen 3.5's deltas.
FUSED = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
    frozenset({"in_proj_qkv", "in_proj_z"}),
    frozenset({"in_proj_b", "in_proj_a"}),
)

# tests/test_models.py runs every one of these.
KNOWN_ARCHITECTURES = frozenset(
    {
        "Cohere2ForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "FalconForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "Glm4ForCausalLM",
        "GlmForCausalLM",
        "GptOssForCausalLM",
        "GraniteForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeSharedForCausalLM",
        "Idefics3ForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration",
        "LlamaForCausalLM",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "Ministral3ForCausalLM",
        "MinistralForCausalLM",
        "Mistral3ForConditionalGeneration",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
        "OlmoeForCausalLM",
        "Phi3ForCausalLM",
        "PhiMoEForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
        "StableLmForCausalLM",
    }
)


@dataclass(frozen=True, slots=True)
class BlockMap:
    """Names of a checkpoint's tensors, sorted by where they belong.

    Attributes:
        prefix: path of the block list on disk, e.g. ``model.layers``.
        linears: for each block, module names (without ``.weight``) whose weight is to be quantised, in file order.
        others: for each block, the names of its remaining tensors.
        outside: names of all tensors outside the blocks.
        unsupported: names of tensors in blocks that hold matrices but are copied.
    """

    prefix: str
    linears: tuple[tuple[str, ...], ...]
    others: tuple[tuple[str, ...], ...]
    outside: tuple[str, ...]
    unsupported: tuple[str, ...]

    @property
    def num_blocks(self) -> int:
        return len(self.linears)

    @property
    def decoder_prefix(self) -> str:
        """Path of the module that holds the block list, with its dot: ``model.`` for ``model.layers``."""
        parent, _, _ = self.prefix.rpartition(".")
        return parent + "." if parent else ""

    def block_tensors(self, index: int) -> tuple[str, ...]:
        """All tensor names of one block, by the full names on disk (weights of Linears included)."""
        return tuple(f"{m}.weight" for m in self.linears[index]) + self.others[index]


def map_blocks(checkpoint: Checkpoint, found: list[HalfbyteError] | None = None) -> BlockMap:
    """Sort a dense checkpoint's tensors into decoder blocks and the rest.

    Args:
        checkpoint: headers and config.
        found: a list that takes the error about absent layers, so that a plan can go on and find more; without it,
            that error is raised.

    Raises:
        ArchitectureError: no block list is found, or layers that the config announces are absent.
    """
    expected = checkpoint.text_config.get("num_hidden_layers")
    prefix = find_block_prefix(checkpoint.tensors)
    if prefix is None or not isinstance(expected, int) or expected < 1:
        raise ArchitectureError(
            f"no decoder blocks were found for architecture {checkpoint.architecture}",
            where=checkpoint.name,
            why="no numbered module list among the tensors"
            if prefix is None
            else f"num_hidden_layers in the config is {expected}",
            remedy="halfbyte quantises decoder-only language models; `halfbyte inspect` shows what this is.",
        )
    linears: list[list[str]] = [[] for _ in range(expected)]
    others: list[list[str]] = [[] for _ in range(expected)]
    outside: list[str] = []
    unsupported: list[str] = []
    seen: set[int] = set()
    for name, info in checkpoint.tensors.items():
        match = NUMBERED.match(name)
        if match is None or match["prefix"] != prefix or int(match["index"]) >= expected:
            outside.append(name)
            continue
        index = int(match["index"])
        seen.add(index)
        if is_linear_weight(info):
            linears[index].append(name.removesuffix(".weight"))
        else:
            others[index].append(name)
            if len(info.shape) == 3 and "experts" in name:
                unsupported.append(name)
    missing = sorted(set(range(expected)) - seen)
    if missing:
        listed = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
        absent = ArchitectureError(
            f"layers {listed} of {expected} are absent from the weights",
            where=f"{checkpoint.name}: {prefix}",
            remedy="The checkpoint is incomplete; download it again.",
        )
        if found is None:
            raise absent
        found.append(absent)
    return BlockMap(
        prefix=prefix,
        linears=tuple(map(tuple, linears)),
        others=tuple(map(tuple, others)),
        outside=tuple(outside),
        unsupported=tuple(unsupported),
    )


def find_block_prefix(names: Iterable[str]) -> str | None:
    """Path of the longest numbered module list under the language model, ``None`` when there is none."""
    indices: Mapping[str, set[int]] = defaultdict(set)
    for name in names:
        match = NUMBERED.match(name)
        if match is not None and not NOT_LANGUAGE.search(match["prefix"]):
            indices[match["prefix"]].add(int(match["index"]))
    if not indices:
        return None
    return max(indices, key=lambda p: (len(indices[p]), -len(p)))


def is_linear_weight(info: TensorInfo) -> bool:
    """Whether a tensor inside a decoder block is the weight of a Linear that is to be quantised."""
    module, _, leaf = info.name.rpartition(".")
    return leaf == "weight" and len(info.shape) == 2 and KEPT_MODULES.search(module) is None
