"""`moegguf measure`: what a quantisation, a merge or another layout costs, against a reference of the same vocabulary.

The reference's logits are kept on disk, so that the next file is measured without running it again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from moegguf.commands.options import (
    add_device_arguments,
    cache_folder,
    check_range,
    check_threads,
    device_options,
    print_json,
)
from moegguf.commands.progress import counted
from moegguf.divergences import (
    CHUNK,
    KeptReference,
    Tokens,
    check_both_fit,
    check_vocabulary,
    chunk_length,
    compare,
    kept_in,
    sequences_of,
)
from moegguf.errors import UserError, one_line
from moegguf.gguf_header import Header, read_header
from moegguf.measurement.divergence import Divergence, Estimate
from moegguf.recipe import find_recipes_file, load_recipe
from moegguf.runtime.offload import Offload
from moegguf.texts import Record, read_domains

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

ALL = "all texts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="GGUF files to measure")
    parser.add_argument(
        "--against", type=Path, required=True, metavar="FILE", help="the reference: the same model in F16, say"
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text", nargs="+", action="extend", default=[], metavar="FILE", help="FILE, NAME=FILE or demo:DOMAIN/heldout"
    )
    text.add_argument("--domains", metavar="RECIPE", help="the texts under `domains` of this recipe")
    text.add_argument("--recipes", type=Path, metavar="FILE", help="recipes file (default: moegguf's models.toml)")
    text.add_argument(
        "--max-tokens", type=int, default=4096, metavar="N", help="of each text, from its start on (default: 4096)"
    )
    text.add_argument(
        "--chunk", type=int, metavar="N", help=f"tokens of a chunk (default: {CHUNK}, or the reference's context)"
    )
    kept = parser.add_argument_group("logits of the reference").add_mutually_exclusive_group()
    kept.add_argument(
        "--cache", type=Path, metavar="DIR", help="where they are kept (default: ~/.cache/moegguf/measure)"
    )
    kept.add_argument("--reference-logits", type=Path, metavar="FILE", help="the file they are kept in")
    kept.add_argument("--no-cache", action="store_true", help="keep none: run both models at once")
    how = parser.add_argument_group("how")
    how.add_argument("--json", action="store_true", help="print the results as JSON")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: physical cores)")
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the reference unless its logits are there, then every model; print how far each is from it."""
    check_range("--max-tokens", args.max_tokens, 1)
    check_threads(args.threads)
    offload = device_options(args)
    reference = _check_models(args)
    chunks = sequences_of(
        reference, _texts(args), chunk=chunk_length(reference, args.chunk), max_tokens=args.max_tokens
    )
    console = Console(stderr=args.json, markup=False, highlight=False, emoji=False, width=_width(args.json))
    measured = _measure(args, reference, chunks, offload, console)
    if args.json:
        print_json(_as_json(args, measured))
    else:
        _print(console, measured)
    return 0


# --- what is asked for ---


def _check_models(args: argparse.Namespace) -> Header:
    """The reference's header. Raises one UserError for all files that are none, or of another vocabulary."""
    reference = read_header(args.against)
    faults: list[UserError] = []
    for path in args.models:
        try:
            check_vocabulary(reference, read_header(path))
            if args.no_cache:
                check_both_fit(args.against, path)
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    return reference


def _texts(args: argparse.Namespace) -> dict[str, list[Record]]:
    """Name → records, in order. Raises one UserError for all that cannot be read."""
    if not (args.text or args.domains):
        raise UserError("nothing to measure on", "give --text FILE or --domains RECIPE")
    refs: dict[str, list[str]] = {}
    for spec in args.text:
        name, ref = _named_text(spec)
        refs.setdefault(name, []).append(ref)
    texts = read_domains(refs)
    if not args.domains:
        return texts
    recipe = load_recipe(args.domains, args.recipes or find_recipes_file(), {})
    if not recipe.domains:
        raise UserError(f"recipe {recipe.name} names no domains", 'give it domains = { NAME = "file.jsonl" }')
    for name, records in read_domains(recipe.domains, recipe.folder).items():
        texts.setdefault(name, []).extend(records)
    return texts


def _named_text(spec: str) -> tuple[str, str]:
    """(name, reference) of `NAME=FILE` or `FILE`, whose name is its stem; of `demo:math/heldout#9`, that is math."""
    name, equals, ref = spec.partition("=")
    if equals and not Path(spec).exists():
        return name, ref
    if spec.startswith("demo:"):
        return spec.removeprefix("demo:").partition("#")[0].removesuffix("/heldout"), spec
    return Path(spec).stem, spec


# --- measuring ---


@dataclass(frozen=True)
class _Measured:
    """A model: how far it is from the reference on each text, and on all of them."""

    name: str
    path: Path
    texts: Mapping[str, Divergence]

    @property
    def rows(self) -> dict[str, Divergence]:
        """By text; where there are several, with one for all, in which every token counts alike."""
        overall = {ALL: Divergence.joined(self.texts.values())} if len(self.texts) > 1 else {}
        return {**self.texts, **overall}


