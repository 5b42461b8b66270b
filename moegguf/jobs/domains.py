"""Texts by name: those that are given, and those that a recipe names under `domains`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moegguf.errors import UserError
from moegguf.recipe import load_recipe
from moegguf.texts import Record, read_domains


def texts_by_name(
    refs: Iterable[tuple[str, str]], domains: str | None = None, recipes: Path | None = None
) -> dict[str, list[Record]]:
    """Name → records: those of the recipe `domains`, if one is named, and then those of (name, reference).

    Raises one UserError for all references that cannot be read, and as `texts_of_recipe` does.
    """
    given: dict[str, list[str]] = {}
    for name, ref in refs:
        given.setdefault(name, []).append(ref)
    texts = {} if domains is None else texts_of_recipe(domains, recipes)
    for name, records in read_domains(given).items():
        texts.setdefault(name, []).extend(records)
    return texts


def texts_of_recipe(name: str, recipes: Path | None = None) -> dict[str, list[Record]]:
    """Domain → records, of the recipe `name` in the file `recipes` (default: moegguf's own).

    Raises UserError where there is no such recipe, where it has no domains, and for texts that cannot be read.
    """
    recipe = load_recipe(name, recipes)
    if not recipe.domains:
        raise UserError(f"recipe {recipe.name} names no domains", 'give it domains = { NAME = "file.jsonl" }')
    return read_domains(recipe.domains, recipe.folder)
