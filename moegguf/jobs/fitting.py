"""A fitted router, end to end: texts → activations of a running model → statistics → router → how well it separates.

`read_texts` needs no model; `plan_fit` tokenises and splits; `run_fit` runs the texts through the model once, keeps
what `moegguf.routers.statistics` says, fits, and counts on held-out text how often each layer's router ranks the right
expert first. `fit_from_recipe` does all that; while there is no mix, on the base alone: the experts will hang on its
trunk, so what enters its FFNs is close to what will enter the routers of the mix.

Every token counts, of questions and of answers: in use a question is routed before there is an answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moegguf.checks import check_range, check_threads
from moegguf.errors import UserError
from moegguf.gguf_header import Header, read_header
from moegguf.jobs.dense import DenseOptions, dense_model
from moegguf.metadata import read_card
from moegguf.recipe import Mixed, Pool, Recipe, RouterMode, Tap
from moegguf.routers import FFN, Router, hidden, ridge
from moegguf.routers.separation import Separation, count_choices, warnings
from moegguf.routers.statistics import Statistics, Subject, experts_in, read_statistics, write_statistics
from moegguf.runtime import tap as taps
from moegguf.runtime.encode import chunks, encode
from moegguf.runtime.machine import memory
from moegguf.runtime.model import Model, open_model
from moegguf.runtime.run_options import RunOptions, hparam
from moegguf.runtime.template import template_of
from moegguf.runtime.vocab import open_vocab
from moegguf.sizes import show_size
from moegguf.texts import Record, Text, read_domains
from moegguf.watch import Progress, Watch, unheard, unwatched

MAX_PIECE = 512
"""Tokens of a piece of text that is run, and held out or not, as one."""
MAX_CHARACTERS = 2000
"""Of such a piece, where it is cut out of a longer text."""
MAX_TOKENS = 10**7
FEW_TOKENS = 100

_NODES = {Tap.ROUTER_INPUT: taps.ROUTER_INPUT, Tap.LAYER_INPUT: taps.LAYER_INPUT}

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class FitOptions:
    """What a recipe does not say of a fit. `positive` and `negative` name texts that replace the recipe's prompts."""

    positive: Mapping[str, Sequence[str]] = field(default_factory=dict)
    negative: Mapping[str, Sequence[str]] = field(default_factory=dict)
    max_tokens: int = 4000
    """Of the text of one expert, held-out text included."""
    holdout: float = 0.2
    """Share of each expert's pieces of text that the router is not fitted to but judged by."""
    statistics: Path | None = None
    """Statistics to extend, where the file exists, and to write."""
    threads: int | None = None
    folder: Path | None = None
    """Where the base is written for the time of the fit, if it has to be; default: beside the recipe's output."""
    pre: str | None = None
    stream: bool = False
    """As in a build, where the base is written first."""

    def __post_init__(self) -> None:
        check_range("--max-tokens", self.max_tokens, 1, MAX_TOKENS)
        check_threads(self.threads)
        if not (isinstance(self.holdout, int | float) and 0 <= self.holdout <= 0.9):
            raise UserError(f"--holdout {self.holdout}: expected a share from 0 to 0.9", "the usual one is 0.2")

    @property
    def dense(self) -> DenseOptions:
        """How the base is written, if it has to be."""
        return DenseOptions(self.threads, self.folder, self.pre, self.stream)


@dataclass(frozen=True)
class Texts:
    """The texts of a fit, read and checked: by routed expert, where there are any."""

    recipe: Recipe
    options: FitOptions
    domains: Mapping[str, Sequence[Record]]
    positive: Mapping[str, Sequence[Record]]
    negative: Mapping[str, Sequence[Record]]

    def to_fit(self, expert: str) -> Sequence[Record]:
        """What the row of `expert` is fitted to."""
        return self.positive.get(expert) or self.domains.get(expert, ())


@dataclass(frozen=True)
class Sample:
    """Tokenised text, in pieces."""

    pieces: tuple[Tokens, ...] = ()

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.pieces).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ExpertText:
    """The text of one expert: what is fitted to, what is held out, and negative prompts."""

    fit: Sample
    heldout: Sample
    negative: Sample
    is_new: bool
    """False where the statistics hold it already."""

    @property
    def n_tokens(self) -> int:
        """How many tokens will be run."""
        return self.heldout.n_tokens + self.is_new * (self.fit.n_tokens + self.negative.n_tokens)


