"""What the commands that change a finished mix have in common: their flags, and what is said of what they did."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moegguf.commands.options import add_json, pairs, print_json
from moegguf.commands.output import console, describe_requantised
from moegguf.edit.made import Made
from moegguf.errors import UserError, one_line
from moegguf.sizes import show_size


def add_output(parser: argparse._ActionsContainer, *, required: bool, what: str = "file to write") -> None:
    parser.add_argument("-o", "--output", type=Path, required=required, metavar="FILE", help=what)


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all usable cores)")
    add_json(parser)


def named_sources(values: Sequence[str]) -> dict[str, str]:
    """Expert → reference of its source. Raises UserError for what is not NAME=SOURCE, and for a name given twice."""
    refs: dict[str, str] = {}
    for name, ref in pairs("", values, "NAME=SOURCE", "math=hf:org/math-model"):
        if name in refs:
            raise UserError(f"{name}={ref}: {name} was given {refs[name]} already", "name every expert once")
        refs[name] = ref
    return refs


def report(args: argparse.Namespace, made: Made, done: str) -> int:
    """Say what was `done`, in words or as JSON. Returns the exit code."""
    print_made(console(args), made, done)
    if args.json:
        print_json(made.as_json())
    return 0


def print_made(out: Console, made: Made, done: str) -> None:
    for note in made.notes:
        out.print(f"note: {one_line(note)}")
    if cost := describe_requantised(made.requantised):
        out.print(cost)
    size = f" ({show_size(made.n_written)})" if made.n_written else ""
    where = f"changed {made.path} in place" if made.in_place else f"wrote {made.path}"
    out.print(f"{where}{size} in {made.seconds:.2f} s: {one_line(done)}")
