"""`moegguf doctor`: what this machine can run, and what is missing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moegguf.commands.options import add_json, print_json
from moegguf.sizes import show_size

if TYPE_CHECKING:
    from moegguf.runtime.machine import Machine

HELP = "Say what this machine can run, and what is missing."
EXAMPLES = """\
examples:
  moegguf doctor
  moegguf doctor --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; exit code 1 when something that moegguf needs is missing."""
    from moegguf.runtime.machine import inspect_machine

    machine = inspect_machine(Path.cwd())
    if args.json:
        print_json(machine.as_json())
    else:
        print("\n".join(_report(machine)))
        print("\n".join(f"  - {line}" for line in machine.advice))
    return 0 if machine.is_complete else 1


def _report(machine: Machine) -> list[str]:
    cores, memory, runtime = machine.cores, machine.memory, machine.runtime
    lines = [
        f"system     {machine.system}, Python {machine.python}",
        f"cpu        {cores.name}: {cores.usable} physical cores usable, {cores.logical} logical",
        f"disk       {show_size(machine.disk_free)} free here",
        f"memory     {show_size(memory.available)} available of {show_size(memory.total)}",
        f"room for   a GGUF of {show_size(memory.largest_file)}, {memory.largest_model / 1e9:.1f} B weights at Q4_K_M",
        "packages   " + ", ".join(f"{name} {version or '-'}" for name, version in machine.packages.items()),
    ]
    if runtime:
        extras = [name for name, has in (("mmap", runtime.mmap), ("mlock", runtime.mlock), ("rpc", runtime.rpc)) if has]
        lines += [
            f"llama.cpp  ggml {runtime.ggml_version} ({runtime.ggml_commit}), {', '.join(extras)}",
            f"           {' '.join(runtime.features)}",
            *(
                f"device     {device.name} ({device.kind}): {device.description}, {show_size(device.memory_total)}"
                for device in runtime.devices
            ),
        ]
    lines += [f"store      {store.name}: {store.models} models in {store.path}" for store in machine.stores]
    return lines + ([] if machine.stores else ["store      no models of Hugging Face, Ollama or LM Studio found"])