@dataclass(frozen=True)
class FitPlan:
    """All that is known before the model runs. It is run once: that extends `statistics`."""

    recipe: Recipe
    options: FitOptions
    header: Header
    statistics: Statistics
    material: Mapping[str, ExpertText]
    """By routed expert; experts that only the statistics know are not in it."""
    notes: tuple[str, ...]

    @property
    def routed(self) -> tuple[str, ...]:
        return _routed(self.recipe)

    @property
    def n_tokens(self) -> int:
        """How many tokens will be run."""
        return sum(material.n_tokens for material in self.material.values())


@dataclass(frozen=True)
class Fitted:
    """A router, how well it separates the domains (None without held-out text), and what is wrong with it."""

    router: Router
    n_tokens: Mapping[str, int]
    """Tokens that each expert's row is fitted to."""
    separation: Separation | None
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """All but the matrices, as the command reports it."""
        router = self.router
        return {
            "mode": router.mode,
            "experts": list(router.experts),
            "k": router.k,
            "always_on": router.always_on,
            "shared": router.shared,
            "settings": dict(router.settings),
            "tokens": dict(self.n_tokens),
            "separation": self.separation and self.separation.as_json(),
            "notes": list(self.warnings),
        }


def fit_from_recipe(
    recipe: Recipe,
    options: FitOptions = FitOptions(),
    *,
    model: Path | None = None,
    on_plan: Callable[[FitPlan], None] = lambda plan: None,
    watch: Watch = unwatched,
) -> Fitted:
    """Fit the ridge or hidden router of `recipe`, on the GGUF `model` of the mix or of its base, or else on the base.

    `on_plan` hears what is about to be run. Raises UserError.
    """
    texts = read_texts(recipe, options)
    with nullcontext(model) if model else dense_model(recipe, options.dense, watch) as path:
        plan = plan_fit(texts, path)
        on_plan(plan)
        with watch("fitting the router", "tokens") as step:
            step.has(plan.n_tokens)
            return run_fit(plan, step.did)


# ------------------------------------------------------------------------------------------------ texts


def read_texts(recipe: Recipe, options: FitOptions = FitOptions()) -> Texts:
    """The texts that the router of `recipe` is fitted to. Opens no model.

    Raises UserError for a router that cannot be fitted, with every text that cannot be read, and with all experts
    that have none.
    """
    _check_fittable(recipe)
    routed, is_hidden = _routed(recipe), recipe.router.mode is RouterMode.HIDDEN
    if not is_hidden and (options.positive or options.negative):
        raise UserError("--positive and --negative go with --mode hidden", "pass --text, or choose that mode")
    read, faults = [], list(_unknown_names(recipe, options))
    for refs, folder in ((recipe.domains, recipe.folder), (options.positive, Path()), (options.negative, Path())):
        try:
            read.append(read_domains({name: refs[name] for name in routed if name in refs}, folder))
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    domains, positive, negative = read
    if is_hidden:
        positive = _prompts(recipe, "positive_prompts") | positive
        negative = _prompts(recipe, "negative_prompts") | negative
    texts = Texts(recipe, options, domains, positive, negative)
    _check_experts(texts)
    return texts


def _routed(recipe: Recipe) -> tuple[str, ...]:
    return tuple(name for name in recipe.expert_names if name != recipe.router.always_on)


def _check_fittable(recipe: Recipe) -> None:
    if not recipe.router.is_unfitted:
        raise UserError(
            f"recipe {recipe.name}: a {recipe.router.mode} router is not fitted", "choose mode ridge or hidden"
        )
    if recipe.mixed is not Mixed.FFN:
        raise UserError(
            f"recipe {recipe.name}: mix = {recipe.mixed.value!r} has routers that only training makes",
            "fit a recipe with mix = 'ffn', or use `moegguf train`",
        )
    routed = _routed(recipe)
    if len(routed) < 2:
        what = f"only {routed[0]} is routed" if recipe.router.always_on else f"{routed[0]} is its only expert"
        raise UserError(f"recipe {recipe.name}: {what}, so there is nothing to choose from", "add an expert")


