"""`moegguf prune`: a copy of a finished mix without some of its experts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from moegguf.commands.changes import add_common, add_output, make, open_mix, quiet_for_json
from moegguf.commands.options import check_range, print_json
from moegguf.commands.progress import counted
from moegguf.edit.experts import plan_drop
from moegguf.edit.finished import FinishedMix
from moegguf.errors import UserError, one_line
from moegguf.recipe import find_recipes_file, load_recipe
from moegguf.texts import Record, read_domains

if TYPE_CHECKING:
    from moegguf.saliency import Rank, Tokens

HELP = """\
Write a mix again without some of its experts, and say what that costs. Bytes of the others are copied; nothing is
quantised again. (`moegguf drop` only does it.)

--drop names the experts to leave out; --keep N keeps those that matter most on the texts: by REAP, the mean over the
tokens that reach an expert of its output's length times its weight. With texts, the cost is measured on one half of
them: the KL divergence of the pruned mix from the full one. A router loses rows and is not fitted again;
noise is what a build gives those that are left.
"""
EXAMPLES = """\
examples:
  moegguf prune mix.gguf --drop clinic -o smaller.gguf
  moegguf prune mix.gguf --keep 2 --text math=sums.jsonl talk=talk.txt -o smaller.gguf
  moegguf prune mix.gguf --keep 2 --domains mymix -o smaller.gguf

text: .txt and .md files, .jsonl of {"text"}, {"prompt", "completion"}, {"messages"} or {"question", "answer"},
demo:DOMAIN
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="MIX", help="a mix with experts in stacks: layout mixtral or shared")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--drop", action="append", metavar="NAME", help="an expert to leave out; once for each")
    which.add_argument("--keep", type=int, metavar="N", help="keep the N experts that matter most on the texts")
    text = parser.add_argument_group("text to rank by and to measure on")
    text.add_argument("--text", nargs="+", action="extend", default=[], metavar="FILE", help="FILE, or NAME=FILE")
    text.add_argument("--domains", metavar="RECIPE", help="the texts under `domains` of this recipe")
    text.add_argument("--recipes", type=Path, metavar="FILE", help="recipes file (default: moegguf's models.toml)")
    text.add_argument("--max-tokens", type=int, default=4096, metavar="N", help="of each text (default: 4096)")
    add_output(parser, required=True)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    from moegguf.saliency import halves

    check_range("--max-tokens", args.max_tokens, 2)
    mix = open_mix(args)
    _check_keep(mix, args)
    plan_drop(mix, args.drop or mix.routed_names[args.keep :])  # or fail now
    texts = _texts(args)
    to_rank, to_measure = halves(mix.header, texts, args.max_tokens) if texts else ([], [])
    console = quiet_for_json(args)
    ranks = _ranked(console, mix, to_rank, args) if args.keep else []
    drop = list(dict.fromkeys(args.drop or [one.expert for one in ranks[args.keep :]]))
    change = plan_drop(mix, drop)
    report = make(console, args, change, f"without {', '.join(drop)}, {change.card.describe_router()}")
    cost = _measured(console, mix, to_measure, args) if to_measure else None
    if args.json:
        print_json(report | {"dropped": drop, "ranking": list(map(dataclasses.asdict, ranks)), "cost": cost})
    return 0


def _check_keep(mix: FinishedMix, args: argparse.Namespace) -> None:
    if args.keep is None:
        return
    n = len(mix.routed_names)
    if not 1 <= args.keep < n:
        besides = f" besides {mix.card.always_on}" if mix.card.always_on else ""
        raise UserError(f"--keep {args.keep}: expected 1 to {n - 1}", f"{mix.path} has {n} experts{besides}")
    if {info.shape[0] for info in mix.sites.values()} != {n}:
        message = f"{mix.path}: layout {mix.card.layout} does not tell its experts apart, so they cannot be ranked"
        raise UserError(message, "name those to leave out: --drop")
    if not (args.text or args.domains):
        raise UserError(f"--keep {args.keep}: takes text to rank experts by", "pass --text FILE or --domains RECIPE")


def _texts(args: argparse.Namespace) -> Mapping[str, Sequence[Record]]:
    """Name → records; none where none are asked for."""
    refs = {spec: [spec.partition("=")[2] or spec] for spec in args.text}
    texts = read_domains(refs)
    if args.domains:
        recipe = load_recipe(args.domains, args.recipes or find_recipes_file(), {})
        texts |= read_domains(recipe.domains, recipe.folder)
        if not texts:
            raise UserError(f"recipe {recipe.name} names no domains", 'give it domains = { NAME = "file.jsonl" }')
    return texts


def _ranked(console: Console, mix: FinishedMix, chunks: Sequence[Tokens], args: argparse.Namespace) -> list[Rank]:
    """The experts, the one that matters most first. Prints them."""
    from moegguf.saliency import rank

    n_tokens = sum(map(len, chunks))
    with counted("ranking", n_tokens, "tokens") as bar:
        ranks = rank(mix, chunks, threads=args.threads, progress=bar.did)
    table = Table("expert", Column("score", justify="right"), Column("tokens", justify="right"), "", box=None,
                  pad_edge=False)  # fmt: skip
    for place, one in enumerate(ranks):
        verdict = "kept" if place < args.keep else "dropped"
        table.add_row(one_line(one.expert), f"{one.score:.3f}", f"{one.share:.1%}", verdict)
    console.print(f"share of each expert in the router-weighted norm of outputs (REAP), {n_tokens} tokens:")
    console.print(table)
    return ranks


def _measured(console: Console, mix: FinishedMix, chunks: Sequence[Tokens], args: argparse.Namespace) -> dict:
    """What was lost, as JSON. Prints it."""
    from moegguf.saliency import measure_cost

    with counted("measuring", 2 * sum(len(chunk) - 1 for chunk in chunks), "tokens") as bar:
        cost = measure_cost(mix, args.output, chunks, threads=args.threads, progress=bar.did)
    error = "" if cost.kld.error is None else f" ± {cost.kld.error:.1g}"
    console.print(
        f"cost: KLD {cost.kld.value:.2g}{error} nats from the full mix, which finds the same token likeliest "
        f"{cost.top1.value:.1%} of the time; perplexity {cost.perplexity.value:.3f}, was "
        f"{cost.perplexity_reference.value:.3f} ({cost.n_tokens} held-out tokens)"
    )
    return cost.as_json()
