"""`moegguf route fit`: a router from text of each expert's domain.

All that may be chosen is a recipe's: the flags are put on top of one, or of the one that a finished mix stands for,
and checked as such. So a fit before a build, after it, and within it are the same fit.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from moegguf.commands.options import check_threads, named_refs, print_json
from moegguf.commands.progress import counted
from moegguf.edit.finished import FinishedMix, read_routed_mix
from moegguf.errors import UserError, one_line
from moegguf.recipe import FITTED, Pool, Recipe, RouterMode, Tap, find_recipes_file, load_recipe, parse_recipe
from moegguf.routers.file import check_target, write_router

if TYPE_CHECKING:
    from moegguf.fitting import FitPlan, Fitted

HELP = """\
Compute a router from text of each expert's domain. Needs no training and no PyTorch: the text runs once through the
mix, or through the base alone while there is no mix, quantised or not.

ridge (default): least squares from what the router sees to the expert whose text it is. A few hundred tokens of each
domain do. hidden: the mean state on an expert's prompts less that on negative ones, as in mergekit.

With --statistics an expert can be added later with its own text only, and other settings tried without running again.
"""
EXAMPLES = """\
examples:
  moegguf route fit mymix -o router.safetensors                a recipe with domains; runs its base
  moegguf route fit --mix mix.gguf --text math=sums.jsonl --text chat=talk.txt
  moegguf route fit --mix mix.gguf --mode hidden --positive math=sums.txt --positive chat=talk.txt
  moegguf route fit --base-gguf base.gguf --text math=sums.jsonl --text chat=talk.txt --statistics s.safetensors
  moegguf route fit --base-gguf base.gguf --text code=code.txt --statistics s.safetensors     adds code to the two

