"""The bytes of finished rows: read, decode, scale, put side by side, quantise.

Rows whose source already has the wanted type are never decoded: their bytes pass through, with their block
scales multiplied where a factor has to go in. Experts side by side in a row are quantised each on its own, as far as
blocks end where they do: with an imatrix ggml weighs the errors of Q4_0, Q4_1, Q5_0 and Q5_1 by the mean square of the
row that it is given, and no expert's bytes are to depend on its neighbours. All the work is done in C calls that
release the GIL, on one chunk of rows, so any number of threads may make rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from moegguf.errors import UserError
from moegguf.quant import ggml
from moegguf.tensor import FLOAT_TYPES, Part, Planned, Tensor

LARGEST_QUANTISED = 1e12
"""No block scale reaches weights this large; from 1e18 on their squares overflow in ggml's searches, which then abort
the process (IQ2, IQ3) or store noise (Q3_K, IQ4_XS)."""
COUNT_WEIGHTS = 1 << 20
"""Weights that are looked at in one go to count the broken ones."""


@dataclass(frozen=True)
class Requantised:
    """What requantising already quantised sources cost, in sums over all weights concerned."""

    n_weights: int = 0
    squared_error: float = 0.0
    squared_weights: float = 0.0
    types: frozenset[tuple[str, str]] = frozenset()

    def __add__(self, other: Requantised) -> Requantised:
        return Requantised(
            self.n_weights + other.n_weights,
            self.squared_error + other.squared_error,
            self.squared_weights + other.squared_weights,
            self.types | other.types,
        )

    @property
    def relative_error(self) -> float:
        """Root mean square of the error over that of the weights."""
        return (self.squared_error / self.squared_weights) ** 0.5 if self.squared_weights else 0.0

    def as_json(self) -> dict[str, object]:
        return {
            "weights": self.n_weights,
            "types": [{"from": source, "to": target} for source, target in sorted(self.types)],
            "relative_error": self.relative_error,
        }


def make_rows(tensor: Planned, band: Sequence[Part], start: int, stop: int) -> tuple[np.ndarray, Requantised]:
    """Rows start to stop of one band of `tensor`, uint8 (stop - start, row_bytes), and what requantising cost.

    Raises UserError when a source cannot be read, holds NaN or Inf, or does not fit the type.
    """
    raw = [part.tensor.read_rows(start, stop) for part in band]
    if _splits_at_blocks(band, tensor.type):
        made = [_made(part, rows, tensor.type) for part, rows in zip(band, raw, strict=True)]
        data, cost = _side_by_side([rows for rows, _ in made]), sum((cost for _, cost in made), Requantised())
    else:
        data, cost = _quantised(band, raw, tensor.type)
    if not ggml.is_valid(tensor.type, data):
        raise _not_writable(max(zip(band, raw, strict=True), key=_magnitude)[0], tensor.type)
    return data, cost


def _made(part: Part, rows: np.ndarray, type: GGMLQuantizationType) -> tuple[np.ndarray, Requantised]:
    passed = _passed_through(part, rows, type)
    return _quantised([part], [rows], type) if passed is None else (passed, Requantised())


def _passed_through(part: Part, rows: np.ndarray, type: GGMLQuantizationType) -> np.ndarray | None:
    """The bytes of `rows` times the part's scale without decoding them; None where that cannot be done."""
    if part.tensor.type != type:
        return None
    return rows if part.scale == 1.0 else ggml.scale_rows(type, rows, part.scale)


def _splits_at_blocks(band: Sequence[Part], type: GGMLQuantizationType) -> bool:
    """Whether every part of a row is whole blocks of `type`, so that each can be made on its own."""
    block = GGML_QUANT_SIZES[type][0]
    return all(part.tensor.n_cols % block == 0 for part in band)


def _quantised(
    band: Sequence[Part], raw: Sequence[np.ndarray], type: GGMLQuantizationType
) -> tuple[np.ndarray, Requantised]:
    floats = _side_by_side([_floats(part, rows, type) for part, rows in zip(band, raw, strict=True)])
    importances = [part.importance for part in band]
    is_important = all(importance is not None for importance in importances)
    data = ggml.quantise(type, floats, np.concatenate(importances) if is_important else None)
    sources = {part.tensor.type for part in band if part.tensor.is_quantised}
    if not sources:
        return data, Requantised()
    error = ggml.dequantise(type, data, floats.shape[1]) - floats
    types = frozenset((source.name, type.name) for source in sources)
    return data, Requantised(floats.size, float(np.vdot(error, error)), float(np.vdot(floats, floats)), types)


def _side_by_side(pieces: Sequence[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)


def _floats(part: Part, rows: np.ndarray, type: GGMLQuantizationType) -> np.ndarray:
    """float32 (n, n_cols) of a part, scaled. Raises UserError where a weight is NaN or Inf, or too large for ggml."""
    floats = ggml.dequantise(part.tensor.type, rows, part.tensor.n_cols)
    if part.scale != 1.0:
        with np.errstate(over="ignore"):  # an Inf is refused below
            floats = floats * np.float32(part.scale)
    if not _largest(floats) < (np.inf if type in FLOAT_TYPES else LARGEST_QUANTISED):
        raise _not_writable(part, type)
    return floats


def _largest(floats: np.ndarray) -> np.float32:
    """The largest magnitude; NaN if there is one."""
    with np.errstate(invalid="ignore"):
        return np.maximum(floats.max(), -floats.min())


def _magnitude(part_and_rows: tuple[Part, np.ndarray]) -> float:
    """How large the weights of a part are in these rows; NaN counts as Inf."""
    part, rows = part_and_rows
    largest = float(_largest(ggml.dequantise(part.tensor.type, rows, part.tensor.n_cols))) * part.scale
    return np.inf if np.isnan(largest) else largest


def _not_finite(tensor: Tensor) -> UserError:
    return UserError(
        f"{tensor.origin or tensor.name}: {_count_not_finite(tensor)} of {tensor.n_rows * tensor.n_cols} weights "
        "are NaN or Inf",
        "download it again, or leave this model out: it is broken",
    )


def _count_not_finite(tensor: Tensor) -> int:
    step = max(1, COUNT_WEIGHTS // tensor.n_cols)
    count = 0
    for start in range(0, tensor.n_rows, step):
        rows = tensor.read_rows(start, min(start + step, tensor.n_rows))
        floats = ggml.dequantise(tensor.type, rows, tensor.n_cols)
        count += floats.size - int(np.isfinite(floats).sum())
    return count


def _not_writable(part: Part, type: GGMLQuantizationType) -> UserError:
    """Why valid rows could not be made of a part: it holds NaN or Inf, or its values do not fit the type."""
    if _count_not_finite(part.tensor):
        return _not_finite(part.tensor)
    factor = "" if part.scale == 1.0 else f" once they are multiplied by its share ({part.scale:.3g})"
    return UserError(
        f"{part.tensor.origin or part.tensor.name}: holds weights too large for {type.name}{factor}",
        "choose BF16 or F32, or a quantised type, for this tensor",
    )
