"""The texts that a recipe names under `domains`, for whoever is given a recipe to take them from."""

from __future__ import annotations

from pathlib import Path

from moegguf.errors import UserError
from moegguf.recipe import find_recipes_file, load_recipe
from moegguf.texts import Record, read_domains


def texts_of_recipe(name: str, recipes: Path | None = None) -> dict[str, list[Record]]:
    """Domain → records, of the recipe `name` in the file `recipes` (default: moegguf's own).

    Raises UserError where there is no such recipe, where it has no domains, and for texts that cannot be read.
    """
    recipe = load_recipe(name, recipes or find_recipes_file(), {})
    if not recipe.domains:
        raise UserError(f"recipe {recipe.name} names no domains", 'give it domains = { NAME = "file.jsonl" }')
    return read_domains(recipe.domains, recipe.folder)
