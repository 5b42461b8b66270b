"""`moegguf split`: a GGUF file in parts."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.api.editing import split
from moegguf.commands.changes import add_common
from moegguf.commands.options import print_json
from moegguf.commands.output import console, in_shell
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
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    parts = split(args.file, args.max_size, output=args.output, threads=args.threads, overwrite=args.force, watch=shown)
    if args.json:
        print_json(parts.as_json())
    out = console(args)
    for file in parts.files:
        out.print(f"wrote {file.path} ({show_size(file.n_bytes)})")
    merge = f"moegguf merge {in_shell(parts.files[0].path)} -o FILE"
    out.print(f"runtimes open the first one; to put them together: {merge}")
    return 0
