"""`moegguf calibrate`: importance matrices from text, of a finished model or of single experts before a mix."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console

from moegguf.api.calibrating import calibrate
from moegguf.commands.options import (
    add_device_arguments,
    add_json,
    add_recipes,
    add_threads,
    device_options,
    named_refs,
    print_json,
)
from moegguf.commands.output import console
from moegguf.commands.progress import shown
from moegguf.errors import one_line
from moegguf.jobs.calibration import MAX_TOKENS
from moegguf.jobs.imatrices import FOLDER, OUTPUT, Calibrated, Kind

HELP = """\
Run text through a model and write how much each column of each weight matters: an importance matrix, in llama.cpp's own
format. A build at few bits per weight is much closer to the original with one, and below 3 bits it needs one.

A GGUF: the matrix of that file; of a mix, each expert from the tokens that reach it. With --split also one matrix for
each expert, which any mix of it can use.
An expert's source, or a recipe: one matrix for each expert, before there is a mix. The text of its domain goes through
it, and where it runs for every token (gateless, always on) the text of all domains.

A run that was stopped goes on where it was, and more text is added to a file that is there.
"""
EXAMPLES = """\
examples:
  moegguf calibrate mix.gguf --text general=talk.txt --text math=sums.jsonl      writes imatrix.gguf
  moegguf calibrate mix.gguf --domains mymix --split experts/                     the domains of a recipe
  moegguf calibrate demo:math --text math=demo:math -o math.imatrix.gguf         an expert alone, on its own trunk
  moegguf calibrate mymix --recipes my.toml -o experts/                          all experts of a recipe
  moegguf build mymix --recipes my.toml --quant IQ2_M --imatrix imatrix.gguf

use: build --imatrix FILE, or imatrix = "FILE" in a recipe, for the whole mix or for an expert
text: .txt and .md files, .jsonl of {"text"}, {"prompt", "completion"}, {"messages"} or {"question", "answer"},
demo:DOMAIN
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a .gguf file, the source of an expert, or the name of a recipe")
    parser.add_argument("--base", metavar="SOURCE", help="of an expert's source: run it on this model's trunk")
    add_recipes(parser)
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE",
        help="text of a domain; once for each file. Of a recipe, NAME is an expert, and it replaces its domain's text",
    )  # fmt: skip
    text.add_argument("--domains", metavar="RECIPE", help="the texts under `domains` of this recipe")
    text.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N",
                      help=f"tokens of each text (default: {MAX_TOKENS})")  # fmt: skip
    text.add_argument("--chunk", type=int, metavar="N", help="tokens that run as one (default: 512, or the context)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help=f"file to write or to extend (default: {OUTPUT}); of a recipe, a folder (default: {FOLDER})",
    )  # fmt: skip
    output.add_argument("--split", type=Path, metavar="FOLDER", help="of a mix: also write a matrix for each expert")
    output.add_argument("--fresh", action="store_true", help="begin anew where the file is there already")
    add_json(output)
    output.add_argument(
        "--process-output", action="store_true", help="calibrate output.weight too, which llama.cpp advises against"
    )
    machine = parser.add_argument_group("machine")
    add_threads(machine)
    machine.add_argument("--pre", metavar="NAME", help="of sources: llama.cpp's name of the BPE pre-tokenizer")
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    done = calibrate(
        args.model, base=args.base, recipes=args.recipes, text=named_refs("--text", args.text), domains=args.domains,
        max_tokens=args.max_tokens, chunk=args.chunk, output=args.output, split=args.split, fresh=args.fresh,
        process_output=args.process_output, threads=args.threads, pre=args.pre, offload=device_options(args),
        watch=shown,
    )  # fmt: skip
    if args.json:
        print_json(done.as_json() | {"seconds": round(time.monotonic() - start, 3)})
    _print(console(args), done)
    return 0


def _print(out: Console, done: Calibrated) -> None:
    for matrix in done.matrices:
        texts = matrix.calibration.texts
        tokens = ", ".join(f"{one_line(text.name)} {text.n_tokens}" for text in texts)
        if matrix.n_run:
            out.print(f"wrote {matrix.path}: {len(matrix.calibration.squares)} weights; tokens: {tokens}")
        else:
            out.print(f"{matrix.path} holds all of this text already; tokens: {tokens}")
    for note in done.notes:
        out.print(f"note: {one_line(note)}")
    if done.split:
        out.print(f"wrote {done.split[0].parent}: a matrix for each expert, for any mix of it")
    match done.kind:
        case Kind.MODEL:
            out.print(f"use: moegguf build … --imatrix {done.path}")
        case Kind.EXPERT:
            out.print(f'use: imatrix = "{done.path}" with this expert in a recipe')
        case Kind.RECIPE:
            out.print("use, in the recipe:")
            for matrix in done.matrices:
                out.print(f'  {{ name = "{matrix.expert}", …, imatrix = "{matrix.path}" }}')
