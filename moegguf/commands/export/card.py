"""`moegguf export card`: a README.md for the Hugging Face Hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moegguf.atomic import atomic_file
from moegguf.commands.options import print_json
from moegguf.edit.change import check_copy
from moegguf.errors import one_line
from moegguf.exporting.card import model_card
from moegguf.exporting.results import results_table
from moegguf.gguf_header import read_header, shards

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
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    header = read_header(shards(args.file)[0])
    card = model_card(header, [results_table(path) for path in args.results], args.repo)
    output = args.output or args.file.parent / "README.md"
    check_copy(header.path, output, overwrite=args.force)
    with atomic_file(output) as file:
        file.write(card.text.encode())
    if args.json:
        print_json({"card": str(output), "warnings": card.warnings})
        return 0
    for warning in card.warnings:
        print(f"warning: {one_line(warning)}", file=sys.stderr)
    print(f"wrote {output}")
    return 0
