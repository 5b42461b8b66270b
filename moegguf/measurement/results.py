"""From outcomes to figures: a value, how many items it rests on, and a 95 % confidence interval.

- An accuracy has Wilson's interval (E. B. Wilson, "Probable Inference", JASA 22, 1927): unlike value ± error it stays
  within 0 to 1 and does not shrink to nothing where every item is right.
- The mean of several accuracies has the interval of Zou and Donner ("Construction of confidence limits about effect
  measures", Statistics in Medicine 27, 2008), which adds up the distances to the limits of each in quadrature.
- A perplexity is exp(Σ nll / Σ tokens). Windows are taken as independent draws, their tokens as not: the interval is
  that of a ratio estimate over windows, in nats, then exponentiated. One window gives none.

The intervals say how far another draw of items could move a figure. Models that are asked the same items differ more
reliably than such intervals that overlap suggest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moegguf.errors import UserError
from moegguf.measurement.scores import Chosen, Outcome, Weighed
from moegguf.measurement.tasks import Metric

Z = 1.959963984540054
"""Two-sided 95 % of a normal distribution."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """`value` is a share from 0 to 1, or a perplexity; `n` counts items, or tokens."""

    metric: Metric
    value: float
    n: int
    interval: Interval | None
    value_by_length: float | None = None
    """Of multiple choice: the share that is right when log p is divided by the choice's length in characters."""

    def as_json(self) -> dict[str, object]:
        fields = {"metric": self.metric, "value": self.value, "n": self.n, "ci": self.interval}
        return fields | ({"value_by_length": self.value_by_length} if self.metric is Metric.CHOICE else {})


@dataclass(frozen=True)
class Mean:
    """Of the accuracies of several tasks, each counted alike."""

    value: float
    interval: Interval


def figure(metric: Metric, outcomes: Sequence[Outcome]) -> Figure:
    """The figure of a task, from the outcomes of its items (at least one).

    Raises UserError where there is nothing to count: texts of a single token.
    """
    if metric is Metric.PERPLEXITY:
        return _perplexity(outcomes)
    value, n = _share(outcome.is_right for outcome in outcomes)
    by_length = _share(outcome.is_right_by_length for outcome in outcomes if isinstance(outcome, Chosen))[0]
    return Figure(metric, value, n, wilson(value, n), by_length if metric is Metric.CHOICE else None)


def wilson(share: float, n: int) -> Interval:
    """The 95 % interval of a share of `n` items."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def mean(figures: Sequence[Figure]) -> Mean | None:
    """The mean of the figures that are accuracies; None with fewer than two of them."""
    figures = [figure for figure in figures if figure.metric.is_accuracy]
    if len(figures) < 2:
        return None
    values = np.array([figure.value for figure in figures])
    low, high = np.array([figure.interval for figure in figures]).T
    value, n = float(values.mean()), len(figures)
    return Mean(value, (value - math.hypot(*(values - low)) / n, value + math.hypot(*(high - values)) / n))


def _share(right: Iterable[bool]) -> tuple[float, int]:
    right = list(right)
    return (sum(right) / len(right) if right else 0.0), len(right)


def _perplexity(outcomes: Sequence[Weighed]) -> Figure:
    nlls = np.array([nll for outcome in outcomes for nll in outcome.nlls])
    n_tokens = np.array([n for outcome in outcomes for n in outcome.n_tokens])
    total = int(n_tokens.sum())
    if not total:
        raise UserError("texts of a single token have no perplexity", "give longer ones")
    nats = float(nlls.sum() / total)
    n = len(nlls)
    if n < 2:
        return Figure(Metric.PERPLEXITY, math.exp(nats), total, None)
    error = math.sqrt(n / (n - 1) * float(np.square(nlls - nats * n_tokens).sum())) / total
    interval = math.exp(nats - Z * error), math.exp(nats + Z * error)
    return Figure(Metric.PERPLEXITY, math.exp(nats), total, interval)
