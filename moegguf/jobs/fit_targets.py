"""What a router is fitted for: a recipe by its name, a finished mix, or a mix that is still to be made of a base.

All that may be chosen is a recipe's: what is given is put on top of one, or of the one that a finished mix or the names
of the texts stand for, and checked as such. So a fit before a build, after it, and within it are the same fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moegguf.edit.finished import FinishedMix
from moegguf.edit.router import notes_on, open_routed_mix
from moegguf.errors import UserError
from moegguf.jobs.fitting import FitOptions
from moegguf.recipe import Recipe, RouterMode, load_recipe, parse_recipe
from moegguf.routers.statistics import experts_in

Table = Mapping[str, object]
"""Keys of a recipe."""

_WHERE = "route fit:"


@dataclass(frozen=True)
class FitTarget:
    """A recipe whose router is wanted, and the GGUF that the texts are run through, if there is one already."""

    recipe: Recipe
    model: Path | None
    notes: tuple[str, ...] = ()
    """What whoever asked for it should know."""


def fit_target(
    given: Table,
    options: FitOptions,
    *,
    recipe: str | None = None,
    recipes: Path | None = None,
    mix: Path | None = None,
    base_gguf: Path | None = None,
) -> FitTarget:
    """What to fit a router for: the recipe of that name in the file `recipes`, else `mix`, else `base_gguf`'s.

    `given` are keys on top of it: `router`, `always_on` and `domains`. Raises UserError where there is nothing of them
    to fit for, where they do not go together, and where the router that is asked for could not be put into `mix`.
    """
    if mix and base_gguf:
        raise UserError("--mix and --base-gguf do not go together", "the text runs through one model")
    finished, is_undone = open_routed_mix(mix) if mix else (None, False)
    if recipe is not None:
        wanted = _named(recipe, recipes, given, finished)
    elif finished:
        wanted = _parsed(_table_of_mix(finished), given)
    elif base_gguf:
        wanted = _parsed(_table_of_base(base_gguf, _experts_of_texts(given, options)), given)
    else:
        raise UserError("nothing to fit", "name a recipe (see `moegguf recipes`), or pass --mix or --base-gguf")
    if finished:
        _check_room(finished, wanted)
    return FitTarget(wanted, mix or base_gguf, tuple(notes_on(mix, is_undone)) if mix else ())


def _named(name: str, file: Path | None, given: Table, mix: FinishedMix | None) -> Recipe:
    is_fitted = load_recipe(name, file).router.is_unfitted
    router = ({} if is_fitted else {"mode": RouterMode.RIDGE}) | dict(given.get("router", {}))
    recipe = load_recipe(name, file, {**given, "layout": "auto"} | ({"router": router} if router else {}))
    if mix and recipe.expert_names != mix.expert_names:
        raise UserError(
            f"{mix.path}: its experts are {', '.join(mix.expert_names)}, those of recipe {recipe.name} are "
            f"{', '.join(recipe.expert_names)}",
            "leave the recipe out, or pass a mix that was built from it",
        )
    return recipe


def _parsed(table: Table, given: Table) -> Recipe:
    router = {"mode": RouterMode.RIDGE, **table.get("router", {}), **given.get("router", {})}
    return parse_recipe("router", {**table, **given, "router": router}, where=_WHERE, folder=Path())


def _table_of_mix(mix: FinishedMix) -> Table:
    """The recipe of a finished mix, as far as a fit asks for it."""
    card = mix.card
    table = {
        "base": card.base,
        "experts": [{"name": expert.name, "source": expert.source} for expert in card.experts],
        "router": {} if card.is_gateless else {"k": card.k},
        "always_on": card.always_on,
    }
    return {key: value for key, value in table.items() if value is not None}


def _table_of_base(base: Path, experts: Iterable[str]) -> Table:
    return {"base": str(base), "experts": [{"name": name, "source": str(base)} for name in experts]}


def _experts_of_texts(given: Table, options: FitOptions) -> tuple[str, ...]:
    """The experts of a mix that is still to be made: those that text is given for, or was."""
    known = experts_in(options.statistics) if options.statistics and options.statistics.exists() else ()
    always_on = filter(None, [given.get("always_on")])
    names = dict.fromkeys((*known, *given.get("domains", ()), *options.positive, *always_on))
    if not names:
        raise UserError("no text to fit to", "pass --text NAME=FILE for each expert")
    return tuple(names)


def _check_room(mix: FinishedMix, recipe: Recipe) -> None:
    """Whether the router can be put into the mix that it is fitted on."""
    n_routed = len([name for name in recipe.expert_names if name != recipe.router.always_on])
    n_rows = next(iter(mix.sites.values())).shape[0]
    if n_rows != n_routed:
        raise UserError(
            f"{mix.path}: layout {mix.card.layout} has {n_rows} experts behind its router, this one is for {n_routed}",
            "build the mix with layout mixtral, and with the same always_on",
        )
