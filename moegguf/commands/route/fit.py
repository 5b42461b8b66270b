"""`moegguf route fit`: a router from text of each expert's domain."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from moegguf.commands.options import add_json, add_recipes, add_threads, named_refs, print_json
from moegguf.commands.output import console, in_shell
from moegguf.commands.progress import shown
from moegguf.errors import one_line
from moegguf.recipe import FITTED, Pool, Tap
from moegguf.sizes import show_size

if TYPE_CHECKING:
    from moegguf.jobs.fitting import FitPlan, Fitted

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
LARGE = 10**8
"""Bytes of statistics that are worth a word."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="name of a [mix.NAME] in the recipes file")
    add_recipes(parser)
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
    router.add_argument("--k", type=int, metavar="N", help="experts that run for each token (default: the mix's, or 2)")
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
    output.add_argument("--force", action="store_true", help="replace the router if it exists")
    add_json(output)
    add_threads(output)


def run(args: argparse.Namespace) -> int:
    from moegguf.api import route

    out, start = console(args), time.monotonic()
    fitted = route.fit(
        args.recipe, recipes=args.recipes, mix=args.mix, base_gguf=args.base_gguf,
        text=named_refs("--text", args.text), positive=named_refs("--positive", args.positive),
        negative=named_refs("--negative", args.negative), max_tokens=args.max_tokens, holdout=args.holdout,
        mode=args.mode, k=args.k, ridge_lambda=args.ridge_lambda, temperature=args.temperature, tap=args.tap,
        pool=args.pool, shared=args.shared, always_on=args.always_on, output=args.output, statistics=args.statistics,
        overwrite=args.force, threads=args.threads, on_plan=lambda plan: _print_plan(out, plan), watch=shown,
    )  # fmt: skip
    if args.json:
        written = {"file": str(args.output), "bytes": args.output.stat().st_size}
        print_json(written | fitted.as_json() | {"seconds": round(time.monotonic() - start, 3)})
    _print_report(out, fitted)
    use = f"route set {in_shell(args.mix)}" if args.mix else f"build {args.recipe or '…'}"
    out.print(f"wrote {args.output}; try: moegguf {use} --router {in_shell(args.output)}")
    return 0


def _print_plan(out: Console, plan: FitPlan) -> None:
    subject = plan.statistics.subject
    out.print(f"running {plan.n_tokens} tokens through {plan.header.path.name}: {subject.n_layer} layers of "
              f"{subject.n_embd}")  # fmt: skip
    if subject.gram_bytes > LARGE:
        out.print(f"the statistics take {show_size(subject.gram_bytes)} of memory"
                  + (" and of disk" if plan.options.statistics else ""))  # fmt: skip


def _print_report(out: Console, fitted: Fitted) -> None:
    router = fitted.router
    settings = ", ".join(f"{key} {value}" for key, value in router.settings.items())
    out.print(f"{router.mode} router: {router.k} experts a token; {settings}")
    out.print(f"tokens fitted to: {', '.join(f'{name} {n}' for name, n in fitted.n_tokens.items())}")
    if separation := fitted.separation:
        out.print("\nof held-out tokens, in %: those whose first choice is the expert of their domain (right), and")
        out.print("how many each expert is the first choice of (all domains weigh the same)")
        table = Table("layer", Column("right", justify="right"), box=None, pad_edge=False)
        for name in separation.experts:
            table.add_column(name, justify="right")
        for layer, (top1, load) in enumerate(zip(separation.top1, separation.load, strict=True)):
            table.add_row(str(layer), *_percent(top1, *load))
        table.add_section()
        table.add_row("mean", *_percent(separation.top1.mean(), *separation.load.mean(axis=0)))
        out.print(table)
    for note in fitted.warnings:
        out.print(f"note: {one_line(note)}")


def _percent(*shares: float) -> list[str]:
    return [f"{100 * share:.1f}" for share in shares]