text: .txt and .md files, .jsonl of {"text"}, {"prompt", "completion"}, {"messages"} or {"question", "answer"},
demo:DOMAIN. Put the router into a mix with `moegguf route set`, or name it as the router of a build.
"""

DEFAULT_OUTPUT = Path("router.safetensors")
MAX_TOKENS = 10**7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="name of a [mix.NAME] in the recipes file")
    parser.add_argument("--recipes", type=Path, metavar="FILE", help="recipes file (default: moegguf's models.toml)")
    run_on = parser.add_mutually_exclusive_group()
    run_on.add_argument("--mix", type=Path, metavar="FILE", help="run the text through this finished mix")
    run_on.add_argument("--base-gguf", type=Path, metavar="FILE", help="run the text through this GGUF of the base")
    text = parser.add_argument_group("text (NAME is an expert; once for each file)")
    for flag, what in (
        ("--text", "text of its domain, in place of the recipe's"),
        ("--positive", "hidden: prompts for it, in place of the text of its domain"),
        ("--negative", "hidden: prompts that are not for it (default: the other experts' prompts)"),
    ):
        text.add_argument(flag, action="append", default=[], metavar="NAME=FILE", help=what)
    text.add_argument("--max-tokens", type=int, default=4000, metavar="N", help="tokens an expert (default: 4000)")
    text.add_argument(
        "--holdout", type=float, default=0.2, metavar="SHARE",
        help="share of the text that the router is judged by and not fitted to (default: 0.2)",
    )  # fmt: skip
    router = parser.add_argument_group("the router (each flag overrides the recipe's key)")
    router.add_argument("--mode", choices=sorted(FITTED), help="(default: the recipe's, or ridge)")
    router.add_argument("--k", type=int, help="experts that run for each token (default: the mix's, or 2)")
    router.add_argument(
        "--lambda", type=float, dest="ridge_lambda", metavar="L", help="ridge: penalty on large weights (default: 0.01)"
    )
    router.add_argument("--temperature", type=float, metavar="T", help="ridge: smaller is sharper (default: 0.1)")
    router.add_argument("--tap", choices=[*map(str, Tap)], help="hidden: where to look (default: router_input)")
    router.add_argument("--pool", choices=[*map(str, Pool)], help="hidden: mean of a prompt, or its last token")
    router.add_argument("--shared", action="store_true", default=None, help="one router for all layers")
    router.add_argument("--always-on", metavar="NAME", help="an expert that runs for every token (default: the mix's)")
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE",
                        help=f"router to write (default: {DEFAULT_OUTPUT})")  # fmt: skip
    output.add_argument("--statistics", type=Path, metavar="FILE", help="read if it is there, extended, and written")
    output.add_argument("--json", action="store_true", help="print the report as JSON")
    output.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: physical cores)")


def run(args: argparse.Namespace) -> int:
    _check_numbers(args)
    check_target(args.output)  # before minutes go into what cannot be written
    mix = read_routed_mix(args.mix) if args.mix else None
    recipe = _recipe(args, mix)
    if mix:
        _check_room(mix, recipe)

    from moegguf.fitting import FitOptions, dense_model, plan_fit, read_texts, run_fit

    options = FitOptions(
        named_refs("--positive", args.positive), named_refs("--negative", args.negative), args.max_tokens, args.holdout,
        args.statistics, args.threads, folder=args.output.parent,
    )  # fmt: skip
    texts = read_texts(recipe, options)
    console = Console(stderr=args.json, markup=False, highlight=False, emoji=False, soft_wrap=True)
    model = args.mix or args.base_gguf
    with nullcontext(model) if model else dense_model(recipe, options) as path:
        plan = plan_fit(texts, path)
        _print_plan(console, plan)
        with counted("running", plan.n_tokens, "tokens") as bar:
            fitted = run_fit(plan, bar.did)
    write_router(args.output, fitted.router)
    if args.json:
        print_json(_as_json(args, fitted))
    else:
        _print_report(console, fitted)
    for warning in fitted.warnings:
        console.print(f"warning: {one_line(warning)}")
    use = f"route set {mix.path}" if mix else f"build {args.recipe or '…'}"
    console.print(f"wrote {args.output}; try: moegguf {use} --router {args.output}")
    return 0


# --- what is asked for ---


def _check_numbers(args: argparse.Namespace) -> None:
    if not 1 <= args.max_tokens <= MAX_TOKENS:
        raise UserError(f"--max-tokens {args.max_tokens}: expected 1 to {MAX_TOKENS}", "4000 is plenty")
    if not 0 <= args.holdout <= 0.9:
        raise UserError(f"--holdout {args.holdout:g}: expected a share from 0 to 0.9", "the usual one is 0.2")
    check_threads(args.threads)


def _recipe(args: argparse.Namespace, mix: FinishedMix | None) -> Recipe:
    """The recipe whose router is wanted: one that is named, the one of the mix, or that of the texts' names."""
    if args.recipe is not None:
        file = args.recipes or find_recipes_file()
        is_fitted = load_recipe(args.recipe, file, {}).router.is_unfitted
        mode = args.mode or (None if is_fitted else RouterMode.RIDGE)
        recipe = load_recipe(args.recipe, file, _overrides(args, mode) | {"layout": "auto"})
        if mix and recipe.expert_names != mix.expert_names:
            raise UserError(
                f"{mix.path}: its experts are {', '.join(mix.expert_names)}, those of recipe {recipe.name} are "
                f"{', '.join(recipe.expert_names)}",
                "leave the recipe out, or pass a mix that was built from it",
            )
        return recipe
    if mix is None and args.base_gguf is None:
        raise UserError("nothing to fit", "name a recipe (see `moegguf recipes`), or pass --mix or --base-gguf")
    table = _table_of_mix(mix) if mix else _table_of_base(args)
    given = _overrides(args, args.mode or RouterMode.RIDGE)
    given["router"] = table.get("router", {}) | given["router"]
    return parse_recipe(args.output.stem, table | given, where="command line:", folder=Path())


def _overrides(args: argparse.Namespace, mode: RouterMode | None) -> dict[str, object]:
    """The recipe table that the flags stand for."""
    router = {
        "mode": mode, "k": args.k, "lambda": args.ridge_lambda, "temperature": args.temperature, "tap": args.tap,
        "pool": args.pool, "shared": args.shared,
    }  # fmt: skip
    flags = {
        "router": {key: value for key, value in router.items() if value is not None} or None,
        "always_on": args.always_on,
        "domains": {
            name: [_from_here(ref) for ref in refs] for name, refs in named_refs("--text", args.text).items()
        } or None,
    }  # fmt: skip
    return {key: value for key, value in flags.items() if value is not None}


