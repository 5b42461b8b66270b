"""`moegguf recipes`: what a recipes file offers."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.text import Text

from moegguf.api.building import recipes as list_recipes
from moegguf.commands.options import add_json, add_recipes, print_json
from moegguf.commands.output import console
from moegguf.errors import one_line
from moegguf.recipe import Recipe, RouterMode

HELP = "List the mixes that a recipes file offers."
EXAMPLES = """\
examples:
  moegguf recipes
  moegguf recipes --recipes my.toml --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipes(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    recipes = list_recipes(args.recipes)
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
