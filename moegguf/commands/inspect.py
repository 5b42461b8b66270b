"""`moegguf inspect`: what is in a mix, and whether it is sound."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from gguf import LlamaFileType
from rich.console import Console
from rich.table import Column, Table

from moegguf.commands.options import print_json
from moegguf.commands.progress import bytes_done
from moegguf.errors import one_line
from moegguf.inspection import Inspection, check, inspect
from moegguf.metadata import Card

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
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    found = inspect(args.file)
    faults = _check_with_progress(found) if args.check else None
    if args.json:
        print_json(_as_json(found, faults))
    else:
        _print(Console(markup=False), found, faults)
    return 1 if faults else 0


def _check_with_progress(found: Inspection) -> list[str]:
    with bytes_done("checking", found.n_bytes) as bar:
        return check(found.path, bar.did)


def _print(console: Console, found: Inspection, faults: list[str] | None) -> None:
    facts = Table(Column(no_wrap=True), Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
    for name, value in _facts(found):
        facts.add_row(name, one_line(value))
    console.print(facts)
    if found.card:
        console.print(_expert_table(found))
    console.print(_group_table(found))
    if faults is None:
        return
    for fault in faults:
        console.print(f"fault: {one_line(fault)}", highlight=False, soft_wrap=True)
    console.print(
        "check: sound" if not faults else f"check: {len(faults)} fault{'s' * (len(faults) > 1)}", highlight=False
    )


def _facts(found: Inspection) -> list[tuple[str, str]]:
    card = found.card
    facts = [("file", f"{found.path} ({found.n_bytes / 1e6:.2f} MB)")]
    if card is None:
        facts.append(("mix", "no: this GGUF was not made by moegguf"))
        facts.append(("name", found.name))
    else:
        facts.append(("mix", f"{card.name} (moegguf {card.tool_version})"))
        facts.append(("base", card.base))
        facts.append(("router", card.describe_router()))
        facts.append(("layout", card.layout))
        facts.append(("mixed", _describe_mixed(card)))
        if card.split:
            facts.append(("split", card.describe_split()))
        if card.compact:
            facts.append(("compacted", card.describe_compact()))
            facts.append(("neurons", f"by layer: {' '.join(map(str, card.compact.widths))}"))
    experts = f", {found.n_expert_used} of {found.n_expert} stacked experts" if found.n_expert else ""
    facts.append(("architecture", f"{found.arch}: {found.n_layer} layers, hidden size {found.n_embd}{experts}"))
    facts.append(("context", f"{found.n_ctx} tokens"))
    facts.append(("chat template", "yes" if found.has_chat_template else "no"))
    facts.append(("quant", f"{_file_type(found)}, {found.bits_per_weight:.2f} bits per weight"))
    facts.append(("weights", f"{found.n_weights / 1e6:.2f} M"))
    return facts


def _describe_mixed(card: Card) -> str:
    layers = "all layers" if card.layers is None else f"layers {', '.join(map(str, card.layers))}"
    trunk = {"base": "", "mean": "; trunk: the mean of all experts"}.get(card.trunk, f"; trunk: {card.trunk}'s")
    return f"{card.mixed} in {layers}{trunk}"


def _file_type(found: Inspection) -> str:
    if found.file_type is None:
        return "unknown"
    try:
        return LlamaFileType(found.file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return f"file type {found.file_type}"


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
        weights, size = f"{group.n_weights / 1e6:.3f} M", f"{group.n_bytes / 1e6:.3f} MB"
        table.add_row(group.name, types, weights, f"{group.bits_per_weight:.2f}", size)
    return table


def _as_json(found: Inspection, faults: list[str] | None) -> dict:
    report = dataclasses.asdict(found) | {
        "path": str(found.path),
        "is_mix": found.card is not None,
        "file_type": _file_type(found),
        "n_weights": found.n_weights,
        "bits_per_weight": round(found.bits_per_weight, 4),
    }
    return report if faults is None else report | {"faults": faults}
