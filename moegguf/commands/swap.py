"""`moegguf swap`: other weights for experts of a finished mix."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.api.editing import swap
from moegguf.commands.changes import add_common, add_output, named_sources, report
from moegguf.commands.progress import shown

HELP = """\
Put another model in the place of an expert. Only that expert's weights are read, quantised to the types that the file
has, and written; every other byte stays. The result is the file of a fresh build with that expert.

In place it needs room on the disk for the old weights of the expert, which are kept until it is done: after Ctrl-C or
for a broken source it puts them back at once, after a crash `moegguf set MIX --recover` does.
"""
EXAMPLES = """\
examples:
  moegguf swap mix.gguf math=hf:org/better-math --in-place
  moegguf swap mix.gguf math=./math-model code=lora:./adapter::./base -o other.gguf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="MIX", help="the mix to change")
    parser.add_argument("experts", nargs="+", metavar="NAME=SOURCE", help="an expert of it, and what takes its place")
    where = parser.add_mutually_exclusive_group(required=True)
    add_output(where, required=False)
    where.add_argument("--in-place", action="store_true", help="change the file itself")
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix of the mix, its base or SOURCE")
    parser.add_argument("--stream", action="store_true", help="read Hub models by range; keep nothing of them")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    refs = named_sources(args.experts)
    made = swap(
        args.file, refs, output=args.output, imatrix=args.imatrix, stream=args.stream, threads=args.threads,
        overwrite=args.force, watch=shown,
    )  # fmt: skip
    sources = {expert.name: expert.source for expert in made.card.experts}
    return report(args, made, ", ".join(f"{name} is {sources[name]}" for name in refs))
