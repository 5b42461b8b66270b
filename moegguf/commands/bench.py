"""`moegguf bench`: how fast a file runs on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moegguf.commands.options import (
    add_device_arguments,
    add_experts_used,
    add_json_and_save,
    add_memory_arguments,
    add_threads,
    check_save,
    report_json,
    run_options,
)
from moegguf.commands.output import console
from moegguf.commands.progress import shown
from moegguf.errors import UserError, one_line
from moegguf.sizes import show_size

if TYPE_CHECKING:
    from rich.console import Console

    from moegguf.runtime.bench import Bench, Rate, Speeds

HELP = """\
Measure how fast a file runs here: prompts and generation in tokens per second, time to the first token, loading,
memory, and how much of this machine's memory bandwidth generation reaches. The definitions are those of llama-bench."""
EXAMPLES = """\
examples:
  moegguf bench mix.gguf
  moegguf bench mix.gguf --compare base.gguf        side by side, with the ratio
  moegguf bench mix.gguf --prompt 512 --generate 128 --repeat 5     what llama-bench runs by default
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the GGUF file (first part of a split one)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="measure this one too, after the first")
    parser.add_argument(
        "--prompt", metavar="N,…",
        help="lengths of prompts in tokens, or 0 (default: 128,512, or the model's context where that is shorter)",
    )  # fmt: skip
    parser.add_argument(
        "--generate", metavar="N,…", help="lengths of answers in tokens, or 0 (default: likewise 32,128)"
    )
    parser.add_argument("--repeat", type=int, metavar="N", default=5, help="runs of each length (default: 5)")
    add_threads(parser)
    add_experts_used(parser)
    out = parser.add_argument_group("results", "Seconds of every run included.")
    add_json_and_save(out)
    out.add_argument("--force", action="store_true", help="replace what --save names if it exists")
    add_device_arguments(parser)
    add_memory_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from moegguf.runtime.bench import bench_all

    paths = [args.model, *([args.compare] if args.compare else [])]
    check_save(args, paths)
    found = bench_all(
        paths,
        run_options(args),
        shown,
        prompts=_lengths("--prompt", args.prompt),
        generations=_lengths("--generate", args.generate),
        repeat=args.repeat,
    )
    report_json(args, found.as_json())
    out = console(args)
    _print(out, found)
    if args.save:
        out.print(f"wrote {one_line(str(args.save))}")
    return 0


def _lengths(flag: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UserError(f"{flag} {text}: expected numbers of tokens with commas between", f"for example {flag} 512")
    return list(map(int, words))


def _print(out: Console, speeds: Speeds) -> None:
    from rich.table import Column, Table

    found = speeds.models
    names = [Column(one_line(each.path.name), justify="right") for each in found]
    ratio = [Column("ratio", justify="right")] if len(found) > 1 else []
    table = Table("", *names, *ratio, box=None, pad_edge=False)
    for label, rates in _rows(found):
        table.add_row(label, *map(_speed, rates), *([f"{rates[1].mean / rates[0].mean:.2f}"] if ratio else []))
    for i, prompt in enumerate(found[0].prompts):
        seconds = [prompt.n_tokens / each.prompts[i].mean for each in found]
        table.add_row(
            f"first token after a prompt of {prompt.n_tokens}",
            *(f"{each:.3g} s" for each in seconds),
            *([f"{seconds[1] / seconds[0]:.2f}"] if ratio else []),
        )
    table.add_row("loading", *(f"{each.load_seconds:.2f} s" for each in found))
    table.add_row("resident memory", *(show_size(each.resident) for each in found))
    table.add_row("weights read for a token", *(show_size(each.touched) for each in found))
    if found[0].generations:
        table.add_row("weights read in a second", *(_bandwidth(each, speeds.stream) for each in found))
    out.print(table)
    out.print(
        f"memory of this machine reads at {speeds.stream / 1e9:.1f} GB/s; ± is the standard deviation of the runs"
    )


def _rows(found: Sequence[Bench]) -> list[tuple[str, list[Rate]]]:
    """What is measured in tokens per second: its name, and the rates of each file."""
    prompts = zip(*(each.prompts for each in found), strict=True)
    generations = zip(*(each.generations for each in found), strict=True)
    return [
        *((f"prompt of {rates[0].n_tokens}", list(rates)) for rates in prompts),
        *((f"generation of {rates[0].n_tokens}", list(rates)) for rates in generations),
    ]


def _speed(rate: Rate) -> str:
    return f"{rate.mean:.1f} ± {rate.spread:.1f} tokens/s"


def _bandwidth(found: Bench, stream: float) -> str:
    return f"{found.bandwidth / 1e9:.1f} GB/s, {found.bandwidth / stream:.0%} of the machine's"
