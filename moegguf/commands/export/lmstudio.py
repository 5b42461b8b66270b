"""`moegguf export lmstudio`: a mix where LM Studio finds it."""

from __future__ import annotations

import argparse
from pathlib import Path

from moegguf.commands.options import print_json
from moegguf.commands.progress import bytes_done
from moegguf.exporting.lmstudio import (
    PUBLISHER,
    Place,
    defaults_of,
    experts_used,
    make_place,
    put,
    read_defaults,
    set_experts,
)
from moegguf.gguf_header import read_header, shards
from moegguf.stores import is_folder, lmstudio_folder, lmstudio_home

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
    parser.add_argument("--force", action="store_true", help="replace a file of that name")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    path = shards(args.file)[0]
    n_experts = experts_used(read_header(path))
    place = make_place(args.output or lmstudio_folder(), args.publisher, args.name or path.stem)
    settings = defaults_of(lmstudio_home(), place, path.name)
    has_settings = n_experts is not None and is_folder(lmstudio_home())
    defaults = read_defaults(settings) if has_settings else {}
    done = _put_with_progress(path, place, args)
    if has_settings:
        set_experts(settings, defaults, n_experts)
    if args.json:
        report = {"files": {str(target): how for target, how in done.items()}, "experts": n_experts}
        print_json(report | {"settings": str(settings) if has_settings else None})
        return 0
    for target, how in done.items():
        print(f"{how}: {target}")
    if has_settings:
        print(f"experts: {n_experts} run for a token ({settings})")
    elif n_experts is not None:
        print(f"experts: {n_experts} run for a token, as the file says; LM Studio has no settings here")
    print(f"in LM Studio it is {place.publisher}/{place.name}")
    return 0


def _put_with_progress(path: Path, place: Place, args: argparse.Namespace) -> dict[Path, str]:
    with bytes_done("copying", sum(shard.stat().st_size for shard in shards(path))) as bar:
        return put(path, place, overwrite=args.force, progress=bar.did)
