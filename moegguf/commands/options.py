"""What the flags of several commands have in common."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moegguf.atomic import atomic_file, check_writable
from moegguf.checks import LARGEST, host_and_port
from moegguf.errors import UserError, one_line
from moegguf.leaving import leave

if TYPE_CHECKING:
    from moegguf.runtime.offload import Offload, Override
    from moegguf.runtime.run_options import RunOptions

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""What llama.cpp's key-value cache can be (common/arg.cpp)."""


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a model goes; `device_options` reads these flags."""
    devices = parser.add_argument_group("devices", "GPUs, and workers on other machines; `moegguf doctor` lists GPUs.")
    devices.add_argument(
        "--gpu-layers", metavar="N", default="auto",
        help="layers to put on devices: a number, all, or auto: what fits, experts last (default: auto)",
    )  # fmt: skip
    devices.add_argument(
        "--cpu-experts", metavar="N", nargs="?", const="all", default="0",
        help="leave the experts of the first N layers on the CPU; without a number those of all layers",
    )  # fmt: skip
    devices.add_argument(
        "--override-tensor", metavar="PATTERN=DEVICE", action="append", default=[],
        help="tensors whose name matches this regular expression go on DEVICE, say 'blk\\.[0-3]\\..*_exps=CPU'; "
        "several with commas, the first that matches counts",
    )  # fmt: skip
    devices.add_argument("--device", metavar="NAMES", help="the devices to use, with commas, or none (default: all)")
    devices.add_argument("--main-gpu", metavar="I", type=int, help="use one of them alone, counted from 0")
    devices.add_argument(
        "--tensor-split", metavar="SHARES", help="shares of the layers for each device, say 3,1 (default: what fits)"
    )
    devices.add_argument(
        "--rpc", metavar="HOST:PORT", help="devices of other machines that run `moegguf worker`, with commas"
    )
    devices.add_argument(
        "--rpc-timeout", metavar="SECONDS", type=int,
        help="how long workers may say nothing while they are waited for (default: 600)",
    )  # fmt: skip


def device_options(args: argparse.Namespace) -> Offload:
    """What `add_device_arguments` asks for. Raises UserError for what means nothing on any machine.

    With --rpc, a worker that is lost from now on ends the program with one line, as llama.cpp cannot go on without it.
    """
    from moegguf.runtime.offload import ALL, WHAT_FITS, Offload

    given = [part for value in args.override_tensor for part in value.split(",")]
    asked = Offload(
        layers=None if args.gpu_layers == "auto" else _count("--gpu-layers", args.gpu_layers, {"all": ALL}),
        cpu_experts=_count("--cpu-experts", args.cpu_experts, {"all": ALL}),
        overrides=tuple(map(_override, given)),
        devices=device_names(args.device),
        main_gpu=args.main_gpu,
        tensor_split=() if args.tensor_split is None else _shares(args.tensor_split),
        workers=() if args.rpc is None else _workers(args.rpc),
        patience=WHAT_FITS.patience if args.rpc_timeout is None else args.rpc_timeout,
    )
    if asked.workers:
        from moegguf.runtime.lost import when_lost

        when_lost(asked.workers, asked.patience, _leave)
    return asked


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model uses memory; `run_options` reads these flags and those of `add_device_arguments`."""
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--kv-type", metavar="TYPE", default="f16", choices=KV_TYPES,
        help=f"type of the key-value cache: {', '.join(KV_TYPES)} (default: f16)",
    )  # fmt: skip
    memory.add_argument(
        "--flash-attn", metavar="WHEN", default="auto", choices=("auto", "on", "off"),
        help="on, off, or auto: where a device has it or the cache needs it (default: auto)",
    )  # fmt: skip
    memory.add_argument("--no-mmap", action="store_true", help="read the file into memory first instead of mapping it")
    memory.add_argument("--mlock", action="store_true", help="keep the weights from being swapped out")


def run_options(args: argparse.Namespace) -> RunOptions:
    """What `add_device_arguments`, `add_memory_arguments`, --threads and --experts-used ask for; the rest is
    RunOptions' default."""
    from gguf import GGMLQuantizationType

    from moegguf.runtime.offload import FlashAttention
    from moegguf.runtime.run_options import RunOptions

    return RunOptions(
        threads=args.threads,
        experts_used=args.experts_used,
        offload=device_options(args),
        kv_type=GGMLQuantizationType[args.kv_type.upper()],
        flash_attention=FlashAttention[args.flash_attn.upper()],
        mmap=not args.no_mmap,
        mlock=args.mlock,
    )


