"""What the commands that change a finished mix have in common: where it is written to, and what is said of it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moegguf.assembly import usable_cores
from moegguf.commands.options import check_threads, print_json
from moegguf.commands.progress import bytes_done
from moegguf.edit.change import Change, check_copy, write_copy, write_in_place
from moegguf.edit.finished import FinishedMix, read_mix
from moegguf.errors import UserError, one_line
from moegguf.journal import recover
from moegguf.sizes import show_size


def add_output(parser: argparse._ActionsContainer, *, required: bool, what: str = "file to write") -> None:
    parser.add_argument("-o", "--output", type=Path, required=required, metavar="FILE", help=what)


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace the output file if it exists")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all usable cores)")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def open_mix(args: argparse.Namespace) -> FinishedMix:
    """The mix to change, whole; what is wrong with the common flags is said before anything is read."""
    check_threads(args.threads)
    if args.output:
        check_output(args)
        check_copy(args.file, args.output, overwrite=args.force)
    if recover(args.file):
        print(f"{args.file}: an interrupted change of it was undone", file=sys.stderr)
    return read_mix(args.file)


def check_output(args: argparse.Namespace) -> None:
    if args.output.suffix != ".gguf":
        raise UserError(f"-o {args.output}: expected a name that ends in .gguf", "runtimes look for that ending")


def named_sources(values: Sequence[str]) -> dict[str, str]:
    """Expert → reference of its source. Raises UserError for what is not NAME=SOURCE, and for a name given twice."""
    refs: dict[str, str] = {}
    for value in values:
        name, _, ref = value.partition("=")
        if not name or not ref:
            raise UserError(f"{value}: expected NAME=SOURCE", "for example math=hf:org/math-model")
        if name in refs:
            raise UserError(f"{value}: {name} was given {refs[name]} already", "name every expert once")
        refs[name] = ref
    return refs


def carry_out(args: argparse.Namespace, change: Change, done: str) -> int:
    """Write `change` and say what was `done`, in words or as JSON. Returns the exit code."""
    report = make(quiet_for_json(args), args, change, done)
    if args.json:
        print_json(report)
    return 0


def make(console: Console, args: argparse.Namespace, change: Change, done: str) -> dict:
    """Write `change`, to the output if there is one and else in place; say what was `done`, and give it as JSON."""
    start, threads = time.monotonic(), args.threads or usable_cores()
    with bytes_done("writing", change.n_bytes_to_do(in_place=args.output is None)) as bar:
        if args.output:
            written = write_copy(change, args.output, threads=threads, progress=bar.did)
        else:
            written = write_in_place(change, threads=threads, progress=bar.did)
    seconds = time.monotonic() - start
    for note in change.notes:
        console.print(f"note: {one_line(note)}")
    if cost := written.requantised:
        types = ", ".join(f"{source} → {target}" for source, target in sorted(cost.types))
        if cost.n_weights:
            console.print(f"requantised {cost.n_weights / 1e6:.1f} M weights ({types}): relative error "
                          f"{cost.relative_error:.2%}")  # fmt: skip
    size = f" ({show_size(written.n_bytes)})" if written.n_bytes else ""
    where = f"wrote {args.output}" if args.output else f"changed {args.file} in place"
    console.print(f"{where}{size} in {seconds:.2f} s: {one_line(done)}")
    return {
        "file": str(args.output or args.file),
        "in_place": args.output is None,
        "experts": [{"name": expert.name, "source": expert.source} for expert in change.card.experts],
        "router": change.card.describe_router(),
        "bytes_written": written.n_bytes,
        "seconds": round(seconds, 3),
        "notes": list(change.notes),
    }


def quiet_for_json(args: argparse.Namespace) -> Console:
    """What goes to stdout in words; nothing where that is to be JSON."""
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True, quiet=args.json)
