"""Sums of squares of what enters a weight matrix: what an importance matrix is made of.

The runtime counts them, `quant.imatrix` stores them and quantises by their means. They only ever add up, so a
calibration can be stopped, continued, and put together from parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Squares:
    """`sums` is float64 (n_matrices, n_cols): Σ x² of the inputs of each matrix; `counts` is int64 (n_matrices,).

    Stacked experts are matrices of their own, each with the tokens that reached it; other weights are one.
    """

    sums: np.ndarray
    counts: np.ndarray

    def __add__(self, other: Self) -> Squares:
        return Squares(self.sums + other.sums, self.counts + other.counts)

    def means(self) -> np.ndarray:
        """Mean squares, float32 (n_matrices, n_cols). A matrix that no token reached has those of all together."""
        total = self.counts.sum()
        if not total:
            return np.ones(self.sums.shape, np.float32)
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        means[self.counts == 0] = self.sums.sum(axis=0) / total
        return means.astype(np.float32)


def added(a: Mapping[str, Squares], b: Mapping[str, Squares]) -> dict[str, Squares]:
    """The squares of both, by the name of their weight."""
    return {name: a[name] + b[name] if name in a and name in b else {**a, **b}[name] for name in {**a, **b}}
