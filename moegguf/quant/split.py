"""Which neurons of a gate-less layer are stored more finely than the others.

Purpose: with constant shares an FFN is a bag of neurons, and any two groups of them add up to it exactly. Some
neurons put out hundreds of times as much as others, so bits are worth more in them. The shared layout has room for two
groups in each layer, each with types of its own. The graph has one width for each group, so all layers have equally
many fine neurons; which ones they are is a matter of the layer.

Method: the energy of a neuron is share² · E[h²], with h what enters its down column, as an importance matrix has it;
those of most energy are fine. Lengths of down columns differ little, and to count them changed nothing that could be
measured, so no weight is read: the same importances and the same size give the same split. How much an error counts is
the energy for down. The less a neuron is on, the less do errors of its gate and up rows count, but not as much less: as
energy^(2/3), fitted to activations of the embedded family (0.63 to 0.80 in its layers, R² 0.72 to 0.93).

Whole experts in place of neurons are the same in coarser grains. Experts of one base put out about equally much, so
there is little to gain.

Not done: an order within a group. Sorted by energy, blocks hold neurons of alike importance, and the search for scales,
which is weighted by importance, has less to choose from: that costs what it gains, and more at few bits. The copies of
a neuron side by side gain 5 % on average, and lose in the IQ3 types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np

from moegguf.quant.neurons import grid
from moegguf.recipe import Splitting

FRACTIONS = (1 / 8, 1 / 4, 1 / 2)
"""Of all neurons, that may be fine."""
OF_ROWS = 2 / 3
"""The power of a neuron's energy by which errors of its gate and up rows count."""

Energies = Mapping[int, np.ndarray]
"""Layer → the energies of its neurons, (N, n_ff)."""


@dataclass(frozen=True)
class Split:
    """`is_fine`: layer → bool (N, n_ff), equally often True in each. `by` says whether whole experts were taken."""

    by: Splitting
    is_fine: Mapping[int, np.ndarray]

    @property
    def n_fine(self) -> int:
        """Neurons of a layer in the fine group."""
        return int(next(iter(self.is_fine.values())).sum())

    @property
    def n_neurons(self) -> int:
        """Of a layer, in both groups."""
        return next(iter(self.is_fine.values())).size

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is fine where."""
        masks = (np.packbits(self.is_fine[layer]).tobytes() for layer in sorted(self.is_fine))
        return sha256(b"".join(masks)).hexdigest()

    def fine(self, layer: int) -> list[np.ndarray]:
        """The fine neurons of each expert, ascending."""
        return [np.flatnonzero(row) for row in self.is_fine[layer]]

    def coarse(self, layer: int) -> list[np.ndarray]:
        return [np.flatnonzero(~row) for row in self.is_fine[layer]]


def split_neurons(energies: Energies, by: Splitting, n_fine: int) -> Split:
    """The split that makes the `n_fine` neurons of most energy fine; by experts, those of the experts of most."""
    if by is not Splitting.EXPERTS:
        return Split(Splitting.NEURONS, {layer: _largest(each, n_fine) for layer, each in energies.items()})
    of_experts = {layer: np.broadcast_to(each.sum(axis=1, keepdims=True), each.shape)
                  for layer, each in energies.items()}  # fmt: skip
    return Split(by, {layer: _largest(each, n_fine) for layer, each in of_experts.items()})


def _largest(values: np.ndarray, n: int) -> np.ndarray:
    """bool of the shape of `values`: whether it is among the `n` largest; of equal ones the first are."""
    is_largest = np.zeros(values.size, bool)
    is_largest[np.argsort(-values, axis=None, kind="stable")[:n]] = True
    return is_largest.reshape(values.shape)


def fine_sizes(n: int, n_ff: int, by: Splitting) -> list[int]:
    """How many neurons may be fine of `n` experts' `n_ff` each, so that rows of both groups divide into blocks as those
    of one do; none where they are too few."""
    total = n * n_ff
    step = n_ff if by is Splitting.EXPERTS else grid(total)
    sizes = {max(1, round(fraction * total / step)) * step for fraction in FRACTIONS}
    return sorted(size for size in sizes if size < total)


def weights(role: str, energies: np.ndarray, neurons: Sequence[np.ndarray | slice]) -> np.ndarray:
    """(N,): how much the errors of these neurons of each expert count in projection `role`, up to a constant."""
    each = energies if role == "ffn_down" else energies**OF_ROWS
    return np.array([row[numbers].sum() for row, numbers in zip(each, neurons, strict=True)])
