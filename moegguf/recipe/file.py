"""models.toml: the recipes of a file, and flags on top of them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from moegguf.errors import UserError
from moegguf.recipe.parsing import parse_recipe
from moegguf.recipe.quant import BUDGETS, TARGETS
from moegguf.recipe.router import router_table
from moegguf.recipe.specs import Recipe, RouterMode


def find_recipes_file() -> Path:
    """The models.toml that ships with moegguf: in the package when installed, at the top of a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "models.toml"
    return installed if installed.is_file() else package.parent / "models.toml"


def load_tables(path: Path) -> dict[str, dict]:
    """The unchecked `[mix.NAME]` tables of a recipes file. Raises UserError when it is no such file."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path given to --recipes") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no valid TOML ({error})", "mend that line") from error
    mixes = content.pop("mix", {})
    if content:
        raise UserError(f"{path}: unknown key {', '.join(content)}, expected only [mix.NAME] tables", "remove it")
    if not isinstance(mixes, dict) or not all(isinstance(mix, dict) for mix in mixes.values()):
        raise UserError(f"{path}: mix is no table of tables", "write recipes as [mix.NAME]")
    return mixes


def load_recipes(path: Path | None = None) -> list[Recipe]:
    """Every recipe of the file `path` (default: moegguf's own). Raises UserError with the faults of all of them."""
    path = path or find_recipes_file()
    recipes, faults = [], []
    for name in load_tables(path):
        try:
            recipes.append(load_recipe(name, path))
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    return recipes


def load_recipe(name: str, path: Path | None = None, overrides: Mapping[str, object] = MappingProxyType({})) -> Recipe:
    """The recipe `name` of the file `path` (default: moegguf's own), with `overrides` from the command line on top."""
    path = path or find_recipes_file()
    tables = load_tables(path)
    if name not in tables:
        known = ", ".join(tables) or "none"
        raise UserError(
            f"{path}: has no recipe {name!r}, only {known}", "see `moegguf recipes`, or pass --recipes FILE"
        )
    table = _overridden(tables[name], overrides)
    return parse_recipe(name, table, where=f"{path}: [mix.{name}]", folder=path.parent)


def _overridden(table: Mapping[str, object], overrides: Mapping[str, object]) -> dict[str, object]:
    """`table` with `overrides` on top: inside router and quant only what is given changes.

    The parameters of another router mode mean nothing, nor do texts of experts that are no more: they are dropped.
    """
    old, new = {"router": RouterMode.GATELESS, **table}, dict(overrides)
    for each in (old, new):
        if not isinstance(each.get("router", {}), dict):
            each["router"] = router_table(each["router"])
        if not isinstance(each.get("quant", {}), dict):
            each["quant"] = {"preset": each["quant"]}
    if TARGETS & set(new.get("quant", {})):  # a preset, a budget and a plan exclude each other
        replaced = TARGETS if set(BUDGETS) & set(new["quant"]) else {*TARGETS, "split"}
        old["quant"] = {key: value for key, value in old.get("quant", {}).items() if key not in replaced}
    if isinstance(experts := new.get("experts"), list) and isinstance(domains := old.get("domains"), dict):
        names = [expert.get("name") for expert in experts if isinstance(expert, dict)]
        old["domains"] = {name: texts for name, texts in domains.items() if name in names}
    if "compact" in new:  # a size and a largest KLD are no parts of one thing
        old.pop("compact", None)
    if any(
        new.get("router", {}).get(key, old["router"].get(key)) != old["router"].get(key) for key in ("mode", "file")
    ):
        del old["router"]
    return _on_top(new, old)


def _on_top(new: Mapping[str, object], old: Mapping[str, object]) -> dict[str, object]:
    """Table `new` over table `old`, tables inside likewise. Keys of `new` come first: of patterns the first counts."""
    merged = dict(new)
    for key, value in old.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(merged[key], dict):
            merged[key] = _on_top(merged[key], value)
    return merged
