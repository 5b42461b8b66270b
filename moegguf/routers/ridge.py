"""The ridge router: least squares from a token's router input to its domain's expert. Method: DUME, arXiv 2603.29765.

    W = (G + λI)⁻¹ XᵀY        Y is one-hot in the expert of the text that the token is of
    G = Σ_c (n̄ / n_c) X_cᵀX_c,  XᵀY likewise: every expert counts as if it had n̄ tokens, the mean over experts
    row_e = W_e / (‖W_e‖ · T)  all experts' logits on one scale; the softmax of the router is of temperature T

No intercept, because the stock graph has no router bias to put it in; balance between the experts takes most of its
part. In a shared router all layers' inputs are one data set, and every layer gets the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moegguf.errors import UserError
from moegguf.recipe import FitSpec
from moegguf.routers.statistics import Statistics


def fit(statistics: Statistics, experts: Sequence[str], spec: FitSpec, *, shared: bool) -> list[np.ndarray]:
    """The router of every layer, float32 (len(experts), n_embd), rows in the order of `experts`.

    Raises UserError when `spec.ridge_lambda` is too small for the text to determine a router.
    """
    groups = [statistics.groups[name] for name in experts]
    n_mean = np.mean([group.count for group in groups])
    means = np.stack([group.mean for group in groups], axis=1)  # (n_layer, n_expert, n_embd)
    n_layer = statistics.subject.n_layer
    if shared:
        gram = sum(statistics.full_gram(layer) for layer in range(n_layer))
        return [_rows(n_mean * gram, n_mean * means.sum(axis=0), spec)] * n_layer
    return [_rows(n_mean * statistics.full_gram(layer), n_mean * means[layer], spec) for layer in range(n_layer)]


def _rows(gram: np.ndarray, sums: np.ndarray, spec: FitSpec) -> np.ndarray:
    """float32 (n_expert, n_embd) from the balanced XᵀX (n_embd, n_embd) and YᵀX (n_expert, n_embd)."""
    gram[np.diag_indices_from(gram)] += spec.ridge_lambda
    try:
        weights = np.linalg.solve(gram, sums.T).T
    except np.linalg.LinAlgError:
        weights = np.full_like(sums, np.nan)
    norms = np.linalg.norm(weights, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and norms.all()):
        raise UserError(
            f"lambda {spec.ridge_lambda:g}: the text does not determine a router",
            "pass a larger --lambda, or more text",
        )
    return (weights / norms / spec.temperature).astype(np.float32)
