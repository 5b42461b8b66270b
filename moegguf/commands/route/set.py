"""`moegguf route set`: another router for a finished mix, in place."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moegguf.commands.options import add_json, print_json
from moegguf.commands.output import console, in_shell
from moegguf.edit.router import change_router, kept_router, notes_on
from moegguf.errors import one_line
from moegguf.recipe import RouterSpec

HELP = """\
Replace the router inside a finished mix: in place, in a moment, nothing is quantised again.

The router that was there is kept beside the mix, in MIX.old-router.safetensors; --undo sets it again, which restores
every byte. A crash in the middle leaves the old router, if need be after `moegguf set MIX --recover`.
"""
EXAMPLES = """\
examples:
  moegguf route set mix.gguf --router router.safetensors     one that `route fit` or `train` wrote
  moegguf route set mix.gguf --router noisy:7 --k 2          white noise of seed 7
  moegguf route set mix.gguf --router gateless               the mean of all experts
  moegguf route set mix.gguf --undo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="MIX", help="a mix in layout mixtral, or shared with always_on")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--router", metavar="ROUTER", help="FILE.safetensors, gateless, noisy or noisy:SEED")
    what.add_argument("--undo", action="store_true", help="set the router that the last change replaced")
    parser.add_argument(
        "--k", type=int, metavar="N", help="experts that run for each token (default: the router's; noisy: 2)"
    )
    parser.add_argument("--std", type=float, help=f"noisy: standard deviation (default: {RouterSpec.std})")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    router = str(kept_router(args.file)) if args.undo else args.router
    done = change_router(args.file, router, k=args.k, std=args.std)
    for note in notes_on(args.file, done.is_undone):
        print(note, file=sys.stderr)
    if args.json:
        print_json(done.as_json())
    out = console(args)
    out.print(f"{args.file}: {one_line(done.card.describe_router())} ({done.seconds:.2f} s)")
    undo = f"moegguf route set {in_shell(args.file)} --undo"
    out.print(f"the old router ({done.old.mode}) is in {done.kept}; to set it again: {undo}")
    return 0
