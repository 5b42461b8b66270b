"""`moegguf route set`: another router for a finished mix, in place."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from moegguf.atomic import atomic_file
from moegguf.edit.finished import read_routed_mix
from moegguf.edit.router import named_router, router_of, set_router
from moegguf.journal import recover
from moegguf.recipe import RouterSpec
from moegguf.routers.file import router_bytes

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
    parser.add_argument("--k", type=int, help="experts that run for each token (default: the router's; noisy: 2)")
    parser.add_argument("--std", type=float, help=f"noisy: standard deviation (default: {RouterSpec.std})")


def run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    recover(args.file)
    mix = read_routed_mix(args.file)
    kept = args.file.with_name(f"{args.file.name}.old-router.safetensors")
    router = named_router(mix, str(kept) if args.undo else args.router, args.k, args.std)
    old = router_of(mix)
    with atomic_file(kept) as file:
        file.write(router_bytes(old))
        set_router(mix, router)  # where it cannot be set, what was kept before stays
    print(f"{args.file}: {read_routed_mix(args.file).card.describe_router()} ({time.monotonic() - start:.2f} s)")
    print(f"the old router ({old.mode}) is in {kept}; to set it again: moegguf route set {args.file} --undo")
    return 0
