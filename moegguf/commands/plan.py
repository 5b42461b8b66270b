"""`moegguf plan`: where a model would go, what memory each part takes, how fast it is, and what would make it fit.

For this machine and its workers, or for one that is described on the command line. Nothing is loaded: llama.cpp lays
out its buffers without allocating them. A described GPU is taken to need the compute buffers that a CPU needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from moegguf.commands.options import (
    add_device_arguments,
    add_memory_arguments,
    check_range,
    print_json,
    run_options,
)
from moegguf.errors import UserError
from moegguf.sizes import parse_size, show_size

if TYPE_CHECKING:
    from moegguf.gguf_header import Header
    from moegguf.runtime.model import RunOptions
    from moegguf.runtime.offload import Device
    from moegguf.runtime.planning import Outlook

HELP = "Say where a model would go, what memory it takes, how fast it would be, and what would make it fit."
EXAMPLES = """\
examples:
  moegguf plan mix.gguf --ctx 8192                            on this machine
  moegguf plan mix.gguf --rpc 127.0.0.1:50052                 with a worker's devices
  moegguf plan mix.gguf --vram 8GB --ram 16GB --bandwidth 50GB --vram-bandwidth 300GB
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the GGUF file (first part of a split one)")
    parser.add_argument("--ctx", metavar="N", type=int, help="context in tokens (default: the model's, at most 4096)")
    parser.add_argument(
        "--experts-used", metavar="K", type=int, help="experts per token, in place of the file's number"
    )
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: physical cores)")
    parser.add_argument("--json", action="store_true", help="one JSON object, sizes in bytes")
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
    from moegguf.gguf_header import read_header, whole
    from moegguf.metadata import read_card
    from moegguf.runtime.model import check_experts_used
    from moegguf.runtime.planning import suggestions
    from moegguf.runtime.run_options import MIN_CTX

    check_range("--ctx", args.ctx, MIN_CTX)
    model = whole(read_header(args.model))
    card = read_card(model)
    check_experts_used(model, card, args.experts_used)
    options = replace(run_options(args), ctx=args.ctx)
    machine = _described(args) if (args.vram, args.ram) != (None, None) else _this_one(args, options)

    def outlook(options: RunOptions) -> Outlook:
        return machine.outlook(model, options)

    found = outlook(options)
    advice = suggestions(found, model, card, options, outlook)
    if args.json:
        print_json(_as_json(found, advice))
    else:
        _print(found, advice)
    return 0 if found.fits else 1


# --- the machine ---


@dataclass(frozen=True)
class _Machine:
    """`ram`: bytes of main memory to give, if known; `bandwidth`: device → bytes in a second, as far as known."""

    devices: Sequence[Device]
    ram: int
    bandwidth: Mapping[str, float]
    is_here: bool

    def outlook(self, model: Header, options: RunOptions) -> Outlook:
        from moegguf.runtime.placing import plan_elsewhere, plan_model
        from moegguf.runtime.planning import Outlook

        plan = plan_model(model, options) if self.is_here else plan_elsewhere(model, options, self.devices)
        return Outlook(plan, self.ram, self.bandwidth)


def _this_one(args: argparse.Namespace, options: RunOptions) -> _Machine:
    from moegguf.runtime.bandwidth import device_bandwidth, memory_bandwidth
    from moegguf.runtime.devices import accelerators
    from moegguf.runtime.machine import memory, physical_cores
    from moegguf.runtime.offload import CPU
    from moegguf.runtime.workers import connect

    connect(options.offload.workers)
    devices = accelerators(options.offload)
    given = _size("--vram-bandwidth", args.vram_bandwidth)
    speeds = {device.name: given or device_bandwidth(device.name) for device in devices}
    speeds[CPU] = _size("--bandwidth", args.bandwidth) or memory_bandwidth(options.threads or physical_cores())
    return _Machine(devices, memory().available, {name: n for name, n in speeds.items() if n}, is_here=True)


