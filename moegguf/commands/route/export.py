"""`moegguf route export`: a router as an adapter that a server switches per request."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moegguf.commands.options import add_json, print_json
from moegguf.commands.output import console, in_shell
from moegguf.edit.router import export_router, notes_on
from moegguf.sizes import show_size

HELP = """\
Write a router as a LoRA adapter in GGUF: stock llama.cpp adds it to the router of the mix when asked to.

A server can so hold several routers over one mix and choose for each request (llama-server's --lora and its "lora"
field). The adapter is the difference to the router in the file, so it fits that file only; the number of experts
that run for a token stays the file's.
"""
EXAMPLES = """\
examples:
  moegguf route export mix.gguf --router router.safetensors -o router.gguf
  moegguf chat mix.gguf --adapter router.gguf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="MIX", help="the mix that the adapter is for")
    parser.add_argument("--router", required=True, metavar="ROUTER", help="FILE.safetensors, noisy or noisy:SEED")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="adapter to write (.gguf)")
    parser.add_argument("--force", action="store_true", help="replace the adapter if it exists")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    made = export_router(args.file, args.router, args.output, overwrite=args.force)
    for note in notes_on(args.file, made.is_undone):
        print(note, file=sys.stderr)
    if args.json:
        print_json(made.as_json())
    out = console(args)
    out.print(f"wrote {made.path} ({show_size(made.n_bytes)}), a {made.router.mode} router for {args.file}")
    out.print(f"try: moegguf chat {in_shell(args.file)} --adapter {in_shell(made.path)}")
    return 0
