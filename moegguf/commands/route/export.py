"""`moegguf route export`: a router as an adapter that a server switches per request."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.edit.finished import read_routed_mix
from moegguf.edit.router import named_router, write_adapter
from moegguf.recipe import RouterMode

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


def run(args: argparse.Namespace) -> int:
    mix = read_routed_mix(args.file)
    is_noise = args.router.startswith(RouterMode.NOISY)
    router = named_router(mix, args.router, mix.card.k if is_noise else None)
    write_adapter(mix, router, args.output)
    print(f"wrote {args.output} ({args.output.stat().st_size / 1e6:.2f} MB), a {router.mode} router for {args.file}")
    print(f"try: moegguf chat {args.file} --adapter {args.output}")
    return 0
