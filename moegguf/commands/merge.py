"""`moegguf merge`: the file that several parts were split from."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.api.editing import merge
from moegguf.commands.changes import add_common, add_output
from moegguf.commands.options import print_json
from moegguf.commands.output import console
from moegguf.commands.progress import shown
from moegguf.sizes import show_size

HELP = """\
Put the parts of a split GGUF file together, whoever split it: all of them must be there, and be parts of one file.
"""
EXAMPLES = """\
examples:
  moegguf merge mix-00001-of-00003.gguf -o mix.gguf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="PART", help="one of the parts; the others are looked for beside it")
    add_output(parser, required=True)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    merged = merge(args.file, output=args.output, threads=args.threads, overwrite=args.force, watch=shown)
    if args.json:
        print_json(merged.as_json())
    console(args).print(f"wrote {merged.path} ({show_size(merged.n_bytes)})")
    return 0
