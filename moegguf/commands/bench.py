"""`moegguf bench`: how fast a file runs on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from moegguf.commands.options import (
    LARGEST,
    add_device_arguments,
    add_memory_arguments,
    check_range,
    print_json,
    run_options,
)
from moegguf.commands.progress import counted
from moegguf.errors import UserError, one_line
from moegguf.sizes import show_size

if TYPE_CHECKING:
    from moegguf.runtime.bench import Bench, Rate

HELP = """\
Measure how fast a file runs here: prompts and generation in tokens per second, time to the first token, loading,
memory, and how much of this machine's memory bandwidth generation reaches. The definitions are those of llama-bench."""
EXAMPLES = """\
examples:
  moegguf bench mix.gguf
  moegguf bench mix.gguf --compare base.gguf        side by side, with the ratio
  moegguf bench mix.gguf --prompt 512 --generate 128 --repeat 5     what llama-bench runs by default
"""

_PROMPTS, _ANSWERS = (128, 512), (32, 128)
_LONGEST = 1 << 20


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
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: physical cores)")
    parser.add_argument(
        "--experts-used", type=int, metavar="K", help="experts per token, in place of the file's number"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, seconds of every run included")
    add_device_arguments(parser)
    add_memory_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from moegguf.gguf_header import read_header
    from moegguf.runtime.bandwidth import memory_bandwidth
    from moegguf.runtime.bench import Lengths, bench
    from moegguf.runtime.machine import physical_cores
    from moegguf.runtime.run_options import hparam

    check_range("--repeat", args.repeat, 1)
    paths = [args.model, *([args.compare] if args.compare else [])]
    longest = min(hparam(read_header(path), "context_length", LARGEST) for path in paths)
    prompts = _lengths("--prompt", args.prompt, _PROMPTS, longest)
    lengths = Lengths(prompts, _lengths("--generate", args.generate, _ANSWERS, longest), args.repeat)
    if not lengths.prompts + lengths.generations:
        raise UserError("--prompt 0 and --generate 0 leave nothing to measure", "leave one of them out")
    options = run_options(args)
    stream = memory_bandwidth(args.threads or physical_cores())
    found = []
    for path in paths:
        with counted(path.name, lengths.n_tokens, "tokens") as bar:
            found.append(bench(path, options, lengths, bar.did))
    if args.json:
        print_json({"stream_bytes_per_s": stream, "models": list(map(_as_json, found))})
    else:
        _print(found, stream)
    return 0


def _lengths(flag: str, text: str | None, default: Sequence[int], longest: int) -> tuple[int, ...]:
    if text is None:
        return tuple(dict.fromkeys(min(n, longest) for n in default))
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and int(word) <= _LONGEST for word in words):
        raise UserError(f"{flag} {text}: expected numbers of tokens with commas between", f"for example {flag} 512")
    return tuple(n for n in map(int, words) if n)


def _print(found: list[Bench], stream: float) -> None:
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 10_000)
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
        table.add_row("weights read in a second", *(_bandwidth(each, stream) for each in found))
    console.print(table)
    console.print(f"memory of this machine reads at {stream / 1e9:.1f} GB/s; ± is the standard deviation of the runs")


def _rows(found: list[Bench]) -> list[tuple[str, list[Rate]]]:
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


def _as_json(found: Bench) -> dict:
    def rates(of: tuple[Rate, ...]) -> list[dict]:
        return [
            {
                "n_tokens": rate.n_tokens,
                "tokens_per_s": rate.mean,
                "stdev": rate.spread,
                "seconds": rate.seconds,
            }
            for rate in of
        ]

    return {
        "path": str(found.path),
        "prompts": rates(found.prompts),
        "generations": rates(found.generations),
        "first_token_seconds": {rate.n_tokens: rate.n_tokens / rate.mean for rate in found.prompts},
        "load_seconds": found.load_seconds,
        "resident_bytes": found.resident,
        "touched_bytes_per_token": found.touched,
        "bytes_per_s": found.bandwidth,
    }
