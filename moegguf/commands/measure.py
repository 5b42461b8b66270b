"""`moegguf measure`: what a quantisation, a merge or another layout costs, against a reference of the same vocabulary.

The reference's logits are kept on disk, so that the next file is measured without running it again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from moegguf.commands.options import (
    add_device_arguments,
    add_json,
    add_recipes,
    add_threads,
    device_options,
    print_json,
)
from moegguf.commands.output import console
from moegguf.commands.progress import shown
from moegguf.errors import one_line
from moegguf.jobs.divergences import CHUNK
from moegguf.jobs.engines import by_name
from moegguf.jobs.measuring import MAX_TOKENS, Measured, MeasureOptions, plan_measurement, run_measurement, texts_of
from moegguf.measurement.divergence import Divergence, Estimate
from moegguf.sizes import show_size
from moegguf.texts import named_ref

HELP = """\
How far models are from a reference: KL divergence of their next-token distributions, how often the likeliest token is
the same, perplexity. Needs no questions and answers, only text.

Errors are standard errors over chunks of text, because the tokens of a chunk depend on each other; in brackets: 95 %
confidence intervals. All tokens of a chunk count but its first.
"""
EXAMPLES = """\
examples:
  moegguf measure mix-Q4_K_M.gguf --against mix-F16.gguf --text book.txt
  moegguf measure q8.gguf q6.gguf q4.gguf --against f16.gguf --text math=sums.jsonl law=law.jsonl
  moegguf measure mix.gguf --against f16.gguf --domains my-mix --json > measured.json
  moegguf measure mix.gguf --against f16.gguf --text demo:math/heldout#100 --no-cache

text: .txt and .md files, .jsonl of {"text"}, {"prompt", "completion"}, {"messages"} or {"question", "answer"},
demo:DOMAIN/heldout. Texts of one name count as one.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="GGUF files to measure")
    parser.add_argument(
        "--against", type=Path, required=True, metavar="FILE", help="the reference: the same model in F16, say"
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text", nargs="+", action="extend", default=[], metavar="FILE", help="FILE, NAME=FILE or demo:DOMAIN/heldout"
    )
    text.add_argument("--domains", metavar="RECIPE", help="the texts under `domains` of this recipe")
    add_recipes(text)
    text.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, metavar="N",
        help=f"tokens of each text, from its start on (default: {MAX_TOKENS})",
    )  # fmt: skip
    text.add_argument(
        "--chunk", type=int, metavar="N", help=f"tokens of a chunk (default: {CHUNK}, or the reference's context)"
    )
    kept = parser.add_argument_group("logits of the reference").add_mutually_exclusive_group()
    kept.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="where they are kept (default: ~/.cache/moegguf/measure)"
    )
    kept.add_argument("--reference-logits", type=Path, metavar="FILE", help="the file they are kept in")
    kept.add_argument("--no-cache", action="store_true", help="keep none: run both models at once")
    how = parser.add_argument_group("how")
    add_json(how)
    add_threads(how)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the reference unless its logits are there, then every model; print how far each is from it."""
    options = MeasureOptions(
        chunk=args.chunk, max_tokens=args.max_tokens, threads=args.threads, offload=device_options(args),
        cache=args.cache, reference_logits=args.reference_logits, keep=not args.no_cache,
    )  # fmt: skip
    texts = texts_of(map(named_ref, args.text), domains=args.domains, recipes=args.recipes)
    models = {name: Path(ref) for name, ref in by_name(args.models).items()}
    plan = plan_measurement(models, args.against, texts, options)
    out = console(args)
    out.print(f"{plan.n_tokens} tokens in {len(plan.sequences)} chunks")
    if kept := plan.kept:
        state = "are there already" if kept.is_there else "will be kept"
        out.print(f"the reference's logits {state}: {show_size(kept.nbytes)}, {kept.path}")
    found = run_measurement(plan, shown)
    if args.json:
        print_json(found.as_json())
    else:
        _print(out, found.models)
    return 0


# --- what is shown ---

_HEADS = ("model", "size", "KLD", "median", "99 %", "largest", "top-1 %", "|Δp| %", "ppl")
_LEGEND = """\
KLD: mean, median, 99th percentile and largest, in nats; top-1: how often the likeliest token is the reference's;
|Δp|: by how much the probability of that one differs, on average; ppl: perplexity.
±: standard error over chunks; in brackets: 95 % confidence interval"""
_WIDE = 120
"""Columns of a terminal in which a model takes one line."""


def _print(out: Console, models: Sequence[Measured]) -> None:
    """A table that goes on from text to text, with a row a model."""
    between = " " if out.width >= _WIDE else "\n"
    sections = {
        text: [[one_line(model.name), *(between.join(cell) for cell in _cells(model, model.rows[text]))]
               for model in models]
        for text in models[0].rows
    }  # fmt: skip
    widths = [
        max(len(line) for cell in column for line in cell.split("\n"))
        for column in zip(_HEADS, *(row for rows in sections.values() for row in rows), strict=True)
    ]
    for number, (text, rows) in enumerate(sections.items()):
        out.print(f"\n{one_line(_about(text, models[0].rows[text]))}")
        first = Column(_HEADS[0], overflow="fold", min_width=len(_HEADS[0]))
        table = Table(first, box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=not number)
        for head, width in zip(_HEADS[1:], widths[1:], strict=True):
            table.add_column(head, justify="right", no_wrap=True, min_width=width)
        for row in rows:
            table.add_row(*row)
        out.print(table)
    out.print(f"\n{_LEGEND}")


def _about(text: str, divergence: Divergence) -> str:
    chunks = f"{divergence.n_chunks} chunk{'s' * (divergence.n_chunks > 1)}"
    perplexity = " ".join(_plus_minus(divergence.perplexity_reference, ".4g"))
    return f"{text}: {divergence.n_tokens} tokens in {chunks}, perplexity of the reference {perplexity}"


def _cells(model: Measured, divergence: Divergence) -> list[list[str]]:
    """Each is a figure, with its error or its interval where there is one."""
    interval = divergence.top1_interval
    limits = [] if interval is None else ["[" + ", ".join(f"{100 * limit:.4g}" for limit in interval) + "]"]
    return [
        [show_size(model.n_bytes)],
        _plus_minus(divergence.kld, ".3g"),
        *([f"{divergence.kld_percentile(percent):.3g}"] for percent in (50, 99, 100)),
        [f"{100 * divergence.top1.value:.2f}", *limits],
        [f"{100 * divergence.p_change.value:.3g}"],
        _plus_minus(divergence.perplexity, ".4g"),
    ]


def _plus_minus(estimate: Estimate, form: str) -> list[str]:
    error = [] if estimate.error is None else [f"±{estimate.error:.2g}"]
    return [format(estimate.value, form), *error]
