"""`moegguf route map`: which experts a mix uses for which text, and whether few of them at a time would do.

Shown as heat maps of shares, one row a layer and one column an expert, and as a table of figures for each domain.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from moegguf.api import route
from moegguf.commands.options import (
    add_device_arguments,
    add_json_and_save,
    add_recipes,
    add_threads,
    check_save,
    device_options,
    named_refs,
    report_json,
)
from moegguf.commands.output import console
from moegguf.commands.progress import shown
from moegguf.errors import one_line
from moegguf.jobs.mapping import DEFAULT_CTX, DEFAULT_SEGMENT, DEFAULT_TOKENS, RoutingMap
from moegguf.measurement.routing import Routing

HELP = "Show which experts a mix uses for which text, and whether it suits running from disk or system memory."
EXAMPLES = """\
examples:
  moegguf route map mix.gguf --text math=gsm8k.jsonl --text code=code.txt
  moegguf route map mix.gguf --domains mymix --recipes my.toml -o map.png    the recipe's domains, and a figure
  moegguf route map demo-noisy-Q8_0.gguf --text math=demo:math --text clinic=demo:clinic --json
"""

WIDEST = 10
"""Columns that an expert takes at a terminal, where panels stand side by side."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a GGUF with a router: a mix, or any other Mixture of Experts")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE",
        help="text of a domain: .txt, .md, .jsonl or demo:DOMAIN; once for each file",
    )  # fmt: skip
    text.add_argument("--domains", metavar="RECIPE", help="the texts under `domains` of this recipe")
    add_recipes(text)
    text.add_argument(
        "--max-tokens", type=int, metavar="N", default=DEFAULT_TOKENS,
        help=f"tokens a domain (default: {DEFAULT_TOKENS})",
    )  # fmt: skip
    figures = parser.add_argument_group("figures")
    figures.add_argument(
        "--segment", type=int, metavar="L", default=DEFAULT_SEGMENT,
        help=f"tokens of a segment, for SRP and SCH (default: {DEFAULT_SEGMENT})",
    )  # fmt: skip
    figures.add_argument(
        "--cache", type=int, nargs="+", default=[], metavar="M",
        help="experts of a layer that a cache holds (default: k, N/2 and 2k of N)",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--output", type=Path, metavar="FILE", help="draw the heat maps as .png, .svg or .pdf")
    add_json_and_save(output)
    output.add_argument("--force", action="store_true", help="replace what -o and --save name if it exists")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--ctx", type=int, metavar="N", help=f"tokens of the pieces that run (default: {DEFAULT_CTX})")
    add_threads(machine)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    text = named_refs("--text", args.text)
    check_save(args, [args.model, *chain.from_iterable(text.values())])
    found = route.map(
        args.model, text=text, domains=args.domains, recipes=args.recipes,
        max_tokens=args.max_tokens, segment=args.segment, cache=args.cache, output=args.output, overwrite=args.force,
        ctx=args.ctx, threads=args.threads, offload=device_options(args), watch=shown,
    )  # fmt: skip
    report_json(args, found.as_json())
    out = console(args)
    _print(out, found)
    for path in filter(None, (args.output, args.save)):
        out.print(f"wrote {path}")
    return 0


def _print(out: Console, found: RoutingMap) -> None:
    choice = found.choice
    out.print(
        f"{one_line(choice.name)}: {choice.k} of {len(choice.experts)} experts a token"
        + (f", and {one_line(choice.always_on)} always" if choice.always_on else "")
    )
    has_shades = out.color_system in ("256", "truecolor") and not out.no_color
    width = out.width if has_shades else None
    widest = WIDEST if out.is_terminal else None
    for title, name in found.maps.items():
        out.print(f"\n{title}, per cent of tokens, by layer", style="bold")
        measured = found.domains.items()
        _print_panels(out, [_panel(one_line(to), of, name, choice.experts, width, widest) for to, of in measured])
    out.print()
    out.print(_table(found), width=max(out.width, 44 + sum(len(name) + 9 for name in found.columns)))
    out.print()
    out.print(found.verdict)


def _panel(
    title: str, domain: Routing, name: str, experts: Sequence[str], width: int | None, widest: int | None
) -> list[Text]:
    """The domain, the experts, and a row of numbers for each layer.

    With a width, numbers are on coloured ground; where they do not fit into it, the ground alone is shown. With a
    widest column, names are cut to it, and lines are of equal width.
    """
    labels = [one_line(expert) for expert in experts]
    margin = max(len(str(layer)) for layer in domain.layers) + 1
    cell = max(5, *(len(label) + 2 for label in labels))
    if widest is not None:
        cell = min(cell, widest)
    if width is not None and margin + cell * len(experts) > width:
        cell, labels = 2, [""] * len(experts)
    head = " " * margin + "".join(f"{label[: cell - 2]:>{cell - 1}} " for label in labels)
    room = None if widest is None else len(head)
    lines = [Text(title[:room].ljust(len(head)), style="bold"), Text(head, style="dim")]
    for layer, row in zip(domain.layers, domain.matrix(name), strict=True):
        line = Text().append(f"{layer:>{margin - 1}} ", style="dim")
        for share in row:
            number = f"{100 * share:.0f}" if cell > 2 else ""
            line.append(f"{number:>{cell - 1}} ", style=_heat(share) if width else "")
        lines.append(line)
    return lines


def _heat(share: float) -> str:
    """A rich style: the colours of cividis, as in the figure."""
    low, middle, high = (0, 34, 78), (124, 123, 120), (254, 232, 56)
    start, end, way = (low, middle, 2 * share) if share < 0.5 else (middle, high, 2 * share - 1)
    rgb = ",".join(f"{a + (b - a) * way:.0f}" for a, b in zip(start, end, strict=True))
    return f"{'white' if share < 0.55 else 'black'} on rgb({rgb})"


def _print_panels(out: Console, panels: Sequence[Sequence[Text]]) -> None:
    """As many side by side as a terminal is wide; in a pipe one below the other."""
    gap = 3
    across = max(1, (out.width + gap) // (max(len(panel[0]) for panel in panels) + gap)) if out.is_terminal else 1
    for start in range(0, len(panels), across):
        if start:
            out.print()
        for lines in zip(*panels[start : start + across], strict=True):
            out.print(Text(" " * gap).join(lines))


def _table(found: RoutingMap) -> Table:
    """Figures in rows, domains in columns."""
    n = len(found.choice.experts)
    domains = found.columns
    table = Table("", *(Column(name, justify="right", no_wrap=True) for name in domains), box=None, pad_edge=False)
    rows = [
        ("tokens", "{:d}", lambda domain: domain.n_tokens),
        (f"router entropy, nats (at most {math.log(n):.2f})", "{:.3f}", lambda domain: domain.mean("entropy")),
        ("router entropy, share of that", "{:.0%}", lambda domain: domain.mean("relative_entropy")),
        ("load: largest over mean (1 is even)", "{:.2f}", lambda domain: domain.mean("peak")),
        ("load: coefficient of variation (0 is even)", "{:.2f}", lambda domain: domain.mean("variation")),
        ("load-balancing loss of Switch (1 is even)", "{:.3f}", lambda domain: domain.mean("balance_loss")),
        ("same top expert as the token before", "{:.0%}", lambda domain: domain.whole.repeat),
        (f"SRP, segments of {found.segment} tokens", "{:.0%}", lambda domain: domain.whole.srp),
        ("  experts it takes, times k", "{:.2f}", lambda domain: domain.whole.srp_size),
        *(
            (f"SCH, best {m} of {n} experts of a segment", "{:.0%}", lambda domain, m=m: domain.whole.sch(m))
            for m in found.caches
        ),
        *(
            (f"LRU hit rate, cache of {m} (chance {m / n:.0%})", "{:.0%}", lambda domain, m=m: domain.whole.lru(m))
            for m in found.caches
        ),
    ]
    for label, form, figure in rows:
        values = [figure(domain) for domain in domains.values()]
        table.add_row(label, *("-" if math.isnan(value) else form.format(value) for value in values))
    return table