def _count(flag: str, text: str, words: Mapping[str, int]) -> int:
    if text in words:
        return words[text]
    if not (text.isascii() and text.isdigit() and int(text) <= LARGEST):
        raise UserError(
            f"{flag} {text}: expected a whole number, or {', '.join(words)}", "leave it out for the default"
        )
    return int(text)


def _override(text: str) -> Override:
    from moegguf.runtime.offload import Override

    pattern, _, device = text.partition("=")
    if not pattern or not device:
        raise UserError(f"--override-tensor {text}: expected PATTERN=DEVICE", "for example 'ffn_.*_exps=CPU'")
    return Override(pattern, device)


def device_names(text: str | None) -> tuple[str, ...] | None:
    """Names of the devices that --device gives; None where it was left out, which is all of them."""
    return None if text is None else () if text == "none" else tuple(text.split(","))


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise UserError(f"--tensor-split {text}: expected a share for each device", "for example 3,1") from None


def _workers(text: str) -> tuple[str, ...]:
    workers = tuple(f"{host}:{port}" for host, port in (host_and_port("--rpc", part) for part in text.split(",")))
    if len(set(workers)) < len(workers):
        raise UserError(f"--rpc {text}: a worker is named twice", "name each once")
    return workers


def _leave(message: str, code: int) -> NoReturn:
    leave(f"moegguf: {'error: ' if code == 2 else ''}{one_line(message)}", code)


def add_recipes(group: argparse._ActionsContainer) -> None:
    group.add_argument("--recipes", type=Path, metavar="FILE", help="recipes file (default: moegguf's models.toml)")


def add_threads(group: argparse._ActionsContainer) -> None:
    """Of what runs a model."""
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: physical cores)")


def add_experts_used(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--experts-used", type=int, metavar="K",
        help="experts per token, in place of the file's number; gate-less takes all",
    )  # fmt: skip


def add_json(group: argparse._ActionsContainer) -> None:
    group.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else")


def add_json_and_save(group: argparse._ActionsContainer) -> None:
    """`--json` prints results instead of tables, `--save` keeps them beside; `report_json` does both."""
    add_json(group)
    group.add_argument("--save", type=Path, metavar="FILE", help="write the results as JSON to this file")


def check_save(args: argparse.Namespace, inputs: Iterable[str | Path]) -> None:
    """Raises UserError where --save cannot be written, or --force would have it replace one of the files to read."""
    if not args.save:
        return
    check_writable(args.save, args.force)
    if args.save.exists() and any(Path(each).exists() and args.save.samefile(each) for each in inputs):
        raise UserError(f"--save {args.save}: is one of the files to read", "choose another name")


def report_json(args: argparse.Namespace, content: object) -> None:
    """Write and print `content` as the flags of `add_json_and_save` ask; it is kept whoever reads stdout leaves."""
    if args.save:
        with atomic_file(args.save) as file:
            file.write(_json(content).encode())
    if args.json:
        print_json(content)


def print_json(content: object) -> None:
    """The one document that a command with `--json` writes to stdout."""
    sys.stdout.write(_json(content))


def _json(content: object) -> str:
    return json.dumps(content, indent=2) + "\n"


def named_refs(flag: str, values: Sequence[str]) -> dict[str, list[str]]:
    """NAME → references of texts, from the NAME=FILE that a flag was given. Raises UserError for another form."""
    refs: dict[str, list[str]] = {}
    for name, ref in pairs(flag, values, "NAME=FILE", "math=math.jsonl"):
        refs.setdefault(name, []).append(ref)
    return refs


def pairs(flag: str, values: Sequence[str], form: str, example: str, *, at_last: bool = False) -> list[tuple[str, str]]:
    """The two parts of each of `values`, which `flag` was given: before and after the first "=", or the last one.

    Raises UserError where one of them is missing.
    """
    found = []
    for value in values:
        name, _, rest = value.rpartition("=") if at_last else value.partition("=")
        if not name or not rest:
            given = f"{flag} ".lstrip()  # nothing for what no flag is in front of
            raise UserError(f"{given}{value}: expected {form}", f"for example {given}{example}")
        found.append((name, rest))
    return found
