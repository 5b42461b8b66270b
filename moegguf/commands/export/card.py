"""`moegguf export card`: a README.md for the Hugging Face Hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moegguf.commands.options import add_json, print_json
from moegguf.commands.output import console
from moegguf.errors import one_line

HELP = """\
Write the README.md of a mix for the Hugging Face Hub: metadata, experts, licences, the recipe, what was measured, and
how to run it. Licences that are missing, unknown or exclude each other are named, here and in the card.
"""
EXAMPLES = """\
examples:
  moegguf export card mix.gguf
  moegguf export card mix.gguf --results scores.json --results kld.json --repo me/my-mix -o upload/README.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="MIX", help="a mix; any shard of a split one")
    parser.add_argument(
        "--results", type=Path, action="append", default=[], metavar="FILE",
        help="what `moegguf eval --json` or `moegguf measure --json` wrote; once for each",
    )  # fmt: skip
    parser.add_argument("--repo", default="", metavar="ORG/NAME", help="where it will be on the Hub")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="file to write (default: README.md beside it)"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from moegguf.api import export

    made = export.card(args.file, results=args.results, repo=args.repo, output=args.output, overwrite=args.force)
    if args.json:
        print_json(made.as_json())
        return 0
    for warning in made.warnings:
        print(f"warning: {one_line(warning)}", file=sys.stderr)
    console(args).print(f"wrote {made.path}")
    return 0
