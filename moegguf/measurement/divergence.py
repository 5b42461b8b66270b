"""How far a model's next-token distributions are from a reference's: KL divergence, agreement, perplexity.

For every token that has one before it in its chunk, p is what the reference says of it and q what the model says:

- *KLD*: Σ p log(p / q) over the whole vocabulary, in nats; mean, median, 99th percentile, largest.
- *top-1 agreement*: how often both find the same token likeliest.
- *Δp*: |q - p| of the token that the reference finds likeliest, on average.
- *perplexity* of both: exp of the mean of -log p of the token that follows.

Tokens of a chunk depend on each other, chunks are taken as independent draws. So every standard error is that of a
ratio estimate over chunks (as in `moegguf.measurement.results`), and the interval of the agreement is Wilson's for as
many independent tokens as would scatter like these (C. Franco, R. Little, T. Louis and E. Slud, "Comparative Study of
Confidence Intervals for Proportions in Complex Sample Surveys", J. Surv. Stat. Methodol. 7, 2019: it may still be a
little narrow where chunks are few). A single chunk gives none.

llama.cpp's tool (tools/perplexity/perplexity.cpp, kl_divergence) has the same KLD, percentiles and agreement. But it
counts the second half of each chunk only, leaves tokens with log p ≤ -16 out of the sum, takes tokens as independent in
its errors, and its Δp is that of the token that follows. It keeps log p in 65536 even steps over the upper 16 nats.

Logits of a reference are kept (`pack`) as 65535 · (p / p_max)^(1/4), rounded to 16 bits: finer where p is large, and
down to p_max · e^-47. Rounding moves log p at random, by 4 / (code · √12): 1.8e-5 near the top, 3e-5 at a tenth of it;
p is then normalised again. A token's KLD of D nats moves by some 1e-5 · √D either way, so the mean of n tokens by
1e-5 · √(D / n); and it rises by about 1.6e-10 · Σ √p, below 1e-8. Over thousands of tokens that is less than
1e-5 of a KLD of 1e-3 or more.

Whatever the vocabulary, a few MB are worked on at a time (`row_blocks`), in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moegguf.measurement.results import Interval, wilson

TOKEN = np.dtype([("kld", "f4"), ("p_change", "f4"), ("is_same_top", "?"), ("nll_reference", "f4"), ("nll", "f4")])
"""What is known of one token; `p_change` is q - p of the reference's likeliest, nll are -log p of the token itself."""

BLOCK = 2**19
"""Logits that are worked on at a time: 4 MB in float64, of which a handful are needed."""

_LARGEST = 2**16 - 1
_ROOT = 4
with np.errstate(divide="ignore"):
    _LOG_OF_CODE = _ROOT * np.log(np.arange(_LARGEST + 1) / _LARGEST)


class Estimate(NamedTuple):
    """A figure and its standard error; None where there is but one chunk."""

    value: float
    error: float | None


class Reference(NamedTuple):
    """What a reference says: log p of every token of the vocabulary, float64 (n, n_vocab), and -log p of the token that
    follows, float64 (n,)."""

    log_p: np.ndarray
    nll: np.ndarray


_PERCENTILES = {"median": 50, "p99": 99, "max": 100}


