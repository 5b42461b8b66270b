"""`moegguf export lmstudio`: a mix where LM Studio finds it."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.commands.options import add_json, print_json
from moegguf.commands.output import console
from moegguf.commands.progress import shown
from moegguf.exporting.lmstudio import PUBLISHER

HELP = """\
Put a GGUF into LM Studio's models folder, as a hard link, or as a copy where it is on another disk.

The number of experts that run is written into the settings that LM Studio loads the model with by default.
"""
EXAMPLES = """\
examples:
  moegguf export lmstudio mix.gguf
  moegguf export lmstudio mix.gguf --publisher me --name my-mix
  moegguf export lmstudio mix.gguf -o /data/lmstudio/models
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="MIX", help="a GGUF file; any shard of a split one")
    parser.add_argument("--publisher", default=PUBLISHER, metavar="NAME", help=f"whose it is (default: {PUBLISHER})")
    parser.add_argument("--name", help="what it is called (default: the file's name)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="LM Studio's models folder (default: as its settings say)"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from moegguf.api import export

    made = export.lmstudio(
        args.file, publisher=args.publisher, name=args.name, output=args.output, overwrite=args.force, watch=shown
    )
    if args.json:
        print_json(made.as_json())
    out, place = console(args), made.place
    for target, how in made.files.items():
        out.print(f"{how}: {target}")
    if made.settings:
        out.print(f"experts: {made.n_experts} run for a token ({made.settings})")
    elif made.n_experts is not None:
        out.print(f"experts: {made.n_experts} run for a token, as the file says; LM Studio has no settings here")
    out.print(f"in LM Studio it is {place.publisher}/{place.name}")
    return 0
