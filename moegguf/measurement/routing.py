"""Statistics of routing: which experts a router chooses, how evenly, and how stably from token to token.

Two accumulators, each for one layer and one domain, or for whatever is added up: `Load` counts who is chosen,
`Locality` asks how much of it a cache of few experts would serve. They hold sums only, so that their size does not
depend on the text and `a + b` equals the statistics of both texts; a sequence (one text, tokens in order) is the
smallest unit, as no segment and no cache reaches over the end of a text.

Locality follows Liang et al., "Not All Models Suit Expert Offloading: On Local Routing Consistency of
Mixture-of-Expert Models" (arXiv 2505.16056): SRP as it defines it, SCH as its version 1 does (equation 9), and
the hit rate of a cache that evicts the least recently used expert, with no knowledge of the future.
Throughout: T tokens, N experts that the router chooses from, k of them used for a token, segments of L tokens.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

BLOCK = 4096
"""Tokens (or segments) that are worked on at once, which bounds memory to BLOCK · N · k numbers."""


class _Sums:
    """Adds up field by field; fields that describe what was measured must agree."""

    _same: tuple[str, ...] = ()

    def __add__(self, other):
        for name in self._same:
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"{name} differs: {getattr(self, name)} and {getattr(other, name)}")
        return type(self)(**{
            f.name: getattr(self, f.name) + (0 if f.name in self._same else getattr(other, f.name))
            for f in fields(self)
        })  # fmt: skip


def total(parts: Iterable):
    """The sum of at least one `Load`, `Locality` or `Routing`."""
    return functools.reduce(operator.add, parts)


@dataclass(frozen=True, eq=False)
class Load(_Sums):
    """How often each expert of a router is chosen, and how sure the router is."""

    _same = ("k",)

    k: int
    n_tokens: int
    top: np.ndarray
    """int64 (N,): tokens for which the expert is the most probable of those that run."""
    used: np.ndarray
    """int64 (N,): tokens for which the expert runs."""
    probability: np.ndarray
    """float64 (N,): sum of the router's probability over tokens."""
    entropy_sum: float
    """Sum over tokens of the entropy of the router's probabilities, nats."""

    @classmethod
    def of(cls, probabilities: np.ndarray, chosen: np.ndarray) -> Load:
        """Of any tokens: `probabilities` (T, N) over all experts, `chosen` (T, k) the numbers of those that run.

        Rows that do not add up to 1, such as those of sigmoid routers, are divided by their sum.
        """
        n_tokens, n_experts = probabilities.shape
        p = probabilities / probabilities.sum(axis=1, keepdims=True, dtype=np.float64)
        surprise = -np.log(p, where=p > 0, out=np.zeros_like(p))
        return cls(
            k=chosen.shape[1],
            n_tokens=n_tokens,
            top=np.bincount(_by_probability(probabilities, chosen)[:, 0], minlength=n_experts),
            used=np.bincount(chosen.ravel(), minlength=n_experts),
            probability=p.sum(axis=0),
            entropy_sum=float((p * surprise).sum()),
        )

    @property
    def top_share(self) -> np.ndarray:
        """(N,): share of tokens for which each expert is the top one; adds up to 1."""
        return self.top / self.n_tokens

    @property
    def used_share(self) -> np.ndarray:
        """(N,): share of tokens for which each expert runs; adds up to k."""
        return self.used / self.n_tokens

    @property
    def mean_probability(self) -> np.ndarray:
        """(N,): mean probability that the router gives each expert; adds up to 1."""
        return self.probability / self.n_tokens

    @property
    def entropy(self) -> float:
        """Mean entropy of the router's probabilities for a token, nats: 0 when sure, log N when it has no idea."""
        return self.entropy_sum / self.n_tokens

    @property
    def relative_entropy(self) -> float:
        """Entropy divided by log N: from 0 to 1 for any number of experts (at least two)."""
        return self.entropy / float(np.log(len(self.used)))

    @property
    def variation(self) -> float:
        """Coefficient of variation of the loads: their standard deviation over their mean; 0 when even."""
        return float(self.used.std() / self.used.mean())

    @property
    def peak(self) -> float:
        """The largest load over the mean load: 1 when even, at most N / k."""
        return float(self.used.max() / self.used.mean())

    @property
    def balance_loss(self) -> float:
        """N · Σ f_i · P_i with f_i the share of all uses that fall to expert i and P_i its mean probability.

        The auxiliary loss of Switch Transformers (Fedus et al., arXiv 2101.03961, equations 4 to 6) without its
        factor α; for k > 1, f_i counts all k uses and adds up to 1. 1 when even, at most N.
        """
        return float(len(self.used) * (self.used / self.used.sum() * self.mean_probability).sum())