def _unknown_names(recipe: Recipe, options: FitOptions) -> Iterator[UserError]:
    mend = f"use one of {', '.join(recipe.expert_names)}"
    for flag, refs in (("--positive", options.positive), ("--negative", options.negative)):
        yield from (
            UserError(f"{flag} {name}: no expert has that name", mend)
            for name in refs
            if name not in recipe.expert_names
        )


def _prompts(recipe: Recipe, side: str) -> dict[str, list[Record]]:
    """The prompts that stand in the recipe itself; as they are, without a chat template, as in mergekit."""
    prompts = {spec.name: getattr(spec, side) for spec in recipe.experts if spec.name in _routed(recipe)}
    return {
        name: [Text(prompt, f"experts.{name}.{side}[{i}]") for i, prompt in enumerate(some)]
        for name, some in prompts.items()
        if some
    }


def _check_experts(texts: Texts) -> None:
    """Whether the texts and the statistics, if there are any, are those of all routed experts and of no others."""
    recipe, file = texts.recipe, texts.options.statistics
    routed = _routed(recipe)
    known = experts_in(file) if file and file.exists() else ()
    if extra := [name for name in known if name not in routed]:
        raise UserError(
            f"{file}: holds the text of {', '.join(extra)}, the router is to choose between {', '.join(routed)}",
            "what was added cannot be taken out: pass another --statistics file, and all texts",
        )
    missing = [name for name in routed if not texts.to_fit(name) and name not in known]
    if not missing:
        return
    flag = "--positive" if texts.positive else "--text"
    given = [name for name in routed if name not in missing]
    raise UserError(
        f"no text for expert {', '.join(missing)}"
        + (f"; there is text of one domain only, {given[0]}" if len(given) == 1 else ""),
        f"pass {' '.join(f'{flag} {name}=FILE' for name in missing)}, or name them under domains in the recipe",
    )


# ------------------------------------------------------------------------------------------------- plan


def plan_fit(texts: Texts, model: Path) -> FitPlan:
    """Tokenise and split `texts`, to be run through the GGUF `model`: any of the mix, or one of its base.

    Raises UserError with every text that has no tokens, or is not the one that the statistics know.
    """
    recipe, file = texts.recipe, texts.options.statistics
    header = read_header(model)
    subject = _subject(recipe, header)
    _check_memory(subject)
    statistics = read_statistics(file, subject) if file and file.exists() else Statistics.empty(subject)
    sampler = _Sampler(header, texts.options)
    material: dict[str, ExpertText] = {}
    faults: list[UserError] = []
    for name in filter(texts.to_fit, _routed(recipe)):
        try:
            material[name] = _material(name, texts, sampler, statistics)
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    notes = tuple(_notes(material, statistics, _run_on(header)))
    return FitPlan(recipe, texts.options, header, statistics, material, notes)


def _subject(recipe: Recipe, header: Header) -> Subject:
    card = read_card(header)
    n_layer, n_embd = (hparam(header, name, 0) for name in ("block_count", "embedding_length"))
    if not n_layer or not n_embd:
        raise UserError(f"{header.path}: is no language model", "pass a mix, or the GGUF of its base")
    base = card.base if card else header.path.resolve().name
    if recipe.router.mode is RouterMode.RIDGE:
        return Subject(RouterMode.RIDGE, base, n_layer, n_embd, Tap.ROUTER_INPUT, None)
    return Subject(RouterMode.HIDDEN, base, n_layer, n_embd, recipe.router.fit.tap, recipe.router.fit.pool)


def _check_memory(subject: Subject) -> None:
    available = memory().available
    if subject.gram_bytes > available:
        raise UserError(
            f"the statistics of a ridge router take {show_size(subject.gram_bytes, up=True)} of memory, "
            f"{show_size(available)} are free",
            "choose mode hidden, which needs little, or fit on a larger machine",
        )


class _Sampler:
    """Draws text by lot, because files are often sorted, and tokenises no more than is taken. The lot never changes."""

    def __init__(self, header: Header, options: FitOptions) -> None:
        self._vocab = open_vocab(header.path)
        self._template = template_of(header, self._vocab)
        self._length = min(MAX_PIECE, hparam(header, "context_length", MAX_PIECE))
        self._max_tokens = options.max_tokens

    def draw(self, records: Sequence[Record]) -> Sample:
        """At most `max_tokens` of `records`."""
        documents = list(_documents(records))
        order = np.random.RandomState(0).permutation(len(documents))
        encoded = (encode(self._vocab, self._template, documents[i]) for i in order)
        pieces: list[Tokens] = []
        room = self._max_tokens
        for piece in chunks(encoded, self._length):
            pieces.append(piece[:room])
            room -= len(pieces[-1])
            if room <= 0:
                break
        return Sample(tuple(pieces))


