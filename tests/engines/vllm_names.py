"""What vLLM calls the modules of checkpoints, and which of them it takes to be quantised, by its own functions.

    python vllm_names.py QUESTIONS.json ANSWERS.json

QUESTIONS: ``[{"name", "architecture", "quantization_config", "modules": {name on disk: kind}}]``, where a kind is
"linear", "head" or "expert". ANSWERS: for each question's name, ``{name on disk: [name in vLLM, bits or null]}``, or
``null`` for architectures that vLLM runs as transformers builds them. No weights and no model are made: these are
attributes of vLLM's classes, and its matching.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import vllm_setup  # noqa: F401 -- before vLLM is imported
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import WeightsMapper

KINDS = {"linear": RowParallelLinear, "head": ParallelLMHead, "expert": RoutedExperts}
# Of the language model inside, where a class that sees says nothing itself.
INNER = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# What classes add when they are built: mixtures with dense layers or shared experts, latent attention with q_lora_rank.
LATER = {"gate_up_proj": ["gate_proj", "up_proj"], "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"]}


def packed_modules(model: type, modules: list[str]) -> dict[str, list[str]]:
    """vLLM's fused Linears with their parts."""
    leaves = {m.rpartition(".")[2] for m in modules}
    packed = dict(getattr(model, "packed_modules_mapping", None) or INNER)
    return {fused: parts for fused, parts in LATER.items() if leaves.issuperset(parts)} | packed


def answer(question: dict[str, Any]) -> dict[str, Any] | None:
    known = ModelRegistry.models.get(question["architecture"])
    model = known.load_model_cls() if known is not None else None
    if model is None or "transformers" in model.__module__:
        return None
    mapper: WeightsMapper = getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper()
    renames = mapper.get_rename_mapper()
    packed = packed_modules(model, [m for m, kind in question["modules"].items() if kind == "linear"])
    config = CompressedTensorsConfig.from_config(copy.deepcopy(question["quantization_config"]))
    config.packed_modules_mapping = packed
    config.apply_vllm_mapper(renames)
    config._add_fused_moe_to_target_scheme_map()
    found = {}
    for module, kind in question["modules"].items():
        name = renames.map_name(f"{module}.weight").removesuffix(".weight")
        if kind == "linear":
            parent, _, leaf = name.rpartition(".")
            leaf = next((fused for fused, parts in packed.items() if leaf in parts), leaf)
            name = f"{parent}.{leaf}"
        layer = KINDS[kind].__new__(KINDS[kind])  # the matching asks for the name of its class
        scheme = config.get_scheme_dict(layer, name)
        found[module] = [name, scheme["weights"].num_bits if scheme else None]
    return found


if __name__ == "__main__":
    questions, answers = map(Path, sys.argv[1:])
    answers.write_text(json.dumps({q["name"]: answer(q) for q in json.loads(questions.read_text())}))