@dataclass(frozen=True, eq=False)
class Locality(_Sums):
    """How far nearby tokens choose the same experts.

    Segments are all runs of L consecutive tokens of a sequence, overlapping ones included, as in the paper; a
    sequence of fewer tokens has none. Added up over layers, the figures are those of the model as a whole.
    """

    _same = ("segment",)

    segment: int
    """L, tokens."""
    n_uses: int
    """T · k."""
    n_slots: int
    """Segments · k: the (segment, expert) pairs that k experts a segment make up."""
    frequency: np.ndarray
    """int64 (L + 1,): pairs of a segment and an expert, by how many tokens of the segment use the expert."""
    covered: np.ndarray
    """int64 (N,): uses within segments that the m most used experts of each segment serve, at index m − 1."""
    recent: np.ndarray
    """int64 (N,): uses of one of the m most recently used experts, at index m − 1."""
    n_pairs: int
    """Pairs of consecutive tokens."""
    repeated: int
    """Pairs of which both have the same top expert."""

    @classmethod
    def of(cls, probabilities: np.ndarray, chosen: np.ndarray, segment: int) -> Locality:
        """Of one sequence: `probabilities` (T, N) over all experts, `chosen` (T, k) the numbers of those that run."""
        ranked = _by_probability(probabilities, chosen)
        n_tokens, k = ranked.shape
        n_experts = probabilities.shape[1]
        frequency, covered = _segments(ranked, n_experts, segment)
        return cls(
            segment=segment,
            n_uses=n_tokens * k,
            n_slots=max(0, n_tokens - segment + 1) * k,
            frequency=frequency,
            covered=covered,
            recent=_recent_uses(ranked, n_experts),
            n_pairs=max(0, n_tokens - 1),
            repeated=int((ranked[1:, 0] == ranked[:-1, 0]).sum()),
        )

    @property
    def srp(self) -> float:
        """Segment routing best performance, from 0 to 1; NaN without a segment.

        Imagine a router that decides once for a whole segment which experts run, any number of them, and compare
        its (token, expert) pairs with the true ones. SRP is the best F1 score that it can reach over all segments.
        The best such router takes an expert where at least α tokens of the segment use it, so that α = 0 … L are
        all there is to try (equations 5 and 6 of version 1; appendix C).
        """
        return self._best_segment_router()[0]

    @property
    def srp_size(self) -> float:
        """How many experts that best segment router takes, on average, as a multiple of k; NaN without a segment."""
        return self._best_segment_router()[1]

    def sch(self, m: int) -> float:
        """Segment cache best hit rate with room for m experts, from 0 to 1; NaN without a segment.

        The share of uses within segments that the best m experts of each segment cover, chosen with hindsight and
        kept for the whole segment (equation 9 of version 1 with ρk = m). Version 3 of the paper lets the cache
        change within a segment instead.
        """
        in_segments = int(self.frequency @ np.arange(self.segment + 1))
        return float(self.covered[m - 1]) / in_segments if in_segments else float("nan")

    def lru(self, m: int) -> float:
        """Share of uses that find their expert among the m most recently used ones, from 0 to 1.

        All k experts of a token are looked up before any of them is moved to the front, the top one last. The
        cache begins a sequence with the experts that the sequence uses first, as the paper's code has it: a long
        running cache is never empty. By chance alone, with experts drawn evenly, the rate would be m / N.
        """
        return float(self.recent[m - 1]) / self.n_uses

    @property
    def repeat(self) -> float:
        """Share of tokens whose top expert is that of the token before; NaN when no text has two tokens."""
        return self.repeated / self.n_pairs if self.n_pairs else float("nan")

    def _best_segment_router(self) -> tuple[float, float]:
        """(F1, size ratio) of the best threshold; of equal ones, the one that takes the fewest experts."""
        if not self.n_slots:
            return float("nan"), float("nan")
        uses = np.arange(self.segment + 1)
        hits = np.cumsum((self.frequency * uses)[::-1])[::-1]
        predicted = np.cumsum(self.frequency[::-1])[::-1] * self.segment
        f1 = 2 * hits / (predicted + hits[0])
        best = len(f1) - 1 - int(f1[::-1].argmax())
        return float(f1[best]), float(predicted[best]) / (self.n_slots * self.segment)


