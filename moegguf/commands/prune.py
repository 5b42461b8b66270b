"""`moegguf prune`: a copy of a finished mix without some of its experts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from moegguf.api.editing import prune
from moegguf.commands.changes import add_common, add_output, print_made
from moegguf.commands.options import add_recipes, print_json
from moegguf.commands.output import console
from moegguf.commands.progress import shown
from moegguf.errors import one_line

if TYPE_CHECKING:
    from moegguf.jobs.pruning import Pruned
    from moegguf.measurement.divergence import Divergence

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
    add_recipes(text)
    text.add_argument("--max-tokens", type=int, default=4096, metavar="N", help="tokens of each text (default: 4096)")
    add_output(parser, required=True)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    pruned = prune(
        args.file, output=args.output, drop=args.drop or (), keep=args.keep, text=args.text, domains=args.domains,
        recipes=args.recipes, max_tokens=args.max_tokens, threads=args.threads, overwrite=args.force, watch=shown,
    )  # fmt: skip
    if args.json:
        print_json(pruned.as_json())
        return 0
    out = console(args)
    if pruned.ranking:
        _print_ranking(out, pruned)
    print_made(out, pruned.made, f"without {', '.join(pruned.dropped)}, {pruned.made.card.describe_router()}")
    if pruned.cost:
        _print_cost(out, pruned.cost)
    return 0


def _print_ranking(out: Console, pruned: Pruned) -> None:
    table = Table("expert", Column("score", justify="right"), Column("tokens", justify="right"), "", box=None,
                  pad_edge=False)  # fmt: skip
    for one in pruned.ranking:
        verdict = "dropped" if one.expert in pruned.dropped else "kept"
        table.add_row(one_line(one.expert), f"{one.score:.3f}", f"{one.share:.1%}", verdict)
    out.print(f"share of each expert in the router-weighted norm of outputs (REAP), {pruned.n_ranked} tokens:")
    out.print(table)


def _print_cost(out: Console, cost: Divergence) -> None:
    error = "" if cost.kld.error is None else f" ± {cost.kld.error:.1g}"
    out.print(
        f"cost: KLD {cost.kld.value:.2g}{error} nats from the full mix, which finds the same token likeliest "
        f"{cost.top1.value:.1%} of the time; perplexity {cost.perplexity.value:.3f}, was "
        f"{cost.perplexity_reference.value:.3f} ({cost.n_tokens} held-out tokens)"
    )
