"""`moegguf.build`, `inspect` and `check`: mixes written, and read back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moegguf.api.paths import Location
from moegguf.assembly import Built
from moegguf.assembly import build as write_plan
from moegguf.inspection import Inspection
from moegguf.inspection import check as check_file
from moegguf.inspection import inspect as inspect_file
from moegguf.preparation import DEFAULT_BUILD, BuildOptions, prepare
from moegguf.recipe import find_recipes_file, load_recipe, parse_recipe
from moegguf.watch import Watch, unwatched


def build(
    recipe: str | Mapping[str, Any],
    *,
    recipes: Location | None = None,
    options: BuildOptions = DEFAULT_BUILD,
    watch: Watch = unwatched,
    **keys: Any,
) -> Built:
    """Build a mix, as `moegguf build` does, and say what was written and where.

    `recipe` is the name of a recipe in the file `recipes` (default: moegguf's models.toml), or a table of the keys that
    a recipe has; `keys` are put on top of it: build("demo", quant="Q6_K", output="mix.gguf"). Paths in a table are
    relative to the working directory. `watch` hears of the steps before the writing.
    """
    if isinstance(recipe, str):
        file = find_recipes_file() if recipes is None else Path(recipes)
        parsed = load_recipe(recipe, file, _texts(keys))
    else:
        name = Path(keys.get("output") or recipe.get("output") or "mix.gguf").stem
        parsed = parse_recipe(name, {**recipe, **_texts(keys)}, where="recipe:", folder=Path())
    return write_plan(prepare(parsed, options, watch).plan, threads=options.n_threads)


def _texts(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in keys.items()}


def inspect(path: Location) -> Inspection:
    """What is in a GGUF, read from its header."""
    return inspect_file(Path(path))


def check(path: Location) -> list[str]:
    """Every fault of a mix that reading all of it finds; none for a sound one."""
    return check_file(Path(path))
