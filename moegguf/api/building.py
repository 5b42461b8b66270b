"""`moegguf.recipes`, `build`, `inspect` and `check`: mixes described, written, and read back."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moegguf.api.paths import Location, maybe_path, to_path, to_ref
from moegguf.checks import check_threads
from moegguf.errors import UserError
from moegguf.estimate import parse_fit, with_budget_of
from moegguf.inspection import Inspection
from moegguf.inspection import check as check_file
from moegguf.inspection import inspect as inspect_file
from moegguf.jobs.build_report import BuildReport, describe, finish
from moegguf.jobs.preparation import BuildOptions, prepare
from moegguf.kinds import checked
from moegguf.recipe import Recipe, load_recipe, load_recipes, parse_recipe
from moegguf.watch import Watch, unwatched


@checked
def recipes(recipes: Location | None = None) -> list[Recipe]:
    """The mixes that the file `recipes` offers (default: moegguf's models.toml). Raises UserError for a faulty one."""
    return load_recipes(maybe_path("recipes", recipes))


@checked
def build(
    recipe: str | Mapping[str, Any],
    *,
    recipes: Location | None = None,
    fit: str | None = None,
    ctx: int | None = None,
    probe: bool | None = None,
    save_plan: Location | None = None,
    stream: bool = False,
    pre: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    watch: Watch = unwatched,
    **keys: Any,
) -> BuildReport:
    """Build a mix, as `moegguf build` does, and say what was written and where.

    `recipe` is the name of a recipe in the file `recipes` (default: moegguf's models.toml), or a table of the keys that
    a recipe has; `keys` are put on top of it: build("demo", quant="Q6_K", output="mix.gguf"). Paths in a table are
    relative to the working directory. The others are flags of the command; with `dry_run` nothing is written.
    Raises UserError.
    """
    check_threads(threads)
    memory = None if fit is None else parse_fit(fit, ctx)
    if memory:
        quant = keys.get("quant") or {}
        keys["quant"] = with_budget_of(memory, quant if isinstance(quant, Mapping) else {"preset": quant})
    elif ctx is not None:
        raise UserError("ctx goes with fit: it says for how many tokens there is to be room", "leave it out")
    parsed = _parsed(recipe, maybe_path("recipes", recipes), _plain("keys", keys))
    options = BuildOptions(
        threads=threads,
        stream=stream,
        pre=pre,
        overwrite=overwrite,
        fit=memory,
        probe=probe,
        save_plan=maybe_path("save_plan", save_plan),
        is_dry=dry_run,
    )
    report = describe(prepare(parsed, options, watch), options)
    return report if dry_run else finish(report, options, watch)


def _parsed(recipe: str | Mapping[str, Any], recipes: Path | None, keys: dict[str, Any]) -> Recipe:
    if isinstance(recipe, str):
        return load_recipe(recipe, recipes, keys)
    table = {**_plain("recipe", recipe), **keys}
    name = Path(str(table.get("output") or "mix.gguf")).stem
    return parse_recipe(name, table, where="recipe:", folder=Path())


def _plain(name: str, value: Any) -> Any:
    """`value`, given as `name`, of the kinds that TOML has. Raises UserError for others."""
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, each) for each in value]
    if isinstance(value, os.PathLike):
        return to_ref(name, value)
    if not isinstance(value, str | int | float | None):
        raise UserError(f"{name} {reprlib.repr(value)}: expected a text, a number, a list or a table", "mend it")
    return value


@checked
def inspect(path: Location) -> Inspection:
    """What is in a GGUF, read from its header. Raises UserError."""
    return inspect_file(to_path("path", path))


@checked
def check(path: Location) -> list[str]:
    """Every fault of a mix that reading all of it finds; none for a sound one. Raises UserError."""
    return check_file(to_path("path", path))
