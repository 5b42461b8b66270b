"""`moegguf split`: a GGUF file in parts."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.assembly import usable_cores
from moegguf.commands.changes import quiet_for_json
from moegguf.commands.options import check_threads, print_json
from moegguf.commands.progress import bytes_done
from moegguf.edit.shards import plan_split, write_parts
from moegguf.errors import UserError
from moegguf.sizes import parse_size, show_size

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
    check_threads(args.threads)
    try:
        max_bytes = parse_size(args.max_size)
    except UserError as error:
        raise UserError(f"--max-size {error.message}", error.mend) from None
    prefix = args.output or args.file.with_suffix("")
    if prefix.is_dir():
        raise UserError(f"-o {prefix}: is a folder, the parts need a name", f"write -o {prefix / args.file.stem}")
    parts = plan_split(args.file, max_bytes, prefix, overwrite=args.force)
    with bytes_done("writing", sum(part.n_tensor_bytes for part in parts)) as bar:
        write_parts(args.file, parts, threads=args.threads or usable_cores(), progress=bar.did)
    if args.json:
        print_json([{"file": str(part.path), "bytes": part.n_bytes} for part in parts])
    console = quiet_for_json(args)
    for part in parts:
        console.print(f"wrote {part.path} ({show_size(part.n_bytes)})")
    console.print(f"runtimes open the first one; to put them together: moegguf merge {parts[0].path}")
    return 0
