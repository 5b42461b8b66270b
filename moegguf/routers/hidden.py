"""The hidden router: an expert's row is the direction that sets its prompts apart. Method: mergekit-moe's of that name.

    row_e = h⁺_e − h⁻_e, divided by its norm        h⁺, h⁻: mean hidden state of its positive and negative prompts

mergekit looks at the last token of what enters the layer: tap = "layer_input", pool = "last" does the same. The default
looks where the router itself will look, at the mean over the prompt's tokens.

An expert without negative prompts has the other experts' positive ones for negatives, each expert weighing the same.
mergekit subtracts nothing there: then all rows are one large common part and a little of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moegguf.routers.statistics import Group, Statistics

_TINY = 1e-8
"""Least norm that a row is divided by, as in mergekit."""


def fit(statistics: Statistics, experts: Sequence[str], *, shared: bool) -> list[np.ndarray]:
    """The router of every layer, float32 (len(experts), n_embd), rows in the order of `experts`.

    Shared: the states of all layers are averaged first. Experts that equal their negatives get rows near zero.
    """
    positive = np.stack([_states(statistics.groups[name], shared) for name in experts])
    others = (positive.sum(axis=0) - positive) / (len(experts) - 1)
    negative = np.stack([
        _states(statistics.negatives[name], shared) if name in statistics.negatives else others[i]
        for i, name in enumerate(experts)
    ])  # fmt: skip
    rows = positive - negative  # (n_expert, n_layer, n_embd)
    rows /= np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), _TINY)
    return list(rows.swapaxes(0, 1).astype(np.float32))


def _states(group: Group, shared: bool) -> np.ndarray:
    """Mean hidden state per layer, (n_layer, n_embd); the same in every layer for a shared router."""
    return np.broadcast_to(group.mean.mean(axis=0), group.mean.shape) if shared else group.mean
