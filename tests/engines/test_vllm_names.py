"""One module, three names: on disk, in transformers, in vLLM. The written config means the same one under each.

What is to be quantised, and with how many bits, comes from halfbyte's plan. Whether loaders agree is asked of their own
functions: compressed-tensors' ``apply_quantization_config`` on a model that transformers builds without weights, and
vLLM's ``get_scheme_dict`` in its own environment.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

import cases
import engine
import tiny
import zoo
from conftest import Models
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.mixing import groups_of
from halfbyte.planner import WorkPlan, calibration_work, choose_recipe, make_plan
from halfbyte.recipe import Recipe
from halfbyte.schemes import quantization_config

# The same module on disk, in transformers and in vLLM; its bits with the recipe MIXED.
TABLE: dict[str, list[tuple[str, str, str, int | None]]] = {
    "gemma3-vision": [
        (
            "language_model.model.layers.1.self_attn.k_proj",
            "model.language_model.layers.1.self_attn.k_proj",
            "language_model.model.layers.1.self_attn.qkv_proj",
            4,
        ),
        (
            "language_model.model.layers.0.mlp.down_proj",
            "model.language_model.layers.0.mlp.down_proj",
            "language_model.model.layers.0.mlp.down_proj",
            4,
        ),
        (
            "vision_tower.vision_model.encoder.layers.1.self_attn.k_proj",
            "model.vision_tower.encoder.layers.1.self_attn.k_proj",
            "vision_tower.vision_model.encoder.layers.1.self_attn.qkv_proj",
            None,
        ),
    ],
    "mistral3": [
        (
            "language_model.model.layers.1.self_attn.v_proj",
            "model.language_model.layers.1.self_attn.v_proj",
            "language_model.model.layers.1.self_attn.qkv_proj",
            4,
        ),
        (
            "vision_tower.transformer.layers.2.feed_forward.down_proj",
            "model.vision_tower.transformer.layers.2.feed_forward.down_proj",
            "vision_tower.transformer.layers.2.feed_forward.down_proj",
            None,
        ),
        (
            "multi_modal_projector.linear_1",
            "model.multi_modal_projector.linear_1",
            "multi_modal_projector.linear_1",
            None,
        ),
        ("language_model.lm_head", "lm_head", "language_model.lm_head", None),
    ],
    "qwen2-vl": [
        (
            "model.layers.0.mlp.up_proj",
            "model.language_model.layers.0.mlp.up_proj",
            "language_model.model.layers.0.mlp.gate_up_proj",
            4,
        ),
        ("visual.blocks.2.attn.qkv", "model.visual.blocks.2.attn.qkv", "visual.blocks.2.attn.qkv", None),
        ("lm_head", "lm_head", "language_model.lm_head", None),
    ],
    "qwen2.5-vl": [
        (
            "model.layers.0.self_attn.o_proj",
            "model.language_model.layers.0.self_attn.o_proj",
            "language_model.model.layers.0.self_attn.o_proj",
            8,
        ),
        (
            "visual.blocks.0.mlp.down_proj",
            "model.visual.blocks.0.mlp.down_proj",
            "visual.blocks.0.mlp.down_proj",
            None,
        ),
    ],
    "qwen3-vl": [
        (
            "model.language_model.layers.1.mlp.down_proj",
            "model.language_model.layers.1.mlp.down_proj",
            "language_model.model.layers.1.mlp.down_proj",
            4,
        ),
        ("model.visual.merger.linear_fc1", "model.visual.merger.linear_fc1", "visual.merger.linear_fc1", None),
        ("lm_head", "lm_head", "language_model.lm_head", None),
    ],
    "gemma3-vision-nested": [
        (
            "model.language_model.layers.0.self_attn.q_proj",
            "model.language_model.layers.0.self_attn.q_proj",
            "language_model.model.layers.0.self_attn.qkv_proj",
            4,
        ),
        (
            "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1",
            "model.vision_tower.encoder.layers.0.mlp.fc1",
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
            None,
        ),
    ],
    "qwen2.5-vl-nested": [
        (
            "model.language_model.layers.1.self_attn.q_proj",
            "model.language_model.layers.1.self_attn.q_proj",
            "language_model.model.layers.1.self_attn.qkv_proj",
            4,
        ),
        (
            "model.visual.blocks.1.attn.proj",
            "model.visual.blocks.1.attn.proj",
            "visual.blocks.1.attn.proj",
            None,
        ),
    ],
}
UNIFORM = "scheme = 'W8A8'\nmethod = 'rtn'\n"
MIXED = """
scheme = 'W4A16'
group_size = 32
method = 'rtn'
[[groups]]
scheme = 'W8A16'
group_size = 32
targets = ['re:.*o_proj', 're:.*\\.experts\\..*']
"""
RECIPES = {"uniform": UNIFORM, "mixed": MIXED}
# vLLM never quantises these, whatever the config says: their routers are built without it.
UNASKED = re.compile(r"\.block_sparse_moe\.router\.layer$")


@dataclass(frozen=True)
class Written:
    """A plan, and what config.json would say."""

    source: Path
    work: WorkPlan
    config: dict[str, Any]

    def bits(self, module: str) -> int | None:
        scheme = self.work.schemes.get(module)
        return scheme.weights.num_bits if scheme else None


def written(source: Path, recipe_text: str, folder: Path) -> Written:
    file = folder / "recipe.toml"
    file.write_text(recipe_text)
    recipe: Recipe = choose_recipe(
        scheme="W4A16", group_size=None, method=None, ignore=(), recipe=file, effort=None, target_bits=None
    )
    checkpoint = open_checkpoint(source)
    size = calibration_work(recipe, checkpoint, None, None, None, offload=None)
    work = make_plan(checkpoint, recipe, size)
    assert work.problems == []
    groups = recipe.groups if len(recipe.groups) == 1 else groups_of(work.blocks, work.schemes)
    targets = [(g.scheme, list(g.targets)) for g in groups]
    return Written(source, work, quantization_config(targets, work.ignore_patterns))


def built(source: Path, family: str) -> Any:
    """The model as transformers builds it, without weights."""
    config = transformers.AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        return getattr(transformers, zoo.FAMILIES[family].model)(config)


@functools.cache
def linears(source: Path, family: str) -> dict[str, str]:
    """Module names in transformers by those on disk, of all that are Linears there."""
    names = [n.removesuffix(".weight") for n in tiny.stored(source) if n.endswith(".weight")]
    model = built(source, family)
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if not isinstance(r, WeightConverter)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    state, modules = model.state_dict(), dict(model.named_modules())
    found = {}
    for name in names:
        path, _ = rename_source_key(f"{name}.weight", renamings, converters, model.base_model_prefix, state)
        module = path.removesuffix(".weight")
        if isinstance(modules.get(module), torch.nn.Linear):
            found[name] = module
    return found


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_transformers_quantises_what_the_plan_does(
    family: str, recipe: str, tiny_model: Models, tmp_path: Path
) -> None:
    made = written(tiny_model(family), RECIPES[recipe], tmp_path)
    model = built(made.source, family)
    names = linears(made.source, family)
    config = QuantizationConfig.model_validate(
        {k: v for k, v in made.config.items() if k in QuantizationConfig.model_fields}
    )
    apply_quantization_config(model, config)
    taken = {n: getattr(m, "quantization_scheme", None) for n, m in model.named_modules()}
    bits = {n: s.weights.num_bits for n, s in taken.items() if s is not None and n in set(names.values())}
    assert bits == {path: made.bits(name) for name, path in names.items() if made.bits(name)}
    # Nothing that transformers has under another name than the files is taken either.
    others = {n for n, s in taken.items() if s is not None} - set(names.values())
    assert others == set()


@pytest.fixture(scope="module")
def vllm_names(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM answers for every family and recipe."""
    folder = tmp_path_factory.mktemp("names")
    questions = []
    for family in cases.CASES:
        for recipe, text in RECIPES.items():
            made = written(tiny_model(family), text, folder)
            questions.append(question(f"{family}-{recipe}", family, made, made.config))
    made = written(tiny_model("qwen2-vl-nested"), UNIFORM, folder)
    anchored = made.config | {"ignore": ["lm_head", r"re:model\.visual\..*"]}
    questions.append(question("anchored", "qwen2-vl-nested", made, anchored))
    answers: dict[str, Any] = engine.ask("vllm_names.py", questions, folder)
    return answers


