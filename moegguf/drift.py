"""How far the experts of a mix have drifted apart, and what merging them all would cost by that.

The drift of an expert is |ΔFFN| / |FFN|: the distance of its FFN weights from the mean of all experts, relative to that
mean. The divergence of the dense model of mean weights from the gate-less mix grows with the fourth power of
drift: one square because the mix is the mean of outputs, whose first order the mean weights share, and another because
KLD is quadratic. The factor was measured on the embedded family; other models have others, so it gives the order of
magnitude and no more.

Large models are sampled: some rows of some layers, evenly spread, so that it takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moegguf.mix import FFN_ROLES, Mix
from moegguf.quant import ggml
from moegguf.tensor import Tensor

KLD_FACTOR = 0.45
"""KLD of the dense model of mean weights / drift⁴, in nats."""
EXACT_WEIGHTS = 1 << 26
"""Mixes with no more weights in their experts are read whole."""
SAMPLED_LAYERS = 8
SAMPLED_ROWS = 64
CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Drift:
    """By expert, and of all: the root of the mean square, weighted by their shares."""

    by_expert: Mapping[str, float]
    overall: float

    @property
    def estimated_kld(self) -> float:
        """Of the dense model of mean weights from the mix, in nats: the order of magnitude."""
        return KLD_FACTOR * self.overall**4

    def as_json(self) -> dict[str, object]:
        return {"experts": dict(self.by_expert), "overall": self.overall, "estimated_kld": self.estimated_kld}


def measure_drift(mix: Mix) -> Drift:
    """The drift of the experts of `mix`. Reads all rows of small models, a sample of large ones."""
    shares = np.array([expert.weight for expert in mix.experts])
    squares, mean_square = np.zeros(len(shares)), 0.0
    for layer in _layers(mix):
        for role in FFN_ROLES:
            tensors = [expert.ffn(layer, role) for expert in mix.experts]
            for start, stop in _row_spans(tensors[0], is_exact=_is_exact(mix)):
                rows = np.stack([ggml.dequantise(t.type, t.read_rows(start, stop), t.n_cols) for t in tensors])
                with np.errstate(all="ignore"):  # NaN and Inf are told when they are written
                    mean = np.tensordot(shares.astype(np.float32), rows, 1)
                    squares += np.square(rows - mean).sum(axis=(1, 2), dtype=np.float64)
                    mean_square += float(np.square(mean).sum(dtype=np.float64))
    relative = squares / (mean_square or 1.0)
    by_expert = {expert.name: float(square**0.5) for expert, square in zip(mix.experts, relative, strict=True)}
    return Drift(by_expert, float((shares @ relative) ** 0.5))


def _is_exact(mix: Mix) -> bool:
    ffns = (mix.experts[0].ffn(layer, role) for layer in mix.layers for role in FFN_ROLES)
    return len(mix.experts) * sum(tensor.n_rows * tensor.n_cols for tensor in ffns) <= EXACT_WEIGHTS


def _layers(mix: Mix) -> list[int]:
    if _is_exact(mix) or len(mix.layers) <= SAMPLED_LAYERS:
        return list(mix.layers)
    return [mix.layers[int(i)] for i in np.linspace(0, len(mix.layers) - 1, SAMPLED_LAYERS)]


def _row_spans(tensor: Tensor, *, is_exact: bool) -> list[tuple[int, int]]:
    if is_exact or tensor.n_rows <= SAMPLED_ROWS:
        return [(start, min(start + CHUNK_ROWS, tensor.n_rows)) for start in range(0, tensor.n_rows, CHUNK_ROWS)]
    return [(int(row), int(row) + 1) for row in np.linspace(0, tensor.n_rows - 1, SAMPLED_ROWS)]
