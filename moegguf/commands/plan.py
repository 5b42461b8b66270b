"""`moegguf plan`: where a model would go, what memory each part takes, how fast it is, and what would make it fit.

For this machine and its workers, or for one that is described on the command line; `runtime.forecast` works it out.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from moegguf.commands.options import (
    add_device_arguments,
    add_experts_used,
    add_json,
    add_memory_arguments,
    add_threads,
    print_json,
    run_options,
)
from moegguf.commands.output import console
from moegguf.sizes import show_size

if TYPE_CHECKING:
    from rich.console import Console

    from moegguf.runtime.forecast import Forecast
    from moegguf.runtime.planning import Outlook

HELP = """\
Say where a model would go, what memory it takes, how fast it would be, and what would make it fit.

A worker that lends a CPU says that all of its memory is free; what is free there `moegguf worker` prints, and
--tensor-split or --gpu-layers gives it less.
"""
EXAMPLES = """\
examples:
  moegguf plan mix.gguf --ctx 8192                            on this machine
  moegguf plan mix.gguf --rpc 127.0.0.1:50052                 with a worker's devices
  moegguf plan mix.gguf --vram 8GB --ram 16GB --bandwidth 50GB --vram-bandwidth 300GB
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the GGUF file (first part of a split one)")
    parser.add_argument("--ctx", metavar="N", type=int, help="context in tokens (default: the model's, at most 4096)")
    add_experts_used(parser)
    add_threads(parser)
    add_json(parser)
    other = parser.add_argument_group("another machine")
    other.add_argument("--vram", metavar="SIZES", help="memory that its GPUs have free, with commas: 8GB, or 8GB,24GB")
    other.add_argument("--ram", metavar="SIZE", help="main memory that it has free")
    speed = parser.add_argument_group("speed", "Measured where it is this machine's; what is read in a second.")
    speed.add_argument("--bandwidth", metavar="SIZE", help="of main memory, say 50GB")
    speed.add_argument("--vram-bandwidth", metavar="SIZE", help="of each device's memory, say 300GB")
    add_device_arguments(parser)
    add_memory_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan; exit code 1 when it does not fit. Raises UserError."""
    from moegguf.runtime.forecast import forecast

    found = forecast(
        args.model,
        replace(run_options(args), ctx=args.ctx),
        vram=None if args.vram is None else args.vram.split(","),
        ram=args.ram,
        bandwidth=args.bandwidth,
        vram_bandwidth=args.vram_bandwidth,
    )
    if args.json:
        print_json(found.as_json())
    else:
        _print(console(args), found)
    return 0 if found.fits else 1


def _print(out: Console, found: Forecast) -> None:
    from rich.table import Table

    from moegguf.runtime.offload import PARTS

    outlook, plan = found.outlook, found.outlook.plan
    table = Table("memory", *plan.memory, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in PARTS:
        if any(parts[part] for parts in plan.memory.values()):
            table.add_row(part, *(show_size(parts[part]) if parts[part] else "" for parts in plan.memory.values()))
    table.add_row("in all", *(show_size(parts.total(), up=True) for parts in plan.memory.values()))
    table.add_row("room", *(show_size(found.room[name]) for name in plan.memory))
    out.print(f"placement  {plan.placement.flags()}")
    out.print(f"           {plan.placement.in_words()}; {_verdict(outlook)}")
    out.print(table)
    out.print(f"speed      {_speed(outlook)}")
    touched = plan.touched(full=False)
    for device, n_bytes in ((device, touched[device]) for device in plan.memory if touched[device]):
        rate = f" at {outlook.bandwidth[device] / 1e9:.1f} GB/s" if device in outlook.bandwidth else ""
        out.print(f"           {device} reads {show_size(n_bytes)} for each token{rate}")
    headings = chain(["faster" if found.fits else "to fit"], repeat(""))
    for heading, line in zip(headings, found.suggestions, strict=False):
        out.print(f"{heading:<10} {line}")


def _verdict(found: Outlook) -> str:
    if found.missing:
        return f"does not fit: {show_size(found.missing, up=True)} of main memory are lacking"
    return "fits" if found.fits else "does not fit: a device lacks memory"


def _speed(found: Outlook) -> str:
    empty, full = found.tokens_per_s(full=False), found.tokens_per_s(full=True)
    if empty is None or full is None:
        return "unknown: give --bandwidth, and --vram-bandwidth for GPUs"
    return f"at most {empty:.1f} tokens/s, {full:.1f} with a full context, as memory is read"
