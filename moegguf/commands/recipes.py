"""`moegguf recipes`: what a recipes file offers."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.text import Text

from moegguf.commands.options import print_json
from moegguf.commands.output import console
from moegguf.errors import UserError, one_line
from moegguf.recipe import Recipe, RouterMode, find_recipes_file, load_recipe, load_tables

HELP = "List the mixes that a recipes file offers."
EXAMPLES = """\
examples:
  moegguf recipes
  moegguf recipes --recipes my.toml --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipes", type=Path, metavar="FILE", help="recipes file (default: moegguf's models.toml)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    path = args.recipes or find_recipes_file()
    recipes, faults = [], []
    for name in load_tables(path):
        try:
            recipes.append(load_recipe(name, path, {}))
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    if args.json:
        print_json([_as_json(recipe) for recipe in recipes])
        return 0
    out = console(args)
    for recipe in recipes:
        _print(out, recipe)
    return 0


def _print(out: Console, recipe: Recipe) -> None:
    router = recipe.router.mode
    if recipe.router.mode is not RouterMode.GATELESS:
        router += f" with {recipe.router.k} experts a token"
    out.print(Text.assemble((recipe.name, "bold"), f"  {one_line(recipe.description)}"))
    out.print(
        f"    {len(recipe.experts)} experts ({', '.join(recipe.expert_names)}) in {recipe.base}; "
        f"{router}, {recipe.layout}, {recipe.quant.preset}"
    )


def _as_json(recipe: Recipe) -> dict:
    return {
        "name": recipe.name,
        "description": recipe.description,
        "base": recipe.base,
        "experts": [{"name": e.name, "source": e.source, "weight": e.weight, "quant": e.quant} for e in recipe.experts],
        "router": recipe.router.mode,
        "k": recipe.router.k,
        "layout": recipe.layout,
        "quant": recipe.quant.preset,
        "output": str(recipe.output),
    }
