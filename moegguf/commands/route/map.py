"""`moegguf route map`: which experts a mix uses for which text, and whether few of them at a time would do.

Texts run through the file in llama.cpp while a tap reads the router's probabilities and choices; the statistics are
those of `moegguf.measurement.routing`. Shown as heat maps of shares (Figures 6 and 7 of arXiv 2408.17280), one row a
layer and one column an expert, and as a table of figures for each domain.

Texts are cut into pieces of `--ctx` tokens, 512 by default, as in the work that defines SRP and SCH.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from moegguf.commands.options import (
    add_device_arguments,
    add_json_arguments,
    check_range,
    check_threads,
    device_options,
    report_json,
)
from moegguf.commands.progress import Bar, counted
from moegguf.errors import UserError, one_line
from moegguf.gguf_header import Header, read_header
from moegguf.measurement import plots
from moegguf.measurement.routing import Locality, Routing, total
from moegguf.metadata import read_card
from moegguf.recipe import find_recipes_file, load_recipe
from moegguf.texts import Record, read_domains

if TYPE_CHECKING:
    from moegguf.runtime.model import Model, RunOptions
    from moegguf.runtime.tap import Tap, Tapped

HELP = "Show which experts a mix uses for which text, and whether it suits running from disk or system memory."
EXAMPLES = """\
examples:
  moegguf route map mix.gguf --text math=gsm8k.jsonl --text code=code.txt
  moegguf route map mix.gguf --domains mymix --recipes my.toml -o map.png    the recipe's domains, and a figure
  moegguf route map demo-noisy-Q8_0.gguf --text math=demo:math --text clinic=demo:clinic --json
"""

DEFAULT_TOKENS = 4096
DEFAULT_SEGMENT = 16
MAX_SEGMENT = 65536
DEFAULT_CTX = 512
MIN_HIT_RATE = 0.9
"""From here on a mix is said to suit running from slow memory, see `_verdict`."""

ALL = "all of them"
"""A column; no domain can have that name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a GGUF with a router: a mix, or any other Mixture of Experts")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE",
        help="text of a domain: .txt, .md, .jsonl or demo:DOMAIN; once for each file",
    )  # fmt: skip
    text.add_argument("--domains", metavar="RECIPE", help="the texts under `domains` of this recipe")
    text.add_argument("--recipes", type=Path, metavar="FILE", help="recipes file (default: moegguf's models.toml)")
    text.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        default=DEFAULT_TOKENS,
        help=f"tokens a domain (default: {DEFAULT_TOKENS})",
    )
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
    output.add_argument("-o", "--png", type=Path, metavar="FILE", help="write the heat maps as .png, .svg or .pdf")
    add_json_arguments(output)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--ctx", type=int, metavar="N", help=f"tokens of the pieces that run (default: {DEFAULT_CTX})")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: physical cores)")
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    header = read_header(args.model)
    choice = _choice(header)
    check_range("--max-tokens", args.max_tokens, 1)
    check_range("--segment", args.segment, 1, MAX_SEGMENT)
    for size in args.cache:
        check_range("--cache", size, 1, len(choice.experts))
    options = _run_options(args, header)
    if args.png:
        plots.require(args.png)
    texts = _texts(args)

    from moegguf.runtime.model import open_model

    with open_model(args.model, options) as model:
        domains = _measure(model, texts, args.max_tokens, args.segment)
    caches = sorted(set(args.cache) or choice.default_caches())
    report = Report(args.model.name, choice, args.segment, caches, domains)
    if not args.json:
        _print(Console(markup=False, highlight=False, emoji=False), report)
    if args.png:
        _draw(args.png, report)
    report_json(args, _as_json(report))
    return 0


