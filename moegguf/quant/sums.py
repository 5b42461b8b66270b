"""Sums of tensors as tensors: read lazily, row by row, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gguf import GGMLQuantizationType

from moegguf.quant import ggml
from moegguf.tensor import Tensor


def weighted_sum(name: str, tensors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Σ factor · tensor, F32, of tensors of one shape; quantised ones are decoded. Reads only the rows asked for."""

    def read_rows(start: int, stop: int) -> np.ndarray:
        rows = (ggml.dequantise(tensor.type, tensor.read_rows(start, stop), tensor.n_cols) for tensor in tensors)
        total = sum(np.float32(factor) * row for factor, row in zip(factors, rows, strict=True))
        return np.ascontiguousarray(total, "<f4").view(np.uint8)

    origin = " + ".join(dict.fromkeys(tensor.origin or tensor.name for tensor in tensors))
    return Tensor(name, tensors[0].shape, GGMLQuantizationType.F32, read_rows, origin)