def _described(args: argparse.Namespace) -> _Machine:
    from moegguf.runtime.machine import memory
    from moegguf.runtime.offload import CPU, Device

    if args.rpc or args.device or args.main_gpu is not None:
        raise UserError("--vram and --ram describe another machine", "leave --rpc, --device and --main-gpu out")
    sizes = [_size("--vram", size) for size in ([] if args.vram is None else args.vram.split(","))]
    devices = [Device(f"GPU{i}", "described", "GPU", size, size) for i, size in enumerate(sizes)]
    speeds = dict.fromkeys((device.name for device in devices), _size("--vram-bandwidth", args.vram_bandwidth))
    speeds[CPU] = _size("--bandwidth", args.bandwidth)
    ram = _size("--ram", args.ram) or memory().available
    return _Machine(devices, ram, {name: n for name, n in speeds.items() if n}, is_here=False)


def _size(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_size(text.removesuffix("/s"))
    except UserError as error:
        raise UserError(f"{flag} {error.message}", error.mend) from error


# --- what came out ---


def _print(found: Outlook, advice: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from moegguf.runtime.offload import CPU, PARTS

    plan = found.plan
    console = Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 10_000)
    room = {CPU: found.ram} | {device.name: device.room for device in plan.devices}
    table = Table("memory", *plan.memory, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in PARTS:
        if any(parts[part] for parts in plan.memory.values()):
            table.add_row(part, *(show_size(parts[part]) if parts[part] else "" for parts in plan.memory.values()))
    table.add_row("in all", *(show_size(parts.total(), up=True) for parts in plan.memory.values()))
    table.add_row("room", *(show_size(room[name]) for name in plan.memory))
    console.print(f"placement  {plan.placement.flags()}")
    console.print(f"           {plan.placement.in_words()}; {_verdict(found)}")
    console.print(table)
    console.print(f"speed      {_speed(found)}")
    touched = plan.touched(full=False)
    for device, n_bytes in ((device, touched[device]) for device in plan.memory if touched[device]):
        rate = f" at {found.bandwidth[device] / 1e9:.1f} GB/s" if device in found.bandwidth else ""
        console.print(f"           {device} reads {show_size(n_bytes)} for each token{rate}")
    headings = chain(["faster" if found.fits else "to fit"], repeat(""))
    for heading, line in zip(headings, advice, strict=False):
        console.print(f"{heading:<10} {line}")


def _verdict(found: Outlook) -> str:
    if found.missing:
        return f"does not fit: {show_size(found.missing, up=True)} of main memory are lacking"
    return "fits" if found.fits else "does not fit: a device lacks memory"


def _speed(found: Outlook) -> str:
    empty, full = found.tokens_per_s(full=False), found.tokens_per_s(full=True)
    if empty is None or full is None:
        return "unknown: give --bandwidth, and --vram-bandwidth for GPUs"
    return f"at most {empty:.1f} tokens/s, {full:.1f} with a full context, as memory is read"


def _as_json(found: Outlook, advice: Sequence[str]) -> dict:
    from moegguf.runtime.offload import CPU

    plan = found.plan
    return {
        "fits": found.fits,
        "flags": plan.placement.flags(),
        "layers": dict(zip(plan.placement.devices, plan.placement.layers, strict=True)),
        "cpu_experts": plan.placement.cpu_experts,
        "memory": {device: dict(parts) for device, parts in plan.memory.items()},
        "room": {CPU: found.ram} | {device.name: device.room for device in plan.devices},
        "bytes_per_token": {"empty": dict(plan.touched(full=False)), "full": dict(plan.touched(full=True))},
        "bandwidth": dict(found.bandwidth),
        "tokens_per_s": {"empty": found.tokens_per_s(full=False), "full": found.tokens_per_s(full=True)},
        "suggestions": list(advice),
    }
