"""`moegguf drop`: fewer experts in a finished mix."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.api.editing import drop
from moegguf.commands.changes import add_common, add_output, report
from moegguf.commands.progress import shown

HELP = """\
Write a mix again without some of its experts. The bytes of the others are copied; nothing is quantised again.

A gate-less mix is then the mean of those that are left, noise is what a build gives them, and a router that was fitted
or trained loses rows. `moegguf prune` does the same, says what it costs, and can choose the experts.
"""
EXAMPLES = """\
examples:
  moegguf drop mix.gguf clinic -o smaller.gguf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="MIX", help="the mix to start from; it stays as it is")
    parser.add_argument("experts", nargs="+", metavar="NAME", help="an expert to leave out")
    add_output(parser, required=True)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    made = drop(args.file, args.experts, output=args.output, threads=args.threads, overwrite=args.force, watch=shown)
    return report(args, made, f"without {', '.join(dict.fromkeys(args.experts))}, {made.card.describe_router()}")