def _documents(records: Iterable[Record]) -> Iterator[Record]:
    """The records, long plain texts cut at white space, so that a file that is one text can be held out in part."""
    for record in records:
        if isinstance(record, Text):
            parts = re.findall(rf"(?s).{{1,{MAX_CHARACTERS}}}(?!\S)|.{{1,{MAX_CHARACTERS}}}", record.text)
            yield from (Text(part, record.where) for part in parts)
        else:
            yield record


def _material(name: str, texts: Texts, sampler: _Sampler, statistics: Statistics) -> ExpertText:
    """The text of one expert. Raises UserError when it has no tokens, or the statistics hold other text of it."""
    text, holdout = sampler.draw(texts.to_fit(name)), texts.options.holdout
    if not text.pieces:
        raise UserError(f"expert {name}: its text has no tokens", "give it some words")
    if name in texts.positive and name in texts.domains:  # prompts are few: judge by the domain's text
        fit, heldout = text, _split(sampler.draw(texts.domains[name]), holdout)[1]
    else:
        fit, heldout = _split(text, holdout)
    negative = sampler.draw(texts.negative.get(name, ()))
    return ExpertText(fit, heldout, negative, _is_new(name, fit, negative, statistics))


def _split(sample: Sample, holdout: float) -> tuple[Sample, Sample]:
    """To fit to, and held out: whole pieces, at least one each where there are two and any are asked for."""
    n = len(sample.pieces)
    n_heldout = min(max(round(holdout * n), int(holdout > 0)), n - 1)
    return Sample(sample.pieces[n_heldout:]), Sample(sample.pieces[:n_heldout])


def _is_new(name: str, fit: Sample, negative: Sample, statistics: Statistics) -> bool:
    """Whether the text has to be run. Raises UserError where the statistics hold other text of this expert."""
    if name not in statistics.groups:
        return True
    known = [group.digest for groups in (statistics.groups, statistics.negatives) if (group := groups.get(name))]
    if known != [sample.digest for sample in (fit, negative) if sample.pieces]:
        raise UserError(
            f"expert {name}: the statistics hold other text of it already, which can be neither extended nor replaced",
            "leave its text out, or pass another --statistics file and all texts",
        )
    return False


def _notes(material: Mapping[str, ExpertText], statistics: Statistics, run_on: str) -> Iterator[str]:
    for name, one in material.items():
        if one.is_new and one.fit.n_tokens < FEW_TOKENS:
            yield f"expert {name} has only {one.fit.n_tokens} tokens of text: some hundreds make a sounder router"
        if not one.heldout.pieces:
            yield f"expert {name} has no held-out text, so how well its domain is told apart is not known"
    digests = {name: group.digest for name, group in statistics.groups.items()}
    digests |= {name: one.fit.digest for name, one in material.items()}
    names = list(digests)
    for i, name in enumerate(names):
        if same := [other for other in names[i + 1 :] if digests[other] == digests[name]]:
            yield f"experts {name} and {', '.join(same)} have the same text: no router can tell them apart"
    others = sorted({group.run_on for group in statistics.groups.values()} - {run_on})
    if others and any(one.is_new for one in material.values()):
        yield f"the statistics are of activations of {', '.join(others)}, new ones are of {run_on}"


def _run_on(header: Header) -> str:
    """The file's name and a digest of its header: of its metadata and tensor table, not of its weights."""
    table = [(info.name, info.shape, info.type.name, info.offset) for info in header.tensors.values()]
    plain = {key: header.get(key) for key in header.fields if not key.startswith("tokenizer.")}
    return f"{header.path.name} ({hashlib.sha256(repr((plain, table)).encode()).hexdigest()[:12]})"


# -------------------------------------------------------------------------------------------------- run


