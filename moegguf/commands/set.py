"""`moegguf set`: what a finished mix says of itself, its template, and how many experts run."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.api.editing import set as set_keys
from moegguf.commands.changes import add_common, add_output, report
from moegguf.commands.output import console
from moegguf.commands.progress import shown
from moegguf.edit.keys import TEXTS
from moegguf.journal import UNDONE

HELP = """\
Change what a mix says of itself, its chat template, and how many experts run for a token: in place and in a moment, as
far as its header has room (a build leaves 1 kB); with -o a copy is written, which has all the room again.

An empty text, as in --author "", takes it out.
"""
EXAMPLES = """\
examples:
  moegguf set mix.gguf --name my-mix --license apache-2.0
  moegguf set mix.gguf --k 1                                a mix with a router; gate-less ones run all experts
  moegguf set mix.gguf --template chatml.jinja -o other.gguf
  moegguf set mix.gguf --recover                            undo a change that was interrupted
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="MIX", help="the mix to change")
    for flag, (_, what) in TEXTS.items():
        parser.add_argument(f"--{flag}", metavar="TEXT", help=what)
    parser.add_argument("--template", type=Path, metavar="FILE", help="chat template, in jinja2")
    parser.add_argument("--k", type=int, metavar="N", help="experts that run for each token")
    parser.add_argument("--recover", action="store_true", help="put back what an interrupted change left half written")
    add_output(parser, required=False, what="write a copy, and leave MIX as it is")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    texts = {flag: text for flag in TEXTS if (text := getattr(args, flag)) is not None}
    made = set_keys(
        args.file, output=args.output, **texts, template=args.template, k=args.k, recover=args.recover,
        threads=args.threads, overwrite=args.force, watch=shown,
    )  # fmt: skip
    what = [*texts, *(["template"] if args.template else []), *(["k"] if args.k is not None else [])]
    if what or args.json:
        return report(args, made, f"{', '.join(what)} set")
    console(args).print(f"{made.path}: {UNDONE if made.is_undone else 'no change of it was interrupted'}")
    return 0
