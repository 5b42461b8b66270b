"""`moegguf add`: more experts for a finished mix."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.api.editing import add
from moegguf.commands.changes import add_common, add_output, named_sources, report
from moegguf.commands.progress import shown

HELP = """\
Write a mix again with more experts, behind those that it has. Their bytes are copied; only the new experts are
quantised, to the types that the file has.

A gate-less mix is then the mean of them all, a noisy router grows by what a build would give it. A router that was
fitted or trained has no row for a new expert: --router names one that has.
"""
EXAMPLES = """\
examples:
  moegguf add mix.gguf law=hf:org/law-model -o larger.gguf
  moegguf add routed.gguf law=./law --router router.safetensors -o larger.gguf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="MIX", help="the mix to start from; it stays as it is")
    parser.add_argument("experts", nargs="+", metavar="NAME=SOURCE", help="a name and a model: a fine-tune of its base")
    parser.add_argument("--router", metavar="ROUTER", help="for all of them: FILE.safetensors, gateless, noisy[:SEED]")
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix of the base or of SOURCE")
    add_output(parser, required=True)
    parser.add_argument("--stream", action="store_true", help="read Hub models by range; keep nothing of them")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    refs = named_sources(args.experts)
    made = add(
        args.file, refs, output=args.output, router=args.router, imatrix=args.imatrix, stream=args.stream,
        threads=args.threads, overwrite=args.force, watch=shown,
    )  # fmt: skip
    return report(args, made, f"{', '.join(refs)} added, {made.card.describe_router()}")
