"""`moegguf inspect`: what is in a mix, and whether it is sound."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from moegguf.commands.options import add_json, print_json
from moegguf.commands.output import console, facts
from moegguf.commands.progress import shown
from moegguf.errors import one_line
from moegguf.inspection import Inspection, check, inspect
from moegguf.sizes import show_size

HELP = "Show what is in a GGUF: base, experts, router, layout, types and sizes. With --check, verify every byte."
EXAMPLES = """\
examples:
  moegguf inspect mix.gguf
  moegguf inspect mix.gguf --check      exit code 1 when something is wrong
  moegguf inspect mix.gguf --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("--check", action="store_true", help="read everything and verify it against what the file says")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    found = inspect(args.file)
    faults = _check_with_progress(found) if args.check else None
    if args.json:
        print_json(found.as_json() | ({} if faults is None else {"faults": faults}))
    else:
        _print(console(args), found, faults)
    return 1 if faults else 0


def _check_with_progress(found: Inspection) -> list[str]:
    with shown("checking", "bytes") as bar:
        bar.has(found.n_bytes)
        return check(found.path, bar.did)


def _print(out: Console, found: Inspection, faults: list[str] | None) -> None:
    out.print(facts(_facts(found)))
    if found.card:
        out.print(_expert_table(found))
    out.print(_group_table(found))
    if faults is None:
        return
    for fault in faults:
        out.print(f"fault: {one_line(fault)}")
    out.print("check: sound" if not faults else f"check: {len(faults)} fault{'s' * (len(faults) > 1)}")


def _facts(found: Inspection) -> list[tuple[str, str]]:
    card = found.card
    rows = [("file", f"{found.path} ({show_size(found.n_bytes)})")]
    if card is None:
        rows.append(("mix", "no: this GGUF was not made by moegguf"))
        rows.append(("name", found.name))
    else:
        rows.append(("mix", f"{card.name} (moegguf {card.tool_version})"))
        rows.append(("base", card.base))
        rows.append(("router", card.describe_router()))
        rows.append(("layout", card.layout))
        rows.append(("mixed", card.describe_mixed()))
        if card.split:
            rows.append(("split", card.describe_split()))
        if card.compact:
            rows.append(("compacted", card.describe_compact()))
            rows.append(("neurons", f"by layer: {' '.join(map(str, card.compact.widths))}"))
    experts = f", {found.n_expert_used} of {found.n_expert} stacked experts" if found.n_expert else ""
    rows.append(("architecture", f"{found.arch}: {found.n_layer} layers, hidden size {found.n_embd}{experts}"))
    rows.append(("context", f"{found.n_ctx} tokens"))
    rows.append(("chat template", "yes" if found.has_chat_template else "no"))
    rows.append(("quant", f"{found.quant}, {found.bits_per_weight:.2f} bits per weight"))
    rows.append(("weights", f"{found.n_weights / 1e6:.2f} M"))
    return rows


def _expert_table(found: Inspection) -> Table:
    table = Table("expert", Column("source", overflow="fold"), "weight", "quant", box=None, pad_edge=False)
    for expert in found.card.experts:
        weight = f"{expert.weight:.4g}" if found.card.is_gateless else "by router"
        table.add_row(*map(one_line, (expert.name, expert.source, weight, expert.quant)))
    return table


def _group_table(found: Inspection) -> Table:
    table = Table("tensors", "types", "weights", "bits per weight", "size", box=None, pad_edge=False)
    for group in found.groups:
        types = ", ".join(f"{count} × {name}" for name, count in group.types.items())
        weights, size = f"{group.n_weights / 1e6:.3f} M", show_size(group.n_bytes)
        table.add_row(group.name, types, weights, f"{group.bits_per_weight:.2f}", size)
    return table
