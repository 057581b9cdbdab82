"""Reading a recipe file of any kind."""

from __future__ import annotations

from pathlib import Path

from halfbyte.recipe.document import read_document
from halfbyte.recipe.llmcompressor import is_llmcompressor, read_llmcompressor
from halfbyte.recipe.model import Recipe
from halfbyte.recipe.native import read_native


def load_recipe(path: Path) -> Recipe:
    """Read a TOML or YAML recipe in halfbyte's keys, or an llm-compressor ``recipe.yaml``; which one shows in its keys.

    Raises:
        RecipeError: everything that is wrong or cannot be honoured, at once, each with file and line.
    """
    root = read_document(path)
    if is_llmcompressor(root):
        return read_llmcompressor(root, str(path))
    return read_native(root, str(path))