@dataclass(frozen=True, eq=False)
class Routing:
    """The statistics of all layers with a router: layer → figures."""

    n_sequences: int
    load: Mapping[int, Load]
    locality: Mapping[int, Locality]

    @classmethod
    def of(cls, choices: Mapping[int, Sequence[tuple[np.ndarray, np.ndarray]]], segment: int) -> Routing:
        """`choices`: layer → (probabilities, chosen) of each sequence, the same sequences in every layer."""
        return cls(
            len(next(iter(choices.values()))),
            {layer: total(Load.of(*each) for each in of_layer) for layer, of_layer in choices.items()},
            {layer: total(Locality.of(*each, segment) for each in of_layer) for layer, of_layer in choices.items()},
        )

    def __add__(self, other: Routing) -> Routing:
        return Routing(
            self.n_sequences + other.n_sequences,
            {layer: load + other.load[layer] for layer, load in self.load.items()},
            {layer: locality + other.locality[layer] for layer, locality in self.locality.items()},
        )

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.load)

    @property
    def n_tokens(self) -> int:
        return self.load[self.layers[0]].n_tokens

    @property
    def whole(self) -> Locality:
        """Of all layers together."""
        return total(self.locality.values())

    def matrix(self, name: str) -> np.ndarray:
        """(layers, N) of the property `name` of `Load`, such as `top_share`."""
        return np.stack([getattr(load, name) for load in self.load.values()])

    def mean(self, name: str) -> float:
        """The mean over layers of the property `name` of `Load`, such as `entropy`."""
        return float(np.mean([getattr(load, name) for load in self.load.values()]))


def _by_probability(probabilities: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """int64 (T, k): the experts that run, the most probable first; of equal ones, the lowest number."""
    chosen = np.sort(chosen.astype(np.int64), axis=1)
    order = np.argsort(-np.take_along_axis(probabilities, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def _segments(ranked: np.ndarray, n_experts: int, segment: int) -> tuple[np.ndarray, np.ndarray]:
    """`frequency` and `covered` of one sequence."""
    frequency, covered = np.zeros(segment + 1, np.int64), np.zeros(n_experts, np.int64)
    for start in range(0, len(ranked) - segment + 1, BLOCK):
        block = ranked[start : start + BLOCK + segment - 1]
        uses = np.zeros((len(block) + 1, n_experts), np.int64)
        np.put_along_axis(uses[1:], block, 1, axis=1)
        before = uses.cumsum(axis=0)
        counts = before[segment:] - before[:-segment]  # (segments, N): tokens of the segment that use the expert
        frequency += np.bincount(counts.ravel(), minlength=segment + 1)
        covered += np.sort(counts, axis=1)[:, ::-1].sum(axis=0).cumsum()
    return frequency, covered


def _recent_uses(ranked: np.ndarray, n_experts: int) -> np.ndarray:
    """`recent` of one sequence, for all m at once.

    Whatever m, the cache holds the m most recently used experts, so a use is a hit exactly where m exceeds the number
    of experts used since (Mattson et al. 1970). An expert's time of last use stands for its place; those not
    used yet have negative times, in the order in which they will first be.
    """
    n_tokens, k = ranked.shape
    times = np.arange(n_tokens)[:, None] * k + np.arange(k)[::-1]
    found, first = np.unique(ranked.ravel(), return_index=True)
    last = np.full(n_experts, -n_tokens * k - 1)
    last[found] = -1 - first
    places = np.zeros(n_experts, np.int64)
    for start in range(0, n_tokens, BLOCK):
        block = ranked[start : start + BLOCK]
        history = np.full((len(block) + 1, n_experts), last.min())
        history[0] = last
        np.put_along_axis(history[1:], block, times[start : start + BLOCK], axis=1)
        history = np.maximum.accumulate(history, axis=0)
        before, last = history[:-1], history[-1]
        own = np.take_along_axis(before, block, axis=1)
        place = (before[:, None, :] > own[:, :, None]).sum(axis=2)
        places += np.bincount(place.ravel(), minlength=n_experts)
    return places.cumsum()
