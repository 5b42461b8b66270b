"""A measurement, end to end: models and one reference on texts by name → how far each is from it, text by text.

The reference's logits are kept in a file, unless memory is to hold two models at once: so the next model, or the next
call, does not run it again. Vocabularies, texts and sizes are checked before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moegguf.checks import check_range, check_threads
from moegguf.errors import UserError
from moegguf.gguf_header import Header, read_header
from moegguf.jobs.divergences import (
    KeptReference,
    Tokens,
    check_both_fit,
    check_vocabulary,
    chunk_length,
    compare,
    kept_in,
    sequences_of,
)
from moegguf.jobs.domains import texts_by_name
from moegguf.measurement.divergence import Divergence
from moegguf.runtime.offload import WHAT_FITS, Offload
from moegguf.stores import cache_folder
from moegguf.texts import Record
from moegguf.watch import Watch, unwatched

ALL = "all texts"
MAX_TOKENS = 4096
"""Of each text, unless told otherwise."""


@dataclass(frozen=True)
class MeasureOptions:
    """How models are compared."""

    chunk: int | None = None
    """Tokens of a chunk; default: 512, or the reference's context where that is less."""
    max_tokens: int = MAX_TOKENS
    """Of each text, from its start on."""
    threads: int | None = None
    offload: Offload = WHAT_FITS
    cache: Path | None = None
    """The folder for the logits of references; default: `measure` in the user's cache."""
    reference_logits: Path | None = None
    """The file for those of this one, in place of a folder."""
    keep: bool = True
    """Whether they are kept at all; else both models run at once."""

    def __post_init__(self) -> None:
        check_range("--max-tokens", self.max_tokens, 1)
        check_threads(self.threads)
        if (self.cache is not None) + (self.reference_logits is not None) + (not self.keep) > 1:
            raise UserError("--cache, --reference-logits and --no-cache exclude each other", "pass one of them")


@dataclass(frozen=True)
class MeasurePlan:
    """All that is known before anything runs. `chunks` are those of each text; `kept` is what is kept, if anything."""

    reference: Header
    models: Mapping[str, Path]
    chunks: Mapping[str, Sequence[Tokens]]
    kept: KeptReference | None
    options: MeasureOptions

    @property
    def sequences(self) -> list[Tokens]:
        """The chunks of all texts."""
        return [tokens for text in self.chunks.values() for tokens in text]

    @property
    def n_tokens(self) -> int:
        """How many count, for each model."""
        return sum(len(tokens) - 1 for tokens in self.sequences)


@dataclass(frozen=True)
class Measured:
    """A model: how far it is from the reference on each text, and on all of them."""

    name: str
    path: Path
    n_bytes: int
    texts: Mapping[str, Divergence]

    @property
    def overall(self) -> Divergence:
        """On all texts, in which every token counts alike."""
        return Divergence.joined(self.texts.values())

    @property
    def rows(self) -> dict[str, Divergence]:
        """By text; where there are several, with one for all."""
        return {**self.texts, **({ALL: self.overall} if len(self.texts) > 1 else {})}


@dataclass(frozen=True)
class Measurement:
    """How far models are from one reference, whose logits are in the file `logits` if they are kept."""

    reference: Path
    logits: Path | None
    models: tuple[Measured, ...]

    def as_json(self) -> dict[str, object]:
        """All of it, as the command reports it."""
        return {
            "reference": str(self.reference),
            "reference_logits": self.logits and str(self.logits),
            "models": [
                {
                    "name": model.name,
                    "file": str(model.path),
                    "bytes": model.n_bytes,
                    "texts": {text: divergence.as_json() for text, divergence in model.texts.items()},
                    "overall": model.overall.as_json(),
                }
                for model in self.models
            ],
        }


def texts_of(
    refs: Iterable[tuple[str, str]], *, domains: str | None = None, recipes: Path | None = None
) -> dict[str, list[Record]]:
    """What to measure on, as `texts_by_name` reads it. Raises UserError where there is nothing."""
    texts = texts_by_name(refs, domains, recipes)
    if not texts:
        raise UserError("nothing to measure on", "give --text FILE or --domains RECIPE")
    return texts


def plan_measurement(
    models: Mapping[str, Path],
    against: Path,
    texts: Mapping[str, Sequence[Record]],
    options: MeasureOptions = MeasureOptions(),
) -> MeasurePlan:
    """Tokenise `texts` for a measurement of `models` (by name) against a reference.

    Raises one UserError for all models that are none, or have another vocabulary; then for a text that is too short.
    """
    reference = read_header(against)
    faults: list[UserError] = []
    for path in models.values():
        try:
            check_vocabulary(reference, read_header(path))
            if not options.keep:
                check_both_fit(against, path)
        except UserError as error:
            faults.append(error)
    if faults:
        raise UserError.of(faults)
    chunk = chunk_length(reference, options.chunk)
    chunks = sequences_of(reference, texts, chunk=chunk, max_tokens=options.max_tokens)
    return MeasurePlan(reference, models, chunks, _kept(reference, chunks, options), options)


def _kept(reference: Header, chunks: Mapping[str, Sequence[Tokens]], options: MeasureOptions) -> KeptReference | None:
    sequences = [tokens for text in chunks.values() for tokens in text]
    if not options.keep:
        return None
    if options.reference_logits:
        return KeptReference(options.reference_logits, reference, sequences, options.offload)
    return kept_in(options.cache or cache_folder("measure"), reference, sequences, offload=options.offload)


def run_measurement(plan: MeasurePlan, watch: Watch = unwatched) -> Measurement:
    """Run the reference unless its logits are there, then every model. Raises UserError."""
    kept, options = plan.kept, plan.options
    must_run = kept is not None and not kept.is_there
    measured = []
    with watch(plan.reference.path.name, "tokens") as step:
        step.has(plan.n_tokens * (must_run + len(plan.models)))
        if must_run:
            kept.write(threads=options.threads, progress=step.did)
        for name, path in plan.models.items():
            step.says(name)
            if kept:
                found = kept.compare(path, threads=options.threads, progress=step.did)
            else:
                found = compare(plan.reference.path, path, plan.sequences, threads=options.threads,
                                offload=options.offload, progress=step.did)  # fmt: skip
            parts = found.split(map(len, plan.chunks.values()))
            texts = dict(zip(plan.chunks, parts, strict=True))
            measured.append(Measured(name, path, path.stat().st_size, texts))
    return Measurement(plan.reference.path, kept and kept.path, tuple(measured))
