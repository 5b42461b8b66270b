"""`moegguf merge`: the file that several parts were split from."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.assembly import usable_cores
from moegguf.commands.changes import add_common, add_output, check_output, quiet_for_json
from moegguf.commands.options import check_threads, print_json
from moegguf.commands.progress import bytes_done
from moegguf.edit.shards import plan_merge, write_merged
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
    check_threads(args.threads)
    check_output(args)
    merged = plan_merge(args.file, args.output, overwrite=args.force)
    with bytes_done("writing", merged.n_tensor_bytes) as bar:
        write_merged(merged, threads=args.threads or usable_cores(), progress=bar.did)
    if args.json:
        print_json({"file": str(merged.path), "bytes": merged.n_bytes})
    quiet_for_json(args).print(f"wrote {merged.path} ({show_size(merged.n_bytes)})")
    return 0
