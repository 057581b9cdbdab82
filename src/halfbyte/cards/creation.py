"""How a checkpoint was made, as commands that make it again: from the manifest, not from memory.

Three forms: halfbyte's command line, its Python function, and a recipe for llm-compressor that asks for the same scheme
(which then finds other codes: its solver is another). Where options do not say it all, a recipe file goes with the
command.
"""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import yaml

from halfbyte.cards.facts import Facts, public_name, public_spec
from halfbyte.recipe.model import DEFAULT_DAMP_FRACTION, GptqSteps
from halfbyte.records import Manifest

LINEAR = ["Linear"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """What goes into a card.

    Attributes:
        command: ``halfbyte quantize ...``; python: the same as a call.
        recipe: the file that both name as ``recipe.yaml``; ``None`` where options say it all.
        llmcompressor: recipe.yaml for llm-compressor; ``None`` where the checkpoint's scheme is none of its.
    """

    command: str
    python: str
    recipe: str | None
    llmcompressor: str | None


def creation_of(facts: Facts, source: str, out: str) -> Creation | None:
    """The commands; ``None`` for a checkpoint that halfbyte did not quantise."""
    if facts.manifest is None:
        return None
    options = plain_options(facts.manifest)
    recipe = (
        None if options is not None else yaml.safe_dump(recipe_of(facts.manifest), sort_keys=False, allow_unicode=True)
    )
    arguments = options or {"recipe": "recipe.yaml"} | calibration_options(facts.manifest)
    command = ["halfbyte", "quantize", source, out]
    for key, value in arguments.items():
        for item in value if isinstance(value, list) else [value]:
            command += [f"--{key.replace('_', '-')}", str(item)]
    keywords = "".join(f",\n    {k}={v!r}" for k, v in arguments.items())
    return Creation(
        command=" ".join(shlex.quote(c) for c in command),
        python=f"import halfbyte\n\nhalfbyte.quantize(\n    {source!r},\n    {out!r}{keywords},\n)",
        recipe=recipe,
        llmcompressor=llmcompressor_recipe(facts),
    )


def plain_options(manifest: Manifest) -> dict[str, Any] | None:
    """Options of ``quantize`` that say it all; ``None`` where a recipe file has to."""
    r = manifest.recipe
    groups = r["groups"]
    steps = dataclasses.asdict(GptqSteps())
    if len(groups) != 1 or groups[0]["targets"] != LINEAR or r.get("damp_fraction", 0.01) != DEFAULT_DAMP_FRACTION:
        return None
    if (r["method"] == "gptq" and any(steps.get(k) != v for k, v in (r.get("gptq") or {}).items())) or r.get("seed"):
        return None
    if (r.get("experts") or {}).get("rare_tokens") is not None:
        return None
    options: dict[str, Any] = {"scheme": groups[0]["scheme"]}
    if groups[0].get("group_size") is not None:
        options["group_size"] = groups[0]["group_size"]
    if r.get("target_bits") is not None:
        options["target_bits"] = r["target_bits"]
    if r.get("ignore"):
        options["ignore"] = list(r["ignore"])
    options["method"] = r["method"]
    if r["method"] == "gptq":
        options["effort"] = r["effort"]
    if (r.get("experts") or {}).get("all_tokens"):
        options["all_experts"] = True
    return options | calibration_options(manifest)


def calibration_options(manifest: Manifest) -> dict[str, Any]:
    """Options that name the calibration text, and the dtype that blocks were computed in."""
    options: dict[str, Any] = {}
    if manifest.calibration is not None:
        c = manifest.calibration
        options = {"calibration": public_spec(c.spec), "samples": c.samples, "seq_len": c.seq_len}
    if manifest.recipe.get("dtype"):
        options["dtype"] = manifest.recipe["dtype"]
    return options


def recipe_of(manifest: Manifest) -> dict[str, Any]:
    """halfbyte's own recipe, as a dictionary."""
    r = manifest.recipe
    keys = ("method", "damp_fraction", "effort", "target_bits", "ignore", "gptq", "experts")
    recipe = {k: r[k] for k in keys if r.get(k) not in (None, [], {})}
    if isinstance(recipe.get("experts"), dict):
        recipe["experts"] = {k: v for k, v in recipe["experts"].items() if v is not None}
    groups = [{k: v for k, v in g.items() if v is not None} for g in r["groups"]]
    if len(groups) == 1 and groups[0]["targets"] == LINEAR:
        recipe |= {k: v for k, v in groups[0].items() if k != "targets"}
    else:
        recipe["groups"] = groups
    if manifest.calibration is not None and r.get("seed"):
        recipe["calibration"] = {"seed": r["seed"]}
    return recipe


def llmcompressor_recipe(facts: Facts) -> str | None:
    """The same schemes, targets and exceptions in llm-compressor's words, from the checkpoint's own config."""
    groups = facts.quantization.get("config_groups")
    if facts.manifest is None or not isinstance(groups, dict):
        return None
    kept = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic")
    written = {}
    for name, group in groups.items():
        written[name] = {"targets": list(group["targets"])} | {
            side: {k: group[side][k] for k in kept if group[side].get(k) is not None}
            for side in ("weights", "input_activations")
            if group.get(side)
        }
    method = facts.manifest.recipe["method"]
    modifier: dict[str, Any] = {"ignore": facts.kept, "config_groups": written}
    if method == "gptq":
        modifier |= {"dampening_frac": facts.manifest.recipe["damp_fraction"], "actorder": "static"}
    name = "GPTQModifier" if method == "gptq" else "QuantizationModifier"
    return yaml.safe_dump({"default_stage": {"default_modifiers": {name: modifier}}}, sort_keys=False)


def source_label(facts: Facts, base_model: str | None) -> str | None:
    """What the card calls the source: the hub id where it is known, else its name without folders."""
    return base_model or public_name(facts.source_name or "") or None