def _measure(
    args: argparse.Namespace, reference: Header, chunks: Mapping[str, list[Tokens]], offload: Offload, console: Console
) -> list[_Measured]:
    sequences = [tokens for text in chunks.values() for tokens in text]
    n_tokens = sum(len(tokens) - 1 for tokens in sequences)
    console.print(f"{n_tokens} tokens in {len(sequences)} chunks", soft_wrap=True)
    kept = None if args.no_cache else _kept(args, reference, sequences, offload)
    must_run = kept is not None and not kept.is_there
    if kept:
        state = "will be kept" if must_run else "are there already"
        console.print(f"the reference's logits {state}: {_size(kept.nbytes)}, {kept.path}", soft_wrap=True)
    measured = []
    with counted(reference.path.name, n_tokens * (must_run + len(args.models)), "tokens") as bar:
        if must_run:
            kept.write(threads=args.threads, progress=bar.did)
        for name, path in _named(args.models).items():
            bar.says(name)
            if kept:
                divergence = kept.compare(path, threads=args.threads, progress=bar.did)
            else:
                divergence = compare(reference.path, path, sequences, threads=args.threads, offload=offload,
                                     progress=bar.did)  # fmt: skip
            by_text = dict(zip(chunks, divergence.split(map(len, chunks.values())), strict=True))
            measured.append(_Measured(name, path, by_text))
    return measured


def _kept(args: argparse.Namespace, reference: Header, sequences: Sequence[Tokens], offload: Offload) -> KeptReference:
    if args.reference_logits:
        return KeptReference(args.reference_logits, reference, sequences, offload)
    return kept_in(args.cache or cache_folder("measure"), reference, sequences, offload=offload)


def _named(models: Sequence[Path]) -> dict[str, Path]:
    """Name → model, in order: the file's stem, or the whole path where two share a stem."""
    stems = [path.stem for path in models]
    return {path.stem if stems.count(path.stem) == 1 else str(path): path for path in models}


# --- what is shown ---

_HEADS = ("model", "size", "KLD", "median", "99 %", "largest", "top-1 %", "|Δp| %", "ppl")
_LEGEND = """\
KLD: mean, median, 99th percentile and largest, in nats; top-1: how often the likeliest token is the reference's;
|Δp|: by how much the probability of that one differs, on average; ppl: perplexity.
±: standard error over chunks; in brackets: 95 % confidence interval"""
_WIDE = 120
"""Columns of a terminal in which a model takes one line."""


def _width(as_json: bool) -> int | None:
    return None if (sys.stderr if as_json else sys.stdout).isatty() else 10_000


def _print(console: Console, measured: Sequence[_Measured]) -> None:
    """A table that goes on from text to text, with a row a model."""
    between = " " if console.width >= _WIDE else "\n"
    sections = {
        text: [[one_line(model.name), *(between.join(cell) for cell in _cells(model, model.rows[text]))]
               for model in measured]
        for text in measured[0].rows
    }  # fmt: skip
    widths = [
        max(len(line) for cell in column for line in cell.split("\n"))
        for column in zip(_HEADS, *(row for rows in sections.values() for row in rows), strict=True)
    ]
    for number, (text, rows) in enumerate(sections.items()):
        console.print(f"\n{one_line(_about(text, measured[0].rows[text]))}", soft_wrap=True)
        table = Table(Column(_HEADS[0], overflow="fold"), box=None, pad_edge=False, padding=(0, 1, 0, 0),
                      show_header=not number)  # fmt: skip
        for head, width in zip(_HEADS[1:], widths[1:], strict=True):
            table.add_column(head, justify="right", no_wrap=True, min_width=width)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"\n{_LEGEND}", soft_wrap=True)


def _about(text: str, divergence: Divergence) -> str:
    chunks = f"{divergence.n_chunks} chunk{'s' * (divergence.n_chunks > 1)}"
    perplexity = " ".join(_plus_minus(divergence.perplexity_reference, ".4g"))
    return f"{text}: {divergence.n_tokens} tokens in {chunks}, perplexity of the reference {perplexity}"


def _cells(model: _Measured, divergence: Divergence) -> list[list[str]]:
    """Each is a figure, with its error or its interval where there is one."""
    interval = divergence.top1_interval
    limits = [] if interval is None else ["[" + ", ".join(f"{100 * limit:.4g}" for limit in interval) + "]"]
    return [
        [_size(model.path.stat().st_size)],
        _plus_minus(divergence.kld, ".3g"),
        *([f"{divergence.kld_percentile(percent):.3g}"] for percent in (50, 99, 100)),
        [f"{100 * divergence.top1.value:.2f}", *limits],
        [f"{100 * divergence.p_change.value:.3g}"],
        _plus_minus(divergence.perplexity, ".4g"),
    ]


def _plus_minus(estimate: Estimate, form: str) -> list[str]:
    error = [] if estimate.error is None else [f"±{estimate.error:.2g}"]
    return [format(estimate.value, form), *error]


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _as_json(args: argparse.Namespace, measured: Sequence[_Measured]) -> dict:
    return {
        "reference": str(args.against),
        "models": [
            {
                "name": model.name,
                "path": str(model.path),
                "size": model.path.stat().st_size,
                "texts": {text: divergence.as_json() for text, divergence in model.texts.items()},
                "overall": Divergence.joined(model.texts.values()).as_json(),
            }
            for model in measured
        ],
    }
