"""Which experts of a mix matter least on given texts, and what leaving some out costs: both measured on the mix itself.

In every layer an expert's saliency is that of REAP (`moegguf.runtime.contributions`). An expert is one model and goes
from all layers or from none, so its score is the mean over layers of its share in the saliency of all experts there.
One half of the texts' chunks ranks, on the others the cost is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moegguf.atomic import scratch_folder
from moegguf.edit.finished import FinishedMix
from moegguf.errors import UserError
from moegguf.gguf_header import Header
from moegguf.jobs.divergences import chunk_length, keep_reference, sequences_of
from moegguf.measurement.divergence import Divergence
from moegguf.runtime.contributions import Contributions
from moegguf.runtime.model import open_model
from moegguf.runtime.run_options import RunOptions
from moegguf.texts import Record
from moegguf.watch import Progress

Tokens = Sequence[int]


@dataclass(frozen=True)
class Rank:
    """An expert: its score (those of all add up to 1), and the share of tokens that reach it in a layer, on average."""

    expert: str
    score: float
    share: float


def halves(model: Header, texts: Mapping[str, Sequence[Record]], max_tokens: int) -> tuple[list[Tokens], list[Tokens]]:
    """Chunks of all texts, at most `max_tokens` of each text, by turns: to judge by, and to measure on.

    Raises UserError where there is one only.
    """
    length = min(chunk_length(model), max(2, max_tokens // 2))
    found = sequences_of(model, texts, chunk=length, max_tokens=max_tokens)
    chunks = [chunk for some in found.values() for chunk in some]
    if len(chunks) < 2:
        raise UserError("the text is a single chunk, too little to judge by and to measure on", "give more text")
    return chunks[0::2], chunks[1::2]


def rank(mix: FinishedMix, chunks: Sequence[Tokens], *, threads: int | None = None, progress: Progress) -> list[Rank]:
    """The experts behind the router, the one that matters most first. `progress` hears the tokens as they pass."""
    names = mix.routed_names
    options = RunOptions(ctx=max(map(len, chunks)), threads=threads)
    with open_model(mix.path, options) as model, Contributions(model, len(names)) as contributions:
        for n_tokens in contributions.run(chunks):
            progress(n_tokens)
    means, counts = contributions.means, contributions.counts
    scores = (means / means.sum(axis=1, keepdims=True)).mean(axis=0)
    shares = counts.mean(axis=0) / sum(map(len, chunks))
    ranks = [Rank(*row) for row in zip(names, scores.tolist(), shares.tolist(), strict=True)]
    return sorted(ranks, key=lambda one: -one.score)


def measure_cost(
    mix: FinishedMix, pruned: Path, chunks: Sequence[Tokens], *, threads: int | None = None,
    progress: Progress,
) -> Divergence:  # fmt: skip
    """How far the pruned mix is from the full one. `progress` hears the tokens of both."""
    with scratch_folder(pruned.parent, ".moegguf-prune") as folder:
        kept = keep_reference(mix.path, chunks, folder, threads=threads, progress=progress)
        return kept.compare(pruned, threads=threads, progress=progress)