def _table_of_mix(mix: FinishedMix) -> dict[str, object]:
    """The recipe of a finished mix, as far as a fit asks for it."""
    card = mix.card
    table = {
        "base": card.base,
        "experts": [{"name": expert.name, "source": expert.source} for expert in card.experts],
        "router": {} if card.is_gateless else {"k": card.k},
        "always_on": card.always_on,
    }
    return {key: value for key, value in table.items() if value is not None}


def _table_of_base(args: argparse.Namespace) -> dict[str, object]:
    """The recipe of a mix that is still to be made: its experts are those that text is given for, or was."""
    from moegguf.routers.statistics import experts_in

    known = experts_in(args.statistics) if args.statistics and args.statistics.exists() else ()
    given = named_refs("--text", args.text) | named_refs("--positive", args.positive)
    names = dict.fromkeys((*known, *given, *filter(None, [args.always_on])))
    if not names:
        raise UserError("no text to fit to", "pass --text NAME=FILE for each expert")
    base = str(args.base_gguf)
    return {"base": base, "experts": [{"name": name, "source": base} for name in names]}


def _check_room(mix: FinishedMix, recipe: Recipe) -> None:
    """Whether the router can be put into the mix that it is fitted on."""
    n_routed = len([name for name in recipe.expert_names if name != recipe.router.always_on])
    n_rows = next(iter(mix.sites.values())).shape[0]
    if n_rows != n_routed:
        raise UserError(
            f"{mix.path}: layout {mix.card.layout} has {n_rows} experts behind its router, this one is for {n_routed}",
            "build the mix with layout mixtral, and with the same always_on",
        )


def _from_here(ref: str) -> str:
    """A path on the command line is relative to the working directory, whatever recipe it goes into."""
    path = Path(os.path.expanduser(ref))  # noqa: PTH111 (pathlib raises for a ~user that there is not)
    return ref if ref.startswith("demo:") else str(path.absolute())


# --- what is shown ---


def _print_plan(console: Console, plan: FitPlan) -> None:
    subject = plan.statistics.subject
    console.print(f"running {plan.n_tokens} tokens through {plan.header.path.name}: {subject.n_layer} layers of "
                  f"{subject.n_embd}")  # fmt: skip
    if subject.gram_bytes > 1e8:
        console.print(f"the statistics take {subject.gram_bytes / 1e9:.1f} GB of memory"
                      + (" and of disk" if plan.options.statistics else ""))  # fmt: skip


def _print_report(console: Console, fitted: Fitted) -> None:
    router, separation = fitted.router, fitted.separation
    settings = ", ".join(f"{key} {value}" for key, value in router.settings.items())
    console.print(f"{router.mode} router: {router.k} experts a token; {settings}")
    tokens = ", ".join(f"{name} {n}" for name, n in fitted.n_tokens.items())
    console.print(f"tokens fitted to: {tokens}")
    if separation is None:
        return
    console.print("\nof held-out tokens, in %: those whose first choice is the expert of their domain (right), and")
    console.print("how many each expert is the first choice of (all domains weigh the same)")
    table = Table("layer", Column("right", justify="right"), box=None, pad_edge=False)
    for name in separation.experts:
        table.add_column(name, justify="right")
    for layer, (top1, load) in enumerate(zip(separation.top1, separation.load, strict=True)):
        table.add_row(str(layer), *_percent(top1, *load))
    table.add_section()
    table.add_row("mean", *_percent(separation.top1.mean(), *separation.load.mean(axis=0)))
    console.print(table)


def _percent(*shares: float) -> list[str]:
    return [f"{100 * share:.1f}" for share in shares]


def _as_json(args: argparse.Namespace, fitted: Fitted) -> dict:
    router, separation = fitted.router, fitted.separation
    report = {
        "output": str(args.output),
        "mode": router.mode,
        "experts": list(router.experts),
        "k": router.k,
        "always_on": router.always_on,
        "shared": router.shared,
        "settings": dict(router.settings),
        "tokens": dict(fitted.n_tokens),
        "separation": None,
        "warnings": list(fitted.warnings),
    }
    if separation:
        report["separation"] = {
            "domains": list(separation.domains),
            "top1": float(separation.top1.mean()),
            "top1_by_layer": separation.top1.tolist(),
            "load": dict(zip(separation.experts, separation.load.mean(axis=0).tolist(), strict=True)),
            "load_by_layer": separation.load.tolist(),
        }
    return report