def run_fit(plan: FitPlan, progress: Progress = unheard) -> Fitted:
    """Run the texts of `plan`, write its statistics where asked to, and fit.

    Raises UserError when the model does not run, or its activations are not finite.
    """
    with open_model(plan.header.path, RunOptions(ctx=MAX_PIECE, threads=plan.options.threads)) as model:
        for name, material in plan.material.items():
            if material.is_new:
                _collect(plan, model, name, material.fit, progress)
                _collect(plan, model, name, material.negative, progress, negative=True)
        if plan.options.statistics:
            write_statistics(plan.options.statistics, plan.statistics)
        matrices = _fit(plan)
        separation = _separation(plan, model, matrices, progress)
    found = warnings(plan.routed, matrices, separation)
    router = _router(plan, matrices, separation)
    n_tokens = {name: plan.statistics.groups[name].n_tokens for name in plan.routed}
    return Fitted(router, n_tokens, separation, (*plan.notes, *found))


def _collect(
    plan: FitPlan, model: Model, name: str, sample: Sample, progress: Progress, *, negative: bool = False
) -> None:
    """Add the activations of `sample` to the statistics: one vector a token or, where they are pooled, a piece."""
    if not sample.pieces:
        return
    subject = plan.statistics.subject
    count = sample.n_tokens if subject.pool is None else len(sample.pieces)
    group = plan.statistics.open_group(
        name, count, n_tokens=sample.n_tokens, digest=sample.digest, run_on=_run_on(plan.header), negative=negative
    )
    for lengths, layers in _activations(model, _NODES[subject.tap], sample.pieces):
        for layer, x in layers.items():
            plan.statistics.add(group, layer, _pooled(x, lengths, subject.pool))
        progress(sum(lengths))


def _pooled(x: np.ndarray, lengths: Sequence[int], pool: Pool | None) -> np.ndarray:
    """(n_tokens, n_embd) → one row a piece of text: its mean, or its last token. Without a pool, as it is."""
    if pool is None:
        return x
    ends = np.cumsum(lengths)
    if pool is Pool.LAST:
        return x[ends - 1]
    return np.add.reduceat(x, ends - lengths, axis=0) / np.asarray(lengths)[:, None]


def _activations(
    model: Model, node: str, pieces: Iterable[Tokens]
) -> Iterator[tuple[tuple[int, ...], Mapping[int, np.ndarray]]]:
    """Lengths of some pieces, and the values of `node` for all their tokens: layer → (n_tokens, width)."""
    with taps.Tap(model, [node]) as tap:
        for tapped in tap.run(pieces):
            yield tapped.lengths, {layer: values for (_, layer), values in tapped.values.items()}


def _fit(plan: FitPlan) -> dict[int, np.ndarray]:
    spec = plan.recipe.router
    if spec.mode is RouterMode.RIDGE:
        rows = ridge.fit(plan.statistics, plan.routed, spec.fit, shared=spec.shared)
    else:
        rows = hidden.fit(plan.statistics, plan.routed, shared=spec.shared)
    return dict(enumerate(rows))


def _separation(
    plan: FitPlan, model: Model, matrices: Mapping[int, np.ndarray], progress: Progress
) -> Separation | None:
    """First choices on the held-out text. Wherever a router was fitted, it will see the router input."""
    domains = tuple(name for name, material in plan.material.items() if material.heldout.pieces)
    counts = np.zeros((len(matrices), len(domains), len(plan.routed)), np.int64)
    for i, name in enumerate(domains):
        for lengths, x in _activations(model, taps.ROUTER_INPUT, plan.material[name].heldout.pieces):
            counts[:, i] += count_choices(matrices, x)
            progress(sum(lengths))
    return Separation(plan.routed, domains, counts) if domains else None


def _router(plan: FitPlan, matrices: Mapping[int, np.ndarray], separation: Separation | None) -> Router:
    recipe, spec = plan.recipe, plan.recipe.router
    if spec.mode is RouterMode.RIDGE:
        settings = {"lambda": f"{spec.fit.ridge_lambda:g}", "temperature": f"{spec.fit.temperature:g}"}
    else:
        settings = {"tap": str(spec.fit.tap), "pool": str(spec.fit.pool)}
    if separation:
        settings["held-out top-1"] = f"{separation.top1.mean():.3f}"
    layers = recipe.layers or tuple(matrices)
    return Router(
        spec.mode, plan.routed, spec.k, {(layer, FFN): matrices[layer] for layer in layers}, spec.always_on,
        spec.shared, settings=settings,
    )  # fmt: skip
