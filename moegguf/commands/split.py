"""`moegguf split`: a GGUF file in parts."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.api.editing import split
from moegguf.commands.options import print_json
from moegguf.commands.output import console
from moegguf.commands.progress import shown
from moegguf.sizes import show_size

HELP = """\
Write a GGUF file as several, none larger than a given size: for file systems and uploads with a limit. Names and keys
are llama.cpp's, which opens the first part and finds the others beside it. `moegguf merge` gives the file back.
"""
EXAMPLES = """\
examples:
  moegguf split mix.gguf --max-size 2GB              mix-00001-of-0000N.gguf and so on
  moegguf split mix.gguf --max-size 4GiB -o /usb/mix
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a GGUF file; it stays as it is")
    parser.add_argument("--max-size", required=True, metavar="SIZE", help="of a part, such as 2GB, 700MB or 4GiB")
    parser.add_argument("-o", "--output", type=Path, metavar="PREFIX", help="name of the parts (default: that of FILE)")
    parser.add_argument("--force", action="store_true", help="replace parts that exist")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all usable cores)")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    parts = split(args.file, args.max_size, output=args.output, threads=args.threads, overwrite=args.force, watch=shown)
    if args.json:
        print_json(
            {
                "files": [{"file": str(file.path), "bytes": file.n_bytes} for file in parts.files],
                "bytes": parts.n_bytes,
                "seconds": round(parts.seconds, 3),
            }
        )
    out = console(args)
    for file in parts.files:
        out.print(f"wrote {file.path} ({show_size(file.n_bytes)})")
    out.print(f"runtimes open the first one; to put them together: moegguf merge {parts.files[0].path}")
    return 0