@dataclass(frozen=True)
class Divergence:
    """Of a model from a reference on some chunks of text, with at least one token.

    `tokens` is (n_tokens,) of `TOKEN`, one chunk after the other; `lengths` (n_chunks,) says how many are each chunk's.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, reference_logits: np.ndarray, logits: np.ndarray, next_tokens: np.ndarray) -> Divergence:
        """On one chunk. Logits are (n_tokens, n_vocab) of the same tokens, `next_tokens` (n_tokens,) what follows each.

        `a + b` is that on the chunks of both.
        """
        if reference_logits.shape != logits.shape or logits.shape[:1] != np.shape(next_tokens):
            raise ValueError(f"{reference_logits.shape}, {logits.shape} and {np.shape(next_tokens)} do not match")
        following = np.asarray(next_tokens)
        blocks = [
            token_values(reference_of(reference_logits[rows], following[rows]), logits[rows], following[rows])
            for rows in row_blocks(*logits.shape)
        ]
        return cls(np.concatenate(blocks), np.array([len(following)]))

    @staticmethod
    def joined(parts: Iterable[Divergence]) -> Divergence:
        """That on the chunks of all `parts`, at least one."""
        parts = list(parts)
        return Divergence(np.concatenate([part.tokens for part in parts]),
                          np.concatenate([part.lengths for part in parts]))  # fmt: skip

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence.joined((self, other))

    def split(self, n_chunks: Iterable[int]) -> Iterator[Divergence]:
        """The parts that hold so many chunks each, in order; they add up to all."""
        chunk = token = 0
        for n in n_chunks:
            lengths = self.lengths[chunk : chunk + n]
            yield Divergence(self.tokens[token : token + lengths.sum()], lengths)
            chunk, token = chunk + n, token + int(lengths.sum())

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_chunks(self) -> int:
        return len(self.lengths)

    @property
    def kld(self) -> Estimate:
        """The mean KLD, in nats."""
        return self._mean(self.tokens["kld"])

    def kld_percentile(self, percent: float) -> float:
        """The KLD that `percent` % of the tokens do not exceed; 50 is the median, 100 the largest."""
        return float(np.percentile(self.tokens["kld"].astype(np.float64), percent))

    @property
    def top1(self) -> Estimate:
        """The share of tokens of which both find the same one likeliest."""
        return self._mean(self.tokens["is_same_top"])

    @property
    def top1_interval(self) -> Interval | None:
        """The 95 % interval of `top1`."""
        share, error = self.top1
        if error is None:
            return None
        n = min(self.n_tokens, share * (1 - share) / error**2) if error else self.n_tokens
        return wilson(share, n)

    @property
    def p_change(self) -> Estimate:
        """The mean |Δp| of the reference's likeliest token."""
        return self._mean(np.abs(self.tokens["p_change"]))

    @property
    def perplexity(self) -> Estimate:
        """Of the model."""
        return _exp(self._mean(self.tokens["nll"]))

    @property
    def perplexity_reference(self) -> Estimate:
        return _exp(self._mean(self.tokens["nll_reference"]))

    def as_json(self) -> dict:
        """All of it, as commands report it."""
        percentiles = {name: self.kld_percentile(percent) for name, percent in _PERCENTILES.items()}
        return {
            "tokens": self.n_tokens,
            "chunks": self.n_chunks,
            "kld": {"mean": self.kld.value, "error": self.kld.error, **percentiles},
            "top1": {"share": self.top1.value, "ci": self.top1_interval},
            "p_change": self.p_change._asdict(),
            "perplexity": self.perplexity._asdict(),
            "perplexity_reference": self.perplexity_reference._asdict(),
        }

    def _mean(self, values: np.ndarray) -> Estimate:
        """Over tokens, with the error over chunks."""
        starts = np.cumsum(self.lengths) - self.lengths
        sums = np.add.reduceat(values.astype(np.float64), starts)
        mean = float(sums.sum() / self.n_tokens)
        n = self.n_chunks
        if n < 2:
            return Estimate(mean, None)
        scatter = float(np.square(sums - mean * self.lengths).sum())
        return Estimate(mean, math.sqrt(n / (n - 1) * scatter) / self.n_tokens)


def _exp(nats: Estimate) -> Estimate:
    value = math.exp(nats.value) if nats.value < 700 else math.inf
    return Estimate(value, None if nats.error is None else value * nats.error)


# --------------------------------------------------------------------------------------------- token by token


def row_blocks(n_rows: int, n_vocab: int) -> Iterator[slice]:
    """All rows in order, in slices that hold at most `BLOCK` logits, or one row."""
    n = max(1, BLOCK // n_vocab)
    return (slice(start, min(start + n, n_rows)) for start in range(0, n_rows, n))


def reference_of(logits: np.ndarray, next_tokens: np.ndarray) -> Reference:
    """From logits (n, n_vocab) and the tokens (n,) that follow."""
    log_p = _log_softmax(logits)
    return Reference(log_p, _nll(log_p, next_tokens))


def token_values(reference: Reference, logits: np.ndarray, next_tokens: np.ndarray) -> np.ndarray:
    """`TOKEN` (n,) of the model's logits (n, n_vocab) against the reference."""
    log_p, log_q = reference.log_p, _log_softmax(logits)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):  # 0 · (-∞ - -∞)
        terms = np.subtract(log_p, log_q)
        terms *= p
    terms[p == 0] = 0
    top = log_p.argmax(axis=1)[:, None]
    values = np.empty(len(logits), TOKEN)
    values["kld"] = terms.sum(axis=1)
    values["is_same_top"] = log_q.argmax(axis=1) == top[:, 0]
    values["p_change"] = (np.exp(np.take_along_axis(log_q, top, 1)) - np.take_along_axis(p, top, 1))[:, 0]
    values["nll_reference"] = reference.nll
    values["nll"] = _nll(log_q, next_tokens)
    return values


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _nll(log_p: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return -np.take_along_axis(log_p, np.asarray(tokens)[:, None], 1)[:, 0]


# --------------------------------------------------------------------------------------------- kept on disk


def packed_type(n_vocab: int) -> np.dtype:
    """What `pack` makes of one token: -log p of the one that follows as it is, all others as a code."""
    return np.dtype([("nll", "<f4"), ("codes", "<u2", (n_vocab,))])


def pack(logits: np.ndarray, next_tokens: np.ndarray) -> np.ndarray:
    """A reference's logits (n, n_vocab) in half the space: `packed_type` (n,).

    Only the likeliest token has the largest code, so it stays the likeliest.
    """
    reference = reference_of(logits, next_tokens)
    packed = np.empty(len(logits), packed_type(logits.shape[1]))
    packed["nll"] = reference.nll
    top = reference.log_p.argmax(axis=1)[:, None]
    roots = np.exp((reference.log_p - np.take_along_axis(reference.log_p, top, 1)) / _ROOT)
    codes = np.minimum(np.rint(_LARGEST * roots), _LARGEST - 1)
    np.put_along_axis(codes, top, _LARGEST, 1)
    packed["codes"] = codes
    return packed


def unpack(packed: np.ndarray) -> Reference:
    """What `pack` kept, its probabilities normalised again."""
    return Reference(_log_softmax(_LOG_OF_CODE[packed["codes"]]), packed["nll"].astype(np.float64))