def question(name: str, family: str, made: Written, config: dict[str, Any]) -> dict[str, Any]:
    asked = [n for n in linears(made.source, family) if not UNASKED.search(n)]
    modules = {n: "head" if n.endswith("lm_head") else "linear" for n in asked}
    modules |= {n: "expert" for n in made.work.schemes if ".experts." in n}
    architecture = cases.CASES[family].published.get("architectures", [zoo.FAMILIES[family].model])[0]
    return {"name": name, "architecture": architecture, "quantization_config": config, "modules": modules}


needs_vllm = pytest.mark.skipif(engine.python() is None, reason=engine.MISSING)


@pytest.mark.engine
@needs_vllm
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", cases.CASES)
def test_vllm_quantises_what_the_plan_does(
    family: str, recipe: str, vllm_names: dict[str, Any], tiny_model: Models, tmp_path: Path
) -> None:
    answer = vllm_names[f"{family}-{recipe}"]
    if answer is None:
        pytest.skip("vLLM runs it as transformers builds it")
    made = written(tiny_model(family), RECIPES[recipe], tmp_path)
    assert {name: bits for name, (_, bits) in answer.items()} == {name: made.bits(name) for name in answer}
    assert made.work.schemes.keys() <= answer.keys()


@pytest.mark.engine
@needs_vllm
@pytest.mark.parametrize("family", TABLE)
def test_three_names_of_one_module(family: str, vllm_names: dict[str, Any], tiny_model: Models, tmp_path: Path) -> None:
    made = written(tiny_model(family), MIXED, tmp_path)
    in_transformers = linears(made.source, family)
    answer = vllm_names[f"{family}-mixed"]
    for disk, path, name, bits in TABLE[family]:
        assert (disk, in_transformers[disk], *answer[disk]) == (disk, path, name, bits)
        assert made.bits(disk) == bits


@pytest.mark.engine
@needs_vllm
def test_a_pattern_that_starts_at_a_prefix_does_not_reach_vllm(vllm_names: dict[str, Any]) -> None:
    """Why patterns begin with ``.*``: with `re:model\\.visual\\..*`, as the files have it, vLLM quantises the tower."""
    assert vllm_names["anchored"]["model.visual.blocks.0.attn.proj"] == ["visual.blocks.0.attn.proj", 8]