@dataclass(frozen=True)
class Choice:
    """What the routers of a file choose from."""

    name: str
    """What the file calls itself."""
    experts: tuple[str, ...]
    k: int
    always_on: str | None

    @property
    def half(self) -> int:
        """The cache that `_verdict` asks about: half of the experts, at least those of one token."""
        return max(self.k, len(self.experts) // 2)

    def default_caches(self) -> set[int]:
        n = len(self.experts)
        return {min(size, n) for size in (self.k, self.half, 2 * self.k)} - {n} or {n}


@dataclass(frozen=True)
class Report:
    file: str
    choice: Choice
    segment: int
    caches: Sequence[int]
    domains: Mapping[str, Routing]

    @property
    def columns(self) -> dict[str, Routing]:
        """The domains and, where there are several, all of them together."""
        return dict(self.domains) | ({ALL: total(self.domains.values())} if len(self.domains) > 1 else {})

    @property
    def maps(self) -> dict[str, str]:
        """Title of a heat map → property of `Load`; of one expert a token, being on top and being used is the same."""
        both = {"top expert": "top_share", "used at all": "used_share"}
        return both if self.choice.k > 1 else dict(islice(both.items(), 1))


# --- what is asked for ---


def _choice(header: Header) -> Choice:
    """What the file's routers choose from. Raises UserError when they choose nothing."""
    card = read_card(header)
    arch = header.get("general.architecture", "")
    n, k = (header.get(f"{arch}.{key}", 0) for key in ("expert_count", "expert_used_count"))
    if card and card.is_gateless:
        raise UserError(
            f"{header.path}: a gate-less mix uses all its experts for every token, so there is no choice to map",
            "give it a router first, see `moegguf route --help`, or map a mix that has one",
        )
    if not n:
        raise UserError(f"{header.path}: has no routers, so there is no choice to map", "pass a Mixture of Experts")
    if n == 1:
        raise UserError(f"{header.path}: its routers have one expert to choose from", "pass a mix of three or more")
    always_on = card.always_on if card else None
    names = tuple(e.name for e in card.experts if e.name != always_on) if card else tuple(map(str, range(n)))
    if len(names) != n:
        raise UserError(f"{header.path}: {n} experts to choose from, but {len(names)} names", "build the mix again")
    return Choice(card.name if card else header.path.name, names, k, always_on)


def _texts(args: argparse.Namespace) -> dict[str, list[Record]]:
    """Domain → records, those of the recipe first."""
    given: dict[str, list[str]] = {}
    for value in args.text:
        name, _, ref = value.partition("=")
        if not re.fullmatch(r"[\w.-]+", name) or not ref:
            raise UserError(f"--text {value}: expected NAME=FILE", "for example --text math=math.jsonl")
        given.setdefault(name, []).append(ref)
    texts = read_domains(given)
    if args.domains is not None:
        recipe = load_recipe(args.domains, args.recipes or find_recipes_file(), {})
        if not recipe.domains:
            raise UserError(f"recipe {args.domains}: has no domains", "add a domains table to it, or use --text")
        of_recipe = read_domains(recipe.domains, recipe.folder)
        texts = {name: of_recipe.get(name, []) + texts.get(name, []) for name in [*of_recipe, *texts]}
    if not texts:
        raise UserError("no text to map", "name it with --text NAME=FILE, or a recipe that has domains with --domains")
    return texts


def _run_options(args: argparse.Namespace, header: Header) -> RunOptions:
    from moegguf.runtime.run_options import MIN_CTX, RunOptions

    check_range("--ctx", args.ctx, MIN_CTX)
    check_threads(args.threads)
    trained = header.get(f"{header.get('general.architecture')}.context_length", DEFAULT_CTX)
    return RunOptions(
        ctx=args.ctx or min(DEFAULT_CTX, trained),
        threads=args.threads,
        offload=device_options(args),
    )


# --- measuring ---


def _measure(model: Model, texts: Mapping[str, Sequence[Record]], max_tokens: int, segment: int) -> dict[str, Routing]:
    """Domain → its statistics. Raises UserError for a domain without tokens, and a graph without routers."""
    from moegguf.runtime.tap import MOE_PROBS, MOE_TOPK, Tap, available

    layers = available(model).get(MOE_TOPK)
    if not layers:
        raise UserError(f"{model.name}: llama.cpp runs it without routers", "pass a Mixture of Experts")
    sequences = {name: list(_sequences(model, records, max_tokens)) for name, records in texts.items()}
    if empty := [name for name, pieces in sequences.items() if not pieces]:
        raise UserError(f"domain {empty[0]}: its text has no tokens", "give it more text")
    n_tokens = sum(len(piece) for pieces in sequences.values() for piece in pieces)
    with Tap(model, (MOE_PROBS, MOE_TOPK), layers) as tap, counted("", n_tokens, "tokens") as bar:
        return {
            name: total(_routing(tapped, layers, segment) for tapped in _followed(bar, name, tap, pieces))
            for name, pieces in sequences.items()
        }


def _sequences(model: Model, records: Iterable[Record], max_tokens: int) -> Iterator[Sequence[int]]:
    """The first `max_tokens` tokens of `records`, in pieces that fit the context."""
    from moegguf.runtime.encode import chunks, encode
    from moegguf.runtime.template import chat_template

    template = chat_template(model.chat_template, model.vocab)
    left = max_tokens
    for piece in chunks((encode(model.vocab, template, record) for record in records), model.n_ctx):
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return


def _routing(tapped: Tapped, layers: Sequence[int], segment: int) -> Routing:
    from moegguf.runtime.tap import MOE_PROBS, MOE_TOPK

    return Routing.of(
        {
            layer: [
                (_probabilities(values), chosen)
                for values, chosen in zip(tapped.split(MOE_PROBS, layer), tapped.split(MOE_TOPK, layer), strict=True)
            ]
            for layer in layers
        },
        segment,
    )


def _probabilities(values: np.ndarray) -> np.ndarray:
    """What the router gives each expert. Where llama.cpp takes the softmax of the chosen ones only, as for gpt-oss,
    the node holds logits."""
    if (values >= 0).all():
        return values
    exponentials = np.exp(values - values.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _followed(bar: Bar, name: str, tap: Tap, pieces: Sequence[Sequence[int]]) -> Iterator[Tapped]:
    """What the tap reads of `pieces`, each part added to the progress bar once it was used."""
    bar.says(name)
    for tapped in tap.run(pieces):
        yield tapped
        bar.did(sum(tapped.lengths))


# --- the terminal ---


def _print(console: Console, report: Report) -> None:
    choice = report.choice
    console.print(
        f"{one_line(choice.name)}: {choice.k} of {len(choice.experts)} experts a token"
        + (f", and {one_line(choice.always_on)} always" if choice.always_on else ""),
        soft_wrap=True,
    )
    has_shades = console.color_system in ("256", "truecolor") and not console.no_color
    width = console.width if has_shades else None
    for title, name in report.maps.items():
        console.print(f"\n{title}, per cent of tokens, by layer", style="bold", soft_wrap=True)
        panels = [_panel(domain, measured, name, choice.experts, width) for domain, measured in report.domains.items()]
        _print_side_by_side(console, panels)
    console.print()
    console.print(_table(report), width=max(console.width, 44 + sum(len(name) + 9 for name in report.columns)))
    console.print()
    console.print(_verdict(report), soft_wrap=True)


def _panel(title: str, domain: Routing, name: str, experts: Sequence[str], width: int | None) -> list[Text]:
    """Lines of equal width: the domain, the experts, and a row of numbers for each layer.

    With a width, numbers are on coloured ground; where they do not fit into it, the ground alone is shown.
    """
    labels = [one_line(expert) for expert in experts]
    margin = max(len(str(layer)) for layer in domain.layers) + 1
    cell = min(max(5, *(len(label) + 2 for label in labels)), 10)
    if width is not None and margin + cell * len(experts) > width:
        cell, labels = 2, [""] * len(experts)
    head = " " * margin + "".join(f"{label[: cell - 2]:>{cell - 1}} " for label in labels)
    lines = [Text(title[: len(head)].ljust(len(head)), style="bold"), Text(head, style="dim")]
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


def _print_side_by_side(console: Console, panels: Sequence[Sequence[Text]]) -> None:
    gap = 3
    across = max(1, (console.width + gap) // (max(len(panel[0]) for panel in panels) + gap))
    for start in range(0, len(panels), across):
        if start:
            console.print()
        for lines in zip(*panels[start : start + across], strict=True):
            console.print(Text(" " * gap).join(lines), soft_wrap=True)


def _table(report: Report) -> Table:
    """Figures in rows, domains in columns."""
    n = len(report.choice.experts)
    domains = report.columns
    table = Table("", *(Column(name, justify="right", no_wrap=True) for name in domains), box=None, pad_edge=False)
    rows = [
        ("tokens", "{:d}", lambda domain: domain.n_tokens),
        (f"router entropy, nats (at most {math.log(n):.2f})", "{:.3f}", lambda domain: domain.mean("entropy")),
        ("router entropy, share of that", "{:.0%}", lambda domain: domain.mean("relative_entropy")),
        ("load: largest over mean (1 is even)", "{:.2f}", lambda domain: domain.mean("peak")),
        ("load: coefficient of variation (0 is even)", "{:.2f}", lambda domain: domain.mean("variation")),
        ("load-balancing loss of Switch (1 is even)", "{:.3f}", lambda domain: domain.mean("balance_loss")),
        ("same top expert as the token before", "{:.0%}", lambda domain: domain.whole.repeat),
        (f"SRP, segments of {report.segment} tokens", "{:.0%}", lambda domain: domain.whole.srp),
        ("  experts it takes, times k", "{:.2f}", lambda domain: domain.whole.srp_size),
        *(
            (f"SCH, best {m} of {n} experts of a segment", "{:.0%}", lambda domain, m=m: domain.whole.sch(m))
            for m in report.caches
        ),
        *(
            (f"LRU hit rate, cache of {m} (chance {m / n:.0%})", "{:.0%}", lambda domain, m=m: domain.whole.lru(m))
            for m in report.caches
        ),
    ]
    for label, form, figure in rows:
        values = [figure(domain) for domain in domains.values()]
        table.add_row(label, *("-" if math.isnan(value) else form.format(value) for value in values))
    return table


def _verdict(report: Report) -> str:
    """One sentence on whether the mix suits running from disk or from system memory, and one on where the line is.

    The question is how many reads of experts a cache of half of them in fast memory saves. A disk reads some ten
    times slower than memory does, and so does system memory over PCIe beside a GPU's, so that with nine hits in ten the
    misses already cost as much time as the hits.
    """
    n, k, m = len(report.choice.experts), report.choice.k, report.choice.half
    if k == n:
        return (
            "This mix does not suit running from disk or from system memory: every token takes all experts of a layer,"
            " so none of them can stay out of fast memory."
        )
    rates = {name: domain.whole.lru(m) for name, domain in report.domains.items()}
    good = [name for name, rate in rates.items() if rate >= MIN_HIT_RATE]
    bad = [name for name in rates if name not in good]
    suits = "does not suit" if not good else "suits"
    scope = f" for {', '.join(good)}, not for {', '.join(bad)}" if good and bad else ""
    low, high = (
        math.floor(100 * rate) for rate in (min(rates.values()), max(rates.values()))
    )  # 89.9 is below the line
    found = str(low) if low == high else f"{low} to {high}"
    return (
        f"This mix {suits} running from disk or from system memory{scope}: with {m} of {n} experts of each layer in"
        f" fast memory, {found}% of the experts that a token needs are there already"
        f" (by chance it would be {m / n:.0%}). The line is at {MIN_HIT_RATE:.0%}: slow memory is some ten times"
        " slower, so with one in ten missing, the misses take as long as the hits."
    )


# --- files ---


def _draw(path: Path, report: Report) -> None:
    panels = {
        f"{domain}: {title}" if len(report.maps) > 1 else domain: measured.matrix(name)
        for title, name in report.maps.items()
        for domain, measured in report.domains.items()
    }
    layers = next(iter(report.domains.values())).layers
    title = f"{report.choice.name}: {'top expert' if report.choice.k == 1 else 'experts'} by layer and domain"
    plots.heat_map(
        path, one_line(title), panels, report.choice.experts, [str(layer) for layer in layers],
        across=min(len(report.domains), plots.PANELS_PER_ROW),
    )  # fmt: skip


def _as_json(report: Report) -> dict:
    choice = report.choice
    return {
        "file": report.file,
        "name": choice.name,
        "experts": list(choice.experts),
        "k": choice.k,
        "always_on": choice.always_on,
        "segment": report.segment,
        "domains": {name: _domain_as_json(domain, report.caches) for name, domain in report.columns.items()},
        "verdict": _verdict(report),
    }


def _domain_as_json(domain: Routing, caches: Sequence[int]) -> dict:
    layers = [
        {
            "layer": layer,
            "top_share": load.top_share.tolist(),
            "used_share": load.used_share.tolist(),
            "mean_probability": load.mean_probability.tolist(),
            "entropy": load.entropy,
            "relative_entropy": load.relative_entropy,
            "load_peak": load.peak,
            "load_variation": load.variation,
            "balance_loss": load.balance_loss,
            **_locality_as_json(domain.locality[layer], caches),
        }
        for layer, load in domain.load.items()
    ]
    figures = {"tokens": domain.n_tokens, "sequences": domain.n_sequences}
    return figures | _locality_as_json(domain.whole, caches) | {"layers": layers}


def _locality_as_json(locality: Locality, caches: Sequence[int]) -> dict:
    return {
        "repeat": _number(locality.repeat),
        "srp": _number(locality.srp),
        "srp_size": _number(locality.srp_size),
        "sch": {str(m): _number(locality.sch(m)) for m in caches},
        "lru": {str(m): locality.lru(m) for m in caches},
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
