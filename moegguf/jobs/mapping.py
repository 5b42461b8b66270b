"""Which experts a mix uses for which text, and whether few of them at a time would do.

Texts run through the file in llama.cpp while a tap reads the router's probabilities and choices; the statistics are
those of `moegguf.measurement.routing`. They are cut into pieces of 512 tokens unless told otherwise, as in the work
that defines SRP and SCH.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from moegguf.checks import check_range, check_threads
from moegguf.errors import UserError, one_line
from moegguf.gguf_header import Header, read_header
from moegguf.jobs.domains import texts_by_name
from moegguf.measurement import plots
from moegguf.measurement.routing import Locality, Routing, total
from moegguf.metadata import read_card
from moegguf.runtime.encode import chunks, encode
from moegguf.runtime.model import Model, open_model
from moegguf.runtime.offload import WHAT_FITS, Offload
from moegguf.runtime.run_options import MIN_CTX, RunOptions, hparam
from moegguf.runtime.tap import MOE_PROBS, MOE_TOPK, Tap, Tapped, available
from moegguf.runtime.template import chat_template
from moegguf.texts import Record
from moegguf.watch import Step, Watch, unwatched

DEFAULT_TOKENS = 4096
DEFAULT_SEGMENT = 16
MAX_SEGMENT = 65536
DEFAULT_CTX = 512
MIN_HIT_RATE = 0.9
"""From here on a mix is said to suit running from slow memory, see `RoutingMap.verdict`."""

ALL = "all of them"
"""A column; no domain can have that name."""

Texts = Mapping[str, Sequence[Record]]


@dataclass(frozen=True)
class MapOptions:
    """How to map."""

    max_tokens: int = DEFAULT_TOKENS
    """Of each domain."""
    segment: int = DEFAULT_SEGMENT
    """Tokens of a segment, for SRP and SCH."""
    caches: tuple[int, ...] = ()
    """How many experts of a layer a cache holds, each; default: k, N/2 and 2k of N."""
    ctx: int | None = None
    """Tokens of the pieces that run; default: 512, or what the model was trained on where that is less."""
    threads: int | None = None
    offload: Offload = WHAT_FITS

    def __post_init__(self) -> None:
        check_range("--max-tokens", self.max_tokens, 1)
        check_range("--segment", self.segment, 1, MAX_SEGMENT)
        check_range("--ctx", self.ctx, MIN_CTX)
        check_threads(self.threads)


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
        """The cache that the verdict asks about: half of the experts, at least those of one token."""
        return max(self.k, len(self.experts) // 2)

    def default_caches(self) -> set[int]:
        n = len(self.experts)
        return {min(size, n) for size in (self.k, self.half, 2 * self.k)} - {n} or {n}


@dataclass(frozen=True)
class MapPlan:
    """All that is known before the model runs."""

    header: Header
    choice: Choice
    options: MapOptions

    @property
    def caches(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.options.caches) or self.choice.default_caches()))

    @property
    def run(self) -> RunOptions:
        ctx = self.options.ctx or min(DEFAULT_CTX, hparam(self.header, "context_length", DEFAULT_CTX))
        return RunOptions(ctx=ctx, threads=self.options.threads, offload=self.options.offload)


@dataclass(frozen=True)
class RoutingMap:
    """What the routers of `file` did on texts."""

    file: Path
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

    @property
    def verdict(self) -> str:
        """One sentence on whether the mix suits running from disk or system memory, and one on where the line is.

        The question is how many reads of experts a cache of half of them in fast memory saves. A disk reads some ten
        times slower than memory does, and so does system memory over PCIe beside a GPU's, so that with nine hits in
        ten the misses already cost as much time as the hits.
        """
        n, k, m = len(self.choice.experts), self.choice.k, self.choice.half
        if k == n:
            return (
                "This mix does not suit running from disk or from system memory: every token takes all experts of a"
                " layer, so none of them can stay out of fast memory."
            )
        rates = {name: domain.whole.lru(m) for name, domain in self.domains.items()}
        good = [name for name, rate in rates.items() if rate >= MIN_HIT_RATE]
        bad = [name for name in rates if name not in good]
        suits = "does not suit" if not good else "suits"
        scope = f" for {', '.join(good)}, not for {', '.join(bad)}" if good and bad else ""
        low, high = (
            math.floor(100 * rate) for rate in (min(rates.values()), max(rates.values()))
        )  # 89.9 is below the line
        found = str(low) if low == high else f"{low} to {high}"
        return (
            f"This mix {suits} running from disk or from system memory{scope}: with {m} of {n} experts of each layer"
            f" in fast memory, {found}% of the experts that a token needs are there already"
            f" (by chance it would be {m / n:.0%}). The line is at {MIN_HIT_RATE:.0%}: slow memory is some ten times"
            " slower, so with one in ten missing, the misses take as long as the hits."
        )

    def draw(self, path: Path) -> None:
        """Write the heat maps: Figures 6 and 7 of arXiv 2408.17280, one row a layer and one column an expert."""
        panels = {
            f"{domain}: {title}" if len(self.maps) > 1 else domain: measured.matrix(name)
            for title, name in self.maps.items()
            for domain, measured in self.domains.items()
        }
        layers = next(iter(self.domains.values())).layers
        title = f"{self.choice.name}: {'top expert' if self.choice.k == 1 else 'experts'} by layer and domain"
        plots.heat_map(
            path, one_line(title), panels, self.choice.experts, [str(layer) for layer in layers],
            across=min(len(self.domains), plots.PANELS_PER_ROW),
        )  # fmt: skip

    def as_json(self) -> dict[str, object]:
        """All of it, as the command reports it."""
        choice = self.choice
        return {
            "file": str(self.file),
            "name": choice.name,
            "experts": list(choice.experts),
            "k": choice.k,
            "always_on": choice.always_on,
            "segment": self.segment,
            "domains": {name: _domain_as_json(domain, self.caches) for name, domain in self.columns.items()},
            "verdict": self.verdict,
        }


# ------------------------------------------------------------------------------------------------- plan


def map_texts(
    refs: Iterable[tuple[str, str]], *, domains: str | None = None, recipes: Path | None = None
) -> dict[str, list[Record]]:
    """What to map, as `texts_by_name` reads it. Raises UserError where there is nothing."""
    texts = texts_by_name(refs, domains, recipes)
    if not texts:
        raise UserError("no text to map", "name it with --text NAME=FILE, or a recipe that has domains with --domains")
    if wrong := [name for name in texts if not re.fullmatch(r"[\w.-]+", name)]:
        raise UserError(f"domain {wrong[0]!r}: expected a name of letters, digits, '.', '_' and '-'", "rename it")
    return texts


def plan_map(model: Path, options: MapOptions = MapOptions()) -> MapPlan:
    """What is to be mapped of the GGUF `model`. Raises UserError when its routers choose nothing."""
    header = read_header(model)
    choice = _choice(header)
    for size in options.caches:
        check_range("--cache", size, 1, len(choice.experts))
    return MapPlan(header, choice, options)


def _choice(header: Header) -> Choice:
    card = read_card(header)
    n, k = (hparam(header, name, 0) for name in ("expert_count", "expert_used_count"))
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


# -------------------------------------------------------------------------------------------------- run


def run_map(plan: MapPlan, texts: Texts, watch: Watch = unwatched) -> RoutingMap:
    """Run `texts`, by domain, and see what is chosen.

    Raises UserError for a domain without tokens, and a graph without routers.
    """
    with open_model(plan.header.path, plan.run) as model:
        domains = _measure(model, texts, plan.options, watch)
    return RoutingMap(plan.header.path, plan.choice, plan.options.segment, plan.caches, domains)


def _measure(model: Model, texts: Texts, options: MapOptions, watch: Watch) -> dict[str, Routing]:
    layers = available(model).get(MOE_TOPK)
    if not layers:
        raise UserError(f"{model.name}: llama.cpp runs it without routers", "pass a Mixture of Experts")
    sequences = {name: list(_sequences(model, records, options.max_tokens)) for name, records in texts.items()}
    if empty := [name for name, pieces in sequences.items() if not pieces]:
        raise UserError(f"domain {empty[0]}: its text has no tokens", "give it more text")
    with Tap(model, (MOE_PROBS, MOE_TOPK), layers) as tap, watch("mapping", "tokens") as step:
        step.has(sum(len(piece) for pieces in sequences.values() for piece in pieces))
        return {
            name: total(_routing(tapped, layers, options.segment) for tapped in _followed(step, name, tap, pieces))
            for name, pieces in sequences.items()
        }


def _sequences(model: Model, records: Iterable[Record], max_tokens: int) -> Iterator[Sequence[int]]:
    """The first `max_tokens` tokens of `records`, in pieces that fit the context."""
    template = chat_template(model.chat_template, model.vocab)
    left = max_tokens
    for piece in chunks((encode(model.vocab, template, record) for record in records), model.n_ctx):
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return


def _routing(tapped: Tapped, layers: Sequence[int], segment: int) -> Routing:
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


def _followed(step: Step, name: str, tap: Tap, pieces: Sequence[Sequence[int]]) -> Iterator[Tapped]:
    """What the tap reads of `pieces`; whoever watches hears of each part once it was used."""
    step.says(name)
    for tapped in tap.run(pieces):
        yield tapped
        step.did(sum(tapped.lengths))


# ------------------------------------------------------------------------------------------------- JSON


def _domain_as_json(domain: Routing, caches: Sequence[int]) -> dict[str, object]:
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


def _locality_as_json(locality: Locality, caches: Sequence[int]) -> dict[str, object]:
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
