"""Recipes: which Linears are quantised, how, and on what calibration text.

    model.py          Recipe, SchemeGroup, matches: what the rest of halfbyte works with
    document.py       TOML and YAML text -> values that know their line
    native.py         halfbyte's own keys
    llmcompressor.py  llm-compressor's recipe.yaml (number formats: llmcompressor_numbers.py)
    load.py           a file's name and contents decide which of the two it is

Reading collects every problem, with file and line, and raises them together. Never imports torch.
"""

from __future__ import annotations

from halfbyte.recipe.load import load_recipe
from halfbyte.recipe.model import (
    DEFAULT_DAMP_FRACTION,
    EFFORTS,
    WIDER,
    Effort,
    ExpertSteps,
    GptqSteps,
    Method,
    Recipe,
    SchemeGroup,
    matches,
    mixing_problem,
    wider,
)

__all__ = [
    "DEFAULT_DAMP_FRACTION",
    "EFFORTS",
    "WIDER",
    "Effort",
    "ExpertSteps",
    "GptqSteps",
    "Method",
    "Recipe",
    "SchemeGroup",
    "load_recipe",
    "matches",
    "mixing_problem",
    "wider",
]
